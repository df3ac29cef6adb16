"""A ledger of memory: every storage that tensors have, by the part of a step that it belongs to."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["Ledger"]

# What CUDA's allocator rounds a block to.
_GRAIN = 512


class Ledger(TorchDispatchMode):
    """Count the bytes of all live storages while it is the mode; the tensors need hold no data.

    Args:
        answer: Asked before an operation runs, with the operation, its arguments and the part. What
            it returns, unless that is NotImplemented, is the operation's result.
        sort: Given a tensor and the part that is being counted, returns the tensor's part.
        shares: Of the bytes of a part those that are counted; all of a part that is not named.

    Attributes:
        part: To which new storages count, unless `sort` says otherwise.
        live: Bytes by part.
        whole: The same, as if this were the only device.
        most: The most that each part had at one time.
        peak: The most that all parts had together.
        at_peak: `live` as it was then.
    """

    def __init__(
        self,
        answer: Callable[[Any, tuple[Any, ...], Mapping[str, Any], str], Any],
        sort: Callable[[Tensor, str], str],
        *,
        shares: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__()
        self._answer = answer
        self._sort = sort
        self._shares = shares or {}
        self._storages: dict[int, tuple[str, int]] = {}
        self.part = ""
        self.live: Counter[str] = Counter()
        self.whole: Counter[str] = Counter()
        self.most: Counter[str] = Counter()
        self.peak = 0
        self.at_peak: Mapping[str, int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        result = self._answer(func, args, kwargs, self.part)
        if result is NotImplemented:
            result = func(*args, **kwargs)
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._enter(leaf)
        return result

    def move(self, x: Tensor, part: str) -> None:
        """Count the storage of a tensor to another part from now on."""
        key = x.untyped_storage()._cdata
        if key in self._storages:
            old, size = self._storages[key]
            self._storages[key] = part, size
            self._add(old, -size)
            self._add(part, size)

    @contextmanager
    def counting(self, part: str) -> Iterator[None]:
        """Count what is made inside to a part."""
        before, self.part = self.part, part
        try:
            yield
        finally:
            self.part = before

    def _enter(self, x: Tensor) -> None:
        storage = x.untyped_storage()
        key = storage._cdata
        if key in self._storages or x.is_meta:
            return
        size = -(-storage.nbytes() // _GRAIN) * _GRAIN
        part = self._sort(x, self.part)
        self._storages[key] = part, size
        weakref.finalize(storage, self._leave, key)
        self._add(part, size)

    def _leave(self, key: int) -> None:
        part, size = self._storages.pop(key)
        self._add(part, -size)

    def _add(self, part: str, size: int) -> None:
        self.whole[part] += size
        size = int(size * self._shares.get(part, 1))
        self.live[part] += size
        self.most[part] = max(self.most[part], self.live[part])
        if size > 0 and (total := self.live.total()) > self.peak:
            self.peak = total
            self.at_peak = dict(self.live)
