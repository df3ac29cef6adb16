"""The command `liger report`."""
