"""The push of a run that has ended, as push_to_hub and the hub_ keys say."""

from __future__ import annotations

from pathlib import Path

from liger_cli.common.hub import check_push
from liger_cli.config import RunConfig
from liger_cli.errors import LigerError
from liger_cli.report import RunReport, notify
from liger_cli.report.publication import publication

__all__ = ["check_publication", "publish_run"]

_KEYS = ("model", "output_dir", "push_to_hub", "hub_model_id", "hub_private_repo")


def check_publication(config: RunConfig) -> None:
    """Check before the run that its model may be pushed after it, as far as no request is needed.

    Raises:
        ConfigError: hub_model_id is no name of a repository.
        EnvironmentProblem: There is no login, or HF_HUB_OFFLINE is set.
    """
    if config.push_to_hub:
        check_push(_repository(config))


def publish_run(report: RunReport) -> None:
    """Push the model of a run, if its configuration asks for it.

    Raises:
        LigerError: It could not be; the model stays in the directory of the run.
    """
    written = report.config or {}
    # These alone: what a run has resolved need not go together in a file.
    config = RunConfig(**{key: written[key] for key in _KEYS if key in written})
    if not config.push_to_hub or report.train is None:
        return
    run, repository = Path(str(config.output_dir)), _repository(config)
    try:
        found = publication(run, repository, private=config.hub_private_repo, notify=notify)
        notify(f"pushed: {found.push('Upload model trained with liger')}")
    except LigerError as error:
        again = f"liger push {run} {repository}"
        error.hint = f"{error.hint}; {again}" if error.hint else again
        raise


def _repository(config: RunConfig) -> str:
    return config.hub_model_id or Path(str(config.output_dir)).name
