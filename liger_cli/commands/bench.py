"""liger bench: patched and eager side by side, with parity beside every speed."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from liger_cli.commands.bench_ops import command as bench_ops
from liger_cli.config import RunConfig, config_flags

__all__ = ["command"]


class _Bench(TyperGroup):
    """`liger bench ops ...` is a command of its own; anything else compares a model."""

    def make_context(
        self, info_name: Any, args: list[str], parent: Any = None, **extra: Any
    ) -> Any:
        if args[:1] == ["ops"]:
            return super().make_context(info_name, args, parent, **extra)
        return self.commands["model"].make_context(info_name, args, parent, **extra)


command = typer.Typer(cls=_Bench, add_completion=False)
command.command("ops")(bench_ops)


@command.command("model")
@config_flags
def _model(
    config: RunConfig,
    against: Annotated[
        str, typer.Option("--against", help="What to compare with; eager is what there is.")
    ] = "eager",
    steps: Annotated[
        int | None,
        typer.Option("--steps", min=2, help="Steps of a run; the same as --max-steps."),
    ] = None,
    repeats: Annotated[
        int | None,
        typer.Option("--repeats", min=1, help="Runs of each side, taken in turn (default 2)."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document.")] = False,
) -> None:
    """Run patched and eager side by side, each in its own process, with parity beside every speed.

    Without more words: 2 x 512 random tokens on a CPU, 8 x 2048 on a GPU. `liger bench ops`
    measures the kernels one by one; see `liger bench ops --help`.
    """
    from liger_cli.comparison import check_against, plan_bench, run_bench
    from liger_cli.report import show_lines, show_report

    check_against(against)
    import torch

    plan = plan_bench(config, steps=steps, repeats=repeats, has_gpu=torch.cuda.is_available())
    config = plan.config
    show_lines(
        f"{config.model} on {config.dataset}: {plan.steps} steps of "
        f"{config.per_device_train_batch_size} x {config.max_length} tokens",
        stderr=True,
    )
    report = run_bench(
        plan,
        on_run=lambda name, number: show_lines(
            f"{name}, run {number} of {plan.repeats} ...", stderr=True
        ),
    )
    show_report(report, as_json=as_json)
