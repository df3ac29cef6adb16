"""TABLE: for each spec of recognise, the op, its trial cases and the forward that calls it.

A new kind of module is a spec with its recogniser, one forward in a file of this package, and one
row here.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from liger_kernels.transformers.recognise import (
    BASE_ATTRIBUTE,
    GLU_OPS,
    ExpertListSpec,
    ExpertsSpec,
    GatedNormSpec,
    HeadSpec,
    LayerNormSpec,
    LoraSpec,
    MlpSpec,
    MoeBlockSpec,
    NormSpec,
    RopeSpec,
    Spec,
    experts_options,
    global_names,
    input_readers,
    lora_group,
    reachable_functions,
    recognise_lora,
)
from liger_kernels.transformers.replacements.adapters import lora_forward
from liger_kernels.transformers.replacements.attention import attention_forward, globals_read
from liger_kernels.transformers.replacements.calls import is_transformed
from liger_kernels.transformers.replacements.expert_lists import (
    expert_list_members,
    lay_experts_together,
)
from liger_kernels.transformers.replacements.experts import experts_forward, moe_block_forward
from liger_kernels.transformers.replacements.mlps import mlp_forward
from liger_kernels.transformers.replacements.norms import (
    AnyNorm,
    gated_norm_forward,
    layer_norm_forward,
    rms_norm_forward,
)
from liger_kernels.transformers.replacements.subclasses import (
    SPEC_ATTRIBUTE,
    can_swap,
    patch_members,
    subclass_in_place,
    swap,
)

__all__ = ["TABLE", "TrialCase", "op_of", "patched_class", "prepare", "trial_cases"]

# An op, a shape and options, as the sample function of the op reads them.
TrialCase = tuple[str, tuple[int, ...], dict[str, Any]]

# Enough rows of 2048 elements for several programs and their partial sums; few enough that sums
# over them cost no digit.
_ROWS = 33
# Of a loss, whose rows are as wide as the vocabulary. A CPU's product of fewer rows sums a
# vocabulary one by one, and loses a digit.
_LOSS_ROWS = 24
# Of the input of a head or of a whole MLP, whose products are cuBLAS's matter.
_INPUT_WIDTH = 16
# Tokens, width, inner width, experts and choices of experts, whose products are torch's matter.
_EXPERTS_SHAPE = (_ROWS, 64, 32, 6, 2)
# Where a module does not say.
_WIDTH, _HEAD_SIZE, _HEADS = 128, 64, (4, 2)


@dataclass(frozen=True)
class Replacement:
    """One row: how modules of one kind are replaced.

    Attributes:
        op: Name the op that modules of this form run; None for a head, which runs the loss that is
            asked for.
        cases: (op, spec, module, text configuration) -> the cases that the self-check tries.
        members: (base, spec) -> forward and what else the subclass of `base` adds. None for a head,
            whose class lazy_logits swaps.
        code: (base, spec) -> the functions that members are made from. Where a tool replaces one, a
            new subclass is made.
        prepare: (module, spec) -> what to do once a patched module has its weights.
        live: spec -> the attributes that the new forward reads at every call, so that they may
            change after patching. None: it runs the stock code, which reads everything itself.
    """

    op: Callable[[Any], str | None]
    cases: Callable[[str, Any, Any, Any], list[TrialCase]]
    members: Callable[[Any, Any], dict[str, Any]] | None
    live: Callable[[Any], set[str]] | None
    code: Callable[[Any, Any], tuple[Any, ...]] = lambda base, spec: (base.forward,)
    prepare: Callable[[Any, Any], None] = lambda module, spec: None


def op_of(found: object) -> str | None:
    """Return the op that modules of a form run; None for a head, a refusal or nothing."""
    row = TABLE.get(type(found))
    return None if row is None else row.op(found)


def trial_cases(op: str, spec: Spec, module: nn.Module, config: Any) -> list[TrialCase]:
    """Return the cases that show whether an op is right in the form and width of a module.

    Args:
        op: What the module will run.
        spec: What the module computes.
        module: The module.
        config: The text configuration of its model, or None.
    """
    return TABLE[type(spec)].cases(op, spec, module, config)


def prepare(modules: Iterable[nn.Module]) -> None:
    """Do what patched modules need once they have weights: move those of a list of experts."""
    for module in modules:
        spec = getattr(type(module), SPEC_ATTRIBUTE, None)
        if type(spec) in TABLE:
            TABLE[type(spec)].prepare(module, spec)


def patched_class(
    base: Any, spec: Spec, saves_memory: bool = True, takes_adapters: bool = False
) -> type[nn.Module]:
    """Return the subclass of `base` that computes a form through its op.

    It adds one forward (or one gate) to `base` and keeps its name, so isinstance, state_dict,
    print, deepcopy and save_pretrained see no difference. Its forward reads the instance's own
    parameters and calls its own children as modules: nothing is copied; hooks, adapters and
    quantised layers keep working.

    It falls back to the forward of `base` when the call is not the plain one: extra arguments,
    tensor subclasses (a sharded DTensor), dtypes other than fp32, bf16 and fp16, meta tensors; and
    when the module has changed since it was patched: another activation or setting, another forward
    of its class, a weight of another shape. Weights, layers and eps are read at every call.

    Args:
        base: The class it replaces.
        spec: The form that modules of the class have.
        saves_memory: Whether outputs that are cheap to recompute are not kept for backward.
        takes_adapters: Whether LoRA layers that a module gets after it was patched are patched when
            it runs.
    """
    row = TABLE[type(spec)]
    make = row.members
    assert make is not None, "lazy_logits.head swaps the class of a head"

    def members() -> dict[str, Any]:
        reads = frozenset() if row.live is None else _names_read(base) - row.live(spec)
        adopt = _adopt_adapters if takes_adapters else _leave_adapters
        own = {
            **make(base, spec),
            "_saves_memory": saves_memory,
            "_tile_tokens": None,
            "_adopt_adapters": adopt,
        }
        return {**own, **patch_members(base, spec, reads)}

    code = row.code(base, spec)
    options = (spec, saves_memory, takes_adapters)
    return subclass_in_place(patched_class, base, *options, members=members, code=code)


def _leave_adapters(self: Any) -> None:
    """Patch no LoRA layers."""


def _adopt_adapters(self: Any) -> None:
    """Patch the LoRA layers that a patched module was given since."""
    if torch.compiler.is_compiling():
        return
    new = []
    for name, child in self._modules.items():
        is_lora = child is not None and "lora_A" in child._modules
        # is_patched() without its calls: this runs at each one of the module.
        if is_lora and not hasattr(type(child), BASE_ATTRIBUTE):
            new.append(name)
    # A dictionary that changes size is not walked.
    for name in () if not new or is_transformed() else new:
        child = self._modules[name]
        found = recognise_lora(child)
        if isinstance(found, LoraSpec) and can_swap(child):
            spec = replace(found, group=lora_group(self, name, input_readers(self)))
            swap(child, patched_class(type(child), spec, self._saves_memory))


def _names_read(base: Any) -> frozenset[str]:
    """Return the names that the forward of a class, its gate and its methods look up."""
    names: set[str] = set()
    waiting = [base.forward, getattr(base, "_apply_gate", None)]
    while waiting:
        for function in reachable_functions(waiting.pop()):
            new = global_names(function.__code__) - names
            names |= new
            methods = (getattr(base, name, None) for name in new if not hasattr(nn.Module, name))
            waiting += filter(inspect.isfunction, methods)
    return frozenset(names - vars(nn.Module()).keys())


# Cases of the self-check ------------------------------------------------------------------------


def _norm_cases(op: str, spec: NormSpec, module: Any, config: Any) -> list[TrialCase]:
    options = {"offset": spec.offset, "cast": spec.cast, "has_weight": spec.has_weight}
    return [(op, (_ROWS, _norm_width(module, spec)), options)]


def _layer_norm_cases(op: str, spec: LayerNormSpec, module: Any, config: Any) -> list[TrialCase]:
    options = {"has_weight": spec.has_weight, "has_bias": spec.has_bias}
    return [(op, (_ROWS, _norm_width(module, spec)), options)]


def _gated_norm_cases(op: str, spec: GatedNormSpec, module: Any, config: Any) -> list[TrialCase]:
    width = _norm_width(module, spec) // spec.num_groups * spec.num_groups
    names = ("gate_first", "activation", "cast", "num_groups", "has_weight")
    return [(op, (_ROWS, width), {name: getattr(spec, name) for name in names})]


def _norm_width(module: Any, spec: AnyNorm) -> int:
    weight = getattr(module, spec.weight_attr, None)
    return _WIDTH if weight is None else int(weight.shape[-1])


def _mlp_cases(op: str, spec: MlpSpec, module: Any, config: Any) -> list[TrialCase]:
    gate = getattr(module, spec.gate, None)
    cases = [_product_case(op, spec, getattr(gate, "out_features", None))]
    if spec.is_one_function:
        # Where its layers are plain, the whole MLP runs as this op.
        (_, (rows, inner), options) = cases[0]
        forms = {"activation": spec.activation, "layout": options.get("layout", "separate")}
        cases.append(("glu_mlp", (rows, _INPUT_WIDTH, inner), forms))
    return cases


def _experts_cases(
    op: str, spec: ExpertsSpec | MoeBlockSpec, module: Any, config: Any
) -> list[TrialCase]:
    options = dict(experts_options(module, spec))
    if isinstance(spec, MoeBlockSpec):
        options["is_transposed"] = True
    else:
        options |= {"is_transposed": spec.is_transposed, "has_bias": spec.has_bias}
    return [(op, _EXPERTS_SHAPE, options)]


def _expert_list_cases(op: str, spec: ExpertListSpec, module: Any, config: Any) -> list[TrialCase]:
    return [(op, _EXPERTS_SHAPE, {"activation": spec.mlp.activation})]


def _product_case(op: str, spec: MlpSpec, width: Any) -> TrialCase:
    options = {} if spec.layout in ("separate", "interleaved") else {"layout": "halves"}
    if op == "geglu":
        options["approximate"] = "tanh" if spec.activation == "gelu_tanh" else "none"
    columns = int(width or 2 * _WIDTH) // (1 if spec.layout == "separate" else 2)
    return op, (_ROWS, columns), options


def _rope_cases(op: str, spec: RopeSpec, module: Any, config: Any) -> list[TrialCase]:
    head_size = getattr(module, "head_dim", None) or _HEAD_SIZE
    table = {"once": "half", "repeated": "interleaved"}.get(spec.angles, "full")
    options = {"style": spec.style, "rotary_dim": head_size, "table": table}
    return [(op, (1, _ROWS, *_HEADS, head_size), options)]


def _lora_cases(op: str, spec: LoraSpec, module: Any, config: Any) -> list[TrialCase]:
    # Its products are cuBLAS's matter: what is tried is the form, in each rank.
    ranks = sorted({int(rank) for rank in module.r.values()})
    return [(op, (_ROWS, _INPUT_WIDTH, _WIDTH, rank), {"scale": 2.0}) for rank in ranks]


def _loss_cases(op: str, spec: HeadSpec, module: Any, config: Any) -> list[TrialCase]:
    vocab_size = int(getattr(module, "out_features", _WIDTH))
    softcap = getattr(config, "final_logit_softcapping", None)
    options = {"softcap": softcap} if softcap else {}
    if op == "cross_entropy":
        return [(op, (_LOSS_ROWS, vocab_size), options)]
    return [(op, (_LOSS_ROWS, _INPUT_WIDTH, vocab_size), options)]


# Rows -------------------------------------------------------------------------------------------


def _forward_by(make: Callable[[Any, Any], Callable[..., Any]]) -> Callable[..., dict[str, Any]]:
    """Return the members of a subclass that adds one forward, made by make(base, spec)."""
    return lambda base, spec: {"forward": make(base, spec)}


def _experts_code(base: Any, spec: ExpertsSpec) -> tuple[Any, ...]:
    return base.forward, base._apply_gate


def _expert_list_code(base: Any, spec: ExpertListSpec) -> tuple[Any, ...]:
    return base.forward, getattr(base, "moe", None), spec.expert.forward


def _attention_code(base: Any, spec: RopeSpec) -> tuple[Any, ...]:
    return (base.forward, *(value for _, _, value in globals_read(base, spec)))


TABLE: Mapping[type, Replacement] = {
    NormSpec: Replacement(
        op=lambda spec: "rms_norm",
        cases=_norm_cases,
        members=_forward_by(rms_norm_forward),
        live=lambda spec: {spec.eps_attr},
    ),
    LayerNormSpec: Replacement(
        op=lambda spec: "layer_norm",
        cases=_layer_norm_cases,
        members=_forward_by(layer_norm_forward),
        live=lambda spec: {spec.eps_attr},
    ),
    GatedNormSpec: Replacement(
        op=lambda spec: "gated_rms_norm",
        cases=_gated_norm_cases,
        members=_forward_by(gated_norm_forward),
        live=lambda spec: {spec.eps_attr},
    ),
    MlpSpec: Replacement(
        op=lambda spec: GLU_OPS[spec.activation],
        cases=_mlp_cases,
        members=_forward_by(mlp_forward),
        live=lambda spec: {spec.gate, spec.up, spec.down, "config"},
    ),
    ExpertsSpec: Replacement(
        op=lambda spec: "moe_experts",
        cases=_experts_cases,
        members=_forward_by(experts_forward),
        live=lambda spec: {"config", spec.alpha_attr, spec.limit_attr, "_is_expert_parallel"},
        code=_experts_code,
    ),
    MoeBlockSpec: Replacement(
        op=lambda spec: "moe_experts",
        cases=_experts_cases,
        members=_forward_by(moe_block_forward),
        live=lambda spec: {"router", "shared_expert", "top_k"},
    ),
    ExpertListSpec: Replacement(
        op=lambda spec: "moe_experts",
        cases=_expert_list_cases,
        members=expert_list_members,
        live=lambda spec: {*spec.others},
        code=_expert_list_code,
        prepare=lay_experts_together,
    ),
    RopeSpec: Replacement(
        op=lambda spec: "rope",
        cases=_rope_cases,
        members=_forward_by(attention_forward),
        live=None,
        code=_attention_code,
    ),
    LoraSpec: Replacement(
        op=lambda spec: "lora_linear",
        cases=_lora_cases,
        members=_forward_by(lora_forward),
        live=None,
    ),
    HeadSpec: Replacement(
        op=lambda spec: None, cases=_loss_cases, members=None, live=lambda spec: set()
    ),
}
