"""The command line: Lightning's commands and those of this package."""
