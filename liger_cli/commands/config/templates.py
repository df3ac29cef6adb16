"""The shipped training configurations, to run as they are or to start one's own from."""

from __future__ import annotations

from pathlib import Path

from liger_cli.common.outputs import check_writable, write_file
from liger_cli.errors import ConfigError
from liger_cli.report import show_lines
from liger_cli.training.model.presets import configs_directory
from liger_kernels.nearest import nearest_name

__all__ = ["template_names", "write_template"]


def template_names() -> list[str]:
    """Return the names of configs/train."""
    return sorted(path.stem for path in _directory().glob("*.yaml"))


def write_template(name: str, path: Path, *, overwrite: bool = False) -> None:
    """Copy a shipped configuration, comments and all, and say how to run it.

    Raises:
        ConfigError: There is no such template, or the file exists and is not to be overwritten.
        EnvironmentProblem: The file cannot be written.
    """
    names = template_names()
    if name not in names:
        near = nearest_name(name, names)
        hint = f"; did you mean {near!r}?" if near else ""
        raise ConfigError(f"--template: unknown template {name!r}{hint} ({', '.join(names)})")
    check_writable(path, "file")
    if path.exists() and not overwrite:
        raise ConfigError(f"{path} exists", hint="--force overwrites it.")
    write_file(path, (_directory() / f"{name}.yaml").read_bytes())
    verb = "eval" if name == "eval" else "train"
    show_lines(f"wrote {path} (template {name}); run it: liger {verb} -c {path}")


def _directory() -> Path:
    return configs_directory() / "train"
