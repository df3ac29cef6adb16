"""The command `liger estimate`."""
