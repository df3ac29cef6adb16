"""Rows that are token ids already, with the labels or the mask that the user has made."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from liger_cli.data.values import check_list, describe
from liger_cli.errors import DataError

__all__ = ["read_token_ids"]

_IGNORED = -100


def read_token_ids(content: Mapping[str, Any], where: str) -> tuple[tuple[int, ...], ...]:
    """Return the ids and the labels of a row of token ids.

    Args:
        content: input_ids; and perhaps labels, each -100 or the id at its place, or loss_mask, each
            1 (trained) or 0. Without either every token is trained.

    Raises:
        DataError: They are no lists of one length, or a label is another token.
    """
    ids = _integers(content["input_ids"], "input_ids", where)
    if negative := [token for token in ids if token < 0]:
        raise DataError(f"{where}: input_ids has {negative[0]}; a token id is 0 or more")
    if {"labels", "loss_mask"} <= set(content):
        raise DataError(f"{where}: labels and loss_mask are both there; keep one of them")
    labels = list(ids)
    for name in {"labels", "loss_mask"} & set(content):
        given = _integers(content[name], name, where)
        if len(given) != len(ids):
            raise DataError(f"{where}: {name} has {len(given)} entries for {len(ids)} input_ids")
        allowed = (0, 1) if name == "loss_mask" else None
        for i, (token, value) in enumerate(zip(ids, given, strict=True)):
            if value not in (allowed or (_IGNORED, token)):
                raise DataError(
                    f"{where}: {name}[{i}] is {value}; allowed are "
                    + ("0 and 1" if allowed else f"-100 and the token at its place, {token}"),
                    hint=None if allowed else "labels are not shifted; the model does that",
                )
            if value in (0, _IGNORED) and (allowed or value == _IGNORED):
                labels[i] = _IGNORED
    labels[:1] = [_IGNORED]
    return ids, tuple(labels)


def _integers(value: Any, name: str, where: str) -> tuple[int, ...]:
    found = tuple(item for _, item in check_list(value, name, where))
    for i, item in enumerate(found):
        if isinstance(item, bool) or not isinstance(item, int):
            raise DataError(f"{where}: {name}[{i}] must be an integer, found {describe(item)}")
    return found
