"""Start the ranks of a command on this host, and end as one process of it would.

The ranks are `liger` itself, in fresh processes with the variables that torchrun sets. Hosts meet
in torch's elastic rendezvous (c10d). Its agent is not used: it restarts ranks, gives those that are
left half a minute, and on a signal forgets why.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from liger_cli.common.ranks import FAULT_FILE, RUN_DIR_FILE
from liger_cli.errors import EnvironmentProblem, Interrupted
from liger_cli.training.checkpoints.files import find_checkpoints
from liger_cli.training.launch.faults import Ended, Fault, killed, read_fault, to_error
from liger_cli.training.launch.hosts import Hosts, meet
from liger_cli.training.launch.plan import LaunchPlan
from liger_cli.training.runtime.stop_signals import SignalRelay

__all__ = ["run_ranks"]

_POLL_S, _ASK_HOSTS_S = 0.1, 1.0
# After the first fault: time for the others to say what they saw, and to end when asked to.
_GRACE_S, _STOP_S = 5.0, 8.0
# Ranks that were stopped have their checkpoint; they close trackers and files.
_STOPPED_GRACE_S = 20.0
_LOG_LINES = 15


def run_ranks(command: Sequence[str], plan: LaunchPlan) -> None:
    """Run a command once for each rank of this host, until all of them have ended.

    The output of rank 0 is that of this process; the messages are those of `plan.log_rank`.

    Raises:
        LigerError: The first fault of a rank, of any host.
    """
    with (
        meet(plan) as hosts,
        SignalRelay() as signals,
        tempfile.TemporaryDirectory(prefix="liger-launch-") as name,
        _pipe() as stdin,
    ):
        folder = Path(name)
        if not 0 <= plan.log_rank - hosts.first_rank < plan.nproc:
            sys.stderr.write(
                f"{plan.nproc} of {hosts.num_ranks} ranks run here, from rank {hosts.first_rank}; "
                f"the host of rank {plan.log_rank} shows the run\n"
            )
        ranks: list[_Process] = []
        try:
            for local in range(plan.nproc):
                ranks.append(_Process(command, plan, hosts, local, folder, stdin))
            ended = hosts.gather_ends(_watch(ranks, hosts, signals))
        finally:
            _end(ranks)
        is_stopped = all(fault.exit_code == Interrupted.exit_code for fault in ended.faults)
        if signals.requested and is_stopped and (ended.faults or ended.silent):
            raise _interruption(ended)
        if ended.faults:
            raise to_error(ended, num_ranks=hosts.num_ranks, checkpoint=_newest(folder))
        if ended.silent:
            raise EnvironmentProblem("the launcher of host 0 cannot be reached, and has the store")


def _interruption(ended: Ended) -> Interrupted:
    """Return the error of ranks that were asked to stop, some before they could say anything."""
    stopped = [fault for fault in ended.faults if fault.exit_code == Interrupted.exit_code]
    # After a step it names the checkpoint.
    said = max(stopped, key=lambda fault: len(fault.message), default=None)
    return Interrupted(said.message, hint=said.hint) if said else Interrupted("interrupted")


def _newest(folder: Path) -> Path | None:
    """Return the newest checkpoint of the run, where its ranks have said which run it is."""
    try:
        run_dir = Path((folder / RUN_DIR_FILE).read_text(encoding="utf-8"))
    except OSError:
        return None
    return next(reversed(find_checkpoints(run_dir)), None)


@contextlib.contextmanager
def _pipe() -> Iterator[int]:
    """Yield the read end of a pipe that ends with this process, however that ends."""
    reads, writes = os.pipe()
    try:
        yield reads
    finally:
        os.close(reads)
        os.close(writes)


class _Process:
    """A rank of this host: its process, and the files in which it leaves output and fault."""

    def __init__(
        self,
        command: Sequence[str],
        plan: LaunchPlan,
        hosts: Hosts,
        local: int,
        folder: Path,
        stdin: int,
    ) -> None:
        self.rank = hosts.first_rank + local
        self._log, self._fault = folder / f"rank{self.rank}.log", folder / f"rank{self.rank}.json"
        self.num_signals = 0
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                command,
                env={**os.environ, **_variables(plan, hosts, local), FAULT_FILE: str(self._fault)},
                stdin=stdin,
                stdout=None if self.rank == 0 else log,
                stderr=None if self.rank == plan.log_rank else log,
                # Signals of a terminal come through this process, and all that it starts ends.
                start_new_session=True,
            )

    @property
    def code(self) -> int | None:
        return self._process.poll()

    def fault(self) -> Fault | None:
        """Return the fault of a process that has failed."""
        found = read_fault(self._fault)
        if found is None and self.code:
            found = killed(self.rank, socket.gethostname(), self.code, self._last_lines())
        return found

    def _last_lines(self) -> str:
        text = self._log.read_text(encoding="utf-8", errors="replace")
        return "\n".join([line for line in text.splitlines() if line.strip()][-_LOG_LINES:])

    def stop(self) -> None:
        """Ask the process to stop; once more: at once."""
        self.num_signals += 1
        if self.code is None:
            self._process.terminate()

    def kill(self) -> None:
        """Kill the process and all that it has started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


def _variables(plan: LaunchPlan, hosts: Hosts, local: int) -> dict[str, str]:
    """Return the variables of a rank, as torchrun sets them."""
    values: dict[str, object] = {
        "RANK": hosts.first_rank + local,
        "WORLD_SIZE": hosts.num_ranks,
        "LOCAL_RANK": local,
        "LOCAL_WORLD_SIZE": plan.nproc,
        "GROUP_RANK": hosts.number,
        "GROUP_WORLD_SIZE": plan.nnodes,
        "MASTER_ADDR": hosts.master[0],
        "MASTER_PORT": hosts.master[1],
        # The store is in the launcher of the first host.
        "TORCHELASTIC_USE_AGENT_STORE": True,
        "TORCHELASTIC_RESTART_COUNT": 0,
        "TORCHELASTIC_MAX_RESTARTS": 0,
        "TORCHELASTIC_RUN_ID": "liger",
    }
    if "OMP_NUM_THREADS" not in os.environ:
        values["OMP_NUM_THREADS"] = max(1, (os.cpu_count() or 1) // plan.nproc)
    return {name: str(value) for name, value in values.items()}


def _watch(ranks: Sequence[_Process], hosts: Hosts, signals: SignalRelay) -> Ended:
    """Wait until all ranks have ended, or for a while after the first has failed."""
    deadline, ask_at = math.inf, 0.0
    while any(rank.code is None for rank in ranks) and time.monotonic() < deadline:
        time.sleep(_POLL_S)
        for rank in ranks:
            if rank.num_signals < signals.count:
                rank.stop()
        now = time.monotonic()
        if signals.count > 1:
            deadline = min(deadline, now + _STOP_S)
        codes = {rank.code for rank in ranks} - {None, 0}
        if codes and deadline == math.inf:
            hosts.say_fault()
            is_stopped = codes == {Interrupted.exit_code}
            deadline = now + (_STOPPED_GRACE_S if is_stopped else _GRACE_S)
        elif now >= ask_at:
            ask_at = now + _ASK_HOSTS_S
            if hosts.has_fault():
                deadline = min(deadline, now + _GRACE_S)
    host = socket.gethostname()
    faults = [fault for rank in ranks if (fault := rank.fault()) is not None]
    has_failed = {fault.rank for fault in faults}
    silent = [
        f"rank {rank.rank} on {host}"
        for rank in ranks
        if rank.code is None and rank.rank not in has_failed
    ]
    return Ended(tuple(faults), tuple(silent))


def _end(ranks: Sequence[_Process]) -> None:
    """End every rank that is left, with all that it has started."""
    for rank in ranks:
        rank.stop()
    deadline = time.monotonic() + _STOP_S
    while any(rank.code is None for rank in ranks) and time.monotonic() < deadline:
        time.sleep(_POLL_S)
    for rank in ranks:
        rank.kill()
