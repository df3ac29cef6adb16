"""Train a tiny llama on the layers of `liger export kernels`, by kernelize and by use_kernels.

Runs where Hugging Face's `kernels` package and a transformers that takes it are installed, which
the development environment is not: transformers 5.22.2 with kernels 0.17.2, or 5.17.0 with 0.16.2.
No network is used.

    python scripts/hf_kernels_check.py [--device cuda] [--steps 5]

Prints a line for each way, and exits 1 if a loss differs from stock, or an op was not called.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import torch  # noqa: E402
import transformers  # noqa: E402
from torch import nn  # noqa: E402

from liger_cli.commands.export.kernels import export_kernels  # noqa: E402
from liger_kernels.transformers import hub_layers  # noqa: E402
from liger_kernels.transformers.replacements import attention  # noqa: E402

LAYERS = {"RMSNorm": "RMSNorm", "rotary_pos_emb": "RotaryPosEmb"}
# Two norms a layer and the last one; one rotation a layer.
NUM_LAYERS = 2
WANTED = {"rms_norm": 2 * NUM_LAYERS + 1, "rope": NUM_LAYERS}


def _config() -> Any:
    return transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=256,
    )


def _count_calls(calls: dict[str, int]) -> None:
    """Count the calls of the ops that layers make."""

    def counted(name: str, op: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            calls[name] += 1
            return op(*args, **options)

        return call

    hub_layers.rms_norm = counted("rms_norm", hub_layers.rms_norm)  # type: ignore[assignment]
    attention.rope = counted("rope", attention.rope)  # type: ignore[attr-defined]


def _train(model: nn.Module, device: str, steps: int) -> list[float]:
    """Return the losses of some steps of AdamW on the same rows."""
    ids = torch.randint(0, 256, (4, 64), generator=torch.Generator().manual_seed(1)).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(steps):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def _kernelize(model: Any, repository: Path, device: str) -> None:
    from kernels import LocalLayerRepository, Mode, kernelize, use_kernel_mapping

    mapping = {
        name: {device: LocalLayerRepository(repo_path=repository, layer_name=layer)}
        for name, layer in LAYERS.items()
    }
    with use_kernel_mapping(mapping, inherit_mapping=False):
        kernelize(model, mode=Mode.TRAINING, device=device)


def _use_kernels(model: Any, repository: Path, device: str) -> None:
    mapping = {name: f"{repository}:{layer}" for name, layer in LAYERS.items()}
    config = transformers.KernelConfig(mapping, use_local_kernel=True)
    model.set_use_kernels(True, config)
    # Each change of mode asks for the layers again.
    model.eval()
    model.train()


def _ways(device: str) -> dict[str, Callable[..., None] | None]:
    """Return the ways of loading layers that a device has; stock comes first.

    `kernels` binds a rotary function for every model of a family, so that no stock comes after.
    """
    from transformers.utils import kernel_config

    ways: dict[str, Callable[..., None] | None] = {"stock": None, "kernelize": _kernelize}
    # transformers lists no CPU, for which `kernels` has variants all the same.
    devices = getattr(kernel_config, "KERNELS_SUPPORTED_DEVICE_TYPES", None)
    if device == "cpu" and devices is None:
        print("use_kernels: not tried, this transformers has it for no CPU")
        return ways
    if device == "cpu":
        devices.append(device)
    return {**ways, "use_kernels": _use_kernels}


def _compare(saved: Path, repository: Path, device: str, steps: int) -> list[str]:
    """Train a model in each way, print a line for each, and return the problems."""
    calls, problems, stock = dict.fromkeys(WANTED, 0), [], []
    _count_calls(calls)
    for name, prepare in _ways(device).items():
        model = transformers.AutoModelForCausalLM.from_pretrained(saved).to(device).train()
        calls.update(dict.fromkeys(calls, 0))
        try:
            if prepare is not None:
                prepare(model, repository, device)
            losses = _train(model, device, steps)
        # The other ways are of interest too.
        except Exception as error:
            problems.append(f"{name}: {error!r}")
            continue
        stock = stock or losses
        difference = max(abs(a - b) for a, b in zip(losses, stock, strict=True))
        print(
            f"{name}: losses {losses[0]:.6f} .. {losses[-1]:.6f}, {difference:.1e} from stock, "
            f"calls {calls}"
        )
        wanted = {op: 0 if prepare is None else n * steps for op, n in WANTED.items()}
        if calls != wanted or difference > 1e-4:
            problems.append(f"{name}: wanted calls {wanted} and a difference below 1e-4")
    return problems


def main() -> int:
    """Compare the ways with stock."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=5)
    options = parser.parse_args()
    print(f"transformers {transformers.__version__}, torch {torch.__version__}, {options.device}")
    with tempfile.TemporaryDirectory() as folder:
        repository, saved = Path(folder, "kernels"), Path(folder, "model")
        export_kernels(repository)
        torch.manual_seed(0)
        transformers.AutoModelForCausalLM.from_config(_config()).save_pretrained(saved)
        problems = _compare(saved, repository, options.device, options.steps)
    print("\n".join(problems) or "passed")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
