"""What of a model is worth a word: each module with the op it is a candidate of, and its form."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from liger_kernels.transformers.patching.families import Family
from liger_kernels.transformers.patching.selection import LOSSES, PATCH_OPS
from liger_kernels.transformers.patching.third_party import Foreign, find_foreign, find_foreign_loss
from liger_kernels.transformers.recognise import (
    GLU_OPS,
    ExpertsSpec,
    GatedNormSpec,
    HeadSpec,
    LayerNormSpec,
    Mismatch,
    MlpSpec,
    NormSpec,
    Recogniser,
    Refusal,
    RopeSpec,
    Spec,
    original_class,
    rope_functions,
    unserved,
)
from liger_kernels.transformers.wrappers import inner_model

__all__ = ["Found", "survey"]

Found = Spec | Refusal


def survey(
    model: nn.Module, row: Family | None
) -> Iterator[tuple[str, nn.Module, str | None, Found]]:
    """Yield the modules worth a word: name, module, the op it is a candidate of, what was found."""
    recogniser = Recogniser(model)
    inner, (head_name, head) = inner_model(model), _head_of(model)
    for name, module in model.named_modules():
        foreign = find_foreign(module)
        if foreign is not None:
            # A model's own forward is there for the loss, which its head stands for.
            if module is not head and (module is not inner or head is None):
                yield name, module, _foreign_op(module, foreign, row, recogniser), foreign
            continue
        class_name = original_class(type(module)).__name__
        found = recogniser.recognise(module)
        if isinstance(found, RopeSpec) and not getattr(module, "use_rope", True):
            without = "attention without rotary positions in this layer: nothing to do"
            found = Refusal(without, is_known_form=True)
        if row is not None:
            found = row.check(class_name, found)
        if found is None:
            found = _look_alike(name, module)
        if found is not None:
            op = _op_of(found)
            if row is not None and isinstance(found, Mismatch):
                op = row.ops[class_name]
            yield name, module, op, found
    if head is not None:
        foreign = find_foreign(inner) or find_foreign(head) or find_foreign_loss(inner)
        for op in LOSSES:
            yield head_name, head, op, foreign or HeadSpec()
    elif not hasattr(type(inner), "get_output_embeddings"):
        yield from _heads_inside(model)


def _heads_inside(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, Found]]:
    """Yield the heads of models that a module of another kind holds."""
    for name, module in model.named_modules():
        if hasattr(type(module), "get_output_embeddings"):
            head_name, head = _head_of(module)
            reason = f"its model is inside a {type(model).__name__}: pass model.{name} instead"
            if head is not None:
                yield from ((f"{name}.{head_name}", head, op, Refusal(reason)) for op in LOSSES)
            return


def _op_of(found: Found) -> str | None:
    if isinstance(found, NormSpec):
        return "rms_norm"
    if isinstance(found, LayerNormSpec):
        return "layer_norm"
    if isinstance(found, GatedNormSpec):
        return "gated_rms_norm"
    if isinstance(found, (MlpSpec, ExpertsSpec)):
        return GLU_OPS[found.activation]
    return "rope" if isinstance(found, RopeSpec) else None


def _foreign_op(
    module: nn.Module, foreign: Foreign, row: Family | None, recogniser: Recogniser
) -> str | None:
    """Return the op that a module of others is a candidate of, without running their code."""
    if foreign.is_held:
        found = recogniser.recognise(module)
        return None if found is None else _op_of(found)
    class_name = original_class(type(module)).__name__
    if row is not None and class_name in row.ops:
        return row.ops[class_name]
    named = (op for op in PATCH_OPS if op.replace("_", "") in class_name.lower())
    return foreign.op or next(named, None)


def _look_alike(name: str, module: nn.Module) -> Refusal | None:
    """Return why a module is no candidate that its class's name would make one."""
    cls = original_class(type(module))
    # Those that hold others of their kind leave the word to them.
    if not any(p.dim() == 2 for m in module.children() for p in m.parameters(recurse=False)):
        return None
    if "Attention" in cls.__name__ or "Attn" in cls.__name__:
        if rope_functions(cls):
            return None
        is_cross = "Cross" in cls.__name__ or "cross" in name.rpartition(".")[2]
        kind = "cross-attention" if is_cross else "attention"
        return Refusal(f"{kind} without rotary positions: nothing to do")
    is_mlp = cls.__name__.lower().endswith(("mlp", "feedforward"))
    return unserved("MLP of another form") if is_mlp else None


def _head_of(model: nn.Module) -> tuple[str, nn.Module | None]:
    """Return the name and module of the language-model head; None if the model has none."""
    find: Any = getattr(inner_model(model), "get_output_embeddings", None)
    try:
        head = None if find is None else find()
    except (AttributeError, NotImplementedError):
        head = None
    return next((entry for entry in model.named_modules() if entry[1] is head), ("", None))
