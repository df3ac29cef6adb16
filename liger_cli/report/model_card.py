"""The model card of a run: the README.md of its repository on the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from liger_cli.common.numbers import format_count
from liger_cli.config import RunConfig
from liger_cli.report.evaluation import eval_texts
from liger_cli.report.summary import SavedReport, settings
from liger_cli.report.tables import Table, markdown_text

__all__ = ["model_card"]


def model_card(name: str, saved: SavedReport, *, is_adapter: bool) -> str:
    """Return the card: base model, data, results and the settings that were changed.

    Names of files are given without their folders, and only names of the hub are links.

    Args:
        name: Of the repository.
        saved: The report of the run.
        is_adapter: Whether the repository holds an adapter alone.
    """
    from huggingface_hub import ModelCardData

    # Not all keys: another version may have written them.
    read = ("model", "dataset", "objective")
    written = saved.report.config or {}
    config = RunConfig.model_validate({key: written[key] for key in read if key in written})
    datasets = [entry.path for entry in config.datasets]
    data = ModelCardData(
        base_model=_hub_name(config.model),
        datasets=[path for path in datasets if _hub_name(path)] or None,
        library_name="peft" if is_adapter else "transformers",
        pipeline_tag="text-classification" if config.has_scores else "text-generation",
        tags=sorted({"liger", config.objective, *(["lora"] if is_adapter else [])}),
    )
    shown = ", ".join(f"`{_shown(path)}`" for path in datasets)
    kind = "An adapter of" if is_adapter else "A fine-tune of"
    lines = [
        f"---\n{data.to_yaml()}\n---\n",
        f"# {markdown_text(name.rpartition('/')[2])}\n",
        f"{kind} `{_shown(config.model)}` by `{config.objective}` on {shown}, "
        "trained with liger.\n",
    ]
    return "\n".join([*lines, *(table.markdown() for table in _tables(saved))])


def _tables(saved: SavedReport) -> Iterator[Table]:
    report = saved.report
    if (part := report.train) is not None:
        rows = [
            ("steps", str(part.steps)),
            ("tokens", format_count(part.tokens)),
            ("tokens trained", format_count(part.trained_tokens)),
            ("first loss", _number(part.first_loss)),
            ("last loss", _number(part.final_loss)),
        ]
        yield Table("Training", ("", "value"), rows)
    if texts := eval_texts(report):
        yield Table("Evaluation", ("",), [(text,) for text in texts])
    # Of this machine, and of nobody else's.
    private = {"model", "dataset", "eval_dataset", "output_dir", "push_to_hub", "hub_model_id"}
    changed = [
        (setting.key, setting.value)
        for setting in settings(report.config or {})
        if not setting.is_default and setting.key not in private and "/" not in setting.value
    ]
    if changed:
        yield Table("Settings", ("key", "value"), changed)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _hub_name(name: Any) -> str | None:
    """Return the name of a model or dataset of the hub: organisation/name, which is no path."""
    text = str(name).partition(":")[0]
    is_name = text.count("/") == 1 and not text.startswith((".", "/", "~"))
    return text if is_name and not Path(text).exists() else None


def _shown(name: Any) -> str:
    return _hub_name(name) or Path(str(name)).name
