"""The hosts of a launch: they meet in torch's elastic rendezvous, and share a store afterwards."""

from __future__ import annotations

import contextlib
import json
import logging
import socket
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

from torch.distributed.elastic.rendezvous import RendezvousParameters
from torch.distributed.elastic.rendezvous import registry as rendezvous

from liger_cli.errors import EnvironmentProblem
from liger_cli.training.launch.faults import Ended
from liger_cli.training.launch.plan import LaunchPlan

__all__ = ["Hosts", "meet"]

_JOIN_S = 900
# Hosts end within this of each other, also where one of them has lost its network.
_END_S = 300.0
_FAULT_S = 6.0


class Hosts:
    """This host among those of a launch, and the store that they share.

    Attributes:
        number: Of this host.
        first_rank: The lowest rank here.
        num_ranks: Ranks of the whole launch.
        master: Address and port of the store for the ranks.
    """

    def __init__(self, store: Any, master: tuple[str, int], number: int, nproc: list[int]) -> None:
        self._store = store
        self._num_hosts = len(nproc)
        self.master = master
        self.number = number
        self.first_rank = sum(nproc[:number])
        self.num_ranks = sum(nproc)

    def has_fault(self) -> bool:
        """Return whether another host has a rank that failed, or cannot be reached."""
        return self._num_hosts > 1 and self._has("fault", default=True)

    def say_fault(self) -> None:
        """Let the other hosts end too."""
        if self._num_hosts > 1:
            self._set("fault", b"1")

    def gather_ends(self, own: Ended) -> Ended:
        """Return the ends of the ranks of all hosts, as far as their launchers answer.

        Where all is well it waits until all hosts are done: the first of them has the store.
        """
        if self._num_hosts == 1:
            return own
        self._set(f"end/{self.number}", own.to_json().encode())
        deadline = time.monotonic() + (_FAULT_S if own.faults or own.silent else _END_S)
        keys = {f"end/{i}" for i in range(self._num_hosts) if i != self.number}
        found = own
        while keys and time.monotonic() < deadline:
            for key in sorted(keys):
                if self._has(key, default=False):
                    keys.remove(key)
                    found += Ended.from_json(self._store.get(key))
            time.sleep(0.1)
        return found

    def leave(self) -> None:
        """Let the host that has the store end."""
        self._set(f"left/{self.number}", b"1")

    def wait_for_others(self) -> None:
        """Wait until the hosts that have said how they ended need the store no more."""
        deadline = time.monotonic() + _FAULT_S
        others = {i for i in range(self._num_hosts) if i != self.number}
        others = {i for i in others if self._has(f"end/{i}", default=False)}
        while others and time.monotonic() < deadline:
            others = {i for i in others if not self._has(f"left/{i}", default=True)}
            time.sleep(0.05)

    def _has(self, key: str, *, default: bool) -> bool:
        try:
            return bool(self._store.check([key]))
        except RuntimeError:
            return default

    def _set(self, key: str, value: bytes) -> None:
        with contextlib.suppress(RuntimeError):
            self._store.set(key, value)


@contextlib.contextmanager
def meet(plan: LaunchPlan) -> Iterator[Hosts]:
    """Wait for the other hosts and yield this one among them; the store is there meanwhile.

    Raises:
        EnvironmentProblem: They did not come, or cannot be reached.
    """
    # It says in a log, with a traceback, what is raised here as one message.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    host, port = plan.endpoint or ("127.0.0.1", 0)
    try:
        parameters = _parameters(plan, host, port)
        handler = rendezvous.get_rendezvous_handler(parameters)
        found = handler.next_rendezvous()
        # Its host number, or a number after that of the host which the endpoint names.
        wish = plan.node_rank
        if wish is None:
            wish = 0 if parameters.get_as_bool("is_host") else 1 + found.rank
        number, nproc = _number_hosts(found.store, found.rank, (wish, plan.nproc), plan.nnodes)
    except (RuntimeError, OSError) as error:
        where = f"--rdzv-endpoint {host}:{port}" if plan.endpoint else "on this host"
        raise EnvironmentProblem(
            f"{plan.nnodes} hosts did not meet at {where}: {error}",
            hint="Every host is started with the same --nnodes and --rdzv-endpoint, another "
            "--node-rank each; host 0 must be reachable at that address and port.",
        ) from error
    # Ranks meet at the same store: its address is known to reach it from every host.
    store: Any = found.store  # a PrefixStore of the one that listens
    hosts = Hosts(store, (host, store.underlying_store.port), number, nproc)
    has_store = parameters.get_as_bool("is_host")
    try:
        yield hosts
    finally:
        if has_store:
            hosts.wait_for_others()
        handler.shutdown()
        if not has_store:
            hosts.leave()


def _parameters(plan: LaunchPlan, host: str, port: int) -> RendezvousParameters:
    """Return the rendezvous of a plan, once the host that holds its store listens."""
    theirs, ours = _addresses(host, port)
    # The way of a host to itself begins where it ends; its own name may be an address of loopback.
    is_own = theirs in (ours, "::1") or theirs.startswith("127.")
    is_host = is_own if plan.node_rank is None else plan.node_rank == 0
    if plan.endpoint is not None and not is_host:
        _wait_for(host, port)
    return RendezvousParameters(
        backend="c10d",
        endpoint=f"[{host}]:{port}" if ":" in host else f"{host}:{port}",
        run_id="liger",
        min_nodes=plan.nnodes,
        max_nodes=plan.nnodes,
        # Without it torch looks up the full name of this host, which may take long.
        local_addr=ours,
        is_host=is_host,
        timeout=_JOIN_S,
    )


def _addresses(host: str, port: int) -> tuple[str, str]:
    """Return the address of a host, and that of this one on the way to it."""
    [family, *_, address] = socket.getaddrinfo(host, port or 1, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as way:
        way.connect(address)
        return str(address[0]), str(way.getsockname()[0])


def _wait_for(host: str, port: int) -> None:
    """Wait until a port is open, in Python: a wait inside of torch ends by no Ctrl-C.

    Raises:
        OSError: It is not, after long.
    """
    deadline = time.monotonic() + _JOIN_S
    while True:
        try:
            with socket.create_connection((host, port), timeout=5):
                return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.5)


def _number_hosts(
    store: Any, joined_as: int, mine: tuple[int, int], num_hosts: int
) -> tuple[int, list[int]]:
    """Return the number of this host, and the processes of all hosts in their order.

    Args:
        mine: A number that orders the hosts, and the processes of this one.
    """
    store.set_timeout(timedelta(seconds=60))
    store.set(f"host/{joined_as}", json.dumps(mine))
    hosts = [(*json.loads(store.get(f"host/{i}")), i) for i in range(num_hosts)]
    hosts.sort(key=lambda host: (host[0], host[2]))
    number = next(n for n, (*_, i) in enumerate(hosts) if i == joined_as)
    return number, [nproc for _, nproc, _ in hosts]
