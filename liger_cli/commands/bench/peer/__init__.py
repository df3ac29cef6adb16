"""Another kernel package, run by its own interpreter."""
