"""Parts shared by the losses: options, kernels over rows, chunks of a linear head."""
