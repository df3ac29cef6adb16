"""The command `liger generate`."""
