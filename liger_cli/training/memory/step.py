"""A training step that runs on tensors without data, and what it has allocated at each moment."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.modules import module as module_hooks

from liger_cli.config import RunConfig
from liger_cli.config.objectives import OBJECTIVES, REFERENCE_KINDS
from liger_cli.training.forward import LossOf
from liger_cli.training.memory.ledger import Ledger
from liger_cli.training.memory.packed import allocate_moments, pack_layers
from liger_cli.training.memory.parts import (
    ACTIVATIONS,
    HEAD_GRADIENT,
    LOGITS,
    module_parts,
    table_of,
)
from liger_cli.training.memory.probe_copy import BACKWARD, Answers, gpu_stand_in, plain_tensors
from liger_cli.training.model.adapters import is_adapted
from liger_cli.training.optim.optimizers import EIGHT_BIT, make_optimizer
from liger_kernels.transformers import token_logprobs
from liger_kernels.transformers.wrappers import inner_model

__all__ = ["Batch", "MemoryEstimate", "step_memory"]

_CPU = torch.device("cpu")
_NUM_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")
# What fully sharded data parallelism spreads over devices.
_SHARDED = frozenset({"weights", "gradients", "optimizer"})


@dataclass(frozen=True)
class Batch:
    """The rows of one forward pass.

    Attributes:
        label_share: Of the tokens those that have a label.
        is_padded: Whether rows have several lengths: transformers then makes a mask of attention.
        is_packed: Whether a row holds several documents, which position_ids separate.
        is_flat: Whether the rows lie end to end in one.
        has_lengths: Whether that one says where documents begin.
    """

    size: int
    length: int
    label_share: float = 1.0
    is_padded: bool = False
    is_packed: bool = False
    is_flat: bool = False
    has_lengths: bool = False


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of a training step by part; the parts are not all there at once.

    Attributes:
        reference: The weights that dpo compares with, where they are in memory.
        optimizer: What it holds from step to step.
        gradients: Of all trained parameters.
        activations: What forward keeps for backward, by kind of layer.
        logits: The most that logits, their copies and their gradients take together.
        head_buffers: The gradient of the head, as the fused loss makes it in forward.
        kept_for_loss: What forward keeps of logits, their loss and these buffers.
        at_peak: What is there at the moment when most is, by part.
        phases: The most that is there in the optimizer's step, in forward and in backward.
    """

    weights: int
    optimizer: int
    gradients: int
    activations: Mapping[str, int]
    logits: int
    head_buffers: int
    kept_for_loss: int
    at_peak: Mapping[str, int]
    phases: Mapping[str, int]
    reference: int = 0

    @property
    def peak(self) -> int:
        return max(self.phases.values())


def step_memory(
    config: RunConfig, model: Any, batch: Batch, *, on_gpu: bool = True, num_shards: int = 1
) -> MemoryEstimate:
    """Return the memory of a training step of a model on the meta device, which it uses up.

    Args:
        config: Of the run: its optimizer, its precision, whether it makes activations again.
        model: With its adapter and its patches, in the dtype of its parameters.
        batch: A micro-batch.
        on_gpu: Whether a GPU's kernels run.
        num_shards: Devices that share weights, gradients and moments.

    Raises:
        ValueError: The forward of this model cannot run without data.
    """
    base = inner_model(model)
    num_labels = max(1, round(batch.size * batch.length * batch.label_share))
    is_masked = batch.is_padded or batch.is_packed or batch.is_flat
    answers = Answers(num_labels, _num_experts(base), is_masked=is_masked)
    sort = _by_shape(base)
    ledger = Ledger(answers, sort, num_shards=num_shards, sharded=_SHARDED)
    with contextlib.ExitStack() as stack:
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(plain_tensors())
        if on_gpu:
            stack.enter_context(gpu_stand_in(num_labels))
        stack.enter_context(ledger)
        try:
            return _run_step(config, model, batch, ledger, num_labels)
        # What a model does with data that it does not find is its own.
        except Exception as error:
            words = f"{type(error).__name__}: {' '.join(str(error).split())}"
            raise ValueError(
                f"the memory of a {base.config.model_type} model cannot be estimated: {words}"
            ) from error


def _run_step(
    config: RunConfig, model: Any, batch: Batch, ledger: Ledger, num_labels: int
) -> MemoryEstimate:
    phases = {}
    with ledger.counting("weights"):
        _give_storage(model)
        pack_layers(model, config)
    # First, because the moments are there in every step but the first.
    parameters = [p for p in model.parameters() if p.requires_grad]
    with ledger.counting("reference"):
        reference = _reference(config, model, parameters)
    with ledger.counting("gradients"):
        for parameter in parameters:
            parameter.grad = torch.empty_like(parameter)
    gradients = ledger.live["gradients"]
    with ledger.counting("optimizer"):
        moments = _moments(config, model, parameters)
    phases["optimizer"] = ledger.peak
    optimizer = ledger.live["optimizer"]
    if config.gradient_accumulation_steps == 1:
        for parameter in parameters:
            parameter.grad = None
    if config.gradient_checkpointing:
        _make_again(model)
    for parameter in parameters:
        parameter.register_post_accumulate_grad_hook(lambda p: ledger.move(p.grad, "gradients"))

    model.train()
    ledger.peak = 0
    with ledger.counting("other"), _gathered(model, ledger):
        inputs = _inputs(batch)
        with _by_module(ledger, model), _autocast(config, model):
            loss = _loss(config, model, inputs, num_labels)
        phases["forward"] = ledger.peak
        kept = dict(ledger.live)
        with ledger.counting(BACKWARD), _by_module(ledger, model):
            loss.backward()
        phases["backward"] = ledger.peak
    del moments, reference
    return MemoryEstimate(
        weights=kept["weights"],
        optimizer=optimizer,
        gradients=gradients,
        activations={part: kept[part] for part in ACTIVATIONS if kept.get(part)},
        logits=ledger.most[LOGITS],
        head_buffers=kept.get(HEAD_GRADIENT, 0),
        kept_for_loss=kept.get(HEAD_GRADIENT, 0) + kept.get(LOGITS, 0),
        at_peak={part: size for part, size in ledger.at_peak.items() if size},
        phases=phases,
        reference=kept.get("reference", 0),
    )


def _loss(config: RunConfig, model: Any, inputs: dict[str, Any], num_labels: int) -> Tensor:
    if not config.trains_pairs:
        return LossOf(model, _CPU)(model, inputs, num_labels)
    labels = inputs.pop("labels")
    with warnings.catch_warnings():
        # An unpatched model is estimated for what it takes: all logits.
        warnings.simplefilter("ignore", UserWarning)
        logps = token_logprobs(model, inputs, labels).logprob
    # Sums over answers and what follows are numbers of pairs, which are few.
    return logps.double().sum()


def _reference(config: RunConfig, model: Any, parameters: list[Tensor]) -> object:
    """Make the weights of the reference that a run holds beside its own.

    Where `reference` is auto, which a run resolves, they are none: the adapter is off, or values
    are precomputed.
    """
    if "reference" not in OBJECTIVES[config.objective].reads:
        return None
    if config.reference == "model" or config.sync_ref_model:
        return [torch.empty_like(parameter) for parameter in parameters]
    if config.reference in REFERENCE_KINDS:
        return None
    return [torch.empty_like(parameter) for parameter in model.parameters()]


def _give_storage(model: nn.Module) -> None:
    """Give a model on the meta device tensors that count; those that are shared stay so."""
    # The old ones are kept meanwhile: an id is another tensor's once its own is gone.
    made: dict[int, tuple[Tensor, Tensor]] = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, x in tensors.items():
                if x is None:
                    continue
                if id(x) not in made:
                    y: Tensor = torch.empty(x.shape, dtype=x.dtype, device=_CPU)
                    if isinstance(x, nn.Parameter):
                        y = nn.Parameter(y, requires_grad=x.requires_grad)
                    made[id(x)] = x, y
                tensors[name] = made[id(x)][1]  # type: ignore[assignment]


def _moments(config: RunConfig, model: Any, parameters: list[Tensor]) -> object:
    """Make a step of the optimizer and return what holds its state."""
    if config.optim in EIGHT_BIT:
        return allocate_moments(parameters)
    optimizer = make_optimizer(config, model)
    for group in optimizer.param_groups:
        # As by default on a GPU; of tensors without data torch would take one by one.
        if group.get("foreach", False) is None and not group.get("fused"):
            group["foreach"] = True
    optimizer.step()
    return optimizer


def _inputs(batch: Batch) -> dict[str, Any]:
    has_positions = batch.is_packed or batch.is_flat
    names = ["input_ids", "labels", "position_ids" if has_positions else "attention_mask"]
    shape = (1, batch.size * batch.length) if batch.is_flat else (batch.size, batch.length)
    inputs: dict[str, Any] = {name: torch.zeros(shape, dtype=torch.int64) for name in names}
    if batch.has_lengths:
        # A document a row: how many they are costs no memory to speak of.
        ends = torch.zeros(batch.size + 1, dtype=torch.int32)
        inputs |= dict.fromkeys(("cu_seq_lens_q", "cu_seq_lens_k"), ends)
        inputs |= dict.fromkeys(("max_length_q", "max_length_k"), batch.length)
    return inputs


def _make_again(model: Any) -> None:
    enable = getattr(model, "activation_checkpointing_enable", None)
    # Nothing is drawn, so that no generator's state need be kept.
    settings = {"use_reentrant": False, "preserve_rng_state": False}
    (enable or model.gradient_checkpointing_enable)(settings)


def _autocast(config: RunConfig, model: Any) -> contextlib.AbstractContextManager[Any]:
    dtype = torch.bfloat16 if config.bf16 else torch.float16 if config.fp16 else None
    if dtype is None and is_adapted(model):
        dtype = inner_model(model).dtype
    if dtype is None or dtype == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast("cpu", dtype=dtype)


@contextlib.contextmanager
def _by_module(ledger: Ledger, model: Any) -> Iterator[None]:
    """Count what is made while a module runs to the part that the module belongs to."""
    parts = module_parts(inner_model(model))
    outer: list[str] = []

    def enter(module: nn.Module, args: Any) -> None:
        outer.append(ledger.part)
        ledger.part = parts.get(id(module), ledger.part)

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        ledger.part = outer.pop()

    handles = [
        module_hooks.register_module_forward_pre_hook(enter),
        module_hooks.register_module_forward_hook(leave, always_call=True),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _by_shape(model: Any) -> Any:
    """Return a function that recognizes gradients of head and logits, which no module makes."""
    head = table_of(model, "get_output_embeddings")
    weight = getattr(head, "weight", None)
    shape = (0, 0) if weight is None else tuple(weight.shape)

    def sort(x: Tensor, part: str) -> str:
        if part in (LOGITS, BACKWARD):
            if tuple(x.shape) == shape:
                return HEAD_GRADIENT
            if part == BACKWARD and x.dim() > 1 and x.shape[-1] == shape[0]:
                return LOGITS
        return part

    return sort


@contextlib.contextmanager
def _gathered(model: Any, ledger: Ledger) -> Iterator[None]:
    """Hold what one device of several has of the others' weights and gradients at a time.

    Embeddings, head and last norm are whole from forward to the end of backward; so is a layer at
    work, with its gradient, and the one that is fetched meanwhile.
    """
    if ledger._num_shards == 1:
        yield
        return
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m)]
    sizes = [[_num_bytes(layer) for layer in layers] for layers in lists]
    layers = max(sizes, key=sum, default=[0])
    root = _num_bytes(model) - sum(layers)
    with ledger.counting("gathered weights"):
        held = torch.empty(root + 3 * max(layers), dtype=torch.uint8)
    yield
    del held


def _num_bytes(module: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in module.parameters())


def _num_experts(model: Any) -> int:
    config = model.config.get_text_config()
    nums = [getattr(config, name) for name in _NUM_EXPERTS if getattr(config, name, None)]
    return int(nums[0]) if nums else 1
