"""The command `liger inspect`."""
