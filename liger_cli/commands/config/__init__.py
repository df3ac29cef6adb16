"""The command `liger config`."""
