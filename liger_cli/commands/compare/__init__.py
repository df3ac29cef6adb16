"""The command `liger compare`."""
