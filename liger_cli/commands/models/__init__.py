"""The command `liger models`."""
