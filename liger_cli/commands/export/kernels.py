"""liger export kernels: a repository of layers that Hugging Face's `kernels` package loads."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import liger_kernels
from liger_cli.errors import ConfigError
from liger_cli.training.checkpoints.files import write_failure, written_aside

__all__ = ["BACKENDS", "ExportedKernels", "export_kernels"]

# Devices that the ops run on; each has a variant of its build, of the same files.
BACKENDS = ("cpu", "cuda", "rocm", "xpu")
# Of the layers: to be raised when one is removed or takes other arguments.
_VERSION = 1

_INIT = '"""Layers of liger-kernels, which must be installed: pip install liger-kernels."""\n\n'

_README = """# liger-kernels for `kernels`

Layers for models of transformers, by their registered names: {names}. Written by liger {version};
they import the installed `liger-kernels`.

```python
from pathlib import Path

from kernels import LocalLayerRepository, Mode, kernelize, use_kernel_mapping

here = Path({path})
layers = {layers}
mapping = {{
    name: {{"cuda": LocalLayerRepository(repo_path=here, layer_name=layer)}}
    for name, layer in layers.items()
}}
with use_kernel_mapping(mapping, inherit_mapping=False):
    kernelize(model, mode=Mode.TRAINING, device="cuda")
```

By `use_kernels` of transformers, for the names that the model has:

```python
from transformers import KernelConfig

model.train()
model.set_use_kernels(
    True,
    KernelConfig(
        {{"RMSNorm": {norm}, "rotary_pos_emb": {rotation}}},
        use_local_kernel=True,
    ),
)
```
"""


@dataclass(frozen=True)
class ExportedKernels:
    """A repository that was written.

    Attributes:
        path: Its directory, absolute.
        layers: The class for each name that transformers registers.
        backends: Devices that have a variant.
    """

    path: str
    layers: dict[str, str]
    backends: tuple[str, ...]

    @property
    def lines(self) -> tuple[str, ...]:
        return (
            f"{self.path}: layers {', '.join(self.layers)} for {', '.join(self.backends)}",
            f"{self.path}/README.md shows how kernelize and use_kernels load them",
        )


def export_kernels(directory: Path) -> ExportedKernels:
    """Write the repository.

    Args:
        directory: New or empty.

    Raises:
        ConfigError: It has files already, or a colon in its path, at which `kernels` cuts.
        EnvironmentProblem: It cannot be written.
    """
    from liger_kernels.transformers.hub_layers import LAYERS

    path = directory.resolve()
    layers = {name: layer.__name__ for name, layer in LAYERS.items()}
    if ":" in str(path):
        raise ConfigError(f"{path} has a colon: kernels reads what follows one as a layer's name")
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ConfigError(
            f"{directory} exists and is not an empty directory",
            hint="Take another directory, or delete it.",
        )
    try:
        with written_aside(path) as new:
            for backend in BACKENDS:
                _write_variant(new / "build" / f"torch-{backend}", backend, layers)
            text = _README.format(
                names=", ".join(f"`{name}`" for name in layers),
                version=liger_kernels.__version__,
                path=_quoted(str(path)),
                norm=_quoted(f"{path}:RMSNorm"),
                rotation=_quoted(f"{path}:RotaryPosEmb"),
                layers=json.dumps(layers, indent=4),
            )
            (new / "README.md").write_text(text, encoding="utf-8")
    except Exception as error:
        raise write_failure(error, directory) from error
    return ExportedKernels(str(path), layers, BACKENDS)


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _write_variant(place: Path, backend: str, layers: dict[str, str]) -> None:
    place.mkdir(parents=True)
    # The id becomes the name of a module, so that it must be another for each variant.
    metadata = {
        "id": f"_liger_{backend}_{_VERSION}",
        "name": "liger",
        "version": _VERSION,
        "license": "Apache-2.0",
        "python-depends": [],
        "backend": {"type": backend},
    }
    (place / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n", encoding="utf-8")
    names = sorted(set(layers.values()))
    (place / "__init__.py").write_text(
        f'{_INIT}from . import layers\n\n__all__ = ["layers"]\n', encoding="utf-8"
    )
    (place / "layers.py").write_text(
        f"{_INIT}from liger_kernels.transformers.hub_layers import {', '.join(names)}\n\n"
        f"__all__ = {json.dumps(names)}\n",
        encoding="utf-8",
    )
