"""Time steps on long rows of one card, and find the longest row of each side.

python scripts/long_bench.py --only cost --output cost.json       llama-8b LoRA at 1 x 32768
python scripts/long_bench.py --only row --output row.json         the same at 1 x 131072
python scripts/long_bench.py --only longest --output long.json    the longest row of each side
python scripts/long_bench.py --only card24 --output card24.json   QLoRA of a card of 24 GB
python scripts/long_bench.py --only longest --lengths 262144 --peer-path FOLDER --sides eager,both
python scripts/long_bench.py --toy                                tiny models on a CPU

Each measurement is a process that trains as `liger train` does, on random tokens with random
weights, under a time limit. The longest rows are searched with 4 of the 32 layers and as many bytes
set aside as the weights of the others take: a step takes an eighth of the time, and where inputs of
layers are offloaded the device holds no more of 32 layers than of 4. Where they are not, those of
the others are set aside too. A line of JSON a measurement; the file has them all.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from packed_bench import apart, event_ms, matmul_tflops, step_flops

from liger_cli.common.environment import environment
from liger_cli.config import RunConfig, load_config
from liger_cli.training.model.source import build_meta_model, load_model, resolve_model
from liger_cli.training.parallel.groups import groups_of

# Trains like `python -m liger_cli.commands.train.arm`, with bytes set aside and memory capped.
_CHILD = """
import sys, torch
config, aside, fraction = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
if torch.cuda.is_available():
    if fraction < 1:
        torch.cuda.set_per_process_memory_fraction(fraction)
    held = torch.empty(aside, dtype=torch.uint8, device="cuda")
from liger_cli.commands.train.arm import main
main([config, *sys.argv[4:]])
"""
SIDES: dict[str, dict[str, Any]] = {
    "checkpoints": {},
    "offload": {"activation_offloading": True},
    "tiles": {"tile_tokens": 8192},
    "both": {"activation_offloading": True, "tile_tokens": 8192},
    "eager": {"ops": "none"},
    "liger-kernel": {"ops": "none"},
}
_PEER = "liger-kernel"
_OFF = {"activation_offloading": False, "tile_tokens": "none"}
_LORA = {"adapter": "lora", "lora_r": 16, "gradient_checkpointing": True}
# Of the groups that time steps of the whole model: tokens of a row, and steps.
_LENGTHS = {"cost": (32768, 4), "row": (131072, 2)}
_CARD24 = 24e9


@dataclass(frozen=True)
class Run:
    """One measurement: a side of llama-8b on a row of so many tokens.

    Attributes:
        layers: Of the model; None for all.
        cap: Bytes of the card that the process may use; None for all.
    """

    group: str
    side: str
    length: int
    steps: int
    quantised: bool = False
    layers: int | None = None
    cap: float | None = None

    @property
    def key(self) -> str:
        return f"{self.group} {self.side} 1x{self.length}"


class Bench:
    """Runs measurements under a budget of seconds, and keeps their results.

    Args:
        model: A preset.
        budget_s: Seconds for all.
        limit_s: Seconds for one.
        folder: For configurations and runs.
        peer_path: Folder that has liger_kernel.
    """

    def __init__(
        self, model: str, budget_s: float, limit_s: float, folder: Path, peer_path: str | None
    ) -> None:
        self._source, self._folder, self._limit = resolve_model(model), folder, limit_s
        self._peer_path = peer_path
        self._end = time.monotonic() + budget_s
        self.found: dict[str, dict[str, Any]] = {}
        whole: Any = build_meta_model(self._source)
        self.config = whole.config.get_text_config()
        self._layer_size = sum(p.numel() for p in groups_of(whole)[-1].parameters())

    def measure(self, run: Run) -> dict[str, Any]:
        """Return the figures of a run, or why there are none."""
        if run.key in self.found:
            return self.found[run.key]
        left = min(self._limit, self._end - time.monotonic())
        result: dict[str, Any] = {"error": "no time left", "kind": "time"}
        if left > 20:
            result = self._train(run, left)
        self.found[run.key] = result
        print(json.dumps({"run": run.key, **result}), flush=True)
        return result

    def _train(self, run: Run, limit_s: float) -> dict[str, Any]:
        name = run.key.replace(" ", "-")
        config = self._config(run, self._folder / name)
        file = self._folder / f"{name}.yaml"
        file.write_text(config.to_yaml(), encoding="utf-8")
        share = 1.0 if run.cap is None else run.cap / _card_bytes()
        command = [sys.executable, "-c", _CHILD, str(file), str(self._aside(run)), str(share)]
        paths = [os.environ.get("PYTHONPATH", "")]
        if run.side == _PEER:
            command.append("--peer-patch")
            paths.append(self._peer_path or "")
        begin = time.monotonic()
        code, text = _run(command, limit_s, os.pathsep.join(filter(None, paths)))
        seconds = round(time.monotonic() - begin, 1)
        if code is None:
            return {"error": f"over {limit_s:.0f} s", "kind": "time", "seconds": seconds}
        if code:
            kind = "memory" if code == 5 else "failure"
            return {"error": text[-600:], "kind": kind, "code": code, "seconds": seconds}
        lines = (self._folder / name / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines]
        return {
            "step_ms": [round(row["step_ms"], 1) for row in rows],
            "peak_bytes": max(row["peak_memory_bytes"] for row in rows),
            "losses": [row["loss"] for row in rows],
            "grad_norms": [row["grad_norm"] for row in rows],
            "set_aside_bytes": self._aside(run),
            "seconds": seconds,
        }

    def _model(self, run: Run) -> str:
        """Return the name of a run's model; one with fewer layers is written first."""
        if run.layers is None:
            return self._source.name
        file = self._folder / f"{run.layers}-layers.json"
        values = {**(self._source.config or {}), "num_hidden_layers": run.layers}
        if "layer_types" in values:
            values["layer_types"] = values["layer_types"][: run.layers]
        file.write_text(json.dumps(values), encoding="utf-8")
        saved = file.with_suffix("")
        if run.quantised and not saved.is_dir():
            # Only weights that are loaded can be quantised.
            apart(lambda: _save_random(file, saved), 120)
        return str(saved if run.quantised else file)

    def _config(self, run: Run, run_dir: Path) -> RunConfig:
        model = self._model(run)
        keys = {**_OFF, **_LORA, **SIDES[run.side], "load_in_4bit": run.quantised}
        keys |= {"model": model, "dataset": "synthetic", "max_length": run.length}
        keys |= {"max_steps": run.steps, "output_dir": run_dir, "per_device_train_batch_size": 1}
        return load_config(flags=keys)

    def _aside(self, run: Run) -> int:
        """Return the bytes that layers which are left out would take of the device."""
        if run.layers is None:
            return 0
        num_others = self.config.num_hidden_layers - run.layers
        weights = self._layer_size * (0.516 if run.quantised else 2)
        kept = 0 if SIDES[run.side].get("activation_offloading") else run.length * 2
        return int(num_others * (weights + kept * self.config.hidden_size))

    def floor_ms(self, length: int, tflops: float) -> dict[str, float]:
        """Return the least milliseconds of a step: of its products, and of attention's kernel."""
        flops = step_flops(self.config, length, lora=True, again=True)
        kernel = apart(lambda: _attention_ms(self.config, length), 120)
        return {"products_ms": flops / tflops / 1e9, "attention_ms": kernel}

    def longest(self, start: int, **of: Any) -> Iterator[tuple[int, bool]]:
        """Try lengths, twice the last until memory runs out and then between; yield what fits."""
        step = start // 4
        low, high, length = 0, 1 << 21, start
        while length < high and high - low > max(step, low // 16):
            found = self.measure(Run(length=length, steps=1, **of))
            if "error" in found and found["kind"] != "memory":
                return
            low, high = (low, length) if "error" in found else (length, high)
            yield length, low == length
            length = 2 * low if high == 1 << 21 else (low + high) // 2 // step * step


def _attention_ms(config: Any, length: int) -> float:
    """Return the time of torch's attention in all layers: twice forward, and backward."""
    import torch
    import torch.nn.functional as F

    size = config.hidden_size // config.num_attention_heads
    heads = (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)
    q, k, v = (
        torch.randn(1, n, length, size, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        for n in heads
    )
    grad = torch.randn_like(q)

    def forward() -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    def both() -> None:
        torch.autograd.grad(forward(), (q, k, v), grad)

    return (event_ms(both, 3) + event_ms(forward, 3)) * int(config.num_hidden_layers)


def _save_random(file: Path, folder: Path) -> None:
    import torch

    model = load_model(resolve_model(str(file)), dtype=torch.bfloat16, device="cuda")
    model.save_pretrained(folder)


def _card_bytes() -> int:
    import torch

    def total() -> int:
        return int(torch.cuda.get_device_properties(0).total_memory)

    return apart(total, 60) if torch.cuda.is_available() else 1 << 40


def _run(command: list[str], limit_s: float, python_path: str) -> tuple[int | None, str]:
    """Return the exit code of a command and what it said; None where its time was up."""
    process = subprocess.Popen(
        command,
        # Its child watches this pipe, which ends with us.
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={
            **os.environ,
            "PYTORCH_ALLOC_CONF": "expandable_segments:True",
            "PYTHONPATH": python_path,
        },
    )
    try:
        _, text = process.communicate(timeout=limit_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return None, ""
    return process.returncode, text


def measure_group(bench: Bench, options: argparse.Namespace, sides: list[str]) -> None:
    """Measure a group of runs, the fastest answers first."""
    group, scale = options.only, 256 if options.toy else 1
    if group in _LENGTHS:
        length, steps = _LENGTHS[group]
        for side in sides:
            bench.measure(Run(group, side, length // scale, steps))
        return
    capped = group == "card24"
    of: dict[str, Any] = {"quantised": capped and not options.toy}
    of |= {"cap": _CARD24 if of["quantised"] else None, "layers": options.layers}
    for side in sides:
        for length in options.lengths:
            bench.measure(Run(group, side, length, steps=1, **of))
        if not options.lengths:
            start = (32768 if capped else 131072) // scale
            list(bench.longest(start, group=group, side=side, **of))


def _numbers(text: str) -> list[int]:
    return [int(word) for word in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("--only", default="cost", choices=("cost", "row", "longest", "card24"))
    parser.add_argument("--sides", help="some of them, in order")
    parser.add_argument("--peer-path", help="folder that has liger_kernel")
    parser.add_argument("--lengths", type=_numbers, default=[], help="of longest and card24 alone")
    parser.add_argument("--layers", type=int, default=4, help="of longest and card24 alone")
    parser.add_argument("--model", default="llama-8b")
    parser.add_argument("--budget", type=float, default=570, help="seconds for all")
    parser.add_argument("--limit", type=float, default=300, help="seconds for a measurement")
    parser.add_argument("--output", help="file for all figures, as JSON")
    parser.add_argument("--toy", action="store_true", help="tiny models on a CPU")
    options = parser.parse_args()
    known = [side for side in SIDES if side != _PEER or options.peer_path]
    sides = options.sides.split(",") if options.sides else known
    if unknown := set(sides) - set(known):
        parser.error(f"no such sides: {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    with tempfile.TemporaryDirectory(prefix="long-bench-") as folder:
        model = "gemma3-text" if options.toy else options.model
        bench = Bench(model, options.budget, options.limit, Path(folder), options.peer_path)
        values: dict[str, Any] = {"command": " ".join(["python", *sys.argv])}
        if not options.toy and options.only in _LENGTHS:
            tflops = apart(matmul_tflops, 60)
            floor = bench.floor_ms(_LENGTHS[options.only][0], tflops)
            values |= {"matmul_tflops": tflops, "floor": floor}
            print(json.dumps(values), flush=True)
        measure_group(bench, options, sides)
        values |= {"environment": environment(), "runs": bench.found}
    if options.output:
        Path(options.output).write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
