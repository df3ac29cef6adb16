"""Ops one by one, against the limits of the device."""
