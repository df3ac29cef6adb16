"""Tokenising in several processes, in the order of the records."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import TYPE_CHECKING

from liger_cli.data.cache import Counts
from liger_cli.data.rows import Record
from liger_cli.errors import EnvironmentProblem

if TYPE_CHECKING:
    import pyarrow

__all__ = ["map_in_order"]

Maker = Callable[[list[Record]], "tuple[pyarrow.Table, Counts]"]

# The worker's maker: sent once, since a tokenizer takes long to send.
_maker: Maker | None = None


def _set_maker(maker: Maker) -> None:
    global _maker
    _maker = maker


def _make(records: list[Record]) -> tuple[pyarrow.Table, Counts]:
    assert _maker is not None
    return _maker(records)


def map_in_order(
    maker: Maker, batches: Iterable[list[Record]], num_proc: int
) -> Iterator[tuple[pyarrow.Table, Counts]]:
    """Yield what the maker makes of each batch, in their order, by so many processes."""
    if num_proc <= 1:
        yield from map(maker, batches)
        return
    # Spawned, since a tokenizer's threads do not survive a fork.
    pool = ProcessPoolExecutor(
        num_proc, get_context("spawn"), initializer=_set_maker, initargs=(maker,)
    )
    pending: deque[Future[tuple[pyarrow.Table, Counts]]] = deque()
    try:
        for batch in batches:
            pending.append(pool.submit(_make, batch))
            if len(pending) > 2 * num_proc:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool as error:
        raise EnvironmentProblem(
            "a process that tokenises ended without a word, as one does that has no memory left",
            hint="lower dataset_num_proc",
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)
