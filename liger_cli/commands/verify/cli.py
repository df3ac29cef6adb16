"""liger verify: whether the patched model computes what the stock one does, on this machine."""

from __future__ import annotations

import functools
from typing import Annotated, Literal

import typer

from liger_cli.config import Launch, RunConfig, adapter_flags, launch_flags
from liger_cli.training.launch.start import launch_ranks
from liger_cli.training.model.names import check_model_name

__all__ = ["command"]


@functools.partial(adapter_flags, trains=True)
@launch_flags
def command(
    adapter: RunConfig,
    launch: Launch,
    model: Annotated[
        str, typer.Option("--model", "-m", help="Preset, directory, config.json or hub id.")
    ],
    ops: Annotated[
        str, typer.Option("--ops", help="auto, all, none, a list, or auto,-rope.")
    ] = "auto",
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"],
        typer.Option("--dtype", help="Parameters; auto is what train takes."),
    ] = "auto",
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of weights and tokens.")] = 42,
    use_cpu: Annotated[
        bool, typer.Option("--use-cpu", help="Stay on the CPU although there is a GPU.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document.")] = False,
) -> None:
    """Check the ops on this device, then your model: loss, logits and every gradient, by module.

    Errors are against fp64, beside those of eager torch in the same dtype. Exit 7 where one is
    larger than eager's can explain, with the module named. With --adapter the model has that
    adapter, with random matrices, and the gradients are the adapter's. With --objective the loss
    is that of pairs, which are scored without a reference, or of the distance from --teacher-model.

    With --nproc the loss and the gradients of so many ranks, which share the model or copy it as
    the dp keys say, are compared with those of one process instead. Exit 7 where they differ.
    """
    # Before torch and transformers are imported.
    check_model_name(model)
    config = adapter.model_copy(update={"dtype": dtype, "seed": seed, "use_cpu": use_cpu})
    if launch_ranks(launch, use_cpu=use_cpu):
        return

    from liger_cli.commands.verify.run import run_verify

    run_verify(config, as_json=as_json)
