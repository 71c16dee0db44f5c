"""Entry point of the command `mvmlx`: an interruption while it is still being imported is one line, as any other."""

import sys

INTERRUPTED = "interrupted; nothing half-written will be taken for a result"
INTERRUPT_EXIT = 130


def main() -> None:
    """Import and run the command line."""
    try:
        from mvshared.cli import main as command_line

        command_line()
    except KeyboardInterrupt:
        sys.stderr.write(f"mvmlx: error: {INTERRUPTED}\n")
        sys.exit(INTERRUPT_EXIT)
