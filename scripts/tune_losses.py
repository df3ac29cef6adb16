"""Time the loss kernel's shapes, the products of a chunk, and the fused loss, on this GPU.

python3 scripts/tune_losses.py --output runs/tune
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tuning import Results, rms_error, time_ms, transient_mib

from liger_kernels.ops import fused_linear_cross_entropy
from liger_kernels.ops.losses import chunk_size, linear_loss, row_loss
from liger_kernels.ops.losses.options import LossOptions

BF16 = torch.bfloat16
# (rows, vocabulary)
LOGITS = ((16384, 32000), (8192, 128256), (4096, 262144))
# (kept, block, warps)
LOSS_SHAPES = (
    (8192, 8192, 8),
    (8192, 8192, 16),
    (16384, 8192, 16),
    (16384, 16384, 16),
    (32768, 16384, 16),
    (32768, 16384, 32),
)
LOSS_OPTIONS = {
    "plain": LossOptions(ignore_index=-100),
    "capped": LossOptions(ignore_index=-100, softcap=30.0),
}
# (tokens, hidden width, vocabulary)
HEADS = (
    (8192, 4096, 128256),
    (4096, 4096, 128256),
    (16384, 2048, 128256),
    (8192, 2304, 256000),
    (4096, 4096, 32000),
)
CHUNKS = (256, 512, 640, 768, 896, 1024, 1280, 1536, 1664, 1792, 1920, 2048, 4096)
# Of the whole op, beside its own choice.
OTHER_CHUNKS = (512, 640, 768, 1024, 1536, 1792, 1920, 2048, 4096)


@contextmanager
def replaced(module: Any, name: str, value: Any) -> Iterator[None]:
    usual = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, usual)


def tune_loss_kernel(results: Results, num_rows: int, vocab: int) -> None:
    logits = torch.randn(num_rows, vocab, dtype=BF16, device="cuda")
    target = torch.randint(0, vocab, (num_rows,), device="cuda")
    target[:2] = -100
    coef = torch.full((), 0.5, device="cuda").expand(num_rows)
    loss, dx = torch.empty(num_rows, device="cuda"), torch.empty_like(logits)
    num_bytes = 2 * logits.numel() * logits.element_size()
    for kind, options in LOSS_OPTIONS.items():
        few = logits[:128].float().requires_grad_()
        z = few if options.softcap is None else options.softcap * (few / options.softcap).tanh()
        wanted = F.cross_entropy(z, target[:128], reduction="none")
        (wanted_dx,) = torch.autograd.grad(wanted.sum() * 0.5, few)

        def launch(options: LossOptions = options) -> None:
            row_loss.loss_rows(logits, target, options, coef=coef, dx=dx, loss=loss)

        for shape in LOSS_SHAPES:
            table = ((1 << 62, row_loss._Shape(*shape)),)
            name = "_SHAPES" if kind == "plain" else "_WIDE_SHAPES"
            with replaced(row_loss, name, table):
                launch()
                assert rms_error(loss[:128], wanted.detach()) < 1e-5, shape
                assert rms_error(dx[:128], wanted_dx) < 4e-3, shape
                ms = time_ms(launch, rep=20)
            results.add(
                "loss kernel",
                shape=(num_rows, vocab),
                variant=shape,
                kind=kind,
                ms=ms,
                share=results.copy_share(num_bytes, ms),
            )


def tune_products(results: Results, width: int, vocab: int) -> None:
    """Time the products of a chunk, alone and one after the other, which leaves no time to cool."""
    weight = torch.randn(vocab, width, dtype=BF16, device="cuda")
    narrow = torch.zeros_like(weight)
    wide = torch.zeros_like(weight, dtype=torch.float32)
    for tokens in CHUNKS:
        if tokens * vocab * 2 > 1100 << 20:
            continue
        x = torch.randn(tokens, width, dtype=BF16, device="cuda")
        z = torch.randn(tokens, vocab, dtype=BF16, device="cuda")
        logits, dx = torch.empty_like(z), torch.empty_like(x)

        def forward(x: torch.Tensor = x, logits: torch.Tensor = logits) -> None:
            torch.mm(x, weight.t(), out=logits)

        def hidden(z: torch.Tensor = z, dx: torch.Tensor = dx) -> None:
            torch.mm(z, weight, out=dx)

        def added(x: torch.Tensor = x, z: torch.Tensor = z) -> None:
            narrow.addmm_(z.t(), x)

        def added_wide(x: torch.Tensor = x, z: torch.Tensor = z) -> None:
            torch.addmm(wide, z.t(), x, out_dtype=torch.float32, out=wide)

        products: dict[str, tuple[Callable[[], None], ...]] = {
            "logits": (forward,),
            "dhidden": (hidden,),
            "dweight added in bf16": (added,),
            "dweight added in fp32": (added_wide,),
            "frozen": (forward, hidden),
            "trained": (forward, hidden, added),
        }
        for name, parts in products.items():
            num_calls = 3 if len(parts) > 1 else 1

            def run(parts: tuple[Callable[[], None], ...] = parts, n: int = num_calls) -> None:
                for _ in range(n):
                    for part in parts:
                        part()

            ms = time_ms(run, rep=8 * num_calls) / num_calls
            results.add(
                "product",
                shape=(tokens, width, vocab),
                variant=name,
                ms=ms,
                share=results.matmul_share(2 * len(parts) * tokens * width * vocab, ms),
            )


def reference(
    hidden: torch.Tensor, weight: torch.Tensor, target: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return loss and gradients by plain torch in chunks, with the weight's summed in fp32."""
    loss = torch.zeros((), device="cuda")
    dhidden = torch.empty_like(hidden)
    dweight = torch.zeros_like(weight, dtype=torch.float32)
    for start in range(0, hidden.shape[0], 1024):
        part = slice(start, start + 1024)
        logits = (hidden[part] @ weight.t()).float().requires_grad_()
        sum_of_part = F.cross_entropy(logits, target[part], reduction="sum")
        (dlogits,) = torch.autograd.grad(sum_of_part / (target != -100).sum(), logits)
        loss += sum_of_part.detach()
        dhidden[part] = dlogits.to(BF16) @ weight
        torch.addmm(
            dweight, dlogits.to(BF16).t(), hidden[part], out_dtype=torch.float32, out=dweight
        )
        del logits, dlogits
    return loss / (target != -100).sum(), dhidden, dweight


def variants(num_rows: int, vocab: int, chunk: int, is_frozen: bool) -> Iterator[str]:
    """Yield the names of ways to run the fused loss, each set up while it is current."""
    yield "as it is"
    for other in OTHER_CHUNKS:
        is_near = chunk / 2 <= other <= min(2 * chunk, num_rows)
        if other != chunk and is_near and other * vocab * 2 <= 1024 << 20:
            with replaced(linear_loss, "chunk_tokens", lambda *_, other=other: other):
                yield f"chunks of {other}"
    if not is_frozen:
        with replaced(linear_loss, "accumulator_dtype", lambda *_: torch.float32):
            yield "fp32 sum"


def tune_fused(results: Results, num_tokens: int, width: int, vocab: int) -> None:
    hidden = torch.randn(num_tokens, width, dtype=BF16, device="cuda", requires_grad=True)
    weight = (torch.randn(vocab, width, device="cuda") * width**-0.5).to(BF16).requires_grad_()
    full = torch.randint(0, vocab, (num_tokens,), device="cuda")
    some = full.masked_fill(torch.rand(num_tokens, device="cuda") > 0.4, -100)
    for labels, target, is_frozen in (
        ("all", full, False),
        ("all", full, True),
        ("40 %", some, False),
    ):
        weight.requires_grad_(not is_frozen)
        wanted = reference(hidden.detach(), weight.detach(), target)

        def step(target: torch.Tensor = target) -> torch.Tensor:
            hidden.grad = weight.grad = None
            loss = fused_linear_cross_entropy(hidden, weight, target)
            loss.backward()
            return loss

        num_rows = int((target != -100).sum())
        chunk = chunk_size.chunk_tokens(num_rows, width, vocab, BF16, target.device, not is_frozen)
        for name in variants(num_rows, vocab, chunk, is_frozen):
            # The first run compiles.
            assert rms_error(step().detach(), wanted[0]) < 1e-3, name
            assert hidden.grad is not None
            errors = [rms_error(hidden.grad, wanted[1])]
            if weight.grad is not None:
                errors.append(rms_error(weight.grad, wanted[2]))
            assert max(errors) < 1e-2, (name, errors)
            hidden.grad = weight.grad = None
            mib, ms = transient_mib(step), time_ms(step, rep=100)
            num_units = 4 if is_frozen else 6
            results.add(
                "fused_linear_cross_entropy",
                shape=(num_tokens, width, vocab),
                variant=name,
                head="frozen" if is_frozen else "trained",
                labels=labels,
                chunk=chunk,
                ms=ms,
                share=results.matmul_share(num_units * num_rows * width * vocab, ms),
                transient_mib=mib,
                rms_errors=[float(f"{error:.2g}") for error in errors],
            )
        del wanted


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("runs/tune"))
    options = parser.parse_args()
    torch.manual_seed(0)
    results = Results(options.output, "losses")
    for num_rows, vocab in LOGITS:
        tune_loss_kernel(results, num_rows, vocab)
    for shape in HEADS:
        tune_fused(results, *shape)
    for width, vocab in dict.fromkeys(shape[1:] for shape in HEADS):
        tune_products(results, width, vocab)
    return 0


if __name__ == "__main__":
    sys.exit(main())
