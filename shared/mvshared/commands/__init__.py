"""What the commands of the command line do: load, run with progress, print. One function per command."""
