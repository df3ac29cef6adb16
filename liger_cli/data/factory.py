"""Datasets as LLaMA-Factory describes them: an entry of its dataset_info.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from liger_cli.common.readers import JsonError, expand_path, read_json
from liger_cli.config.datasets import DatasetEntry
from liger_cli.errors import ConfigError, DataError
from liger_kernels.nearest import nearest_name

__all__ = ["INFO_FILE", "translate_entry"]

INFO_FILE = "dataset_info.json"

_KEYS = (
    *("file_name", "hf_hub_url", "subset", "split", "formatting", "columns", "tags"),
    *("num_samples", "ranking"),
)
# The columns of LLaMA-Factory: its names to ours, by its formatting.
_ALPACA = {
    "prompt": "instruction",
    "query": "input",
    "response": "output",
    "history": "history",
    "system": "system",
    "kto_tag": "kto_tag",
    "chosen": "chosen",
    "rejected": "rejected",
}
_SHAREGPT = {"messages": "conversations", "system": "system", "tools": "tools"}
_SHAREGPT |= {name: name for name in ("kto_tag", "chosen", "rejected")}
_ALPACA_DEFAULTS = {"prompt": "instruction", "query": "input", "response": "output"}
_TAGS = {
    "user_tag": "user",
    "assistant_tag": "assistant",
    "observation_tag": "tool",
    "function_tag": "function_call",
    "system_tag": "system",
}
_SHAREGPT_TAGS = {
    "role_tag": "from",
    "content_tag": "value",
    "user_tag": "human",
    "assistant_tag": "gpt",
    "observation_tag": "observation",
    "function_tag": "function_call",
    "system_tag": "system",
}
_OPENAI_TAGS = {
    "role_tag": "role",
    "content_tag": "content",
    "user_tag": "user",
    "assistant_tag": "assistant",
    "observation_tag": "tool",
    "system_tag": "system",
}


def translate_entry(entry: DatasetEntry) -> DatasetEntry:
    """Return the dataset that an entry of a dataset_info.json describes; any other as it is.

    Args:
        entry: Its path is FOLDER/dataset_info.json:NAME; without a name the file has one entry.

    Raises:
        ConfigError: There is no entry of that name.
        DataError: The file cannot be read, or the entry says something that is not read here.
    """
    path, colon, name = entry.path.rpartition(":")
    path, name = (path, name) if colon and path.endswith(INFO_FILE) else (entry.path, "")
    if Path(path).name != INFO_FILE:
        return entry
    file = expand_path(path, "dataset", DataError)
    if not file.is_file():
        raise DataError(f"there is no data file {file}")
    if entry.columns or entry.roles or entry.message_fields or entry.split:
        raise ConfigError(f"{entry.path}: columns, roles, fields and split are those of the file")
    try:
        infos = read_json(file)
    except JsonError as error:
        raise DataError(str(error)) from error
    if not isinstance(infos, dict) or not infos:
        raise DataError(f"{file} holds no datasets: wanted an object of names and descriptions")
    if not name and len(infos) == 1:
        name = next(iter(infos))
    if name not in infos:
        near = nearest_name(name, list(infos))
        raise ConfigError(
            f"{entry.path}: which of its datasets? {', '.join(map(str, list(infos)[:30]))}"
            + (f"; did you mean {file}:{near}?" if near else f" ({file}:NAME)")
        )
    return _described(infos[name], f"{file}: {name}", file.parent, entry)


def _described(info: Any, where: str, folder: Path, entry: DatasetEntry) -> DatasetEntry:
    if not isinstance(info, dict):
        raise DataError(f"{where} must be an object")
    # What is null or false is absent.
    info = {key: value for key, value in info.items() if value not in (None, False, "", {})}
    for key in info:
        if key not in _KEYS:
            raise DataError(f"{where}: {key} is not read here (read are {', '.join(_KEYS)})")
    formatting = info.get("formatting", "alpaca")
    if formatting == "alpaca":
        names = _columns(info.get("columns", _ALPACA_DEFAULTS), _ALPACA, where)
        if "output" not in names and "instruction" in names and "ranking" not in info:
            # For further pre-training: the prompt is the text.
            names = {"text": names["instruction"]}
        found = replace(entry, columns=names)
    elif formatting in ("sharegpt", "openai"):
        usual = _SHAREGPT_TAGS if formatting == "sharegpt" else _OPENAI_TAGS
        given = info.get("columns", {"messages": "conversations"})
        tags = info.get("tags", usual)
        found = replace(
            entry,
            columns=_columns(given, _SHAREGPT, where),
            roles={ours: [tags[tag]] for tag, ours in _TAGS.items() if tags.get(tag)},
            message_fields=_fields(tags, usual, where),
        )
    else:
        raise DataError(
            f"{where}: formatting is {formatting!r}; allowed are alpaca, sharegpt and openai"
        )
    _check_ranking(info, where)
    limit = entry.max_samples or info.get("num_samples")
    found = replace(found, max_samples=limit, as_llama_factory=True)
    if "hf_hub_url" in info:
        subset = f":{info['subset']}" if "subset" in info else ""
        return replace(found, path=f"{info['hf_hub_url']}{subset}", split=info.get("split"))
    if "file_name" not in info:
        raise DataError(f"{where} has neither file_name nor hf_hub_url")
    return replace(found, path=str(folder / info["file_name"]))


def _check_ranking(info: Mapping[str, Any], where: str) -> None:
    """Check that a dataset of preferences, and no other, names both answers."""
    given = info.get("columns", {})
    named = {name for name in ("chosen", "rejected") if given.get(name)}
    if "ranking" in info and len(named) < 2:
        raise DataError(f"{where}: with ranking, columns must name chosen and rejected")
    if "ranking" not in info and named:
        raise DataError(
            f"{where}: columns.{min(named)} is for preferences, and ranking is not true"
        )


def _columns(given: Mapping[str, str], known: Mapping[str, str], where: str) -> dict[str, str]:
    given = {key: value for key, value in given.items() if value}
    for key in given:
        if key not in known:
            raise DataError(
                f"{where}: columns.{key} is not read here (read are {', '.join(known)})"
            )
    return {known[key]: value for key, value in given.items()}


def _fields(tags: Mapping[str, str], usual: Mapping[str, str], where: str) -> dict[str, str]:
    for tag in tags:
        if tag not in _SHAREGPT_TAGS:
            raise DataError(
                f"{where}: tags.{tag} is not read here (read are {', '.join(_SHAREGPT_TAGS)})"
            )
    role, content = (tags.get(tag) or usual[tag] for tag in ("role_tag", "content_tag"))
    return {"role": role, "content": content}
