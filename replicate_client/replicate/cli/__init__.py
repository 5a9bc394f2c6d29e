"""The command line: `replicate`."""
