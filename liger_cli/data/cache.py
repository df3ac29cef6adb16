"""Tokenised data on disk, under a name that is a hash of everything they are made from.

An entry is a folder of rows.arrow, which is mapped into memory, and counts.json, which holds a hash
of both: what a full disk or another program did to them is noticed. Data below a megabyte are not
kept: they are tokenised sooner than an entry is worth its place.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from liger_cli.common.environment import cache_directory
from liger_cli.common.readers import read_json
from liger_cli.data.encode import WEIGHTED, WEIGHTS

if TYPE_CHECKING:
    import pyarrow
    from transformers import PreTrainedTokenizerBase

__all__ = ["MIN_BYTES", "Counts", "Tokenised", "cached", "tokenizer_content"]

_log = logging.getLogger(__name__)

MIN_BYTES = 1_000_000
_ROWS, _COUNTS = "rows.arrow", "counts.json"
# Determines the ids and labels of a row, together with its content and options.
_CODE = (
    *("answers", "borders", "cache", "calls", "chat", "clip", "encode", "examples"),
    *("factory", "files", "formats", "image_parts", "instructions", "makers", "marks"),
    *("messages", "names", "pair_formats", "pair_maker", "rendering", "rows", "samples"),
    *("shown", "sources", "template", "text_stream", "thoughts", "threads", "token_ids"),
    *("turns", "unpaired_formats", "unpaired_maker", "used", "values"),
)


@dataclass
class Counts:
    """Counts over the records of a source."""

    rows: int = 0
    dropped_rows: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    truncated_rows: int = 0
    columns: list[str] = field(default_factory=list)
    # What of the rows used is not trained although it was said, by its name.
    left_out: dict[str, int] = field(default_factory=dict)
    unused_columns: list[str] = field(default_factory=list)
    # The fields of messages that are read, with their names in the data.
    fields: list[str] = field(default_factory=list)
    # The columns that were mapped and are there.
    seen: list[str] = field(default_factory=list)

    def set(self, other: Counts) -> None:
        """Add the counts of another source."""
        vars(self).update(asdict(other))

    def add(self, other: Counts) -> None:
        """Add the counts of later records; the columns are those of all."""
        self.rows += other.rows
        self.dropped_rows += other.dropped_rows
        self.tokens += other.tokens
        self.trained_tokens += other.trained_tokens
        self.truncated_rows += other.truncated_rows
        for names, more in (
            (self.columns, other.columns),
            (self.unused_columns, other.unused_columns),
            (self.fields, other.fields),
            (self.seen, other.seen),
        ):
            names += [name for name in more if name not in names]
        self.add_left_out(other.left_out)

    def add_left_out(self, left_out: Mapping[str, int]) -> None:
        """Add what is left out of a row that is used."""
        for name, number in left_out.items():
            self.left_out[name] = self.left_out.get(name, 0) + number


@dataclass(frozen=True)
class Tokenised:
    """Rows by number, and what was counted while they were made."""

    rows: Any
    counts: Counts


def cached(
    key: dict[str, Any],
    make: Callable[[], Iterable[tuple[pyarrow.Table, Counts]]],
    *,
    keep: bool,
    notify: Callable[[str], None] | None = None,
) -> Tokenised:
    """Return the rows of a key, made if they are not there yet.

    Args:
        key: Everything that decides the rows, as JSON has it.
        make: Makes them, a table at a time.
        keep: False makes them in memory.
        notify: Called where an entry is damaged or the cache cannot be written; both are
            logged as warnings otherwise.
    """
    notify = notify or _log.warning
    if not keep:
        return _in_memory(make())
    name = hashlib.sha256(json.dumps({**key, **_makers()}, sort_keys=True).encode()).hexdigest()
    folder = cache_directory() / "data" / name[:32]
    from filelock import FileLock

    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        # Saves the other processes of a run the work. What makes it safe is the rename.
        with FileLock(folder.with_suffix(".lock")):
            if (found := _read(folder, notify)) is not None:
                return found
            _write(folder, make())
            found = _read(folder, notify)
    except OSError as error:
        notify(f"the data cache {folder.parent} cannot be used, rows stay in memory: {error}")
        return _in_memory(make())
    assert found is not None
    return found


def tokenizer_content(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Return the content that determines a tokenizer's ids, without its name and path."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return {
        "class": type(tokenizer).__name__,
        "backend": backend.to_str() if backend is not None else _files_of(tokenizer),
        "template": getattr(tokenizer, "chat_template", None),
        "special": {key: str(value) for key, value in tokenizer.special_tokens_map.items()},
        # Tokenizers without a backend keep these beside it.
        "added": {str(i): str(token) for i, token in tokenizer.added_tokens_decoder.items()},
    }


def _files_of(tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    with tempfile.TemporaryDirectory() as folder:
        files = sorted(Path(file) for file in tokenizer.save_pretrained(folder))
        return {file.name: _hash(file) for file in files if file.is_file()}


def _makers() -> dict[str, Any]:
    """Return the code that makes rows: entries of another version are not this one's."""
    import tokenizers
    import transformers

    here = Path(__file__).parent
    code = {name: _hash(here / f"{name}.py") for name in _CODE}
    return {
        "code": code,
        "tokenizers": tokenizers.__version__,
        "transformers": transformers.__version__,
    }


def _hash(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _seal(rows: Path, counts: dict[str, Any]) -> str:
    return hashlib.sha256((_hash(rows) + json.dumps(counts)).encode()).hexdigest()


def _read(folder: Path, notify: Callable[[str], None]) -> Tokenised | None:
    """Return the entry, or None where there is none or it is damaged; that one is deleted."""
    import datasets

    if not folder.is_dir():
        return None
    try:
        content = read_json(folder / _COUNTS)
        counts = content["counts"]
        if content["sha256"] != _seal(folder / _ROWS, counts):
            raise ValueError("the content is not what was written")
        return _tokenised(datasets.Dataset.from_file(str(folder / _ROWS)), Counts(**counts))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        notify(f"the cached data {folder} are damaged and are tokenized again: {error}")
        shutil.rmtree(folder)
        return None


def _write(folder: Path, tables: Iterable[tuple[pyarrow.Table, Counts]]) -> None:
    import pyarrow

    partial = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", dir=folder.parent))
    counts = Counts()
    try:
        with contextlib.ExitStack() as stack:
            file = stack.enter_context(pyarrow.OSFile(str(partial / _ROWS), "wb"))
            writer: Any = None
            for table, added in tables:
                counts.add(added)
                if writer is None:
                    writer = stack.enter_context(pyarrow.ipc.new_stream(file, table.schema))
                writer.write_table(table)
        values = asdict(counts)
        content = {"counts": values, "sha256": _seal(partial / _ROWS, values)}
        (partial / _COUNTS).write_text(json.dumps(content), encoding="utf-8")
        partial.chmod(0o755)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _in_memory(tables: Iterable[tuple[pyarrow.Table, Counts]]) -> Tokenised:
    import datasets
    import pyarrow

    counts = Counts()

    def counted() -> Iterator[pyarrow.Table]:
        for table, added in tables:
            counts.add(added)
            yield table

    rows = pyarrow.concat_tables(counted())
    return _tokenised(datasets.Dataset(datasets.table.InMemoryTable(rows)), counts)


def _tokenised(rows: Any, counts: Counts) -> Tokenised:
    """Return rows without the column of weights where no row has any."""
    if WEIGHTED not in counts.left_out and WEIGHTS in rows.column_names:
        rows = rows.remove_columns(WEIGHTS)
    return Tokenised(rows, counts)
