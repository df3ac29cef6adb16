"""Time steps on packed and padding-free rows: varlen attention, the mask of documents, a peer.

python scripts/packed_bench.py --peer-path FOLDER --output packed.json     one CUDA GPU, 7 minutes
python scripts/packed_bench.py --only llama-1b                             some of it
python scripts/packed_bench.py --toy                                       tiny models on a CPU

Each side of a workload is a separate process with random weights of one seed, the product's own
collator and loss, and a median of its steps; their first losses are compared. Floors are the FLOPs
of the step over the matmul rate of this run, and the time of the varlen kernel alone. A line of
JSON a side, and a table of ratios at the end. liger-kernel is imported from --peer-path.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

from liger_cli.common.environment import environment
from liger_cli.data.collate import Collator
from liger_cli.data.encode import IGNORED
from liger_cli.data.packing import join_rows
from liger_cli.training.forward import LossOf
from liger_cli.training.model.source import load_model, resolve_model
from liger_kernels import apply_liger_kernel

BF16 = torch.bfloat16
LORA = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# Words in the names of attention's kernels.
ATTENTION = ("flash", "fmha", "attention", "sdpa", "cudnn_generated", "flex", "bprop", "fprop")


@dataclass(frozen=True)
class Side:
    """One measurement: a model, its rows, and how they are computed.

    Attributes:
        rows: "packed", of 8192 or `length` tokens; or "chitchat" or "lognormal", one by one.
        how: mask, varlen, padded, or free: padding-free by varlen.
        seconds: That it is expected to take, start included.
    """

    workload: str
    model: str
    rows: str
    how: str
    patch: str = "ours"
    layers: int | None = None
    length: int = 8192
    size: int = 2
    adapter: bool = False
    checkpoints: bool = False
    seconds: int = 20

    @property
    def key(self) -> str:
        return f"{self.workload} {self.patch} {self.how}"


def sides() -> list[Side]:
    """Return the workloads of the issue's table, the fastest answers first."""
    found = []
    for patch, how in (
        ("ours", "varlen"),
        ("liger-kernel", "mask"),
        ("ours", "mask"),
        ("ours", "padded"),
    ):
        found.append(Side("llama-1b 2x8192", "llama-1b", "packed", how, patch))
    for how in ("varlen", "mask"):
        found.append(Side("gemma3-1b 2x8192", "gemma3-1b", "packed", how))
        found.append(Side("mistral-7b/2 2x8192", "mistral-7b", "packed", how, layers=2))
    for rows in ("lognormal", "chitchat"):
        for how in ("free", "padded"):
            found.append(
                Side(f"llama-1b 32 rows {rows}", "llama-1b", rows, how, length=4096, size=32)
            )
    lora: dict[str, Any] = {"adapter": True, "seconds": 40}
    for how in ("varlen", "mask"):
        found.append(Side("llama-8b lora 2x8192", "llama-8b", "packed", how, **lora))
    long: dict[str, Any] = {**lora, "checkpoints": True, "length": 32768, "size": 1}
    for how in ("varlen", "mask"):
        found.append(Side("llama-8b lora 1x32768", "llama-8b", "packed", how, **long))
    for how in ("varlen", "mask"):
        found.append(Side("gemma2-2b/4 2x8192", "gemma2-2b", "packed", how, layers=4, seconds=45))
    return found


def document_lengths(total: int, median: int, cap: int) -> list[int]:
    """Draw lengths, lognormal with sigma 1, that sum to the total."""
    generator = torch.Generator().manual_seed(5)
    found, left = [], total
    while left > 0:
        draw = math.exp(math.log(median) + torch.randn(1, generator=generator).item())
        found.append(min(int(min(cap, max(16, draw))), left))
        left -= found[-1]
    return found


def packed_lengths(num_rows: int, length: int) -> list[list[int]]:
    """Cut documents at the ends of rows, so that rows are full."""
    rows: list[list[int]] = [[]]
    for n in document_lengths(num_rows * length, min(300, length // 4), length):
        rest = n
        while rest:
            part = min(rest, length - sum(rows[-1]))
            rows[-1].append(part)
            rest -= part
            if sum(rows[-1]) == length:
                rows.append([])
    return rows[:num_rows]


def single_lengths(side: Side) -> list[int]:
    """Return the lengths of rows that are not packed."""
    if side.rows == "chitchat":
        from liger_cli.config import load_config
        from liger_cli.data.packing import row_lengths
        from liger_cli.training.inputs import load_inputs

        inputs = load_inputs(load_config(flags={"model": "llama", "dataset": "chitchat"}))
        return [int(n) for n in row_lengths(inputs.train)[: side.size]]
    generator = torch.Generator().manual_seed(5)
    draws = torch.randn(side.size, generator=generator).tolist()
    return [int(min(side.length, max(16, 200 * math.exp(draw)))) for draw in draws]


def micro_batches(side: Side, vocab_size: int) -> tuple[list[dict[str, Any]], list[int]]:
    """Return the collated micro-batches of a step, and the lengths of its documents."""
    generator = torch.Generator().manual_seed(1)

    def document(n: int) -> dict[str, list[int]]:
        ids = torch.randint(0, vocab_size, (n,), generator=generator).tolist()
        return {"input_ids": ids, "labels": [IGNORED, *ids[1:]]}

    flat = {"flatten": True, "has_lengths": True}
    if side.rows == "packed":
        packs = packed_lengths(side.size, side.length)
        rows = [[document(n) for n in pack] for pack in packs]
        lengths = [n for pack in packs for n in pack]
        if side.how == "padded":
            order = torch.randperm(len(lengths), generator=generator).tolist()
            single = [one for row in rows for one in row]
            groups = [[single[i] for i in order[k : k + 8]] for k in range(0, len(order), 8)]
            return [Collator()(group) for group in groups], lengths
        collator = Collator(**flat) if side.how == "varlen" else Collator()
        return [collator([join_rows(row) for row in rows])], lengths
    lengths = single_lengths(side)
    collator = Collator(**flat, padding_free=True) if side.how == "free" else Collator()
    # As many rows at once as are worth padding together.
    documents = [document(n) for n in lengths]
    return [collator(documents)], lengths


def build(side: Side, toy: bool) -> Any:
    """Load the model with random weights and patch it."""
    source = resolve_model(side.model)
    if toy:
        source = resolve_model("gemma3-text" if "gemma" in side.model else "mistral")
    elif side.layers:
        values = dict(source.config or {})
        if "layer_types" in values:
            values["layer_types"] = values["layer_types"][: side.layers]
        if side.model == "mistral-7b":
            # Of its first release; later ones have none.
            values["sliding_window"] = 4096
        source = replace(source, config={**values, "num_hidden_layers": side.layers})
    uses_lengths = side.how in ("varlen", "free")
    model: Any = load_model(
        source,
        dtype=torch.float32 if toy else BF16,
        device="cpu" if toy else "cuda",
        attn_implementation="liger_varlen" if uses_lengths else None,
    )
    if side.patch == "liger-kernel":
        from liger_kernel.transformers import _apply_liger_kernel_to_instance

        _apply_liger_kernel_to_instance(model=model)
    if side.adapter:
        from peft import LoraConfig, get_peft_model

        settings = LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules=list(LORA))
        torch.manual_seed(7)
        model = get_peft_model(model, settings)
    if side.checkpoints:
        base = model.get_base_model() if side.adapter else model
        base.gradient_checkpointing_enable({"use_reentrant": False})
    if side.patch == "ours":
        apply_liger_kernel(model)
    return model.train()


def measure(side: Side, toy: bool, num_steps: int) -> dict[str, Any]:
    """Return the figures of one side."""
    from liger_kernels.transformers.attention.interface import recorded_choices

    device = torch.device("cpu" if toy else "cuda")
    if toy:
        side = replace(side, length=min(side.length, 128), size=min(side.size, 4))
    model = build(side, toy)
    base = model.get_base_model() if side.adapter else model
    config = base.config.get_text_config()
    batches, lengths = micro_batches(side, config.vocab_size)
    num_labels = sum(n - 1 for n in lengths)
    loss_of = LossOf(model, device)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=not toy)
    moved = [
        {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
        for batch in batches
    ]

    def step() -> torch.Tensor:
        total = torch.zeros((), device=device)
        for batch in moved:
            with torch.autocast(device.type, BF16, enabled=side.adapter and not toy):
                loss = loss_of(model, batch, num_labels)
            loss.backward()
            total += loss.detach()
        optimizer.step()
        optimizer.zero_grad()
        return total

    with recorded_choices() as found:
        losses = [float(step())]
    losses += [float(step()) for _ in range(2)]
    times, peak = timed(step, num_steps, device)
    ms = statistics.median(times)
    result: dict[str, Any] = {
        "ms": round(ms, 2),
        "min_ms": round(min(times), 2),
        "trained_tokens_per_s": round(num_labels / ms * 1e3),
        "peak_gb": round(peak / 1e9, 2),
        "losses": [round(x, 5) for x in losses],
        "tokens": sum(lengths),
        "places": sum(b["input_ids"].numel() for b in batches),
        "documents": len(lengths),
        "layers": [f"{x.layer_type} {x.num_layers} {x.backend}" for x in found],
    }
    if device.type == "cuda":
        result["attention_ms"] = attention_ms(step)
        if side.how in ("varlen", "free") and "gemma2" not in side.model:
            result["kernel_ms"] = kernel_ms(config, lengths, checkpoints=side.checkpoints)
        flops = step_flops(config, sum(lengths), lora=side.adapter, again=side.checkpoints)
        result["product_tflop"] = round(flops / 1e12, 1)
    return result


def timed(step: Callable[[], Any], num_steps: int, device: torch.device) -> tuple[list[float], int]:
    """Return the milliseconds of steps and the peak of memory in bytes."""
    times = []
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for _ in range(num_steps):
        begin = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append((time.perf_counter() - begin) * 1e3)
    return times, torch.cuda.max_memory_allocated() if device.type == "cuda" else 0


def attention_ms(step: Callable[[], Any]) -> float:
    """Return the milliseconds that attention's kernels take in a step."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as found:
        step()
        torch.cuda.synchronize()
    total = 0.0
    for event in found.key_averages():
        name = event.key.lower()
        if any(word in name for word in ATTENTION) and "gemm" not in name:
            total += event.self_device_time_total
    return round(total / 1e3, 2)


def kernel_ms(config: Any, lengths: list[int], *, checkpoints: bool) -> float:
    """Return the time of the varlen kernel alone, forward and backward in all layers."""
    from liger_kernels.transformers.attention.choice import _head_size, _layer_types
    from liger_kernels.transformers.attention.kernel import Lengths, varlen_attention

    heads, shared = config.num_attention_heads, config.num_key_value_heads
    total, size = sum(lengths), _head_size(config)
    q, k, v = (
        torch.randn(total, n, size, device="cuda", dtype=BF16, requires_grad=True)
        for n in (heads, shared, shared)
    )
    ends = torch.tensor([0, *lengths], device="cuda").cumsum(0).to(torch.int32)
    where = Lengths(ends, ends, max(lengths), max(lengths))
    grad = torch.randn(total, heads, size, device="cuda", dtype=BF16)
    by_type = {}
    for layer_type in set(_layer_types(config)):
        window = config.sliding_window if layer_type == "sliding_attention" else None

        def forward(window: int | None = window) -> torch.Tensor:
            return varlen_attention(q, k, v, where, window=window)

        def both(forward: Any = forward) -> None:
            torch.autograd.grad(forward(), (q, k, v), grad)

        by_type[layer_type] = event_ms(both) + (event_ms(forward) if checkpoints else 0.0)
    return round(sum(by_type[layer_type] for layer_type in _layer_types(config)), 2)


def event_ms(call: Callable[[], Any], repeats: int = 10) -> float:
    """Return the median milliseconds of a call on the GPU."""
    for _ in range(3):
        call()
    times = []
    for _ in range(repeats):
        begin, end = torch.cuda.Event(True), torch.cuda.Event(True)
        begin.record()
        call()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)


def step_flops(config: Any, tokens: int, *, lora: bool, again: bool) -> float:
    """Return the FLOPs of a step's products, attention apart."""
    from liger_kernels.transformers.attention.choice import _head_size

    width, size = config.hidden_size, _head_size(config)
    q, kv = config.num_attention_heads * size, config.num_key_value_heads * size
    layer = 2 * width * (q + kv) + 3 * width * config.intermediate_size
    body = 2.0 * config.num_hidden_layers * layer * tokens
    head = 2.0 * width * config.vocab_size * tokens
    rank = 16 * (2 * (width + q) + 2 * (width + kv) + 3 * (width + config.intermediate_size))
    adapter = 2.0 * config.num_hidden_layers * rank * tokens
    if lora:
        return 2 * (body + head) + 3 * adapter + (body + adapter if again else 0)
    return 3 * (body + head) + (body if again else 0)


def matmul_tflops() -> float:
    """Return the rate of large products in bfloat16, in TFLOP/s."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=BF16) for _ in range(2))
    return 2 * 8192**3 / event_ms(lambda: a @ b, 20) / 1e9


def child(pipe: Any, task: Callable[[], Any]) -> None:
    """Run a task in a separate process and send back its result, or its error."""
    try:
        result = task()
    except BaseException as error:
        import traceback

        lines = traceback.format_exc().splitlines()[-6:]
        result = {"error": f"{type(error).__name__}: {error}"[:400], "at": lines}
    pipe.send(result)
    pipe.close()
    sys.stdout.flush()
    os._exit(0)


def apart(task: Callable[[], Any], limit_s: float) -> Any:
    """Return the result of a task that a forked process runs; CUDA starts there."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=child, args=(sender, task))
    process.start()
    sender.close()
    result: Any = {"error": f"over {limit_s:.0f} s"}
    try:
        if receiver.poll(limit_s):
            result = receiver.recv()
    except EOFError:
        result = {"error": "the process ended without a result"}
    process.join(3)
    if process.is_alive():
        process.kill()
        process.join()
    return result


def ratios(found: dict[str, dict[str, Any]], tflops: float | None) -> list[str]:
    """Return a line for each target: what was to be reached and what was."""

    def value(key: str, name: str) -> float:
        return float(found.get(key, {}).get(name) or math.nan)

    lines = []

    def line(text: str, figure: float, target: str) -> None:
        lines.append(f"{text:58} {figure:8.3f}   target {target}")

    def over(one: str, other: str, name: str = "ms") -> float:
        return value(one, name) / value(other, name)

    ours = "llama-1b 2x8192 ours varlen"
    peer = "llama-1b 2x8192 liger-kernel mask"
    line("llama-1b packed: time of liger-kernel's", over(ours, peer), "<= 0.53")
    line("llama-1b packed: memory of liger-kernel's", over(ours, peer, "peak_gb"), "<= 0.72")
    for workload in ("gemma3-1b 2x8192", "mistral-7b/2 2x8192", "gemma2-2b/4 2x8192"):
        speed = over(f"{workload} ours mask", f"{workload} ours varlen")
        line(f"{workload}: times faster than the mask", speed, ">= 1.5")
    for rows in ("lognormal", "chitchat"):
        base = f"llama-1b 32 rows {rows} ours"
        speed = over(f"{base} free", f"{base} padded", "trained_tokens_per_s")
        line(f"32 rows {rows}: times the tokens/s of padded", speed, ">= 2.5 of lognormal")
    lora = "llama-8b lora 2x8192 ours varlen"
    share = value(lora, "attention_ms") / value(lora, "kernel_ms")
    line("llama-8b lora: attention over the kernel alone", share, "<= 1.2")
    if tflops:
        key = "llama-8b lora 1x32768 ours varlen"
        floor = value(key, "product_tflop") / tflops * 1e3 + value(key, "kernel_ms")
        line("1x32768: time over its floor", value(key, "ms") / floor, "<= 1.1")
    for key, result in found.items():
        workload = key.rsplit(" ", 2)[0]
        others = [r for k, r in found.items() if k.startswith(workload) and "losses" in r]
        if "losses" in result and others:
            apart_by = abs(result["losses"][0] - others[0]["losses"][0])
            if apart_by > 0.02 * others[0]["losses"][0]:
                lines.append(f"{key}: its first loss is {apart_by:.4f} from the others'")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("--peer-path", help="folder that has liger_kernel")
    parser.add_argument("--only", default="", help="words of a workload's name")
    parser.add_argument("--budget", type=float, default=440, help="seconds")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--output", help="file for all figures, as JSON")
    parser.add_argument("--toy", action="store_true", help="tiny models on a CPU")
    options = parser.parse_args()
    if options.peer_path:
        sys.path.append(options.peer_path)
    begin = time.monotonic()
    tflops = None if options.toy else apart(matmul_tflops, 60)
    if isinstance(tflops, dict):
        sys.exit(f"the GPU cannot be used: {tflops['error']}")
    found: dict[str, dict[str, Any]] = {}
    if torch.cuda.is_initialized():
        sys.exit("an import has started CUDA, which forked processes cannot use then")
    print(json.dumps({"torch": torch.__version__, "matmul_tflops": tflops}), flush=True)
    for side in sides():
        is_peer = side.patch == "liger-kernel"
        if options.only not in side.workload or (is_peer and not options.peer_path):
            continue
        left = options.budget - (time.monotonic() - begin)
        if left < side.seconds and not options.toy:
            print(json.dumps({"side": side.key, "skipped": f"{left:.0f} s left"}), flush=True)
            continue
        result = apart(lambda side=side: measure(side, options.toy, options.steps), left)
        found[side.key] = result
        print(json.dumps({"side": side.key, **result}), flush=True)
    lines = ratios(found, tflops)
    print("\n".join(lines))
    if options.output:
        values = {
            "command": " ".join(["python", *sys.argv]),
            "environment": environment(),
            "matmul_tflops": tflops,
            "sides": found,
            "lines": lines,
        }
        with open(options.output, "w", encoding="utf-8") as file:
            json.dump(values, file, indent=1)


if __name__ == "__main__":
    main()
