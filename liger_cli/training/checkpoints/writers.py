"""The processes that write a checkpoint together: an error of one of them is raised on all."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch.distributed as dist

from liger_cli.errors import EnvironmentProblem, LigerError
from liger_cli.training.checkpoints.files import write_failure

__all__ = ["Writers"]


class Writers:
    """All processes of a run; each calls the same methods in the same order.

    Args:
        group: The process group of their messages; the default one where it is None.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group

    @property
    def rank(self) -> int:
        return dist.get_rank() if dist.is_initialized() else 0

    def gather(self, value: Any) -> list[Any]:
        """Return the value of each process."""
        if not dist.is_initialized():
            return [value]
        found = [None] * dist.get_world_size()
        dist.all_gather_object(found, value, group=self.group)
        return found

    @contextlib.contextmanager
    def together(self, target: Path, hint: str) -> Iterator[None]:
        """Raise what a process raises in the block on all of them: the others would wait for ever.

        Each process leaves the block before any goes on. Collective calls in it come first, or
        raise on all processes themselves.

        Raises:
            EnvironmentProblem: The first process's that failed, the same on all.
            Exception: Of another kind than of writing, where it was raised.
        """
        problem: EnvironmentProblem | None = None
        unexpected: Exception | None = None
        try:
            yield
        except Exception as error:
            try:
                problem = write_failure(error, target, hint)
                problem.__cause__ = error
            except Exception:
                unexpected = error
                text = f"{target} cannot be written: {type(error).__name__}: {error}"
                problem = EnvironmentProblem(text, hint=hint)
        with contextlib.nullcontext() if unexpected is None else contextlib.suppress(LigerError):
            self.raise_everywhere(problem)
        if unexpected is not None:
            raise unexpected

    def raise_everywhere(self, problem: EnvironmentProblem | None) -> None:
        """Raise a process's error on every process.

        Args:
            problem: The error of this process; None where there is none.

        Raises:
            EnvironmentProblem: There is one; that of the first process that has one.
        """
        if (first := self.first_problem(problem)) is not None:
            raise first

    def first_problem(self, problem: EnvironmentProblem | None) -> EnvironmentProblem | None:
        """Return the error of the first process that has one, on every process."""
        found = self.gather(None if problem is None else (problem.message, problem.hint))
        words = next(filter(None, found), None)
        if problem is not None and words == (problem.message, problem.hint):
            return problem
        return None if words is None else EnvironmentProblem(words[0], hint=words[1])
