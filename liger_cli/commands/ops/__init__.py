"""The command `liger ops`."""
