"""liger bench --model M: a model patched and as others run it, with parity beside every speed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from liger_cli.config import Launch, RunConfig, config_flags, launch_flags
from liger_cli.training.model.names import check_model_name

__all__ = ["command"]


def _option(name: str, text: str, metavar: str | None = None, **more: object) -> object:
    return typer.Option(name, metavar=metavar, help=text, **more)  # type: ignore[arg-type]


_AGAINST = "Compare with eager, compile, patched+compile, liger-kernel; one or a list."
_SWEEP = "of a sweep, such as 512,1k or 2k..8k, which doubles; until out of memory."


@config_flags
@launch_flags
def command(
    config: RunConfig,
    launch: Launch,
    against: Annotated[str, _option("--against", _AGAINST, "LIST")] = "eager",
    ablate: Annotated[bool, _option("--ablate", "Also eager with each op alone.")] = False,
    seq: Annotated[str | None, _option("--seq", f"Sequence lengths {_SWEEP}", "SIZES")] = None,
    batch: Annotated[str | None, _option("--batch", f"Batch sizes {_SWEEP}", "SIZES")] = None,
    bounds: Annotated[
        str | None,
        _option("--assert", 'Exit 7 unless "speed>=1.1,memory<=0.7" holds.', "BOUNDS"),
    ] = None,
    steps: Annotated[
        int | None, _option("--steps", "Steps of a run; the same as --max-steps.", min=2)
    ] = None,
    repeats: Annotated[
        int | None,
        _option("--repeats", "Runs of each side, in turn (default 2, of a sweep 1).", min=1),
    ] = None,
    peer_python: Annotated[
        Path | None, _option("--peer-python", "Python that has liger-kernel.", "FILE")
    ] = None,
    peer_path: Annotated[
        Path | None, _option("--peer-path", "Folder that liger-kernel is in.", "DIR")
    ] = None,
    html: Annotated[Path | None, _option("--html", "Also write a page there.", "FILE")] = None,
    as_json: Annotated[bool, _option("--json", "One JSON document.")] = False,
) -> None:
    """Run patched and others side by side, each in its own process, with parity beside every speed.

    Without more words: against eager, 2 x 512 random tokens on a CPU, 8 x 2048 on a GPU.
    --nproc 1,2 compares numbers of processes: tokens a second, also as a share of one process's.
    `liger bench ops` measures the kernels one by one; see `liger bench ops --help`.
    """
    # Before torch and transformers are imported.
    check_model_name(config.model)

    from liger_cli.commands.bench.models.plan import BenchRequest
    from liger_cli.commands.bench.models.run import bench_model

    request = BenchRequest(
        steps, repeats, against, ablate, seq, batch, bounds, peer_python, peer_path
    )
    bench_model(config, launch, request, html=html, as_json=as_json)
