"""Patched models under fully_shard on two ranks train the weights that the stock model trains.

Every way of grouping embedding, layers, norm and head; the ranks run fsdp2_ranks.py, on the CPU.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from liger_kernels.ops.backend import INTERPRETED

pytestmark = [
    pytest.mark.skipif(INTERPRETED, reason="runs without the interpreter"),
    pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed"),
    # All on one worker of xdist: the ranks run once for the whole file.
    pytest.mark.xdist_group("fsdp2"),
]

RANKS = Path(__file__).parents[1] / "fsdp2_ranks.py"
# The names are those of groups_of in fsdp2_ranks.py: "/" between groups, "+" inside one.
GROUPS = (
    "root",
    "layers",
    "head",
    "head-only",
    "norm+head",
    "embed/head",
    "embed/norm/head",
    "embed/norm+head",
    "embed+head",
    "embed+norm+head",
    "layer+norm+head",
    "body/head",
    "body+head",
)
# torch refuses a parameter of two groups.
TIED_GROUPS = ("root", "layers", "embed+head", "embed+norm+head", "body+head")
CASE: dict[str, Any] = {
    "family": "llama",
    "groups": "root",
    "reshard": True,
    "tied": False,
    # None, "reentrant" or "non-reentrant".
    "checkpointing": None,
    # Micro-batches of a step, and whether gradients are reduced after the last of them only.
    "accumulate": 1,
    "no_sync": False,
    # "head" or "body": parts that are not trained.
    "frozen": None,
    # "scaled" is no plain linear layer, so its loss is computed in chunks of tokens.
    "head": "linear",
    # Where the loss is computed: in the "model", by its "caller", from real "logits" too, or by
    # "logprobs", the function token_logprobs.
    "loss": "model",
    "order": "patch-shard",
    "ops": "auto",
    # Whether each step begins with a forward that no backward follows.
    "abandons": False,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulate": {"accumulate": 2},
    "no-sync": {"accumulate": 2, "no_sync": True},
    "reentrant": {"checkpointing": "reentrant"},
    "non-reentrant": {"checkpointing": "non-reentrant"},
    "frozen-head": {"frozen": "head"},
    "frozen-body": {"frozen": "body"},
    "chunked": {"head": "scaled"},
    "caller": {"loss": "caller"},
    "logits": {"loss": "logits"},
    "logprobs": {"loss": "logprobs"},
    "logprobs-frozen": {"loss": "logprobs", "frozen": "head"},
    "logprobs-chunked": {"loss": "logprobs", "head": "scaled"},
    "softcap": {"family": "gemma2"},
    "shard-patch": {"order": "shard-patch"},
    "cross-entropy": {"ops": "auto,-fused_linear_cross_entropy,cross_entropy"},
    "abandons": {"abandons": True},
    "stock-abandons": {"abandons": True, "ops": "none"},
}
GROUPINGS = {
    **{groups: {"groups": groups} for groups in GROUPS},
    **{f"tied-{groups}": {"groups": groups, "tied": True} for groups in TIED_GROUPS},
}
FAST = {
    **{
        name: GROUPINGS[name]
        for name in ("root", "head", "norm+head", "embed/norm+head", "tied-embed+norm+head")
    },
    **{
        f"norm+head-{name}": {"groups": "norm+head", **VARIANTS[name]}
        for name in ("no-sync", "non-reentrant", "frozen-head", "chunked", "logits", "softcap")
    },
    "root-logprobs": {"groups": "root", **VARIANTS["logprobs"]},
    "norm+head-logprobs-chunked": {"groups": "norm+head", **VARIANTS["logprobs-chunked"]},
    **{
        f"head-{name}": {"groups": "head", **VARIANTS[name]}
        for name in ("accumulate", "chunked", "caller", "abandons", "logprobs-frozen")
    },
}
SLOW = {
    f"{groups}-{variant}-{reshard}": {**options, **VARIANTS[variant], "reshard": reshard}
    for (groups, options), variant, reshard in itertools.product(
        GROUPINGS.items(), VARIANTS, (True, False)
    )
}


def run_ranks(cases: dict[str, dict[str, Any]], directory: Path) -> dict[str, Any]:
    """Return what rank 0 found of each case; those after a crash are missing."""
    out, given = directory / "out.json", directory / "cases.json"
    given.write_text(json.dumps([{**CASE, **case, "name": name} for name, case in cases.items()]))
    root = Path(__file__).parents[3]
    path = os.pathsep.join([str(root), str(RANKS.parent), os.environ.get("PYTHONPATH", "")])
    processes = []
    for rank in range(2):
        with open(directory / f"rank{rank}.txt", "w") as log:
            process = subprocess.Popen(
                [sys.executable, str(RANKS), str(rank), str(directory / "store"), str(out)],
                stdin=given.open(),
                stdout=log,
                stderr=log,
                text=True,
                env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
            )
        processes.append(process)
    # When one crashes, the other's next collective fails.
    for process in processes:
        process.wait(timeout=1200)
    print(*(f"{log.name}:\n{log.read_text()[-2000:]}" for log in directory.glob("rank*.txt")))
    return json.loads(out.read_text()) if out.exists() else {}


@pytest.fixture(scope="module")
def found(tmp_path_factory: Any) -> dict[str, Any]:
    return run_ranks(FAST, tmp_path_factory.mktemp("fast"))


@pytest.fixture(scope="module")
def found_slow(tmp_path_factory: Any) -> dict[str, Any]:
    return run_ranks(SLOW, tmp_path_factory.mktemp("slow"))


def check(found: dict[str, Any], name: str) -> None:
    assert name in found, "a rank crashed"
    result = found[name]
    # The last loss is an evaluation's, which would see old weights that were left gathered.
    assert result["loss"] <= 1e-6
    assert result["weights"] <= 1e-6
    assert result["moved"] >= 1e-3


@pytest.mark.parametrize("name", FAST)
def test_case_217_sharded_training_is_that_of_one_process(name, found):
    check(found, name)


@pytest.mark.parametrize("name", [name for name in FAST if "head" in FAST[name]["groups"]])
def test_case_218_the_head_is_gathered_at_most_twice(name, found):
    assert name in found, "a rank crashed"
    result = found[name]
    gathers = result["head_gathers"]
    assert set(gathers) <= {1, 2}
    assert result["num_fused"] >= len(gathers)


def is_refused(case: dict[str, Any]) -> bool:
    """Return whether logits are made by a caller, after the root has sharded its head again."""
    is_by_caller = case.get("loss") in ("caller", "logits")
    return is_by_caller and case["reshard"] and "head" not in case["groups"]


def allowed_gathers(found: dict[str, Any], name: str) -> list[int]:
    """Return how often each forward with its backward, or abandoned, may gather the head.

    Twice; but after an abandoned forward as often as the stock model. torch keeps the order of its
    groups until a backward, in which each group gathers the one before it: the first group of the
    forward gathers the last one of the forward that was abandoned, which may be the head.
    """
    twice = [2] * len(found[name]["head_gathers"])
    if not SLOW[name].get("abandons"):
        return twice
    stock = found[name.replace("-stock-", "-").replace("-abandons", "-stock-abandons")]
    return list(map(max, twice, stock["head_gathers"]))


@pytest.mark.slow  # 648 trainings, a minute.
def test_case_217_and_218_of_every_grouping(found_slow):
    refused = {name for name, result in found_slow.items() if "refusal" in result}
    assert refused == {name for name, case in SLOW.items() if is_refused(case)}
    for name in SLOW.keys() - refused:
        check(found_slow, name)
        allowed = allowed_gathers(found_slow, name)
        pairs = zip(found_slow[name]["head_gathers"], allowed, strict=True)
        assert all(gathers <= most for gathers, most in pairs), name
