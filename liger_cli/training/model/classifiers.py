"""Models of sequence classification: a language model whose head gives scores of a whole text.

The class is transformers' own (AutoModelForSequenceClassification), known by the architectures of
a configuration, which also has the names of the classes: id2label, label2id and problem_type.

Its forward finds the last token of a row by the id of padding, which may be the token that ends a
text, and finds one in a row that has several texts. Here the places of the last tokens are an
argument of forward, which scores them and no others; without it transformers' own forward runs.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from liger_cli.common.readers import read_json
from liger_cli.errors import ConfigError
from liger_cli.training.forward import balance_weight
from liger_cli.training.model.presets import ModelSource
from liger_kernels.transformers.replacements.subclasses import (
    is_made_by,
    subclass_in_place,
    swap,
)
from liger_kernels.transformers.wrappers import inner_model

__all__ = [
    "HEAD",
    "HEAD_WEIGHT",
    "MULTI_LABEL",
    "SINGLE_LABEL",
    "check_head",
    "check_writes_text",
    "draw_head",
    "is_classifier",
    "label_names_of",
    "missing_line",
    "random_labels",
    "row_scores",
    "take_places",
    "token_scores",
    "with_labels",
    "with_labels_of",
    "without_new_head",
]

SINGLE_LABEL = "single_label_classification"
MULTI_LABEL = "multi_label_classification"
# The name of the head in the causal models.
HEAD = "score"
HEAD_WEIGHT = f"{HEAD}.weight"
# Of a quantization: the modules that it leaves out, by the names that its methods have for them.
_LEFT_WHOLE = ("llm_int8_skip_modules", "modules_to_not_convert")
_CLASS = "ForSequenceClassification"
_PLACES = "score_places"


def _class_name(source: ModelSource) -> str:
    """Return the name of the class of sequence classification for the model type of a source.

    Raises:
        ConfigError: The installed transformers has none.
    """
    from transformers import CONFIG_MAPPING, MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING

    known = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING
    if source.family not in CONFIG_MAPPING or CONFIG_MAPPING[source.family] not in known:
        raise ConfigError(
            f"{source.name}: the installed transformers has no model of sequence classification "
            f"of model type {source.family!r}",
            hint="llama, mistral, qwen2, qwen3, gemma2, gemma3, phi3 and others have one",
        )
    return str(known[CONFIG_MAPPING[source.family]].__name__)


def check_head(source: ModelSource, model: Any) -> None:
    """Check that a model scores the last token of a text, as causal models do.

    Raises:
        ConfigError: It is an encoder, which scores the first, or has other layers there.
    """
    if not isinstance(getattr(model, HEAD, None), torch.nn.Linear):
        raise ConfigError(
            f"{source.name} is a {source.family} model, which is not a causal language model: it "
            "does not score the last token of a text"
        )


def check_writes_text(source: ModelSource, what: str, *, hint: str | None = None) -> None:
    """Check that a model has a next token, and not scores of a text.

    Args:
        what: The model in a message, with what it is to be.
        hint: What to give instead; by default how it is evaluated.

    Raises:
        ConfigError: It is one of sequence classification.
    """
    if not source.is_classifier:
        return
    names = label_names_of(source)
    kind = f"{len(names)} classes: {', '.join(names[:20])}" if names[1:] else "a reward"
    objective = "classify" if names[1:] else "reward"
    raise ConfigError(
        f"{what} is a model of sequence classification, which writes no text but scores it "
        f"({kind})",
        hint=hint or f"liger eval --objective {objective} evaluates it",
    )


def draw_head(model: Any, seed: int) -> None:
    """Give the head of a model new random weights, as transformers draws them.

    They depend on the seed alone: not on the device, and not on who else loads the model.

    Args:
        model: A model of sequence classification, which may have no weights yet.
    """
    head = getattr(model, HEAD)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        drawn = torch.nn.Linear(head.in_features, head.out_features, bias=head.bias is not None)
        model._init_weights(drawn)
    drawn.to(head.weight.device, head.weight.dtype)
    head.load_state_dict(drawn.state_dict(), assign=True)


def without_new_head(source: ModelSource, missing: Collection[str]) -> list[str]:
    """Return the weights that files lack and should have; the head of a classifier may be new."""
    return [name for name in missing if not (source.is_classifier and name == HEAD_WEIGHT)]


def missing_line(source: ModelSource, missing: Collection[str]) -> str | None:
    """Return a line on the weights that the files of a model do not have, if it lacks some."""
    # An adapter of a classifier has its head.
    kept = {HEAD_WEIGHT} if source.adapter is not None else set()
    if not (names := sorted(set(missing) - kept)):
        return None
    shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    return f"{source.name}: {len(names)} weights are not in its files and random: {shown}"


def with_labels(
    source: ModelSource,
    names: Sequence[str],
    *,
    problem_type: str | None = None,
    pad_token_id: int | None = None,
) -> ModelSource:
    """Return the source of the same model with a head of one score for each label.

    Args:
        source: A language model, or a model of sequence classification with as many labels.
        names: Of the labels, in the order of their numbers.
        problem_type: As transformers has it; None leaves it out.
        pad_token_id: For transformers' own forward, where the configuration has none.

    Raises:
        ConfigError: transformers has no such model of its type.
    """
    values: dict[str, Any] = {
        **(source.config or {}),
        "architectures": [_class_name(source)],
        "id2label": {str(i): name for i, name in enumerate(names)},
        "label2id": {name: i for i, name in enumerate(names)},
    }
    # Beside id2label it is said twice.
    values.pop("num_labels", None)
    if isinstance(packed := values.get("quantization_config"), dict):
        values["quantization_config"] = _with_whole_head(packed)
    if problem_type is not None:
        values["problem_type"] = problem_type
    if values.get("pad_token_id") is None and pad_token_id is not None:
        values["pad_token_id"] = pad_token_id
    return replace(source, config=values)


def _with_whole_head(packed: Mapping[str, Any]) -> dict[str, Any]:
    """Return the quantization of a language model that leaves a new head as it is.

    Without a list of modules that are left out, transformers leaves out the head.
    """
    lists = [key for key in _LEFT_WHOLE if isinstance(packed.get(key), list)]
    return {**packed, **{key: [*packed[key], HEAD] for key in lists}}


def with_labels_of(adapter: Path, base: ModelSource) -> ModelSource:
    """Return the base model of an adapter with the head that the adapter is for.

    Args:
        adapter: Its directory; that of a classifier has a config.json with the names of its classes
            beside adapter_config.json.

    Raises:
        ConfigError: It is a classifier's, and nothing says which classes it has.
    """
    try:
        task = read_json(adapter / "adapter_config.json").get("task_type")
        if task != "SEQ_CLS" or base.is_classifier:
            return base
        values = read_json(adapter / "config.json")
    except (OSError, ValueError, AttributeError) as error:
        raise ConfigError(
            f"{adapter} is the adapter of a classifier, and its config.json, which has the names "
            f"of the classes, cannot be read: {error}",
            hint="write there the config.json of the base model with id2label",
        ) from error
    names = label_names_of(replace(base, config=values))
    return with_labels(
        base,
        names,
        problem_type=values.get("problem_type"),
        pad_token_id=values.get("pad_token_id"),
    )


def is_classifier(model: Any) -> bool:
    """Return whether a model is one of sequence classification."""
    return type(inner_model(model)).__name__.endswith(_CLASS)


def label_names_of(source: ModelSource) -> list[str]:
    """Return the names of the labels of a model of sequence classification, by number."""
    values = source.config or {}
    given = values.get("id2label")
    if isinstance(given, dict) and given:
        return [str(given[key]) for key in sorted(given, key=int)]
    # transformers' own default.
    return [f"LABEL_{i}" for i in range(int(values.get("num_labels") or 2))]


def take_places(model: Any) -> None:
    """Let a model of sequence classification score the places that row_scores names.

    Args:
        model: The model before it is prepared for several processes.

    Raises:
        ConfigError: The balance of its experts is to be a part of its loss.
    """
    inner = inner_model(model)
    if weight := balance_weight(model):
        raise ConfigError(
            f"the model's configuration adds {weight:g} of the balance of its experts to the loss "
            "(output_router_logits), and models of sequence classification have no such loss",
            hint="set output_router_logits to false in the model's config.json",
        )
    if not is_made_by(_with_places, type(inner)):
        swap(inner, _with_places(type(inner)))


def row_scores(
    model: Any, inputs: Mapping[str, Any], places: torch.Tensor, **options: Any
) -> torch.Tensor:
    """Return the scores at places of a batch, (N, number of labels).

    Args:
        model: What take_places has been called with, or the prepared model around it.
        inputs: The arguments of forward, of rows (B, T).
        places: (N,) int64, in the flattened batch.
        options: More arguments of forward.
    """
    options.setdefault("use_cache", False)
    scores: torch.Tensor = model(**inputs, **options, **{_PLACES: places}).logits
    return scores


def token_scores(model: Any, **inputs: Any) -> torch.Tensor:
    """Return the scores of every token of a batch, (B, T, number of labels).

    Args:
        model: As row_scores has it.
        inputs: The arguments of forward.
    """
    ids = inputs["input_ids"]
    scores = row_scores(model, inputs, torch.arange(ids.numel(), device=ids.device))
    return scores.view(*ids.shape, -1)


def random_labels(model: Any, num_rows: int, generator: torch.Generator) -> torch.Tensor:
    """Return labels for the loss of transformers: classes (N,), or several (N, C); a number (N,)
    of a model of one score."""
    inner = inner_model(model)
    num, dtype, device = inner.config.num_labels, inner.dtype, inner.device
    if inner.config.problem_type == MULTI_LABEL:
        return torch.randint(2, (num_rows, num), generator=generator).to(device, dtype)
    if num == 1:
        return torch.rand(num_rows, generator=generator).to(device, dtype)
    return torch.randint(num, (num_rows,), generator=generator).to(device)


def _with_places(base: Any) -> Any:
    """Return the subclass of `base` whose forward takes places."""

    @functools.wraps(base.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        from transformers.modeling_outputs import SequenceClassifierOutputWithPast

        places = kwargs.pop(_PLACES, None)
        if places is None:
            return base.forward(self, *args, **kwargs)
        hidden = self.base_model(*args, **kwargs).last_hidden_state
        return SequenceClassifierOutputWithPast(logits=self.score(hidden.flatten(0, 1)[places]))

    return subclass_in_place(
        _with_places, base, members=lambda: {"forward": forward}, is_undone=False
    )
