"""The command `liger merge`."""
