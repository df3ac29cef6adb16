"""Models, data, and the loops that train and evaluate."""
