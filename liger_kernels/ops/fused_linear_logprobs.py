"""Log-probability of each token, and more of its distribution, without ever making all logits.

    z = softcap * tanh(scale * (hidden @ weight.T + bias) / softcap) / temperature
    log p_j = z_j - logsumexp(z),  entropy = -sum_j p_j * log p_j,  mean_logit = sum_j z_j / V

Legend: N tokens, H hidden width, V vocabulary.
Compute dtype and rounding: as in fused_linear_cross_entropy.py; what follows the logits is fp32.
Memory: one chunk of logits. Only what is asked for is computed. Between forward and backward two
numbers a token are kept, of which its logsumexp is the sum: backward computes the logits again and
their gradient in one pass. Where only hidden needs a gradient, and of the log-probability alone,
forward computes it while a chunk of logits is there, and backward scales it: no logits again.
"""

from __future__ import annotations

import collections
from typing import Any

import torch

from liger_kernels.ops.arguments import (
    LARGEST,
    SMALLEST,
    Cap,
    Choices,
    Instance,
    Integer,
    Number,
    check_tensors,
)
from liger_kernels.ops.cross_entropy import random_target
from liger_kernels.ops.fused_linear_cross_entropy import (
    LINEAR_TENSORS,
    compute_dtype_of,
    linear_bytes,
    linear_ref,
    linear_sample,
    needs_of,
)
from liger_kernels.ops.losses.autograd import PerTokenLoss, compiled
from liger_kernels.ops.losses.label_count import LabelCount, count_labels, is_capturing
from liger_kernels.ops.losses.linear_loss import LinearLossCall
from liger_kernels.ops.losses.options import (
    LossOptions,
    check_linear,
    check_target,
    label_argument,
)
from liger_kernels.ops.op import Case, Op, Sample, upcast

__all__ = [
    "DIFFERENTIABLE",
    "LOGPROB_OUTPUTS",
    "OP",
    "TEMPERATURE",
    "fused_linear_logprobs",
    "linear_logprobs",
    "logprob_options",
    "logprobs_of_logits",
    "named_outputs",
]

# By name: the outputs of loss_rows that it is made of.
_MADE_OF = {
    "logprob": ("loss",),
    "entropy": ("entropy",),
    "logsumexp": ("peak", "log_total"),
    "correct": ("best",),
    "mean_logit": ("mean",),
}
LOGPROB_OUTPUTS = tuple(_MADE_OF)
# By name: the output of loss_rows that has all of its gradient. A peak is a constant.
_GRADIENT_OF = {"logprob": "loss", "entropy": "entropy", "logsumexp": "log_total"}
DIFFERENTIABLE = ("logprob", "entropy")

_TENSORS = (*LINEAR_TENSORS, label_argument("ids"))
TEMPERATURE = Number("temperature", least=SMALLEST, allowed="positive")
_IGNORE_INDEX = Integer("ignore_index", "None or an int", is_optional=True)
_SOFTCAP, _SCALE = Cap("softcap"), Number("scale")
_OUTPUTS = Choices("outputs", LOGPROB_OUTPUTS)
_LABEL_COUNT = Instance("label_count", LabelCount, "count_labels")

# Of each selection in its order; made once, as a class costs more than a launch.
_CLASSES: dict[tuple[str, ...], Any] = {}


def named_outputs(names: tuple[str, ...], values: Any) -> Any:
    """Return the values as a named tuple with these fields, a subset of LOGPROB_OUTPUTS."""
    if names not in _CLASSES:
        _CLASSES[names] = collections.namedtuple("Logprobs", names)  # noqa: PYI024
    return _CLASSES[names](*values)


def logprobs_of_logits(
    z: torch.Tensor,
    ids: torch.Tensor,
    outputs: tuple[str, ...],
    differentiable: tuple[str, ...] = DIFFERENTIABLE,
) -> Any:
    """Return the outputs of fused_linear_logprobs for given logits z (..., V), in plain torch."""
    log_p = z.log_softmax(-1) if {"logprob", "entropy"} & set(outputs) else z
    column = ids.long()[..., None]
    compute = {
        "logprob": lambda: log_p.gather(-1, column)[..., 0],
        "entropy": lambda: -(log_p.exp() * log_p).sum(-1),
        "logsumexp": lambda: z.logsumexp(-1),
        "correct": lambda: z.argmax(-1) == ids,
        "mean_logit": lambda: z.mean(-1),
    }
    found = {name: compute[name]() for name in outputs}
    return named_outputs(
        outputs, [x if name in differentiable else x.detach() for name, x in found.items()]
    )


def fused_linear_logprobs_ref(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    ids: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    temperature: float = 1.0,
    ignore_index: int | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
    outputs: tuple[str, ...] = ("logprob", "entropy"),
    label_count: Any = None,
) -> Any:
    """The definition, in plain torch."""
    z = upcast(linear_ref(hidden, weight, bias)) * scale
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    z = z / temperature
    if ignore_index is None:
        return logprobs_of_logits(z, ids, outputs)
    is_ignored = ids == ignore_index
    found = logprobs_of_logits(z, ids.masked_fill(is_ignored, 0), outputs)
    return named_outputs(outputs, [value.masked_fill(is_ignored, 0) for value in found])


def fused_linear_logprobs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    ids: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    temperature: float = 1.0,
    ignore_index: int | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
    outputs: tuple[str, ...] = ("logprob", "entropy"),
    label_count: LabelCount | None = None,
) -> Any:
    """Compute each token's log-probability, entropy and more; their softmax is never whole.

    It is of z = softcap * tanh(scale * (hidden @ weight.T + bias) / softcap) / temperature.

    Args:
        hidden: (..., H) fp32, bf16 or fp16; cast as in fused_linear_cross_entropy.
        weight: (V, H). If it does not require grad, its gradient is neither computed nor allocated;
            the same holds for hidden and bias.
        ids: (...) int32 or int64, each from 0 to V - 1 or ignore_index.
        bias: (V,) or None.
        temperature: Divides the logits after scale and cap; positive and finite.
        ignore_index: Tokens with this id give 0 and are left out before the product; None: no
            token is.
        softcap: Cap of the logits; None or infinity for none.
        scale: Multiplies the logits before the cap.
        outputs: What to return, each once, in the order of the result. The others cost nothing.
        label_count: From count_labels, started earlier, as in fused_linear_cross_entropy: with
            more tokens than it says the floating outputs are NaN. With ignore_index alone.

    Returns:
        A named tuple of tensors of ids' shape, fp32 (fp64 for fp64 weights), 0 where ignored:
        logprob, log p of the id; entropy of the distribution in nats; logsumexp of z; correct,
        bool, whether the id has the largest logit, of equal ones the first; mean_logit, the mean of
        z over the vocabulary. Logprob and entropy are differentiable, once, and backward may run
        again over a retained graph. An id out of range gives NaN on a GPU. There the host waits for
        the count of tokens that are not ignored, and for nothing else.

    Raises:
        ValueError: a type, shape, dtype, device or option is off, or, on a CPU, an id is out of
            range.
    """
    check_tensors(_TENSORS, weight, hidden, bias, ids)
    check_linear(hidden, weight, bias)
    ignored, names = _IGNORE_INDEX.of(ignore_index), _OUTPUTS.of(outputs)
    options = logprob_options(ignored, temperature, softcap, scale)
    check_target(ids, hidden.shape[:-1], weight.shape[0], ignored, "ids")
    count = _LABEL_COUNT.of(label_count)
    if count is not None and ignored is None:
        raise ValueError("label_count must be None without ignore_index: every token counts")
    return linear_logprobs((hidden, weight, bias), ids, options, names, label_count=count)


def linear_logprobs(
    layer: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None],
    ids: torch.Tensor,
    options: LossOptions,
    names: tuple[str, ...],
    *,
    differentiable: tuple[str, ...] = DIFFERENTIABLE,
    label_count: LabelCount | None = None,
) -> Any:
    """Compute fused_linear_logprobs from valid arguments.

    Args:
        layer: hidden, weight and bias.
        ids: As fused_linear_logprobs takes them.
        options: With the temperature in scale and cap.
        names: The outputs.
        differentiable: Those with a gradient, of logprob, entropy and logsumexp.
        label_count: As fused_linear_logprobs takes it.
    """
    (hidden, weight, bias), ignored = layer, options.ignore_index
    is_counted = not torch.compiler.is_compiling() and not is_capturing(weight)
    count = None
    if ignored is not None and is_counted:
        # Compiled code counts inside its operator; while a graph is captured all take part.
        count = label_count or count_labels(ids, ignored)
    label = ids.reshape(-1).to(weight.device, non_blocking=True)
    parts = tuple(dict.fromkeys(part for name in names for part in _MADE_OF[name]))
    with_gradient = tuple(_GRADIENT_OF[name] for name in names if name in differentiable)
    call = LinearLossCall(
        label=label,
        options=options,
        compute_dtype=compute_dtype_of(weight),
        outputs=parts,
        differentiable=with_gradient,
        needs=needs_of(hidden, weight, bias) if with_gradient else (False, False, False),
        label_count=count,
        is_per_token=True,
    )
    x = hidden.reshape(-1, hidden.shape[-1]).to(weight.device)
    apply = compiled if torch.compiler.is_compiling() else PerTokenLoss.apply
    found = dict(zip(parts, apply(x, weight, bias, call), strict=True))
    if label_count is not None and count is not None:
        is_here: Any = label != ignored
        is_broken = is_here.sum() > count.wait()
        found = {
            name: value.masked_fill(is_broken, float("nan")) if value.is_floating_point() else value
            for name, value in found.items()
        }
    return named_outputs(names, [_output(name, found, label).view(ids.shape) for name in names])


def logprob_options(ignored: int | None, temperature: Any, softcap: Any, scale: Any) -> LossOptions:
    """Fold the temperature into cap and scale: cap / t * tanh((scale / t) * x / (cap / t))."""
    temperature = TEMPERATURE.of(temperature)
    softcap, scale = _SOFTCAP.of(softcap), _SCALE.of(scale)
    cap = None if softcap is None else softcap / temperature
    if abs(scale / temperature) > LARGEST or not (cap is None or SMALLEST <= cap <= LARGEST):
        raise ValueError(
            f"temperature must leave scale and softcap finite in fp32, got {temperature} with "
            f"scale={scale} and softcap={softcap}"
        )
    return LossOptions(ignored, softcap=cap, scale=scale / temperature)


def _output(name: str, found: dict[str, torch.Tensor], label: torch.Tensor) -> torch.Tensor:
    if name == "logprob":
        return -found["loss"]
    if name == "logsumexp":
        return found["peak"] + found["log_total"]
    if name == "correct":
        # An ignored token has no best class, -1, which may also be ignore_index.
        return (found["best"] == label) & (found["best"] >= 0)
    return found[_MADE_OF[name][0]]


def _sample(case: Case, dtype, device, generator) -> Sample:
    *lead, _, vocab = case.shape
    options = dict(case.options)
    ignored = options.pop("ignored", 0.0)
    hidden, weight = linear_sample(case, dtype, device, generator, options)
    ids = random_target(tuple(lead), vocab, device, generator, ignored)
    return Sample((hidden, weight, ids), options)


_ALL = {
    "has_bias": True,
    "ignored": 0.4,
    "ignore_index": -100,
    "temperature": 1.3,
    "softcap": 3.0,
    "scale": 0.5,
    "spread": 4.0,
}

OP = Op(
    name="fused_linear_logprobs",
    aliases=("logprobs",),
    summary="Log-probability and entropy of each token from a linear layer, in chunks; no logits.",
    function=fused_linear_logprobs,
    reference=fused_linear_logprobs_ref,
    cases=(
        Case("tiny", (4, 8, 16)),
        Case("odd", (7, 33, 127), {"has_bias": True}),
        Case("rank-3", (2, 5, 16, 40), {"temperature": 0.7}),
        Case("ignored", (9, 16, 40), {"ignored": 0.5, "ignore_index": -100}),
        Case("all-ignored", (4, 16, 20), {"ignored": 1.0, "ignore_index": -100}),
        Case("logprob", (6, 16, 50), {"outputs": ("logprob",)}),
        Case("all", (9, 24, 129), {**_ALL, "outputs": LOGPROB_OUTPUTS}),
        Case("reversed", (5, 24, 33), {**_ALL, "outputs": LOGPROB_OUTPUTS[::-1]}),
        Case("three-blocks", (3, 4, 17000), {"outputs": LOGPROB_OUTPUTS}),
        Case("wide-blocks", (2, 4, 41001), {"outputs": LOGPROB_OUTPUTS, "softcap": 3.0}),
        # So many terms of an entropy that the order in which they are added shows.
        Case("many-terms", (64, 64, 8192)),
        Case("no-rows", (0, 16, 20)),
        Case("real", (2048, 2048, 32000), needs_gpu=True),
        Case("real-wide", (512, 2048, 151936), {"outputs": LOGPROB_OUTPUTS}, needs_gpu=True),
    ),
    sample=_sample,
    num_bytes=linear_bytes,
    # Backward makes the logits again: 2 + 6.
    num_flops=lambda case: 8 * torch.Size(case.shape).numel(),
    # No module runs it.
    part_of=(),
    tensors=_TENSORS,
    options=(TEMPERATURE, _IGNORE_INDEX, _SOFTCAP, _SCALE, _OUTPUTS, _LABEL_COUNT),
)
