"""Commands: one file per command of the command line, and how each of them prints and ends."""
