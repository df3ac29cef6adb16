"""The start of a command that may run in several processes."""

from __future__ import annotations

import sys

from liger_cli.config.launch_flags import Launch, without_launch_flags
from liger_cli.training.launch.plan import plan_launch

__all__ = ["launch_ranks"]


def launch_ranks(launch: Launch, *, use_cpu: bool) -> bool:
    """Run a command in several processes if its flags ask for that, and return whether they did.

    Raises:
        LigerError: The first fault of a rank, or flags that have no meaning.
    """
    plan = plan_launch(launch, use_cpu=use_cpu)
    if plan is None:
        return False
    # Wrong flags are refused before torch is imported.
    from liger_cli.training.launch.launcher import run_ranks

    run_ranks([sys.executable, "-m", "liger_cli", *without_launch_flags(launch.words)], plan)
    return True
