"""liger ops: the operations, or one of them with its definition and cases."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Annotated, Any

import typer

from liger_cli.errors import ConfigError

if TYPE_CHECKING:
    from liger_kernels.ops.op import Op

__all__ = ["command"]


def command(
    name: Annotated[
        str | None, typer.Argument(help="One op, by its name or a short one such as flce.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document.")] = False,
) -> None:
    """List the operations, or show one: its formula, its reference, the cases it is tried on."""
    from liger_cli.report import show_json, show_lines, show_table
    from liger_kernels.ops.registry import OPS, find_op

    try:
        ops = [find_op(name)] if name else list(OPS.values())
    except ValueError as error:
        raise ConfigError(str(error)) from None
    backends = _backends()
    if as_json:
        show_json({"command": "ops", "ops": [_describe(op, backends) for op in ops]})
    elif name:
        show_lines(*_page(ops[0], backends))
    else:
        rows = [(op.name, ", ".join(op.aliases), " ".join(backends), op.summary) for op in ops]
        show_table(("op", "short", "runs here", "what it does"), rows)


def _backends() -> list[str]:
    """Return the backends for tensors of this machine's devices, the fastest first."""
    import torch

    from liger_kernels.ops.backend import backend

    kinds = [kind for kind in ("cuda", "xpu") if getattr(torch, kind).is_available()]
    return list(dict.fromkeys(backend(torch.device(kind)) for kind in [*kinds, "cpu"]))


def _describe(op: Op, backends: list[str]) -> dict[str, Any]:
    return {
        "name": op.name,
        "aliases": list(op.aliases),
        "summary": op.summary,
        "backends": backends,
        "signature": f"{op.name}{inspect.signature(op.function)}",
        "cases": [
            {"id": case.id, "shape": case.shape, "options": str(dict(case.options))}
            for case in op.cases
        ],
    }


def _page(op: Op, backends: list[str]) -> list[str]:
    formula = inspect.getdoc(inspect.getmodule(op.function)) or ""
    cases = [f"  {case.id:20} {case.shape} {dict(case.options) or ''}" for case in op.cases]
    return [
        f"{op.name}{inspect.signature(op.function)}",
        *("", op.summary, "", *formula.splitlines(), ""),
        f"short names: {', '.join(op.aliases) or 'none'}",
        f"runs here on: {', '.join(backends)}",
        *("", "reference:", *inspect.getsource(op.reference).rstrip().splitlines(), ""),
        *("cases:", *(case.rstrip() for case in cases)),
    ]
