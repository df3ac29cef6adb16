"""liger verify: whether the patched model computes what the stock one does, on this machine."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from liger_cli.config import Launch, RunConfig, adapter_flags, launch_flags
from liger_cli.training.model.names import check_model_name

__all__ = ["command"]


@adapter_flags
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
    adapter, with random matrices, and the gradients are the adapter's.
    """
    # Before torch and transformers are imported.
    check_model_name(model)

    import torch

    from liger_cli.commands.verify.model import require_right, verify
    from liger_cli.report import show_lines
    from liger_cli.report.required_ops import parse_ops
    from liger_cli.report.verify import show_verify_report
    from liger_cli.training.model.dtypes import choose_dtype
    from liger_cli.training.model.source import resolve_model
    from liger_cli.training.runtime.launch import quiet_libraries

    launch.refuse_several("verify", "What it finds on one device holds for each of several.")
    parse_ops(ops)
    source = resolve_model(model)
    quiet_libraries()
    device = torch.device("cuda" if torch.cuda.is_available() and not use_cpu else "cpu")
    report = verify(
        source,
        ops=ops,
        adapter=adapter,
        dtype=choose_dtype("auto" if dtype == "auto" else getattr(torch, dtype), device),
        device=device,
        seed=seed,
        notify=lambda text: show_lines(text, stderr=True),
    )
    show_verify_report(report, as_json=as_json)
    require_right(report)
