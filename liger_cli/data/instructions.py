"""Instructions in the format of Stanford Alpaca, with the columns that LLaMA-Factory adds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from liger_cli.common.readers import JsonError, parse_json
from liger_cli.data.values import check_text, describe
from liger_cli.errors import DataError

__all__ = ["instruction_messages", "instruction_parts"]

# The wording of Stanford Alpaca, for a model without a chat template.
_SYSTEM = (
    "Below is an instruction that describes a task{with_input}. Write a response that "
    "appropriately completes the request."
)
_TURN = "### Instruction:\n{}\n\n### Response:\n"
_LAST_TURN = "### Instruction:\n{}\n\n{}### Response:\n"


def instruction_messages(
    content: Mapping[str, Any], where: str, joint: str = "\n\n"
) -> tuple[Mapping[str, str], ...]:
    """Return an instruction as a conversation.

    Args:
        joint: Between instruction and input.
        content: instruction and output, and perhaps input, which the user says after the
            instruction; system, the first message; history, a list of earlier [question, answer].

    Raises:
        DataError: A column is not text, or history is no list of pairs.
    """
    names = ("instruction", "input", "output", "system")
    texts = {name: check_text(content.get(name, ""), name, where) for name in names}
    asked = joint.join(text for text in (texts["instruction"], texts["input"]) if text)
    turns = [*_history(content.get("history", []), where), (asked, texts["output"])]
    system = [{"role": "system", "content": texts["system"]}] if texts["system"] else []
    spoken = [
        {"role": role, "content": text}
        for turn in turns
        for role, text in zip(("user", "assistant"), turn, strict=True)
    ]
    return (*system, *spoken)


def instruction_parts(
    messages: Sequence[Mapping[str, str]], instruction: str, extra: str
) -> tuple[str, ...]:
    """Return prompt and answer of each turn, for a model without a chat template."""
    system = _SYSTEM.format(
        with_input=", paired with an input that provides further context" if extra else ""
    )
    if messages[0]["role"] == "system":
        system, messages = messages[0]["content"], messages[1:]
    texts = [message["content"] for message in messages]
    parts = []
    for asked, answer in zip(texts[:-2:2], texts[1:-2:2], strict=True):
        parts += [_TURN.format(asked), answer]
    last = _LAST_TURN.format(instruction, f"### Input:\n{extra}\n\n" if extra else "")
    parts += [last, texts[-1]]
    return tuple(
        ("" if i % 2 else "\n\n" if i else f"{system}\n\n") + part for i, part in enumerate(parts)
    )


def _history(history: Any, where: str) -> Iterator[tuple[str, str]]:
    if isinstance(history, str):
        # A CSV file has no lists.
        try:
            history = parse_json(history)
        except JsonError as error:
            raise DataError(f"{where}: history is {error.reason}") from error
    if not isinstance(history, list):
        raise DataError(f"{where}: history must be a list, found {describe(history)}")
    for number, turn in enumerate(history):
        if not isinstance(turn, list) or len(turn) != 2:
            raise DataError(
                f"{where}: history[{number}] must be a list of question and answer, found "
                + (f"{len(turn)} items" if isinstance(turn, list) else describe(turn))
            )
        asked, answer = (check_text(text, f"history[{number}]", where) for text in turn)
        yield asked, answer
