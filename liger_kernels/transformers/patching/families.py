"""FAMILIES: the expected classes of each model type, one row a type; no other file names classes.

A row is an expectation, not an instruction: recognition still runs (it needs no weights, so on meta
tensors too), and a class whose numbers no longer match its row is refused. A row also gives what
recognition cannot: the options of apply_liger_kernel_to_<type> and the classes to watch in class
mode. eps and activation are the module's, never the row's.

Rows name the classes of transformers 4.57 and 5; a class that a version lacks is simply not met.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from liger_kernels.transformers.recognise import (
    NO_KERNEL,
    ExpertsSpec,
    Layout,
    Mismatch,
    MlpSpec,
    MoeBlockSpec,
    NormSpec,
    Refusal,
    RopeSpec,
    Spec,
)


@dataclass(frozen=True)
class Gate:
    """Where a gated MLP keeps its layers; experts have a layout alone."""

    layout: Layout
    gate: str = ""
    up: str = ""
    down: str = ""


@dataclass(frozen=True)
class Family:
    """The expected classes of a model type, and the options of its function."""

    model_type: str
    # The module whose models of this type are watched in class mode.
    module: str
    norms: Mapping[str, NormSpec]
    gates: Mapping[str, Gate]
    # More than one where transformers versions differ.
    ropes: Mapping[str, tuple[RopeSpec, ...]]
    glu: str = "swiglu"
    # Whether nn.LayerNorm occurs, in a vision part.
    has_layer_norm: bool = False
    # What each listed class is a candidate of, for the reason when it is refused.
    ops: Mapping[str, str] = field(init=False, default_factory=dict)
    # The forms that each listed class may have.
    forms: Mapping[str, tuple[Spec | Gate, ...]] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        ops = dict.fromkeys(self.norms, "rms_norm")
        ops |= {name: self.glu if gate.gate else "moe_experts" for name, gate in self.gates.items()}
        ops |= dict.fromkeys(self.ropes, "rope")
        object.__setattr__(self, "ops", ops)
        forms = {name: (form,) for name, form in {**self.norms, **self.gates}.items()}
        object.__setattr__(self, "forms", {**forms, **self.ropes})

    @property
    def options(self) -> dict[str, bool]:
        """The keyword arguments of apply_liger_kernel_to_<model_type> and their defaults."""
        options = {"rope": True, "rms_norm": True}
        if self.has_layer_norm:
            options["layer_norm"] = True
        return {
            **options,
            self.glu: True,
            **({} if all(gate.gate for gate in self.gates.values()) else {"moe_experts": True}),
            "cross_entropy": False,
            "fused_linear_cross_entropy": True,
        }

    def check(self, class_name: str, found: Spec | Refusal | None) -> Spec | Refusal | None:
        """Return `found`, or a Mismatch if the row says something else about the class."""
        if found is None or isinstance(found, Refusal):
            if class_name not in self.ops or (found is not None and found.is_known_form):
                return found
            return self._mismatch(class_name, found.reason if found else "of no known form")
        expected = self.forms.get(class_name)
        if expected is None or _comparable(found) in map(_comparable, expected):
            return found
        return self._mismatch(class_name, _difference(expected[0], found))

    def _mismatch(self, class_name: str, seen: str) -> Mismatch:
        return Mismatch(
            f"{class_name} does not compute what is known of model type {self.model_type} "
            f"({seen.removesuffix(NO_KERNEL)}): its own code runs; report it with the version of "
            "transformers"
        )


def _comparable(form: Spec | Gate) -> Any:
    """Return the part of a form that a row and a module must have in common."""
    if isinstance(form, MlpSpec):
        return Gate(form.layout, form.gate, form.up, form.down)
    if isinstance(form, ExpertsSpec | MoeBlockSpec):
        return Gate(form.layout)
    # Whether an fp32 cos widens q does not change the rotation.
    return replace(form, keeps_dtype=False) if isinstance(form, RopeSpec) else form


def _difference(expected: Spec | Gate, found: Spec) -> str:
    """Return in words how two forms differ."""
    old, new = _comparable(expected), _comparable(found)
    if type(old) is not type(new):
        return f"found {type(found).__name__}"
    pairs = ((f.name, getattr(old, f.name), getattr(new, f.name)) for f in fields(old))
    return ", ".join(f"{name} is {b!r}, not {a!r}" for name, a, b in pairs if a != b)


LLAMA_NORM = NormSpec(0.0, "before_weight", has_weight=True, eps_attr="variance_epsilon")
OLMO_NORM = replace(LLAMA_NORM, cast="after_weight")
GEMMA_NORM = NormSpec(1.0, "after_weight", has_weight=True, eps_attr="eps")

SEPARATE = Gate("separate", "gate_proj", "up_proj", "down_proj")
FUSED = Gate("gate_first", "gate_up_proj", "gate_up_proj", "down_proj")
EXPERTS = Gate("gate_first")

HALF = RopeSpec("apply_rotary_pos_emb", "half", "twice", 1, is_single=False, keeps_dtype=False)
PAIRS = replace(HALF, style="pairs")
# Merges the angles of three kinds of positions itself, as version 4 does.
SECTIONS = replace(HALF, function="apply_multimodal_rotary_pos_emb", angles="sections")
VISION = replace(HALF, function="apply_rotary_pos_emb_vision", unsqueeze_dim=-2)
COMPLEX = RopeSpec("apply_rotary_emb", "pairs", "complex", -2, is_single=False, keeps_dtype=True)
COMPLEX_VISION = replace(COMPLEX, function="vision_apply_rotary_emb", angles="complex_shared")


def _modeling(name: str) -> str:
    return f"transformers.models.{name}.modeling_{name}"


def _decoder(
    model_type: str,
    prefix: str,
    norm: NormSpec = LLAMA_NORM,
    gate: Gate = SEPARATE,
    rope: RopeSpec = HALF,
    **more: Any,
) -> Family:
    """Return the row of a text decoder with one class of each kind, named after a prefix."""
    return Family(
        model_type,
        more.pop("module", _modeling(model_type)),
        norms={f"{prefix}RMSNorm": norm},
        gates={f"{prefix}MLP": gate},
        ropes={f"{prefix}Attention": (rope,)},
        **more,
    )


_ROWS = (
    _decoder("llama", "Llama"),
    _decoder("mistral", "Mistral"),
    _decoder("qwen2", "Qwen2"),
    _decoder("qwen3", "Qwen3"),
    _decoder("gemma", "Gemma", GEMMA_NORM, glu="geglu"),
    _decoder("gemma2", "Gemma2", GEMMA_NORM, glu="geglu"),
    _decoder(
        "gemma3_text",
        "Gemma3",
        GEMMA_NORM,
        glu="geglu",
        module=_modeling("gemma3"),
    ),
    _decoder("gemma3", "Gemma3", GEMMA_NORM, glu="geglu", has_layer_norm=True),
    _decoder("phi3", "Phi3", gate=FUSED),
    _decoder("granite", "Granite"),
    _decoder("olmo2", "Olmo2", OLMO_NORM),
    _decoder("glm4", "Glm4", gate=FUSED, rope=PAIRS),
    Family(
        "mixtral",
        _modeling("mixtral"),
        norms={"MixtralRMSNorm": LLAMA_NORM},
        # Version 4 has one gated MLP an expert.
        gates={
            "MixtralExperts": EXPERTS,
            "MixtralBlockSparseTop2MLP": Gate("separate", "w1", "w3", "w2"),
        },
        ropes={"MixtralAttention": (HALF,)},
    ),
    Family(
        "qwen3_moe",
        _modeling("qwen3_moe"),
        norms={"Qwen3MoeRMSNorm": LLAMA_NORM},
        gates={"Qwen3MoeExperts": EXPERTS, "Qwen3MoeMLP": SEPARATE},
        ropes={"Qwen3MoeAttention": (HALF,)},
    ),
    Family(
        "paligemma",
        _modeling("paligemma"),
        norms={"GemmaRMSNorm": GEMMA_NORM, "Gemma2RMSNorm": GEMMA_NORM},
        gates={"GemmaMLP": SEPARATE, "Gemma2MLP": SEPARATE},
        ropes={"GemmaAttention": (HALF,), "Gemma2Attention": (HALF,)},
        glu="geglu",
        has_layer_norm=True,
    ),
    Family(
        "mllama",
        _modeling("mllama"),
        norms={"MllamaTextRMSNorm": LLAMA_NORM},
        gates={"MllamaTextMLP": SEPARATE},
        ropes={"MllamaTextSelfAttention": (HALF,)},
        has_layer_norm=True,
    ),
    Family(
        "qwen2_vl",
        _modeling("qwen2_vl"),
        norms={"Qwen2VLRMSNorm": LLAMA_NORM, "Qwen2RMSNorm": LLAMA_NORM},
        gates={"Qwen2MLP": SEPARATE},
        ropes={"Qwen2VLAttention": (HALF, SECTIONS), "VisionAttention": (VISION,)},
        has_layer_norm=True,
    ),
    Family(
        "qwen2_5_vl",
        _modeling("qwen2_5_vl"),
        norms={"Qwen2_5_VLRMSNorm": LLAMA_NORM, "Qwen2RMSNorm": LLAMA_NORM},
        gates={"Qwen2MLP": SEPARATE, "Qwen2_5_VLMLP": SEPARATE},
        ropes={"Qwen2_5_VLAttention": (HALF, SECTIONS), "Qwen2_5_VLVisionAttention": (VISION,)},
    ),
    Family(
        "llama4_text",
        _modeling("llama4"),
        norms={
            "Llama4TextRMSNorm": replace(LLAMA_NORM, eps_attr="eps"),
            "Llama4TextL2Norm": NormSpec(0.0, "before_weight", has_weight=False, eps_attr="eps"),
        },
        gates={"Llama4TextMLP": SEPARATE, "Llama4TextMoe": EXPERTS},
        ropes={"Llama4TextAttention": (COMPLEX,)},
    ),
    Family(
        "llama4",
        _modeling("llama4"),
        norms={
            "Llama4TextRMSNorm": replace(LLAMA_NORM, eps_attr="eps"),
            "Llama4TextL2Norm": NormSpec(0.0, "before_weight", has_weight=False, eps_attr="eps"),
        },
        gates={"Llama4TextMLP": SEPARATE, "Llama4TextMoe": EXPERTS},
        ropes={"Llama4TextAttention": (COMPLEX,), "Llama4VisionAttention": (COMPLEX_VISION,)},
        has_layer_norm=True,
    ),
)
FAMILIES: dict[str, Family] = {row.model_type: row for row in _ROWS}
