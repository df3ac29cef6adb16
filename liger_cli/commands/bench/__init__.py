"""The command `liger bench`."""
