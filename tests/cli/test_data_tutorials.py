"""The pages of docs/tutorials on data: files are written, commands run, and the output is so.

A block whose first line names a file after its language is that file. In a block of console a line
that begins with `$ ` is a command, and the lines below it are lines of its output; `[...]` is for
lines left out.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

FOLDER = next(
    parent / "docs" / "tutorials"
    for parent in Path(__file__).parents
    if (parent / "docs" / "tutorials").is_dir()
)
PAGES = ("sharegpt", "openai-tools", "csv", "moving-from")
_BLOCK = re.compile(r"^```(\S+)(?: (\S+))?\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def commands(block: str) -> list[tuple[str, list[str]]]:
    """Return the commands of a block, each with the lines below it."""
    found: list[tuple[str, list[str]]] = []
    for line in block.splitlines():
        if line.startswith("$ "):
            found.append((line[2:], []))
        else:
            found[-1][1].append(line)
    return found


@pytest.mark.parametrize("page", PAGES)
def test_the_commands_of_a_data_tutorial(liger, page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    num_commands = 0
    for language, name, content in _BLOCK.findall((FOLDER / f"{page}.md").read_text()):
        if name:
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content)
        elif language == "console":
            for command, lines in commands(content):
                program, *words = shlex.split(command)
                assert program == "liger", command
                done = liger(*words)
                found = [line.rstrip() for line in (done.out + "\n" + done.err).splitlines()]
                missing = [line for line in lines if line not in (*found, "[...]")]
                assert not missing, f"{command}\n{done.out}{done.err}"
                is_refused = any(line.startswith("error: ") for line in lines)
                assert (done.code != 0) == is_refused, f"{command}\n{done.err}"
                num_commands += 1
    assert num_commands >= 2
