"""The names that --model takes, checked without torch and transformers, whose imports take long."""

from __future__ import annotations

from liger_cli.common.readers import expand_path
from liger_cli.errors import ConfigError
from liger_cli.training.model.presets import preset_names
from liger_kernels.nearest import nearest_name

__all__ = ["check_model_name", "preset_of"]


def preset_of(name: str) -> str | None:
    """Return the preset that a name is of, or None."""
    # Model types are spelled with underscores, files are not: qwen3_moe is the preset qwen3-moe.
    preset = name.replace("_", "-")
    return preset if preset in preset_names() else None


def check_model_name(name: str) -> None:
    """Check that a name is that of a preset, a directory, a config.json, or may be a hub id.

    Raises:
        ConfigError: It is none of them.
    """
    if not name:
        raise ConfigError("model is empty; liger models lists the presets")
    if preset_of(name) is not None:
        return
    path = expand_path(name, "model")
    if path.is_dir():
        return
    if path.is_file():
        if path.suffix != ".json":
            raise ConfigError(f"model {name} is a file, but not a config.json")
        return
    if name.endswith(".json") or name[:1] in "./~" or name[-1:] == "/" or name.count("/") > 1:
        raise ConfigError(f"model {name}: there is no such file or directory")
    if "/" in name:
        return
    nearest = nearest_name(name.lower(), preset_names(), cutoff=0.5)
    raise ConfigError(
        f"model {name!r} is neither a preset nor a path"
        + (f"; did you mean {nearest}?" if nearest else ""),
        hint="liger models lists the presets; a hub id is written organisation/name",
    )
