"""The process of a measuring run: python -m liger_cli.commands.train.arm CONFIG.

After CONFIG comes --peer-patch, or --nproc N for so many processes.

`run_arm` in training/runtime/arms.py starts it for a baseline or a comparison. It trains without
checkpoints, evaluation or trackers and prints the report as JSON; errors and exit codes are those
of `liger`.

Its standard input is a pipe into which nothing is written. When the process that holds the other
end is gone, by SIGKILL too, the pipe ends, and with it this process and all that it started.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from pathlib import Path

from liger_cli.common.failures import describe_error, show_error
from liger_cli.common.ranks import find_rank
from liger_cli.config import load_config
from liger_cli.errors import panics_raised
from liger_cli.report import RunReport
from liger_cli.training.launch.faults import fault_of, report_fault
from liger_cli.training.runtime.stop_signals import Interruption

__all__ = ["main", "measure"]


def measure(config_file: Path, *, peer_patch: bool = False) -> RunReport | None:
    """Run the training steps of a configuration and return the report.

    Args:
        config_file: The configuration in YAML; its output_dir gets the log of the steps.
        peer_patch: Let a peer patch the model after `ops`.
    """
    from liger_cli.commands.train.prepare import RunOptions
    from liger_cli.commands.train.run import run_train

    options = RunOptions(measure_only=True, peer_patch=peer_patch)
    return run_train(load_config(config_file), options)


def main(words: list[str]) -> None:
    """Measure, print the report, and exit with the code of `liger train`."""
    config_file, *flags = words
    rank = find_rank()
    with Interruption() as interruption:
        try:
            with panics_raised():
                if flags[:1] == ["--nproc"]:
                    _measure_ranks(config_file, int(flags[1]))
                    return
                report = measure(Path(config_file), peer_patch="--peer-patch" in flags)
        except (Exception, KeyboardInterrupt) as error:
            problem = describe_error(error, was_interrupted=interruption.requested)
            if rank is None:
                show_error(problem)
            else:
                report_fault(fault_of(problem, error, rank), rank, sys.stderr)
            raise SystemExit(problem.exit_code) from None
    if report is not None:
        sys.stdout.write(report.to_json() + "\n")


def _measure_ranks(config_file: str, nproc: int) -> None:
    """Measure in so many processes of this program; the first prints the report."""
    from liger_cli.training.launch.launcher import run_ranks
    from liger_cli.training.launch.plan import LaunchPlan

    run_ranks(
        [sys.executable, "-m", "liger_cli.commands.train.arm", config_file], LaunchPlan(nproc)
    )


def _end_with_parent() -> None:
    os.read(sys.stdin.fileno(), 1)
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    threading.Thread(target=_end_with_parent, daemon=True).start()
    main(sys.argv[1:])
