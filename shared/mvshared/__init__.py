"""What both backends share: schedules, cameras, pictures, weight names, the pipeline. No array library but numpy."""

__version__ = "0.1.0"
