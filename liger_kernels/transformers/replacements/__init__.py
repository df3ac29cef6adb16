"""Forwards that run our ops in place of a module's own."""
