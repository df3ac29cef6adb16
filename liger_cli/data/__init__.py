"""Training data: sources, rows, token ids with labels, packing, batches."""
