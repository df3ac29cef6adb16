"""Matrix products whose result is wider than their factors."""

import functools

import torch


@functools.cache
def has_wide_products(device: torch.device) -> bool:
    """Return whether mm and addmm of torch take an out_dtype on this device: on sm_80 and newer."""
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


def wide_product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return a (M, K) @ b (K, N) in fp32, or in fp64 of fp64, rounded to less on the way where the
    device has no such product; a product in fp16, which could overflow, is widened first."""
    if a.dtype in (torch.float32, torch.float64):
        return a @ b
    if has_wide_products(a.device):
        return torch.mm(a, b, out_dtype=torch.float32)
    if a.dtype == torch.float16:
        return a.float() @ b.float()
    return (a @ b).float()
