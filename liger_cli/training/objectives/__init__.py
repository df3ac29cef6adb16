"""Objectives of training: one file each, found by name in table.py."""
