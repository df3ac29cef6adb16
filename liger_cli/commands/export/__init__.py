"""The command `liger export`."""
