"""The optimizer and the schedule that a configuration names.

Matrices decay; vectors, such as norms, and biases do not. muon takes the matrices of the hidden
layers, with steps as long as AdamW's so that one learning rate does for both, and AdamW the rest.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_scheduler
from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION, Adafactor

from liger_cli.common.optional_packages import require_package
from liger_cli.config import RunConfig
from liger_cli.config.conflicts import METRIC_SCHEDULES
from liger_cli.errors import ConfigError, EnvironmentProblem
from liger_cli.training.optim.composite_optimizers import CompositeOptimizer, MasterWeights
from liger_kernels.transformers.lazy_logits.sharding import is_part

__all__ = [
    "EIGHT_BIT",
    "Schedule",
    "check_optimization",
    "make_optimizer",
    "state_bytes",
]

# Optimizers of bitsandbytes whose moments have 8 bits, by the class. Those of a paged one may leave
# a full GPU for the host.
EIGHT_BIT = {"adamw_8bit": "AdamW8bit", "paged_adamw_8bit": "PagedAdamW8bit"}

_Groups = list[dict[str, Any]]

# Arguments of optimizers that keys of the configuration set.
_FROM_KEYS = {"params", "lr", "weight_decay", "betas", "eps"}
# The same of schedules.
_FROM_RUN = {"optimizer", "num_warmup_steps", "num_training_steps", "last_epoch"}


def make_optimizer(config: RunConfig, model: nn.Module) -> torch.optim.Optimizer:
    """Return the optimizer of the trained parameters.

    Raises:
        ConfigError: optim_args holds what this optimizer does not take.
        EnvironmentProblem: It needs a package or a newer torch.
    """
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if config.optim == "muon":
        optimizer = _make_muon(config, model, named)
    else:
        make, options = _named(config)
        optimizer = _make(make, _groups(named, config), config, options)
    return MasterWeights(optimizer) if config.master_weights else optimizer


def _named(config: RunConfig) -> tuple[Callable[..., Any], dict[str, Any]]:
    """Return the class of an optimizer other than muon, and its options."""
    adam = _moments(config)
    if config.optim == "adamw_torch":
        return torch.optim.AdamW, adam
    if config.optim == "adamw_torch_fused":
        return torch.optim.AdamW, {**adam, "fused": True}
    if config.optim in EIGHT_BIT:
        install = "pip install 'liger-kernels[quant]'"
        package = require_package("bitsandbytes", f"optim {config.optim}", install)
        return getattr(package.optim, EIGHT_BIT[config.optim]), adam
    if config.optim == "adafactor":
        # Its own learning rate would make the schedule of the run nothing.
        return Adafactor, {"scale_parameter": False, "relative_step": False}
    return torch.optim.SGD, {}


def _moments(config: RunConfig) -> dict[str, Any]:
    return {"betas": (config.adam_beta1, config.adam_beta2), "eps": config.adam_epsilon}


def _make(
    make: Callable[..., Any], groups: _Groups, config: RunConfig, options: Mapping[str, Any]
) -> Any:
    given = config.optimizer_arguments
    takes = set(inspect.signature(make).parameters) - _FROM_KEYS
    if unknown := sorted(set(given) - takes):
        raise ConfigError(
            f"optim_args: {config.optim} takes no {unknown[0]!r}; allowed: "
            f"{', '.join(sorted(takes))}"
        )
    if any(is_part(parameter) for group in groups for parameter in group["params"]):
        make = _for_shards(make)
    try:
        return make(groups, lr=config.learning_rate, **{**options, **given})
    except (TypeError, ValueError) as error:
        raise ConfigError(f"optim_args: {config.optim}: {error}") from error


def _for_shards(make: Callable[..., Any]) -> Callable[..., Any]:
    """Return the class of an optimizer that takes shards of parameters."""
    from liger_cli.training.optim.sharded_optimizers import ShardedAdafactor, ShardedMuon

    classes: dict[Any, Any] = {Adafactor: ShardedAdafactor, torch.optim.Muon: ShardedMuon}
    return classes.get(make, make)


def _groups(named: Mapping[str, nn.Parameter], config: RunConfig) -> _Groups:
    decaying = [p for name, p in named.items() if _is_matrix(name, p)]
    others = [p for name, p in named.items() if not _is_matrix(name, p)]
    return [
        {"params": decaying, "weight_decay": config.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]


def _is_matrix(name: str, parameter: nn.Parameter) -> bool:
    # The biases of all experts are one matrix.
    return parameter.ndim > 1 and not name.endswith("bias")


def _make_muon(
    config: RunConfig, model: nn.Module, named: Mapping[str, nn.Parameter]
) -> torch.optim.Optimizer:
    muon = getattr(torch.optim, "Muon", None)
    if muon is None:
        raise EnvironmentProblem(
            f"optim muon needs torch 2.9 or newer, this is {torch.__version__}"
        )
    ends = _ends(model)
    hidden = {
        name: parameter
        for name, parameter in named.items()
        if parameter.ndim == 2 and _is_matrix(name, parameter) and parameter not in ends
    }
    if not hidden:
        raise ConfigError("optim muon is for matrices of hidden layers, and none is trained")
    groups: _Groups = [{"params": list(hidden.values()), "weight_decay": config.weight_decay}]
    parts = [_make(muon, groups, config, {"adjust_lr_fn": "match_rms_adamw"})]
    if rest := {name: named[name] for name in named if name not in hidden}:
        options = {**_moments(config), "lr": config.learning_rate, "fused": True}
        parts.append(torch.optim.AdamW(_groups(rest, config), **options))
    return CompositeOptimizer(parts)


def _ends(model: nn.Module) -> set[nn.Parameter]:
    """Return the parameters of embedding and head, which are tables rather than maps."""
    tables = [
        module
        for module in (
            getattr(model, name, lambda: None)()
            for name in ("get_input_embeddings", "get_output_embeddings")
        )
        if module is not None
    ]
    return {parameter for table in tables for parameter in table.parameters()}


class Schedule:
    """The learning rate of each step.

    Args:
        config: Names the schedule.
        optimizer: Whose learning rate it sets.
        num_steps: Optimizer steps of the whole run.

    Raises:
        ConfigError: lr_scheduler_kwargs holds what this schedule does not take.
        EnvironmentProblem: The installed transformers does not know it.
    """

    def __init__(self, config: RunConfig, optimizer: torch.optim.Optimizer, num_steps: int) -> None:
        self._follows_metric = config.lr_scheduler_type in METRIC_SCHEDULES
        self._schedule = _make_schedule(config, optimizer, num_steps)

    @property
    def learning_rate(self) -> float:
        """The learning rate of the step to come."""
        return float(self._schedule.get_last_lr()[0])

    def step(self) -> None:
        """Advance by one optimizer step."""
        if not self._follows_metric:
            self._schedule.step()

    def evaluated(self, loss: float) -> None:
        """Advance a schedule that follows a metric, by the loss of an evaluation."""
        if self._follows_metric:
            self._schedule.step(loss)

    def state_dict(self) -> dict[str, Any]:
        return dict(self._schedule.state_dict())

    def load_state_dict(self, values: dict[str, Any]) -> None:
        """Restore the state of a run, which may have had another number of steps.

        The learning rate of the step to come, in `values` and in the optimizer's state, is that of
        the old length: it is recomputed. Load the optimizer's state first.
        """
        self._schedule.load_state_dict(values)
        if isinstance(self._schedule, LambdaLR):
            schedule = self._schedule
            rates = [
                base * factor(schedule.last_epoch)
                for base, factor in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)
            ]
            for group, rate in zip(schedule.optimizer.param_groups, rates, strict=True):
                group["lr"] = rate
            schedule._last_lr = rates


def _make_schedule(config: RunConfig, optimizer: torch.optim.Optimizer, num_steps: int) -> Any:
    name = config.lr_scheduler_type
    known = [str(kind.value) for kind in TYPE_TO_SCHEDULER_FUNCTION]
    if name not in known:
        raise EnvironmentProblem(
            f"lr_scheduler_type {name} needs a newer transformers; this one knows "
            f"{', '.join(known)}"
        )
    name = "constant_with_warmup" if name == "constant" else name
    _check_schedule_arguments(config, name)
    try:
        return get_scheduler(
            name,
            optimizer,
            num_warmup_steps=config.warmup_steps or math.ceil(config.warmup_ratio * num_steps),
            num_training_steps=num_steps,
            scheduler_specific_kwargs=config.schedule_arguments,
        )
    except (TypeError, ValueError) as error:
        raise ConfigError(f"lr_scheduler_kwargs: {name}: {error}") from error


def _check_schedule_arguments(config: RunConfig, name: str) -> None:
    [make] = [make for kind, make in TYPE_TO_SCHEDULER_FUNCTION.items() if kind.value == name]
    parameters = inspect.signature(make).parameters
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        # It passes them to a class, which raises for an unknown one.
        return
    takes = set(parameters) - _FROM_RUN
    if unknown := sorted(set(config.schedule_arguments) - takes):
        raise ConfigError(
            f"lr_scheduler_kwargs: {config.lr_scheduler_type} takes no {unknown[0]!r}; allowed: "
            f"{', '.join(sorted(takes)) or 'none'}"
        )


def check_optimization(config: RunConfig, device: torch.device) -> None:
    """Validate optimizer and schedule early, on a model of four weights.

    Raises:
        ConfigError: Arguments that the optimizer or the schedule does not take.
        EnvironmentProblem: A package, a device or a newer version is missing.
    """
    if config.optim in EIGHT_BIT and device.type != "cuda":
        raise EnvironmentProblem(
            f"optim {config.optim} needs a CUDA GPU, and this run is on {device.type}",
            hint="--optim adafactor holds as little, on any device.",
        )
    Schedule(config, make_optimizer(config, nn.Linear(2, 2)), 100)


def state_bytes(config: RunConfig, parameter_bytes: int) -> float:
    """Return the bytes that the optimizer holds for each trained parameter of a large matrix."""
    copy = 4 if config.master_weights and parameter_bytes == 2 else 0
    moment = copy or parameter_bytes
    if config.optim in ("sgd", "adafactor"):
        # SGD without momentum has none; adafactor has a row and a column of each matrix.
        return copy
    if config.optim in EIGHT_BIT:
        return copy + 2
    return copy + (moment if config.optim == "muon" else 2 * moment)
