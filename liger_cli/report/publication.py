"""A model for the Hugging Face hub: which files of a run go there, its card, and the push."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from liger_cli.common.hub import check_repository, push_files
from liger_cli.common.numbers import format_bytes
from liger_cli.common.readers import expand_path, read_json
from liger_cli.errors import ConfigError, DataError
from liger_cli.report.model_card import model_card
from liger_cli.report.run_files import read_run
from liger_cli.report.summary import SavedReport
from liger_cli.training.checkpoints.files import MANIFEST, find_damage
from liger_cli.training.model.adapters import ADAPTER_CONFIG
from liger_cli.training.model.run_models import find_run_model

__all__ = ["Publication", "publication"]

CARD = "README.md"
# What resumes a run, which is of no use to others: `*` as in a shell.
_OF_THE_RUN = ("trainer_state.pt", "rng-*.pt", MANIFEST, "*.lock", ".*", CARD)
_WEIGHTS = ("*.safetensors", "*.bin")


@dataclass(frozen=True)
class Publication:
    """The files of a model, and where they go.

    Attributes:
        directory: That holds them.
        repository: organisation/name, or a name of the user's own.
        sizes: Bytes of each file by its name; the card is among them.
        card: README.md.
        is_private: Of a repository that is created; one that is there stays as it is.
    """

    directory: Path
    repository: str
    sizes: dict[str, int]
    card: str
    is_private: bool

    @property
    def lines(self) -> tuple[str, ...]:
        width = max(map(len, self.sizes))
        kind = "private" if self.is_private else "public"
        total = sum(self.sizes.values())
        return (
            *(f"{name:{width}}  {format_bytes(size):>8}" for name, size in self.sizes.items()),
            f"{len(self.sizes)} files, {format_bytes(total)}, of {self.directory} to "
            f"{self.repository} ({kind} if it is new)",
        )

    def push(self, message: str) -> str:
        """Create the repository, if there is none, and add the files in one commit.

        Returns:
            The address of the repository.

        Raises:
            ConfigError: The name is not one of the hub.
            EnvironmentProblem: There is no login, or the hub is out of reach or refuses.
        """
        files: dict[str, Path | bytes] = {name: self.directory / name for name in self.sizes}
        files[CARD] = self.card.encode()
        return push_files(self.repository, files, private=self.is_private, message=message)


def publication(
    run: Path, repository: str, *, private: bool, notify: Callable[[str], None]
) -> Publication:
    """Find the model of a run, or in a directory, and write its card.

    Args:
        run: A run, whose best checkpoint or else its last is taken; a checkpoint; or a directory
            that `liger merge` wrote.
        repository: Where it goes.
        private: Of a repository that is created.
        notify: Called with the checkpoint, and with what others cannot load.

    Raises:
        ConfigError: There is no model, or only the shards of one, or the hub takes no such name.
        DataError: The checkpoint is damaged, or every one of the run.
    """
    check_repository(repository)
    run = expand_path(str(run), "run")
    if not run.is_dir():
        raise ConfigError(f"{run} is not a directory")
    directory = find_run_model(run, notify)
    if directory == run:
        _check_whole(directory)
    names = sorted(
        path.name
        for path in directory.iterdir()
        if path.is_file() and not any(path.match(pattern) for pattern in _OF_THE_RUN)
    )
    if not any(Path(name).match(pattern) for name in names for pattern in _WEIGHTS):
        raise ConfigError(
            f"{directory} holds no weights that other programs load",
            hint=f"liger merge {run} --output DIR puts the shards of a checkpoint together",
        )
    is_adapter = (directory / ADAPTER_CONFIG).is_file()
    if is_adapter:
        _check_base(directory, notify)
    card = _card(directory, repository, is_adapter=is_adapter)
    sizes = {name: (directory / name).stat().st_size for name in names}
    return Publication(
        directory, repository, {CARD: len(card.encode()), **sizes}, card, is_private=private
    )


def _check_whole(directory: Path) -> None:
    """Raise a DataError for a checkpoint whose files are not those that were written."""
    if not (directory / MANIFEST).is_file():
        return
    damage = find_damage(directory)
    if damage is not None:
        raise DataError(
            f"{directory} is damaged: {damage}",
            hint=f"what was changed on purpose is pushed from a copy without {MANIFEST}",
        )


def _card(directory: Path, repository: str, *, is_adapter: bool) -> str:
    """Return the user's own README.md, or the card of the run that wrote a checkpoint."""
    own, is_checkpoint = directory / CARD, (directory / MANIFEST).is_file()
    # That of a checkpoint is an empty form of peft's.
    if own.is_file() and not is_checkpoint:
        return own.read_text(encoding="utf-8")
    run_dir = directory.parent
    if not is_checkpoint or not (run_dir / "metrics.jsonl").is_file():
        return f"---\nlibrary_name: transformers\ntags:\n- liger\n---\n\n# {repository}\n"
    run = read_run(run_dir)
    saved = SavedReport(run.report, run.steps, run.evaluations, run.is_finished)
    return model_card(repository, saved, is_adapter=is_adapter)


def _check_base(directory: Path, notify: Callable[[str], None]) -> None:
    base = str(read_json(directory / ADAPTER_CONFIG).get("base_model_name_or_path") or "")
    if Path(base).is_absolute() or Path(base).exists():
        notify(
            f"{ADAPTER_CONFIG} names {base}, a folder of this machine: others load the adapter "
            f"once it names a model of the hub, or take a whole model: liger merge {directory}"
        )
