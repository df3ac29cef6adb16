"""The command `liger eval`."""
