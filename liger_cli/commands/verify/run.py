"""`liger verify` in this process: the model on one device, or as one of several ranks."""

from __future__ import annotations

import torch

from liger_cli.commands.verify.model import require_right, verify
from liger_cli.commands.verify.ranks import require_equal, verify_ranks
from liger_cli.common.ranks import find_rank
from liger_cli.config import RunConfig
from liger_cli.errors import ConfigError
from liger_cli.report import show_lines
from liger_cli.report.required_ops import parse_ops
from liger_cli.report.verify import show_verify_report
from liger_cli.report.verify_ranks import show_ranks_report
from liger_cli.training.model.dtypes import choose_dtype
from liger_cli.training.model.source import resolve_model
from liger_cli.training.runtime.launch import quiet_libraries
from liger_cli.training.scores import assumed_scores

__all__ = ["run_verify"]


def run_verify(config: RunConfig, *, as_json: bool) -> None:
    """Verify a model, show the report, and end the command where something is wrong.

    Args:
        config: Its model, ops, adapter, dtype, seed and use_cpu; of several ranks the layout too.

    Raises:
        RequirementFailed: An op, a module, a loss or a gradient is wrong.
        LigerError: The model cannot be loaded.
    """
    parse_ops(config.ops)
    if find_rank() is not None:
        if config.objective != "sft":
            raise ConfigError(
                f"--nproc compares the loss of objective sft, and --objective is {config.objective}"
            )
        ranks_report = verify_ranks(config)
        if ranks_report is not None:
            show_ranks_report(ranks_report, as_json=as_json)
            require_equal(ranks_report)
        return
    if config.dp_shard_size is not None or config.dp_replicate_size != 1:
        raise ConfigError("the keys of a layout are for several ranks: add --nproc")
    source = resolve_model(config.model)
    # Without an objective a classifier is compared by the loss that transformers gives it.
    if not (source.is_classifier and config.objective == "sft"):
        source = assumed_scores(config, source)
    quiet_libraries()
    device = torch.device("cuda" if torch.cuda.is_available() and not config.use_cpu else "cpu")
    report = verify(
        source,
        ops=config.ops,
        config=config,
        dtype=choose_dtype(
            "auto" if config.dtype == "auto" else getattr(torch, config.dtype), device
        ),
        device=device,
        notify=lambda text: show_lines(text, stderr=True),
    )
    show_verify_report(report, as_json=as_json)
    require_right(report)
