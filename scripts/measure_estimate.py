"""Measure the peak memory of training steps on a GPU beside what `liger estimate` says.

python3 scripts/measure_estimate.py --output docs/results/estimate-h100.json
python3 scripts/measure_estimate.py --compare docs/results/estimate-h100.json

The first form trains three steps of every case as `liger train` does, with random weights and rows
of full length, and writes one record a case: the peak, what was allocated at the borders of the
last step's phases, and the live blocks at its peak, grouped by who allocated them. The file is
rewritten after each case, so that one that fails loses nothing. The second form needs no GPU: it
adds the estimate and its error to the records, and prints the rows of the table in
docs/estimate.md.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from accelerate.state import AcceleratorState, GradientState

from liger_cli.commands.train import run as runs
from liger_cli.commands.train.prepare import RunOptions
from liger_cli.config import RunConfig
from liger_cli.training import forward, session
from liger_cli.training.memory import Batch, MemoryEstimate, meta_model_of, step_memory
from liger_cli.training.model.source import resolve_model
from liger_cli.training.parallel import engine

STEPS = 3
# Groups of live blocks that a record lists.
NUM_GROUPS = 30
FRAMES = ("transformers", "liger_", "peft", "torch/optim", "torch/nn/utils", "accelerate")

OLMO2_1B = {
    "model_type": "olmo2",
    "vocab_size": 100352,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}
GLM4_SMALL = {
    "model_type": "glm4",
    "vocab_size": 151552,
    "hidden_size": 2048,
    "intermediate_size": 6912,
    "num_hidden_layers": 12,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "partial_rotary_factor": 0.5,
    "pad_token_id": 0,
}
QWEN3_MOE_SMALL = {
    "model_type": "qwen3_moe",
    "vocab_size": 151936,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "moe_intermediate_size": 512,
    "num_hidden_layers": 12,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "num_experts": 32,
    "num_experts_per_tok": 4,
    "norm_topk_prob": True,
    "mlp_only_layers": [],
    "decoder_sparse_step": 1,
}
# The head of case 105: as wide as Llama's, with Gemma's vocabulary.
WIDE_HEAD = {
    "model_type": "llama",
    "vocab_size": 262144,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 2,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "tie_word_embeddings": False,
}


@dataclass(frozen=True)
class Case:
    """One run: a preset or a configuration, rows, tokens a row, and keys of the run.

    Attributes:
        freezes_head: Whether the head gets no gradient, which no key of a run says.
    """

    name: str
    model: str | dict[str, Any]
    batch: int
    length: int
    keys: dict[str, Any] = field(default_factory=dict)
    freezes_head: bool = False


EAGER = {"ops": "none"}
CHECKPOINTS = {"gradient_checkpointing": True}
CASES = (
    Case("llama-1b", "llama-1b", 8, 2048),
    Case("llama-1b eager", "llama-1b", 8, 2048, EAGER),
    Case("llama-1b checkpointing", "llama-1b", 8, 2048, CHECKPOINTS),
    Case("llama-1b eager checkpointing", "llama-1b", 8, 2048, {**EAGER, **CHECKPOINTS}),
    Case("llama-1b lora", "llama-1b", 8, 2048, {"adapter": "lora"}),
    Case("llama-1b eager lora", "llama-1b", 4, 2048, {**EAGER, "adapter": "lora"}),
    Case("llama-1b bf16 autocast", "llama-1b", 4, 2048, {"bf16": True}),
    Case("llama-1b eager bf16 autocast", "llama-1b", 4, 2048, {**EAGER, "bf16": True}),
    Case("llama-1b float32", "llama-1b", 2, 1024, {"dtype": "float32"}),
    Case("llama-1b accumulation", "llama-1b", 16, 512, {"gradient_accumulation_steps": 2}),
    Case("llama-1b eager attention", "llama-1b", 2, 2048, {"attn_implementation": "eager"}),
    Case("llama-1b adamw_torch", "llama-1b", 1, 1024, {"optim": "adamw_torch"}),
    Case("llama-1b adamw_torch_fused", "llama-1b", 1, 1024, {"optim": "adamw_torch_fused"}),
    Case("llama-1b adafactor", "llama-1b", 1, 1024, {"optim": "adafactor"}),
    Case("llama-1b sgd", "llama-1b", 4, 1024, {"optim": "sgd"}),
    Case("llama-1b muon", "llama-1b", 1, 1024, {"optim": "muon"}),
    Case("llama-3b", "llama-3b", 4, 2048),
    Case("llama-3b eager", "llama-3b", 2, 2048, EAGER),
    Case("qwen3-0.6b", "qwen3-0.6b", 8, 2048),
    Case("qwen3-0.6b eager", "qwen3-0.6b", 4, 2048, EAGER),
    Case("gemma3-1b", "gemma3-1b", 4, 2048),
    Case("gemma3-1b eager", "gemma3-1b", 2, 2048, EAGER),
    Case("qwen3-moe", QWEN3_MOE_SMALL, 4, 2048),
    Case("qwen3-moe eager", QWEN3_MOE_SMALL, 4, 2048, EAGER),
    Case("olmo2-1b", OLMO2_1B, 4, 2048),
    Case("olmo2-1b eager", OLMO2_1B, 4, 2048, EAGER),
    Case("phi3-mini", "phi3-mini", 2, 2048),
    Case("glm4", GLM4_SMALL, 4, 2048),
    Case("wide head", WIDE_HEAD, 2, 1024),
    Case("wide head frozen", WIDE_HEAD, 2, 1024, freezes_head=True),
)
# The same paths in seconds on a CPU, where nothing but the script itself is tried.
TINY_CASES = (
    Case(
        "llama", {**WIDE_HEAD, "vocab_size": 512, "hidden_size": 64, "intermediate_size": 96}, 2, 32
    ),
    Case("qwen3-moe eager", "qwen3-moe", 2, 32, EAGER),
    Case("olmo2 frozen", "olmo2", 2, 32, freezes_head=True),
    Case("glm4 that fails", "glm4", 2, 32, {"optim": "adamw_8bit"}),
)


class Phases:
    """Bytes that are allocated at the borders of a step's phases, and the peak of each phase."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.steps: list[dict[str, int]] = []
        self._peak = 0

    def loaded(self) -> None:
        self._begin()

    def end(self, phase: str) -> None:
        """End a phase of the last step."""
        values = self.steps[-1]
        values[f"{phase} end"], peak = self._read()
        # Of several micro-batches the largest counts.
        values[f"{phase} peak"] = max(values.get(f"{phase} peak", 0), peak)

    def begin_step(self) -> None:
        allocated = self._begin()
        self.steps.append({"begin": allocated})

    @property
    def peak(self) -> int:
        return max(value for values in self.steps for value in values.values())

    def _begin(self) -> int:
        return self._read()[0]

    def _read(self) -> tuple[int, int]:
        if self._device.type != "cuda":
            return 0, 0
        peak = torch.cuda.max_memory_allocated(self._device)
        torch.cuda.reset_peak_memory_stats(self._device)
        return torch.cuda.memory_allocated(self._device), peak


@contextlib.contextmanager
def watching(case: Case, phases: Phases) -> Iterator[None]:
    """Record the phases of every step that the launcher's own loop runs inside."""
    load, ask, make = engine.load_patched, forward.LossOf.__call__, session.make_optimizer
    is_cuda = torch.cuda.is_available()

    def load_patched(*args: Any, **kwargs: Any) -> Any:
        model, record = load(*args, **kwargs)
        if case.freezes_head:
            model.get_output_embeddings().requires_grad_(False)
        phases.loaded()
        return model, record

    def loss_of(self: Any, *args: Any, **kwargs: Any) -> Any:
        is_new = not phases.steps or "optimizer end" in phases.steps[-1]
        if is_new and len(phases.steps) == STEPS:
            # The run's own estimate, after the last step.
            return ask(self, *args, **kwargs)
        if is_new:
            phases.begin_step()
            if len(phases.steps) == STEPS and is_cuda:
                torch.cuda.memory._record_memory_history(stacks="python")
        else:
            phases.end("backward")
        loss = ask(self, *args, **kwargs)
        phases.end("forward")
        return loss

    def make_optimizer(*args: Any, **kwargs: Any) -> Any:
        optimizer = make(*args, **kwargs)
        # Clipping lies between; its peak counts as the backward's.
        optimizer.register_step_pre_hook(lambda *_: phases.end("backward"))
        optimizer.register_step_post_hook(lambda *_: phases.end("optimizer"))
        return optimizer

    with (
        mock.patch.object(engine, "load_patched", load_patched),
        mock.patch.object(forward.LossOf, "__call__", loss_of),
        mock.patch.object(session, "make_optimizer", make_optimizer),
    ):
        yield


def live_at_peak() -> list[dict[str, Any]]:
    """List the storages that the last step had allocated at its peak, by size and origin."""
    if not torch.cuda.is_available():
        return []
    events = torch.cuda.memory._snapshot()["device_traces"][torch.cuda.current_device()]
    torch.cuda.memory._record_memory_history(enabled=None)
    live: dict[int, dict[str, Any]] = {}
    total = peak = 0
    at_peak: list[dict[str, Any]] = []
    # Twice over the events: copying the blocks at every new peak would take minutes.
    for is_second in (False, True):
        live, total = {}, 0
        for event in events:
            if event["action"] == "alloc":
                live[event["addr"]] = event
                total += event["size"]
            elif event["action"] == "free_completed" and event["addr"] in live:
                total -= live.pop(event["addr"])["size"]
            if is_second and total == peak:
                at_peak = list(live.values())
                break
            peak = max(peak, total)
    counts: Counter[tuple[int, str]] = Counter((e["size"], origin(e["frames"])) for e in at_peak)
    groups = sorted(counts.items(), key=lambda item: -item[0][0] * item[1])
    return [
        {"bytes": size * count, "blocks": count, "size": size, "origin": place}
        for (size, place), count in groups[:NUM_GROUPS]
    ]


def origin(frames: list[dict[str, Any]]) -> str:
    """The innermost lines that say which part of a model allocated a block."""
    known = [f for f in frames if any(name in f["filename"] for name in FRAMES)]
    lines = [f"{Path(f['filename']).name}:{f['line']} {f['name']}" for f in known[:3]]
    return " < ".join(lines) or "autograd"


def run_config(case: Case, folder: Path) -> RunConfig:
    model = case.model
    if isinstance(model, dict):
        file = folder / "config.json"
        file.write_text(json.dumps(model), encoding="utf-8")
        model = str(file)
    keys = {"ops": "auto", **case.keys}
    return RunConfig(
        model=model,
        dataset="synthetic",
        max_length=case.length,
        per_device_train_batch_size=case.batch,
        max_steps=STEPS,
        output_dir=folder / "run",
        **keys,
    )


def measure(case: Case, device: torch.device) -> dict[str, Any]:
    """Train the steps of a case and return its record."""
    phases = Phases(device)
    with tempfile.TemporaryDirectory() as name, watching(case, phases):
        config = run_config(case, Path(name))
        report = runs.run_train(config, RunOptions(measure_only=True))
        found = {
            "coverage": report.coverage if report else None,
            "peak": phases.peak,
            "steps": phases.steps,
            "live_at_peak": live_at_peak(),
        }
    if device.type == "cuda":
        keys = ("requested_bytes.all.peak", "inactive_split_bytes.all.peak", "num_alloc_retries")
        stats = torch.cuda.memory_stats(device)
        found["statistics"] = {key: stats.get(key) for key in keys}
    return found


def release(device: torch.device) -> int:
    """Free what a case left and return the bytes that stay allocated: the libraries' workspaces."""
    # accelerate keeps one precision for a process, and the cases differ in it.
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    gc.collect()
    if device.type != "cuda":
        return 0
    torch.cuda.memory._record_memory_history(enabled=None)
    torch.cuda.empty_cache()
    return torch.cuda.memory_allocated(device)


def measure_all(cases: tuple[Case, ...], output: Path) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    card = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    records: list[dict[str, Any]] = []
    for case in cases:
        started = time.perf_counter()
        record: dict[str, Any] = {**asdict(case), "allocated_before": release(device)}
        try:
            record |= measure(case, device)
        except Exception as error:
            # Its frames hold the model, which has to go before the next case.
            traceback.clear_frames(error.__traceback__)
            record["error"] = f"{type(error).__name__}: {error}"[:2000]
        record["seconds"] = round(time.perf_counter() - started, 1)
        records.append(record)
        document = {"card": card, "torch": torch.__version__, "cases": records}
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        peak = f"{record['peak'] / 2**30:8.2f} GiB" if "peak" in record else record["error"]
        print(f"{case.name:32} {peak}  {record['seconds']} s", flush=True)


def compare(path: Path) -> None:
    """Add the estimates to the records of a file and print both."""
    document = json.loads(path.read_text(encoding="utf-8"))
    on_gpu = document["card"] != "cpu"
    print("| case | rows | measured | estimated | error |\n| --- | --- | --- | --- | --- |")
    for record in document["cases"]:
        case = Case(**{key.name: record[key.name] for key in fields(Case)})
        found = estimated(case, on_gpu=on_gpu)
        record["estimate"] = {**asdict(found), "peak": found.peak}
        if not record.get("peak"):
            continue
        record["relative_error"] = found.peak / record["peak"] - 1
        rows = f"{case.batch} x {case.length}"
        sizes = f"{record['peak'] / 1e9:.2f} GB | {found.peak / 1e9:.2f} GB"
        print(f"| {case.name} | {rows} | {sizes} | {record['relative_error']:+.1%} |", flush=True)
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def estimated(case: Case, *, on_gpu: bool) -> MemoryEstimate:
    with tempfile.TemporaryDirectory() as name:
        config = run_config(case, Path(name))
        model = meta_model_of(config, resolve_model(config.model), on_gpu=on_gpu)
    if case.freezes_head:
        model.get_output_embeddings().requires_grad_(False)
    return step_memory(config, model, Batch(case.batch, case.length), on_gpu=on_gpu)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("runs/estimate.json"))
    parser.add_argument("--compare", type=Path, metavar="FILE", help="of --output")
    parser.add_argument("--only", default="", help="measure the cases whose name holds this")
    parser.add_argument("--tiny", action="store_true", help="small cases, for a CPU")
    arguments = parser.parse_args()
    if arguments.compare is not None:
        compare(arguments.compare)
        return
    cases = TINY_CASES if arguments.tiny else CASES
    measure_all(tuple(case for case in cases if arguments.only in case.name), arguments.output)


if __name__ == "__main__":
    main()
