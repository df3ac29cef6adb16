"""RunConfig: the validated keys of a run, and the values derived from them."""

from __future__ import annotations

from typing import Any

from pydantic import model_validator
from pydantic_core import PydanticCustomError

from liger_cli.config.conflicts import CONFLICTS
from liger_cli.config.datasets import DatasetEntry, Naming, datasets_name, read_datasets
from liger_cli.config.eval_sets import read_sets
from liger_cli.config.keys import Keys
from liger_cli.config.objectives import OBJECTIVES, RISING_METRICS
from liger_cli.config.pairs import read_numbers, read_pairs, read_ranks, split_names
from liger_cli.config.yaml_file import to_yaml

__all__ = ["RunConfig"]


class RunConfig(Keys):
    """Every key that train, eval and bench know, with its type, default and limits."""

    @model_validator(mode="after")
    def _no_conflicts(self) -> RunConfig:
        found = [
            {"keys": keys, "message": message}
            for keys, message, is_conflict in CONFLICTS
            if is_conflict(self)
        ]
        if found:
            text = "; ".join(str(conflict["message"]) for conflict in found)
            raise PydanticCustomError("conflicts", "{text}", {"text": text, "found": found})
        return self

    @property
    def order_seed(self) -> int:
        """The seed of the data's order."""
        return self.seed if self.data_seed is None else self.data_seed

    @property
    def trains_completions_only(self) -> bool:
        """Whether of a prompt and its completion the completion alone is trained."""
        given = self.completion_only_loss
        return self.train_on != "all" if given is None else given

    @property
    def trains_answers_only(self) -> bool:
        """Whether of a conversation what the assistant says alone is trained."""
        given = self.assistant_only_loss
        return self.train_on != "all" if given is None else given

    @property
    def trains_pairs(self) -> bool:
        """Whether the rows are pairs of a chosen and a rejected answer."""
        return OBJECTIVES[self.objective].has_pairs

    @property
    def tile_size(self) -> int | None:
        """Tokens of a piece in gated MLPs; None: they run whole."""
        return int(self.tile_tokens) if self.tile_tokens.isdigit() else None

    @property
    def trains_unpaired(self) -> bool:
        """Whether the rows are answers labelled as good or bad."""
        return OBJECTIVES[self.objective].is_unpaired

    @property
    def takes_kl(self) -> bool:
        """Whether the loss reads a KL divergence over mismatched answers."""
        return self.objective == "kto" and "kto" in self.losses

    @property
    def has_scores(self) -> bool:
        """Whether the model is one of sequence classification."""
        return OBJECTIVES[self.objective].has_scores

    @property
    def classifies(self) -> bool:
        """Whether the rows are texts with their classes."""
        return self.has_scores and not self.trains_pairs

    @property
    def class_names(self) -> list[str]:
        """The names in label_names."""
        return split_names(self.label_names)

    @property
    def answers_per_row(self) -> int:
        """Sequences that a row is fed as: two of a pair."""
        return 2 if self.trains_pairs else 1

    def saves_async(self, num_processes: int) -> bool:
        """Return whether training goes on while a checkpoint of so many ranks is written."""
        return num_processes > 1 if self.async_save == "auto" else self.async_save

    @property
    def losses(self) -> dict[str, float]:
        """The losses of the objective with their weights; none of one without a loss_type."""
        names = split_names(self.loss_type or OBJECTIVES[self.objective].loss_type)
        weights = read_numbers(self.loss_weights) or [1.0] * len(names)
        return dict(zip(names, weights, strict=True))

    @property
    def likelihood_weight(self) -> float:
        """cpo_alpha, or its default for the objective and the loss."""
        if self.cpo_alpha is not None:
            return self.cpo_alpha
        return 0.0 if "alphapo" in self.losses else OBJECTIVES[self.objective].cpo_alpha

    def with_objective_defaults(self) -> RunConfig:
        """Return the same with the defaults that the objective gives to keys left at null."""
        reads = OBJECTIVES[self.objective].reads
        values = {"loss_type": ",".join(self.losses), "cpo_alpha": self.likelihood_weight}
        return self.model_copy(update={key: values[key] for key in values if key in reads})

    @property
    def naming(self) -> Naming:
        """The names of columns, roles and fields in all datasets."""
        return Naming(self.columns or {}, self.roles or {}, self.message_fields or {})

    @property
    def datasets(self) -> list[DatasetEntry]:
        """The datasets to train on."""
        return read_datasets(self.dataset, self.naming)

    @property
    def dataset_name(self) -> str:
        """The names of the datasets to train on."""
        return datasets_name(self.dataset)

    @property
    def eval_sets(self) -> dict[str, str | list[dict[str, Any]]]:
        """The evaluation data by name, as `dataset` has them; the name of a set alone is ""."""
        return read_sets(self.eval_dataset)

    @property
    def best_metric(self) -> tuple[str, bool]:
        """The metric that ranks the evaluations, and whether the largest is the best."""
        metric = self.metric_for_best_model or "loss"
        greater = self.greater_is_better
        is_rising = metric.endswith(tuple(RISING_METRICS))
        return metric, is_rising if greater is None else greater

    @property
    def trackers(self) -> list[str]:
        """The names in report_to."""
        return split_names(self.report_to)

    @property
    def profiled_steps(self) -> range:
        """The steps of profile_steps; empty where there is none."""
        first, _, last = (self.profile_steps or "").partition("-")
        return range(int(first), int(last or first) + 1) if first else range(0)

    @property
    def adapter_targets(self) -> str | list[str]:
        """lora_target_modules as peft takes them."""
        names = split_names(self.lora_target_modules)
        return names[0] if names == ["all-linear"] else names

    @property
    def saved_modules(self) -> list[str] | None:
        """lora_modules_to_save as peft takes them."""
        return split_names(self.lora_modules_to_save) or None

    @property
    def excluded_modules(self) -> list[str] | None:
        """lora_exclude_modules as peft takes them."""
        return split_names(self.lora_exclude_modules) or None

    @property
    def target_parameters(self) -> list[str] | None:
        """lora_target_parameters as peft takes them."""
        return split_names(self.lora_target_parameters) or None

    @property
    def rank_pattern(self) -> dict[str, int]:
        """lora_rank_pattern as peft takes it."""
        return read_ranks(self.lora_rank_pattern)

    @property
    def new_tokens(self) -> list[str]:
        """The words of add_tokens."""
        return split_names(self.add_tokens)

    @property
    def new_special_tokens(self) -> list[str]:
        """The words of add_special_tokens."""
        return split_names(self.add_special_tokens)

    @property
    def optimizer_arguments(self) -> dict[str, Any]:
        """The pairs of optim_args."""
        return read_pairs(self.optim_args)

    @property
    def schedule_arguments(self) -> dict[str, Any]:
        """The pairs of lr_scheduler_kwargs."""
        return read_pairs(self.lr_scheduler_kwargs)

    def to_yaml(self) -> str:
        """Return the YAML that load_config reads back to an equal configuration."""
        return to_yaml(self.model_dump(mode="json"))
