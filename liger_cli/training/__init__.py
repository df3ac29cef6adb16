"""Models, and the loops that train and evaluate."""
