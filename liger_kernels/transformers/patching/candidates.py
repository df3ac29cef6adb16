"""Candidates: the modules of a model that a plan lists, each with its op and its form."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from torch import nn

from liger_kernels.transformers.patching.families import Family
from liger_kernels.transformers.patching.selection import LOSSES, PATCH_OPS
from liger_kernels.transformers.patching.third_party import (
    ThirdParty,
    find_third_party,
    find_third_party_loss,
)
from liger_kernels.transformers.recognise import (
    BlockRefusal,
    ExpertListRefusal,
    ExpertListSpec,
    HeadSpec,
    LoraRefusal,
    LoraSpec,
    Mismatch,
    MoeBlockSpec,
    Recogniser,
    Refusal,
    RopeSpec,
    Spec,
    lora_group,
    original_class,
    rope_functions,
    unserved,
)
from liger_kernels.transformers.replacements.table import op_of
from liger_kernels.transformers.wrappers import inner_model, output_head

__all__ = ["Candidate", "find_candidates"]


class Candidate(NamedTuple):
    """A module that a plan lists."""

    name: str
    module: nn.Module
    # None: it looks like a candidate of some op, and is none.
    op: str | None
    # Its form, or why it is left alone.
    found: Spec | Refusal


def find_candidates(model: nn.Module, row: Family | None) -> Iterator[Candidate]:
    """Yield the modules that a plan lists, in the order of the model and the head last.

    Args:
        model: Any module; a wrapper's model is looked for inside.
        row: The row of its model type; None if there is none.
    """
    recogniser = Recogniser(model)
    inner = inner_model(model)
    head_name, head = _named_head(model)
    modules = dict(model.named_modules())
    inside_blocks: set[int] = set()
    for name, module in modules.items():
        if id(module) in inside_blocks:
            continue
        third_party = find_third_party(module)
        if third_party is not None:
            # A model's own forward computes the loss, which the candidate of its head reports.
            if module is not head and (module is not inner or head is None):
                op = _third_party_op(module, third_party, row, recogniser)
                yield Candidate(name, module, op, third_party)
            continue
        found = _recognise(name, module, row, recogniser)
        if isinstance(found, LoraSpec):
            owner, _, child = name.rpartition(".")
            group = lora_group(modules[owner], child, recogniser.readers(modules[owner]))
            found = _LORA_HEAD if module is head else LoraSpec(group)
        if isinstance(found, MoeBlockSpec | BlockRefusal):
            # The block's row is theirs too.
            inside_blocks.add(id(module._modules["experts"]))
        if isinstance(found, ExpertListSpec):
            inside_blocks.update(map(id, module._modules["experts"].modules()))
        if found is not None:
            op = found.op if isinstance(found, LoraRefusal | ExpertListRefusal) else op_of(found)
            if row is not None and isinstance(found, Mismatch):
                op = row.ops[original_class(type(module)).__name__]
            yield Candidate(name, module, op, found)
    if head is not None:
        other = find_third_party(inner) or find_third_party(head) or find_third_party_loss(inner)
        for op in LOSSES:
            yield Candidate(head_name, head, op, other or HeadSpec())
    elif not hasattr(type(inner), "get_output_embeddings"):
        yield from _heads_inside(model)


_LORA_HEAD = LoraRefusal("LoRA on the head: the loss calls peft's own code, chunk by chunk")


def _recognise(
    name: str, module: nn.Module, row: Family | None, recogniser: Recogniser
) -> Spec | Refusal | None:
    """Return the form of a module, why it is left alone, or None if a plan does not list it."""
    found = recogniser.recognise(module)
    if isinstance(found, RopeSpec) and not getattr(module, "use_rope", True):
        without = "attention without rotary positions in this layer: nothing to do"
        found = Refusal(without, is_known_form=True)
    if row is not None:
        found = row.check(original_class(type(module)).__name__, found)
    return found if found is not None else _look_alike(name, module)


def _heads_inside(model: nn.Module) -> Iterator[Candidate]:
    """Yield the heads of models that a module of another kind holds."""
    for name, module in model.named_modules():
        if hasattr(type(module), "get_output_embeddings"):
            head_name, head = _named_head(module)
            reason = f"its model is inside a {type(model).__name__}: pass model.{name} instead"
            if head is not None:
                for op in LOSSES:
                    yield Candidate(f"{name}.{head_name}", head, op, Refusal(reason))
            return


def _named_head(model: nn.Module) -> tuple[str, nn.Module | None]:
    """Return the name and module of the language-model head; None if the model has none."""
    head = output_head(inner_model(model))
    return next((entry for entry in model.named_modules() if entry[1] is head), ("", None))


def _third_party_op(
    module: nn.Module, third_party: ThirdParty, row: Family | None, recogniser: Recogniser
) -> str | None:
    """Return the op that a module of others is a candidate of, without running their code."""
    if third_party.is_held:
        found = recogniser.recognise(module)
        return None if found is None else op_of(found)
    class_name = original_class(type(module)).__name__
    if row is not None and class_name in row.ops:
        return row.ops[class_name]
    named = (op for op in PATCH_OPS if op.replace("_", "") in class_name.lower())
    return third_party.op or next(named, None)


def _look_alike(name: str, module: nn.Module) -> Refusal | None:
    """Return why a module is no candidate that its class's name would make one."""
    cls = original_class(type(module))
    if "Expert" in cls.__name__ and any(p.dim() > 1 for p in module.parameters(recurse=False)):
        return unserved("experts of another form")
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
