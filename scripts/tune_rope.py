"""Time the tiles of rope's kernel, and the op with its host, on this GPU.

python3 scripts/tune_rope.py --output runs/tune
"""

from __future__ import annotations

import argparse
import itertools
import sys
from pathlib import Path

import torch
from tuning import Results, rms_error, time_ms

from liger_kernels.ops import rope, rope_kernel
from liger_kernels.ops.rope import rope_ref

SHAPES = ((4, 4096, 32, 8, 128), (8, 2048, 32, 8, 64))
# Elements, heads and warps of a tile.
TILES = ((2048, 4096), (8, 32), (4, 8))


def attention_heads(batch: int, num_tokens: int, num_heads: int, head_size: int) -> torch.Tensor:
    """Return heads as a projection leaves them: a transposed view."""
    x = torch.randn(batch, num_tokens, num_heads, head_size, dtype=torch.bfloat16, device="cuda")
    return x.transpose(1, 2)


def tables(num_tokens: int, head_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    speeds = 1e4 ** (-torch.arange(0, head_size, 2, device="cuda") / head_size)
    angles = torch.arange(num_tokens, device="cuda")[:, None] * speeds
    angles = torch.cat((angles, angles), -1)[None]
    return angles.cos().bfloat16(), angles.sin().bfloat16()


def tune(results: Results, shape: tuple[int, ...]) -> None:
    batch, num_tokens, num_q_heads, num_k_heads, head_size = shape
    q, k = (attention_heads(batch, num_tokens, n, head_size) for n in (num_q_heads, num_k_heads))
    cos, sin = tables(num_tokens, head_size)
    moves = [(x, torch.empty_like(x)) for x in (q, k)]
    wanted = rope_ref(q.float(), k.float(), cos.float(), sin.float())
    num_bytes = 2 * 2 * (q.numel() + k.numel())
    options = rope_kernel.RopeOptions("half", head_size, -3)
    usual = rope_kernel._TILE
    for tile in itertools.product(*TILES):
        rope_kernel._TILE = rope_kernel._Tile(*tile)
        for is_backward in (False, True):

            def launch(is_backward: bool = is_backward) -> None:
                (x, y), (xk, yk) = moves
                rope_kernel.launch_rope(x, xk, y, yk, cos, sin, options, is_backward)

            launch()
            if not is_backward:
                for (_, y), true in zip(moves, wanted, strict=True):
                    assert rms_error(y, true) < 4e-3, (shape, tile)
            ms = time_ms(launch, rep=15)
            results.add(
                "rope kernel",
                shape=shape,
                variant=tile,
                direction="backward" if is_backward else "forward",
                ms=ms,
                share=results.copy_share(num_bytes, ms),
            )
    rope_kernel._TILE = usual

    leaves = [x.detach().requires_grad_() for x in (q, k)]
    dys = [attention_heads(batch, num_tokens, n, head_size) for n in (num_q_heads, num_k_heads)]
    # A gradient as attention may also give it: heads outermost.
    others = [dy.contiguous() for dy in dys]
    turned = rope(*leaves, cos, sin)
    for name, function, passes in (
        ("forward", lambda: rope(*leaves, cos, sin), 1),
        ("backward", lambda: torch.autograd.grad(turned, leaves, dys, retain_graph=True), 1),
        ("backward heads first", lambda: torch.autograd.grad(turned, leaves, others, True), 1),
        ("both", lambda: torch.autograd.grad(rope(*leaves, cos, sin), leaves, dys), 2),
    ):
        ms = time_ms(function)
        share = results.copy_share(passes * num_bytes, ms)
        results.add("rope", shape=shape, direction=name, wall_ms=ms, share=share)
    for grad, leaf in zip(torch.autograd.grad(turned, leaves, dys), leaves, strict=True):
        assert grad.stride() == leaf.stride(), "the projection before it would copy this gradient"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("runs/tune"))
    options = parser.parse_args()
    torch.manual_seed(0)
    results = Results(options.output, "rope")
    for shape in SHAPES:
        tune(results, shape)
    return 0


if __name__ == "__main__":
    sys.exit(main())
