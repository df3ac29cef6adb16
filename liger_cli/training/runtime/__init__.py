"""Devices, processes, signals and trackers of a run."""
