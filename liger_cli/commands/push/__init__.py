"""The command `liger push`."""
