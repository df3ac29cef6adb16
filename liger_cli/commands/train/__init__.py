"""The command `liger train`."""
