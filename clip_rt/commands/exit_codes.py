"""What the exit status of a command says."""

FAILED = 1
"""It came to no end: a server that cannot be reached, a file that cannot be written."""
WRONG_OPTIONS = 2
"""An option, or what it names, cannot be used."""
SOME_BAD = 3
"""It came to its end, and some items could not be used."""
FLAGGED = 4
"""It came to its end, and an image has the action that it was told to fail on."""
INTERRUPTED = 130
"""Ctrl-C cut it short."""
