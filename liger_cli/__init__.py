"""The `liger` program: train, evaluate, inspect and benchmark models with fused kernels."""
