"""The sample conversations: two people chatting, out of the PyPI package chitchat-dataset."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from liger_cli.common.readers import read_json
from liger_cli.data.rows import Record
from liger_cli.errors import EnvironmentProblem

__all__ = ["SAMPLE_LICENCE", "SAMPLE_NAME", "find_sample", "read_sample"]

SAMPLE_NAME = "chitchat"
SAMPLE_LICENCE = "MIT"

_PACKAGE = "chitchat-dataset==0.9.0"
# Every twentieth conversation is for evaluation: 201 of 4018.
_EVAL_EVERY = 20
# Some conversations have hundreds of turns, which a run would tokenise and then cut off.
_MAX_TURNS = 8


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
