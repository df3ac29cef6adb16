"""liger estimate: the memory of a training step by part and its time, before a card is rented."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from liger_cli.commands.estimate.machine import Machine
from liger_cli.commands.estimate.rates import rate_flags
from liger_cli.commands.estimate.sizes import as_sharded, with_sizes
from liger_cli.config import RunConfig, config_flags
from liger_cli.errors import OutOfMemory
from liger_cli.training.model.names import check_model_name

__all__ = ["command"]


@config_flags
@rate_flags
def command(
    config: RunConfig,
    context: typer.Context,
    machine: Machine,
    gpu: Annotated[
        str | None,
        typer.Option("--gpu", metavar="NAME|GB", help="The card it shall fit into: H100-80GB, 24."),
    ] = None,
    fit: Annotated[
        Literal["batch", "seq", "shards"] | None,
        typer.Option(
            "--fit", help="Find the largest batch, longest rows or fewest shards that fit."
        ),
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option("--batch-size", min=1, help="per_device_train_batch_size.")
    ] = None,
    seq_len: Annotated[int | None, typer.Option("--seq-len", min=2, help="max_length.")] = None,
    nproc: Annotated[
        int | None, typer.Option("--nproc", min=1, metavar="N", help="Ranks; figures are of one.")
    ] = None,
    fsdp: Annotated[
        int | None,
        typer.Option("--fsdp", min=1, metavar="N", help="Short for --nproc N --dp-shard-size -1."),
    ] = None,
    padded: Annotated[
        bool, typer.Option("--padded", help="Rows have several lengths, so attention is masked.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document.")] = False,
) -> None:
    """Estimate the memory of a training step by part. Needs no weights, no data and no GPU.

    Rows are as long as max_length. Of a run on several ranks it is the memory of each, and the time
    of a step in the layouts they can have. Exit 5 where the card of --gpu has less than it takes.
    """
    # Before torch and transformers are imported.
    check_model_name(config.model)

    from liger_cli.commands.estimate.cards import find_card
    from liger_cli.commands.estimate.describe import describe_estimate
    from liger_cli.report import notify
    from liger_cli.report.estimate import show_estimate

    config = with_sizes(config, context, batch_size, seq_len)
    if fsdp is not None:
        config, nproc = as_sharded(config, nproc, fsdp), fsdp
    report = describe_estimate(
        config,
        card=None if gpu is None else find_card(gpu),
        fit=fit,
        nproc=nproc,
        is_padded=padded,
        machine=machine,
    )
    if config.torch_compile is True:
        notify("torch_compile is not in the estimate: it decides by itself what to keep")
    show_estimate(report, as_json=as_json)
    if report.card is not None and report.card.free < 0:
        raise OutOfMemory(f"it does not fit into {report.card.name}", is_reported=True)
