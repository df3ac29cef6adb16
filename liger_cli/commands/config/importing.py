"""liger config import: the configuration of another program as one of liger."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from liger_cli.commands.config import axolotl, llama_factory
from liger_cli.commands.config.translation import Translation
from liger_cli.common.outputs import check_writable, write_file
from liger_cli.config import find_problems, load_config
from liger_cli.config.yaml_file import read_file, to_yaml
from liger_cli.errors import ConfigError
from liger_cli.report import notify, show_lines

__all__ = ["import_config", "import_to"]

_PROGRAMS = {"axolotl": axolotl, "LLaMA-Factory": llama_factory}


def import_config(path: Path) -> tuple[str, str, Translation]:
    """Return the program that a file is for, the YAML of liger, and what was translated.

    Raises:
        ConfigError: The file cannot be read, is of neither program, or trains something else.
    """
    given: dict[str, Any] = {}
    for entry in read_file(path):
        if entry.name in given:
            raise ConfigError(f"{entry.at_name}: {entry.name!r} is set twice")
        given[entry.name] = entry.value
    name = _program(given, path)
    found = _PROGRAMS[name].translate(given, path.parent)
    load_config(None, found.values if "model" in found.values else {**found.values, "model": "m"})
    lines = [f"# Translated from {path.name} of {name} by liger config import.\n"]
    lines += [f"# not translated: {key}: {reason}\n" for key, reason in found.lost.items()]
    lines += [f"# note: {note}\n" for note in found.notes]
    return name, "".join([*lines, to_yaml(found.values)]), found


def import_to(path: Path, output: Path | None, *, overwrite: bool) -> None:
    """Write the translation to a file, or print it; name on stderr what is not in it.

    Raises:
        ConfigError: As import_config, or the file exists and is not to be overwritten.
    """
    name, text, found = import_config(path)
    if output is not None:
        check_writable(output, "file")
        if output.exists() and not overwrite:
            raise ConfigError(f"{output} exists", hint="--force overwrites it.")
        write_file(output, text.encode())
        show_lines(f"wrote {output}: {len(found.values)} keys of {name}")
    else:
        show_lines(*text.splitlines())
    for key, reason in found.lost.items():
        notify(f"not translated: {key}: {reason}")
    for note in found.notes:
        notify(f"note: {note}")


def _program(given: Mapping[str, Any], path: Path) -> str:
    counts = {
        name: sum(key in given for key in program.MARKS) for name, program in _PROGRAMS.items()
    }
    name = max(counts, key=lambda name: counts[name])
    if not counts[name]:
        if not find_problems(path):
            raise ConfigError(f"{path} is a configuration of liger already")
        marks = "; ".join(f"{n}: {', '.join(p.MARKS)}" for n, p in _PROGRAMS.items())
        raise ConfigError(
            f"{path} is of none of the programs that are read; by keys such as {marks}"
        )
    return name
