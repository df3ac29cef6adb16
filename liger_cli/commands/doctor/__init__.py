"""The command `liger doctor`."""
