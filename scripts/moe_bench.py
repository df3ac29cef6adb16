"""Check moe_experts on this GPU in three dtypes, then time it and the choices inside it.

    python scripts/moe_bench.py --output moe.json [--check all]

About three minutes; --tiny runs every line on small shapes, on a CPU too, where times say nothing.

Prints and writes one JSON: errors, milliseconds of whole calls beside the grouped products alone
and beside the same in torch operations, and GB/s of each kernel at several tiles.
"""

from __future__ import annotations

import argparse
import functools
import json
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import torch

from liger_kernels.compare import compare
from liger_kernels.ops import grouped_products as products
from liger_kernels.ops import moe_activation as activation
from liger_kernels.ops import moe_experts, moe_rows
from liger_kernels.ops.backend import runs_triton
from liger_kernels.ops.moe_routing import route
from liger_kernels.ops.registry import OPS

OP = OPS["moe_experts"]
# Tokens, width, inner width, experts, choices, as each model has them.
SHAPES = {
    "qwen3-30b-a3b": (16384, 2048, 768, 128, 8),
    "mixtral": (16384, 4096, 14336, 8, 2),
    "gpt-oss-20b": (16384, 2880, 2880, 32, 4),
    "olmoe": (16384, 2048, 1024, 64, 8),
    "qwen3-30b-a3b 2x1024": (2048, 2048, 768, 128, 8),
}
TINY = dict.fromkeys(SHAPES, (16, 32, 16, 4, 2))
GPT_OSS = {
    "activation": "gpt_oss",
    "is_interleaved": True,
    "is_transposed": True,
    "has_bias": True,
}
MOVE_TILES = ((1, 2048, 8), (1, 2048, 4), (1, 1024, 4), (1, 512, 4), (2, 2048, 8))
ACTIVATION_TILES = ((1, 1024, 4), (1, 1024, 8), (1, 512, 4), (1, 256, 2), (4, 256, 4))
PRODUCT_TILES = ((64, 64, 32, 4), (128, 128, 64, 8), (128, 256, 64, 8))
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# The cases of a short check: all layouts and places of the weight.
CHECKED = ("tiny", "odd", "idle", "empty-slots", "gpt-oss", "llama4", "input-bias", "real-wide",
           "real-llama4", "real-gpt-oss")  # fmt: skip
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def do_bench(call: Callable[[], Any], warmup: int = 20, rep: int = 80) -> float:
    """Return the median milliseconds of a call."""
    if DEVICE.type == "cpu":
        began = time.perf_counter()
        call()
        return (time.perf_counter() - began) * 1e3
    from triton.testing import do_bench as measure

    return float(measure(call, warmup=warmup, rep=rep, return_mode="median"))


def draw(shape: tuple[int, ...], options: dict[str, Any], dtype: torch.dtype) -> Any:
    """Return a sample drawn on the GPU, with fp32 routing weights."""
    from liger_kernels.ops.op import Case

    generator = torch.Generator(DEVICE).manual_seed(0)
    case = Case("bench", shape, {"scale": 1.0, "weights_dtype": torch.float32, **options})
    with DEVICE:
        return OP.sample(case, dtype, DEVICE, generator)


def empty_cache() -> None:
    """Give cached memory back."""
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()


def check(ids: Collection[str]) -> dict[str, Any]:
    """Return the failures of some cases in every dtype, and how many were tried."""
    failures, count = [], 0
    for case in (case for case in OP.cases if case.id in ids):
        for dtype in DTYPES:
            count += 1
            try:
                result = compare(OP, case, dtype, DEVICE)
                if not result.ok:
                    failures.append(str(result))
            except Exception as error:
                failures.append(f"{case.id} {dtype}: {type(error).__name__}: {error}"[:500])
            empty_cache()
    return {"cases": count, "failures": failures}


def stock(hidden, weights, ids, gate_up, down, **options) -> torch.Tensor:
    """Compute the same with torch's operations around torch's grouped product."""
    top_k, gating = ids.shape[1], options["gating"]
    ordered, slots = ids.flatten().sort()
    counts = torch.histc(
        ordered.int() if ordered.is_cuda else ordered.float(),
        bins=gate_up.shape[0],
        min=0,
        max=gate_up.shape[0] - 1,
    )
    offsets = counts.cumsum(0, dtype=torch.int32)
    h = torch._grouped_mm(hidden[slots // top_k], gate_up.transpose(1, 2), offs=offsets)
    if options.get("gate_up_bias") is not None:
        h = h + options["gate_up_bias"][ordered]
    y = torch._grouped_mm(activation.gated(h, gating), down.transpose(1, 2), offs=offsets)
    if options.get("down_bias") is not None:
        y = y + options["down_bias"][ordered]
    y = y * weights.flatten()[slots, None]
    back = torch.empty_like(slots)
    back[slots] = torch.arange(slots.numel(), device=slots.device)
    return y[back].view(*ids.shape, -1).sum(1).to(hidden.dtype)


def time_call(
    function: Callable[..., torch.Tensor], sample: Any, **more: Any
) -> dict[str, float | None]:
    """Return milliseconds of forward and of both, and the peak of what both allocate."""
    leaves = [x for x in (*sample.args, *sample.kwargs.values()) if isinstance(x, torch.Tensor)]
    call = functools.partial(function, *sample.args, **{**sample.kwargs, **more})
    dy = torch.randn_like(sample.args[0])

    def both() -> None:
        for x in leaves:
            x.grad = None
        call().backward(dy)

    both()
    for x in leaves:
        x.grad = None
    peak = None
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        both()
        torch.cuda.synchronize()
        peak = (torch.cuda.max_memory_allocated() - before) / 2**20
    found = {
        "forward_ms": do_bench(call, warmup=50, rep=200),
        "both_ms": do_bench(both, warmup=50, rep=300),
        "transient_mib": peak,
    }
    for x in leaves:
        x.grad = None
    return found


def time_products(sample: Any) -> float:
    """Return milliseconds of the six grouped products alone."""
    hidden, _, ids, gate_up, down = (x.detach() for x in sample.args)
    routing = route(ids, gate_up.shape[0], triton_runs=runs_triton(torch.empty(0, device=DEVICE)))
    x = moe_rows.gather_rows(hidden, routing)
    wide = products.grouped_product(x, gate_up.transpose(1, 2), routing.offsets)
    h = wide[:, : down.shape[2]].contiguous()
    outs = torch.randn_like(x)

    def run() -> None:
        products.grouped_product(x, gate_up.transpose(1, 2), routing.offsets)
        products.grouped_product(h, down.transpose(1, 2), routing.offsets)
        products.grouped_product(outs, down, routing.offsets)
        products.grouped_product(wide, gate_up, routing.offsets)
        products.grouped_outer(outs, h, routing.offsets)
        products.grouped_outer(wide, x, routing.offsets)

    return do_bench(run, warmup=50, rep=300)


def whole_calls(shapes: dict[str, tuple[int, ...]]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the figures of whole calls of each shape."""
    for name, shape in shapes.items():
        options = GPT_OSS if name.startswith("gpt-oss") else {}
        sample = draw(shape, options, torch.bfloat16)
        row: dict[str, Any] = {
            "shape": shape,
            "flops": 18 * shape[0] * shape[4] * shape[1] * shape[2],
        }
        row["ours"] = time_call(moe_experts, sample)
        row["ours, products kept"] = time_call(moe_experts, sample, keeps_products=True)
        biases = {k: v for k, v in sample.kwargs.items() if k.endswith("bias")}
        layout = "interleaved" if options else "halves"
        gating = activation.Gating(options.get("activation", "silu"), layout=layout)
        plain = type(sample)(sample.args, biases)
        try:
            row["torch"] = time_call(stock, plain, gating=gating)
        except torch.OutOfMemoryError:
            row["torch"] = None
        row["products_ms"] = time_products(sample)
        yield name, row
        del sample, plain
        empty_cache()


def rate(function: Callable[[], Any], num_bytes: float) -> dict[str, float]:
    """Return milliseconds and GB/s of a call."""
    ms = do_bench(function, warmup=20, rep=80)
    return {"ms": ms, "gb_per_s": num_bytes / ms / 1e6}


def kernels(shape: tuple[int, ...], layout: str) -> dict[str, Any]:
    """Return the figures of each kernel on its own, at several tiles."""
    num_tokens, width, inner, num_experts, top_k = shape
    slots = num_tokens * top_k
    dtype, device = torch.bfloat16, DEVICE
    ids = torch.rand(num_tokens, num_experts, device=device).topk(top_k, dim=1).indices
    weights = torch.rand(num_tokens, top_k, device=device)
    x = torch.randn(num_tokens, width, dtype=dtype, device=device)
    gate_up = torch.randn(slots, 2 * inner, dtype=dtype, device=device)
    dh = torch.randn(slots, inner, dtype=dtype, device=device)
    routing = route(ids, num_experts, triton_runs=runs_triton(torch.empty(0, device=DEVICE)))
    rows = moe_rows.gather_rows(x, routing)
    gating = activation.Gating(layout=layout)
    held = activation.Slots(routing, weights, None)
    found: dict[str, Any] = {
        "sort": do_bench(
            lambda: route(ids, num_experts, triton_runs=runs_triton(torch.empty(0, device=DEVICE)))
        ),
        "torch.sort": do_bench(lambda: ids.flatten().sort(stable=True)),
        "index_select": rate(lambda: x[routing.slots // top_k], 2 * (slots + num_tokens) * width),
        "copy": rate(rows.clone, 4 * slots * width),
    }
    moved = 2 * (slots + num_tokens) * width

    def at(module: Any, name: str, tiles: Any, call: Callable[[], Any], num_bytes: float) -> None:
        kept = getattr(module, name)
        for tile in tiles:
            # A table by size has this tile for all.
            setattr(module, name, ((0, tile),) if name.endswith("TILES") else tile)
            label = f"{call.__name__} {tile}"
            try:
                found[label] = rate(call, num_bytes)
            except Exception as error:
                found[label] = f"{type(error).__name__}: {error}"[:200]
        setattr(module, name, kept)

    def gather() -> None:
        moe_rows.gather_rows(x, routing)

    def combine() -> None:
        moe_rows.combine_rows(rows, routing)

    def forward() -> None:
        activation.activate_rows(gate_up, held, gating)

    def backward() -> None:
        activation.activate_rows_backward(dh, gate_up, held, gating, remakes_h=True)

    at(moe_rows, "_MOVE_TILE", MOVE_TILES, gather, moved)
    at(moe_rows, "_MOVE_TILE", MOVE_TILES, combine, moved)
    at(activation, "_FWD_TILES", ACTIVATION_TILES, forward, 2 * slots * 3 * inner)
    at(activation, "_BWD_TILES", ACTIVATION_TILES, backward, 2 * slots * 6 * inner)
    return found


def triton_products(shape: tuple[int, ...]) -> dict[str, Any]:
    """Return TFLOP/s of the Triton products at several tiles, and of torch's where it serves."""
    num_tokens, width, inner, num_experts, top_k = shape
    slots, found = num_tokens * top_k, {}
    flops = 2 * slots * width * 2 * inner
    ids = torch.rand(num_tokens, num_experts, device=DEVICE).topk(top_k, dim=1).indices
    routing = route(ids, num_experts, triton_runs=runs_triton(torch.empty(0, device=DEVICE)))
    for dtype in DTYPES:
        x = torch.randn(slots, width, dtype=dtype, device=DEVICE)
        weight = torch.randn(num_experts, 2 * inner, width, dtype=dtype, device=DEVICE)
        y = torch.randn(slots, 2 * inner, dtype=dtype, device=DEVICE)
        sides = [("torch", None)] if dtype == torch.bfloat16 else []
        for side, tile in [*sides, *(("triton", t) for t in PRODUCT_TILES)]:
            kept = products._TILE, products._runs_torch
            if tile is not None:
                products._TILE, products._runs_torch = tile, lambda *tensors: False
            name = f"{str(dtype)[6:]} {side} {tile}"
            try:
                product = functools.partial(
                    products.grouped_product, x, weight.transpose(1, 2), routing.offsets
                )
                outer = functools.partial(products.grouped_outer, y, x, routing.offsets)
                for what, call in (("product", product), ("outer", outer)):
                    found[f"{name} {what}"] = flops / do_bench(call, warmup=20, rep=60) / 1e9
            except Exception as error:
                found[name] = f"{type(error).__name__}: {error}"[:200]
            products._TILE, products._runs_torch = kept
    return found


def main() -> None:
    """Write the report, part by part."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--check", choices=("some", "all", "none"), default="some")
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    began = time.monotonic()
    report: dict[str, Any] = {"torch": torch.__version__, "device": str(DEVICE)}
    if DEVICE.type == "cuda":
        report["device"] = torch.cuda.get_device_name()

    def save(part: str, value: Any) -> None:
        report[part] = value
        report["seconds"] = time.monotonic() - began
        options.output.write_text(json.dumps(report, indent=1, default=str) + "\n")
        print(part, f"{report['seconds']:.0f} s", json.dumps(value, default=str), flush=True)

    shapes = TINY if options.tiny else SHAPES
    ids = {"some": CHECKED, "all": [case.id for case in OP.cases], "none": []}[options.check]
    if options.tiny:
        ids = [name for name in ids if not name.startswith("real")]
    for name, row in whole_calls(shapes):
        save(name, row)
    save("kernels qwen3", kernels(shapes["qwen3-30b-a3b"], "halves"))
    save("check", check(ids))
    save("kernels gpt-oss", kernels(shapes["gpt-oss-20b"], "interleaved"))
    save("products", triton_products(shapes["olmoe"] if options.tiny else (4096, 2048, 768, 32, 8)))


if __name__ == "__main__":
    main()
