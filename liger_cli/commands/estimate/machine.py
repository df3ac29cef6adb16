"""The speed of cards and of what connects them, and the time that collectives take on them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

__all__ = ["Machine", "RankGroup"]


class RankGroup(NamedTuple):
    """Ranks that talk to each other.

    Attributes:
        ranks: Their number.
        per_host: Those of one host; each has a network card beside it.
    """

    ranks: int
    per_host: int

    @property
    def hosts(self) -> int:
        return self.ranks // self.per_host


@dataclass(frozen=True)
class Machine:
    """Rates of a cluster, in flops, bytes and seconds.

    The defaults are of H200 cards, measured on one and two of them; those of the network and of
    hops are not measured: 400 Gb/s a card, and what NCCL assumes where it chooses an algorithm.

    Attributes:
        flops: Of products in 16 bits.
        copy: Bytes that a card copies, reads and writes.
        intra: Bytes that a rank sends, and receives, between cards of a host.
        inter: The same between hosts.
        per_host: Cards of a host.
        intra_hop: Seconds of a step of a ring that stays in a host.
        inter_hop: The same between hosts.
        together: Share of a step by which ranks that work side by side are slower than one alone.
        drag: Share of a hidden collective by which it slows down what it hides behind.
    """

    flops: float = 764e12
    copy: float = 4.0e12
    intra: float = 272e9
    inter: float = 50e9
    per_host: int = 8
    intra_hop: float = 3.4e-6
    inter_hop: float = 14e-6
    together: float = 0.05
    drag: float = 0.25

    def neighbours(self, ranks: int) -> RankGroup:
        """Return the group of ranks that are next to each other."""
        return RankGroup(ranks, math.gcd(ranks, self.per_host))

    def spread(self, ranks: int, stride: int) -> RankGroup:
        """Return the group of every stride-th of ranks x stride ranks."""
        return RankGroup(ranks, math.gcd(ranks, max(1, self.per_host // stride)))

    def gather(self, num_bytes: float, group: RankGroup) -> float:
        """Return the seconds of an all-gather, or a reduce-scatter, of so many bytes in all."""
        ranks, hosts = group.ranks, group.hosts
        if ranks == 1:
            return 0.0
        inside = num_bytes * (ranks - 1) / ranks / self.intra if group.per_host > 1 else 0.0
        across = num_bytes * (hosts - 1) / hosts / (self.inter * group.per_host)
        hops = (ranks - hosts) * self.intra_hop + (hosts - 1) * self.inter_hop
        return max(inside, across) + hops

    def all_reduce(self, num_bytes: float, group: RankGroup) -> float:
        """Return the seconds of a sum of so many bytes: twice those of a gather, by a tree."""
        if group.ranks == 1:
            return 0.0
        ring = self.gather(num_bytes, group)
        ring -= self.gather(0.0, group)
        hops = math.log2(group.hosts) * self.inter_hop + (group.per_host - 1) * self.intra_hop
        return 2 * (ring + hops)
