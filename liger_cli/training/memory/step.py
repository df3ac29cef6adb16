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
from liger_cli.training.activation_offload import (
    ActivationOffload,
    HostPages,
    checkpoint_layers,
)
from liger_cli.training.forward import LossOf
from liger_cli.training.memory.ledger import Ledger
from liger_cli.training.memory.packed import allocate_moments, pack_layers
from liger_cli.training.memory.parts import (
    ACTIVATIONS,
    HEAD_GRADIENT,
    LOGITS,
    ON_HOST,
    module_parts,
    table_of,
)
from liger_cli.training.memory.probe_copy import BACKWARD, Answers, gpu_stand_in, plain_tensors
from liger_cli.training.memory.sharding import BUCKETS, OF_RANKS, ShardedStep, shares_of
from liger_cli.training.memory.values import CHECKPOINT_COPY, Batch, MemoryEstimate
from liger_cli.training.model.adapters import is_adapted
from liger_cli.training.model.classifiers import row_scores, take_places
from liger_cli.training.model.source import build_meta_model, resolve_model
from liger_cli.training.optim.optimizers import EIGHT_BIT, make_optimizer
from liger_cli.training.parallel.mesh import ParallelPlan
from liger_kernels.transformers import token_logprobs
from liger_kernels.transformers.replacements.table import prepare
from liger_kernels.transformers.wrappers import inner_model

__all__ = ["num_experts", "step_memory"]

_CPU = torch.device("cpu")
_NUM_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")


def step_memory(
    config: RunConfig,
    model: Any,
    batch: Batch,
    *,
    on_gpu: bool = True,
    plan: ParallelPlan | None = None,
    host_bytes: int | None = None,
) -> MemoryEstimate:
    """Return the memory of a training step of a model on the meta device, which it uses up.

    Args:
        config: Of the run: its optimizer, its precision, whether it makes activations again.
        model: With its adapter and its patches, in the dtype of its parameters.
        batch: A micro-batch.
        on_gpu: Whether a GPU's kernels run.
        plan: How ranks share the model; one process by default. The bytes are those of a rank.
        host_bytes: That activation_offloading may take of the host; None: what it needs.

    Raises:
        ValueError: The forward of this model cannot run without data.
    """
    base = inner_model(model)
    num_labels = max(1, round(batch.size * batch.length * batch.label_share))
    is_masked = batch.is_padded or batch.is_packed or batch.is_flat
    answers = Answers(num_labels, num_experts(base), is_masked=is_masked)
    sort = _by_shape(base)
    plan = plan or ParallelPlan()
    # A CPU has one memory.
    shares = {**shares_of(config, plan), ON_HOST: 0.0 if on_gpu else 1.0}
    ledger = Ledger(answers, sort, shares=shares)
    step = _Step(config, model, batch, plan, ledger, on_gpu, host_bytes)
    with contextlib.ExitStack() as stack:
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(plain_tensors())
        if on_gpu:
            stack.enter_context(gpu_stand_in(num_labels))
        stack.enter_context(ledger)
        try:
            return step.run(num_labels)
        # What a model does with data that it does not find is its own.
        except Exception as error:
            words = f"{type(error).__name__}: {' '.join(str(error).split())}"
            raise ValueError(
                f"the memory of a {base.config.model_type} model cannot be estimated: {words}"
            ) from error


@dataclass
class _Step:
    """A step of a model without data, whose storages a ledger counts."""

    config: RunConfig
    model: Any
    batch: Batch
    plan: ParallelPlan
    ledger: Ledger
    on_gpu: bool
    host_bytes: int | None

    def run(self, num_labels: int) -> MemoryEstimate:
        """Return the memory of the step; it uses the model up."""
        config, model, ledger = self.config, self.model, self.ledger
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
        gradients, buckets = ledger.live["gradients"], self._buckets(parameters)
        with ledger.counting("optimizer"):
            moments = _moments(config, model, parameters)
        phases = {"optimizer": ledger.peak}
        optimizer = ledger.live["optimizer"]
        whole = dict(ledger.whole)
        if config.gradient_accumulation_steps == 1:
            for parameter in parameters:
                parameter.grad = None
        offload = None
        if config.gradient_checkpointing:
            # Nothing is drawn, so that no generator's state need be kept.
            offload = self._offload()
            checkpoint_layers(model, offload, preserve_rng_state=False)
        ledger.peak = 0
        kept = self._passes(parameters, phases, num_labels)
        del moments, reference, buckets
        copy = self._checkpoint_copy(parameters, whole)
        here = 0 if self.on_gpu else copy
        at_peak = {**ledger.at_peak, CHECKPOINT_COPY: here}
        return MemoryEstimate(
            weights=kept["weights"],
            optimizer=optimizer,
            gradients=gradients,
            activations={part: kept[part] for part in ACTIVATIONS if kept.get(part)},
            logits=ledger.most[LOGITS],
            head_buffers=kept.get(HEAD_GRADIENT, 0),
            kept_for_loss=kept.get(HEAD_GRADIENT, 0) + kept.get(LOGITS, 0),
            of_ranks={part: ledger.most[part] for part in OF_RANKS if ledger.most[part]},
            offloaded=self._offloaded(whole),
            inputs_on_host=(offload.num_kept, offload.num_left) if offload else (0, 0),
            at_peak={part: size for part, size in at_peak.items() if size},
            phases={phase: size + here for phase, size in phases.items()},
            reference=kept.get("reference", 0),
            checkpoint_copy=copy,
        )

    def _passes(
        self, parameters: list[Any], phases: dict[str, int], num_labels: int
    ) -> dict[str, int]:
        """Run forward and backward, and return what is there between the two."""
        model, ledger, shards = self.model, self.ledger, None
        if self.plan.is_sharded:
            shards = ShardedStep(self.config, model, ledger, self.plan.dp_shard, on_gpu=self.on_gpu)
        else:
            for parameter in parameters:
                parameter.register_post_accumulate_grad_hook(
                    lambda p: ledger.move(p.grad, "gradients")
                )
        model.train()
        with ledger.counting("other"):
            inputs = _inputs(self.batch)
            autocast = _autocast(self.config, model)
            forward = shards.forward() if shards else contextlib.nullcontext()
            with _by_module(ledger, model), forward, autocast:
                loss = _loss(self.config, model, inputs, num_labels)
            phases["forward"] = ledger.peak
            kept = dict(ledger.live)
            backward = shards.backward() if shards else contextlib.nullcontext()
            with ledger.counting(BACKWARD), _by_module(ledger, model), backward:
                loss.backward()
            phases["backward"] = ledger.peak
        return kept

    def _buckets(self, parameters: list[Any]) -> list[Tensor]:
        """Allocate what DDP copies gradients into, for as long as the run lasts."""
        if self.plan.is_sharded or self.plan.num_processes == 1:
            return []
        with self.ledger.counting(BUCKETS):
            return [torch.empty_like(p) for p in parameters]

    def _offload(self) -> ActivationOffload | None:
        def allocate(num_bytes: int) -> Tensor:
            with self.ledger.counting(ON_HOST):
                return torch.empty(num_bytes, dtype=torch.uint8)

        asks = self.config.activation_offloading is True
        return ActivationOffload(_CPU, HostPages(allocate, self.host_bytes)) if asks else None

    def _checkpoint_copy(self, parameters: list[Any], whole: Mapping[str, int]) -> int:
        if not self.config.saves_async(self.plan.num_processes):
            return 0
        saved = sum(p.numel() * p.element_size() for p in parameters)
        saved = saved if is_adapted(self.model) else whole.get("weights", 0)
        return (saved + whole.get("optimizer", 0)) // self.plan.dp_shard

    def _offloaded(self, whole: Mapping[str, int]) -> dict[str, int]:
        found: dict[str, int] = {}
        if self.config.cpu_offload and self.plan.is_sharded:
            parts = ("weights", "gradients", "optimizer")
            found = {part: whole.get(part, 0) // self.plan.dp_shard for part in parts}
        if self.ledger.whole[ON_HOST]:
            found["inputs of layers"] = self.ledger.whole[ON_HOST]
        return found


def _loss(config: RunConfig, model: Any, inputs: dict[str, Any], num_labels: int) -> Tensor:
    if config.has_scores:
        take_places(model)
        del inputs["labels"]
        # A row each: of packed rows there are more, and all are few numbers.
        places = torch.zeros(len(inputs["input_ids"]), dtype=torch.int64)
        return row_scores(model, inputs, places).double().sum()
    if not OBJECTIVES[config.objective].compares_answers:
        return LossOf(model, _CPU)(model, inputs, num_labels)
    labels = inputs.pop("labels")
    with warnings.catch_warnings():
        # An unpatched model is estimated for what it takes: all logits.
        warnings.simplefilter("ignore", UserWarning)
        logps = token_logprobs(model, inputs, labels).logprob
    # Sums over answers and what follows are numbers of pairs, which are few.
    return logps.double().sum()


def _reference(config: RunConfig, model: Any, parameters: list[Tensor]) -> object:
    """Make the weights of the reference, or the teacher, that a run holds beside its own.

    Where `reference` is auto, which a run resolves, they are none: the adapter is off, or values
    are precomputed.
    """
    if config.teacher_model_name_or_path is not None:
        teacher = build_meta_model(resolve_model(config.teacher_model_name_or_path))
        dtype = next(model.parameters()).dtype
        return [torch.empty(x.shape, dtype=dtype, device=_CPU) for x in teacher.parameters()]
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
    prepare(model.modules())


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


def num_experts(model: Any) -> int:
    config = model.config.get_text_config()
    nums = [getattr(config, name) for name in _NUM_EXPERTS if getattr(config, name, None)]
    return int(nums[0]) if nums else 1
