"""The command `liger verify`."""
