"""The command `liger data`."""
