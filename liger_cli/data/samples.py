"""The sample conversations: two people chatting, out of the PyPI package chitchat-dataset."""

from __future__ import annotations

import importlib.util
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from liger_cli.common.readers import read_json
from liger_cli.data.rows import Record
from liger_cli.errors import EnvironmentProblem

__all__ = [
    "SAMPLE_CLASSES",
    "SAMPLE_LICENCE",
    "SAMPLE_NAME",
    "SAMPLE_PAIRS",
    "code_files",
    "find_sample",
    "read_sample",
    "read_sample_classes",
    "read_sample_pairs",
]

SAMPLE_NAME = "chitchat"
SAMPLE_LICENCE = "MIT"
SAMPLE_PAIRS = "pairs, whose rejected answer is the reply of another conversation"

SAMPLE_CLASSES = "labels chitchat, and code: lines of the standard library of Python"

_PACKAGE = "chitchat-dataset==0.9.0"
# Every twentieth conversation is for evaluation: 201 of 4018.
_EVAL_EVERY = 20
# Some conversations have hundreds of turns, which a run would tokenise and then cut off.
_MAX_TURNS = 8
# Of a pair the answer must be within max_length.
_MAX_PAIR_TURNS = 4
# Of code a text has as many lines.
_CODE_LINES = 6


def read_sample(split: Literal["train", "eval"]) -> Iterator[Record]:
    """Yield the conversations of a split in the package's order.

    Who speaks first is the user, the other is the assistant. A conversation is used up to its
    eighth turn; the 3150 that nobody answered are left out.

    Raises:
        EnvironmentProblem: The package is not installed.
    """
    conversations = read_json(find_sample()).items()
    answered = ((key, value) for key, value in conversations if len(value["messages"]) > 1)
    for number, (key, conversation) in enumerate(answered):
        if (number % _EVAL_EVERY == 0) == (split == "eval"):
            messages = _messages(conversation["messages"][:_MAX_TURNS])
            yield f"{SAMPLE_NAME} {key}", {"messages": messages}


def read_sample_pairs(split: Literal["train", "eval"]) -> Iterator[Record]:
    """Yield each conversation of a split with its last reply chosen and another one rejected.

    The rejected one is the last reply of the conversation before, for the first that of the last;
    of conversations that end alike the next one before.

    Raises:
        EnvironmentProblem: The package is not installed.
    """
    dialogs = [(where, _answered(content["messages"])) for where, content in read_sample(split)]
    for number, (where, messages) in enumerate(dialogs):
        chosen = messages[-1]
        others = (dialogs[number - i][1][-1] for i in range(1, len(dialogs)))
        rejected = next((one for one in others if one["content"] != chosen["content"]), chosen)
        yield where, {"prompt": messages[:-1], "chosen": [chosen], "rejected": [rejected]}


def read_sample_classes(split: Literal["train", "eval"]) -> Iterator[Record]:
    """Yield texts with a label in turn: what people say in a conversation, and lines of code.

    The code is that of Python's standard library, as many texts of it as there are conversations.

    Raises:
        EnvironmentProblem: The package is not installed, or the library has no source.
    """
    for (where, content), (place, code) in zip(read_sample(split), _code(split), strict=False):
        said = "\n".join(message["content"] for message in content["messages"])
        yield where, {"text": said, "label": "chitchat"}
        yield place, {"text": code, "label": "code"}


def code_files() -> list[Path]:
    """Return the files that the sample has lines of: modules of Python's standard library.

    Raises:
        EnvironmentProblem: They are not there, as in a Python that is one file.
    """
    folder = Path(sysconfig.get_path("stdlib"))
    # Some systems put files of their own beside them.
    paths = [folder / f"{name}.py" for name in sorted(sys.stdlib_module_names)]
    found = [path for path in paths if path.is_file()]
    if not found:
        raise EnvironmentProblem(
            f"the sample data {SAMPLE_NAME} has lines of the standard library, and {folder} has no "
            "source",
            hint="take a .jsonl file with text and label",
        )
    return found


def _code(split: Literal["train", "eval"]) -> Iterator[tuple[str, str]]:
    """Yield texts of code of a split, each with its place."""
    number = 0
    for path in code_files():
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        for start in range(0, len(lines) - _CODE_LINES, _CODE_LINES):
            if (number % _EVAL_EVERY == 0) == (split == "eval"):
                yield f"{path.name} {start + 1}", "\n".join(lines[start : start + _CODE_LINES])
            number += 1


def _answered(messages: list[dict[str, str]]) -> list[dict[str, str]]:
    """Return a conversation up to its last answer, the second at most."""
    return messages[: min(_MAX_PAIR_TURNS, len(messages) // 2 * 2)]


def _messages(turns: list[list[dict[str, Any]]]) -> list[dict[str, str]]:
    # A turn is all that one person sent before the other wrote, each line a separate message.
    return [
        {
            "role": "assistant" if number % 2 else "user",
            "content": "\n".join(line["text"].strip() for line in turn),
        }
        for number, turn in enumerate(turns)
    ]


def find_sample() -> Path:
    """Return the file of the package.

    Raises:
        EnvironmentProblem: The package is not installed.
    """
    # The package is located and not imported: importing it reads the file a second time.
    spec = importlib.util.find_spec("chitchat_dataset")
    for folder in (spec.submodule_search_locations if spec else None) or []:
        if (Path(folder) / "dataset.json").is_file():
            return Path(folder) / "dataset.json"
    raise EnvironmentProblem(
        f"the sample data {SAMPLE_NAME} needs the package {_PACKAGE}, which is not installed",
        hint=f"pip install {_PACKAGE}\nor take --dataset synthetic, or a .jsonl file",
    )
