"""command: what the commands that turn one checkpoint into another share.

terminal     bars with the time left, tables
places       the folders that are read and written: checks before, one line where a disk is full
texts        options that say what to calibrate and measure on, and what they read

This module is all that a command's options need: it imports nothing.
"""

EVAL_SPLIT = "eval"  # the lines of a file that are measured, unless --eval-split says others
