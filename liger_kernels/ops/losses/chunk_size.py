"""The size of a chunk of a linear loss, and the dtype of gradients summed over chunks."""

import torch

from liger_kernels.ops.launcher import cache_by_shape, cdiv, lookup, num_sms
from liger_kernels.ops.losses.options import wide_dtype

# Tiles of a GPU's matrix products: of the logits, and of the gradient of hidden.
_TILE_TOKENS, _TILE_WIDTH = 128, 256
# By vocabulary: bytes of a chunk's logits.
_GPU_BYTES = ((255_999, 512 << 20), (1 << 62, 960 << 20))
# The same without a weight gradient: with the gradient of hidden as much as the first, unless that
# leaves less than the second.
_FROZEN_BYTES, _LEAST_FROZEN_BYTES = 300 << 20, 192 << 20
# The same for values of each token.
_VALUE_BYTES = 512 << 20
# Tiles of tokens a chunk has, whatever they take, with a weight gradient and without.
_LEAST_TILES, _LEAST_FROZEN_TILES = 8, 2
# More gain nothing, unless they keep the weight gradient's sum in bf16.
_ENOUGH_TILES = 16
# H100, bf16: the time of a chunk's products, as a multiple of their time at the rate of a
# large square product. Means of the heads 4096 x 128256, 2048 x 128256, 2304 x 256000 and
# 4096 x 32000, which scatter by 0.1 (docs/results/tune-losses-h100.jsonl):
#   tokens               256  384  512  640  768  896 1024 1152 1408 1664 1792 2048 2816 4096
#   logits              1.30 1.08 1.10 1.07 1.05 1.14 1.06 1.05 1.13 1.09 1.06 1.04 1.05 1.03
#   gradient of hidden  1.13 1.01 0.94 0.96 1.00 1.07 0.99 1.02 1.07 1.18 1.09 1.01 1.08 1.01
#   of weight, added    2.96 1.94 1.54 1.42 1.32 1.29 1.24 1.25 1.15 1.17 1.12 1.13 1.10 1.11
#   the same in fp32    5.69 3.69 2.79 2.30 1.98 1.76 1.65 1.58 1.42 1.36 1.29 1.25 1.18 1.17
# So in _cost, in tiles of tokens: a chunk has a cost apart from its tokens, and more where it
# adds to a weight gradient; fewer than four tiles wait for memory; the odd one of seven or more
# costs half as much again; and the gradient of hidden fills whole waves of the multiprocessors,
# which the card's clock makes up for in part, unless they would be so empty that the library sums
# parts of the vocabulary side by side.
_CHUNK_TILES, _ADD_TILES, _ODD_TILES, _WAITING_TILES = 0.5, 2.0, 0.5, 4
_WAVE_SHARE, _MOST_IDLE, _SIDE_BY_SIDE = 0.75, 0.3, 1.05
# On a CPU: 32 MiB of SmolLM2's logits took 1.19 s of CPU time for 512 tokens, 8 MiB 1.52 s, eager
# code 1.30 s.
_CPU_BYTES = 32 << 20
_CPU_GRAIN = 8
# A sum of n partial sums, each rounded to bf16, has (n + 1) / 2 times the variance of one rounding.
# Eager code rounds the sum once, and the logits' gradient before it adds as much again, here too:
# 8 chunks give sqrt((4.5 + 1) / 2) = 1.7 times eager's error, and twice is allowed. Products on a
# CPU are rounded before they are added.
_MAX_BF16_CHUNKS = 8
_MAX_CPU_BF16_CHUNKS = 4


def chunk_tokens(
    num_rows: int,
    width: int,
    vocab: int,
    dtype: torch.dtype,
    device: torch.device,
    needs_weight: bool | None = True,
    sms: int | None = None,
) -> int:
    """Return how many tokens a chunk has: all have as many, but for the last.

    Args:
        num_rows: Tokens.
        width: Of hidden.
        vocab: Of the logits.
        dtype: Of the logits.
        device: Where they are computed.
        needs_weight: Whether there is a weight gradient; None for values of each token, which
            are the same to the bit whatever has a gradient, and so are their chunks.
        sms: Multiprocessors of a GPU, by default those of device.
    """
    if device.type == "cpu":
        num_chunks = max(1, cdiv(num_rows, max(_CPU_GRAIN, _CPU_BYTES // (4 * vocab))))
        # A tail of four tokens would cost a whole reading of the weight.
        return max(1, cdiv(cdiv(num_rows, num_chunks), _CPU_GRAIN)) * _CPU_GRAIN
    least, num_bytes = _LEAST_TILES, lookup(_GPU_BYTES, vocab)
    if needs_weight is None:
        num_bytes, needs_weight = _VALUE_BYTES, True
    elif not needs_weight:
        least = _LEAST_FROZEN_TILES
        num_bytes = max(_LEAST_FROZEN_BYTES, _FROZEN_BYTES - num_rows * width * dtype.itemsize)
    most = max(least, num_bytes // (_TILE_TOKENS * vocab * dtype.itemsize))
    sms = num_sms(device) if sms is None else sms
    num_tiles = max(1, cdiv(num_rows, _TILE_TOKENS))
    return _TILE_TOKENS * _chunk_tiles(num_tiles, most, width, sms, needs_weight)


@cache_by_shape
def _chunk_tiles(num_tiles: int, most: int, width: int, sms: int, needs_weight: bool) -> int:
    # With fewer tiles there are so many chunks that the weight gradient's sum is fp32.
    narrow = cdiv(num_tiles, _MAX_BF16_CHUNKS) if needs_weight else 1
    most = min(num_tiles, most, max(_ENOUGH_TILES, narrow))
    least = max(cdiv(most, 2), narrow if narrow <= most else 1)

    def total(tiles: int) -> tuple[float, int]:
        num_full, rest = divmod(num_tiles, tiles)
        cost = num_full * _cost(tiles, width, sms, needs_weight)
        return cost + (_cost(rest, width, sms, needs_weight) if rest else 0.0), -tiles

    return min(range(least, most + 1), key=total)


def _cost(tiles: int, width: int, sms: int, needs_weight: bool) -> float:
    """Return the time of a chunk's products, in that of a tile of tokens in one of them."""
    tiles = max(tiles, _WAITING_TILES)
    columns = cdiv(width, _TILE_WIDTH)
    idle = cdiv(tiles * columns, sms) * sms / columns / tiles - 1.0
    hidden = tiles * (1.0 + _WAVE_SHARE * idle if idle <= _MOST_IDLE else _SIDE_BY_SIDE)
    logits = tiles + (_ODD_TILES if tiles > 6 and tiles % 2 else 0.0)
    weight = tiles + _ADD_TILES if needs_weight else 0.0
    return logits + hidden + weight + _CHUNK_TILES


def accumulator_dtype(
    compute: torch.dtype, final: torch.dtype, num_chunks: int, device: torch.device
) -> torch.dtype:
    """Return the dtype of the weight gradient's running sum.

    Never fp16: such sums are not yet divided by the number of labels and would overflow.
    """
    most = _MAX_CPU_BF16_CHUNKS if device.type == "cpu" else _MAX_BF16_CHUNKS
    if compute == final == torch.bfloat16 and num_chunks <= most:
        return compute
    return wide_dtype(compute)
