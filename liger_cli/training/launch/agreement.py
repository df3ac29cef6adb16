"""Compare what must be the same on all ranks, before anything is trained."""

from __future__ import annotations

import secrets
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list, gather_object

from liger_cli.common.environment import PACKAGES, package_version
from liger_cli.common.outputs import write_problem
from liger_cli.config import RunConfig
from liger_cli.errors import ConfigError, DataError, EnvironmentProblem, LigerError

__all__ = ["check_same_data", "check_same_launch", "check_shared_directory"]

# A network file system may show a new file late.
_LOOK_S = 10.0


def check_same_launch(config: RunConfig, accelerator: Any) -> None:
    """Check that all ranks have the same packages and the same configuration.

    Raises:
        EnvironmentProblem: Versions differ.
        ConfigError: Keys differ.
    """
    _check_same(
        {name: package_version(name) for name in PACKAGES},
        accelerator,
        EnvironmentProblem,
        "Install the same versions on every host.",
    )
    _check_same(
        config.model_dump(mode="json"),
        accelerator,
        ConfigError,
        "Start every rank with the same words and the same files.",
    )


def check_same_data(identity: Mapping[str, Any], accelerator: Any) -> None:
    """Check that all ranks have read the same rows.

    Args:
        identity: Values that differ where the data do, by the use of the data.

    Raises:
        DataError: They differ.
    """
    _check_same(
        {f"the data ({name})": value for name, value in identity.items()},
        accelerator,
        DataError,
        "Every host needs the same files: copy them again, or use a directory that all hosts see.",
    )


def _check_same(
    values: Mapping[str, Any], accelerator: Any, kind: type[LigerError], hint: str
) -> None:
    if accelerator.num_processes == 1:
        return
    [(first_host, first), *others] = gather_object([(socket.gethostname(), values)])
    for rank, (host, theirs) in enumerate(others, start=1):
        for name in first.keys() | theirs.keys():
            if theirs.get(name) != first.get(name):
                raise kind(
                    f"{name} is {theirs.get(name)!r} for rank {rank} on {host}, and "
                    f"{first.get(name)!r} for rank 0 on {first_host}",
                    hint=hint,
                )


def check_shared_directory(run_dir: Path, accelerator: Any) -> None:
    """Check that all ranks see what rank 0 writes into the directory of the run.

    Raises:
        EnvironmentProblem: One does not.
    """
    if accelerator.num_processes == 1:
        return
    # The name of a leftover, which the next run removes.
    file = run_dir / f".launch.unfinished.{secrets.token_hex(8)}"
    is_main = accelerator.is_main_process
    if is_main:
        try:
            file.write_text("rank 0 has written this\n", encoding="utf-8")
        except OSError as error:
            raise write_problem(file, error) from error
    file = run_dir / broadcast_object_list([file.name])[0]
    seen = gather_object([(socket.gethostname(), str(run_dir.absolute()), _appears(file))])
    if is_main:
        file.unlink(missing_ok=True)
    for rank, (host, directory, is_seen) in enumerate(seen):
        if not is_seen:
            raise EnvironmentProblem(
                f"output_dir {directory} of rank {rank} on {host} is not the directory that rank 0 "
                f"on {seen[0][0]} writes into, {seen[0][1]}",
                hint="All hosts write the parts of a checkpoint: --output-dir must be on a file "
                "system that all of them see, best by its full path.",
            )


def _appears(file: Path) -> bool:
    deadline = time.monotonic() + _LOOK_S
    while not file.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return True
