"""The Python that a peer is installed in, which also finds our packages."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from types import TracebackType

import liger_cli
import liger_kernels
from liger_cli.errors import ConfigError, EnvironmentProblem

__all__ = ["PeerInterpreter"]

# Nothing is imported: finding a package takes no time, and a broken one has a better error when it
# is used.
_FIND = "import importlib.util, sys; sys.exit(importlib.util.find_spec(sys.argv[1]) is None)"


class PeerInterpreter:
    """An interpreter and the environment it starts in; `with` deletes what that needs.

    Attributes:
        executable: Absolute, but not resolved: a virtual environment is known by its link.
        environment: Variables of a process of it.
        folder: Holds links to our packages and nothing else of where they are installed, so that
            the peer keeps its own torch; files of a run may lie there too.

    Args:
        python: The interpreter; this one by default.
        path: A folder that holds the peer, for PYTHONPATH.

    Raises:
        ConfigError: The interpreter or the folder does not exist.
    """

    def __init__(self, python: Path | None, path: Path | None) -> None:
        found = shutil.which(str(python or sys.executable))
        if found is None:
            raise ConfigError(f"--peer-python {python}: there is no such program")
        if path is not None and not path.is_dir():
            raise ConfigError(f"--peer-path {path}: there is no such folder")
        self.executable = os.path.abspath(found)
        self._folder = tempfile.TemporaryDirectory(prefix="liger-peer-")
        self.folder = Path(self._folder.name)
        for package in (liger_cli, liger_kernels):
            source = Path(str(package.__file__)).parent
            (self.folder / source.name).symlink_to(source, target_is_directory=True)
        # In a checkout the presets lie beside the packages.
        configs = Path(str(liger_cli.__file__)).parent.parent / "configs"
        if configs.is_dir():
            (self.folder / "configs").symlink_to(configs, target_is_directory=True)
        paths = [str(self.folder), str(path.resolve()) if path else None]
        paths.append(os.environ.get("PYTHONPATH"))
        self.environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}

    def __enter__(self) -> PeerInterpreter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Delete the folder."""
        self._folder.cleanup()

    def require(self, package: str) -> None:
        """Check that a package is installed there.

        Raises:
            EnvironmentProblem: It is not.
        """
        command = [self.executable, "-c", _FIND, package]
        if subprocess.run(command, env=self.environment, capture_output=True).returncode:
            raise EnvironmentProblem(
                f"{package} is not installed for {self.executable}",
                hint="--peer-path DIR names a folder made by pip install --no-deps --target DIR; "
                "--peer-python FILE a Python that has it.",
            )
