"""Decide what is patched, patch it, and undo it."""
