"""Helpers of every part of the program: the machine, the hub, numbers, files."""
