"""The results of recognisers: a spec of the form of a module, or a Refusal with the reason."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from liger_kernels.ops.glu_mlp import ACTIVATIONS as GLU_MLP_ACTIVATIONS

Cast = Literal["before_weight", "after_weight"]
Layout = Literal["separate", "gate_first", "up_first", "interleaved"]
Style = Literal["half", "pairs", "pairs_to_half"]
# How the function gets its angles: cos and sin as [c, c], [c] or each number twice in a row; or one
# complex tensor instead of the two, for each sample or (T, 1, D / 2) for all of them; or as [c, c]
# of three kinds of positions (3, B, T, D), and how many numbers of a head each kind turns.
Angles = Literal["twice", "once", "repeated", "complex", "complex_shared", "sections"]


@dataclass(frozen=True)
class NormSpec:
    """A root mean square norm: (weight + offset) * x / rms(x), rounded as `cast` says."""

    offset: float
    cast: Cast
    has_weight: bool
    # "" where forward has a constant, which is then eps.
    eps_attr: str
    eps: float | None = None
    # True: x is divided by the root of the sum of its squares, not of their mean; no weight.
    is_l2: bool = False
    # True: the class rounds in yet another way where x and weight differ in dtype.
    needs_one_dtype: bool = False
    # The parameter that is the weight.
    weight_attr: str = "weight"


@dataclass(frozen=True)
class LayerNormSpec:
    """A layer norm over the last dimension, times (weight + offset)."""

    has_weight: bool
    has_bias: bool
    # As in NormSpec.
    eps_attr: str
    eps: float | None = None
    # Added in the weight's dtype.
    offset: float = 0.0
    # The parameters that are the weight and the bias.
    weight_attr: str = "weight"
    bias_attr: str = "bias"


@dataclass(frozen=True)
class GatedNormSpec:
    """A root mean square norm of two inputs, x and gate: as the options of gated_rms_norm say."""

    gate_first: bool
    activation: str
    cast: Cast
    num_groups: int
    has_weight: bool
    # What forward calls its inputs.
    inputs: tuple[str, str]
    # As in NormSpec.
    eps_attr: str
    eps: float | None = None
    weight_attr: str = "weight"


@dataclass(frozen=True)
class MlpSpec:
    """A gated MLP: down(activation(gate(x)) * up(x)); gate and up may be one fused linear layer."""

    layout: Layout
    gate: str
    # The same name as gate when the two are fused.
    up: str
    down: str
    activation: str

    @property
    def is_one_function(self) -> bool:
        """Return whether glu_mlp computes it, where its layers are plain."""
        return self.activation in GLU_MLP_ACTIVATIONS and self.layout in ("separate", "gate_first")


@dataclass(frozen=True)
class ExpertsSpec:
    """Experts as 3-D weights that are called with hidden, ids and weights, as transformers does."""

    layout: Layout
    # One of moe_experts.
    activation: str
    # Whether weights are (E, H, 2 I) and (E, I, H).
    is_transposed: bool = False
    has_bias: bool = False
    # The attributes with alpha and limit of the activation gpt_oss.
    alpha_attr: str = ""
    limit_attr: str = ""
    # What the configuration had chosen to compute experts; a later choice of another is followed.
    implementation: str | None = None


@dataclass(frozen=True)
class MoeBlockSpec:
    """A block as Llama4's: a router, a shared expert, and experts that are given every token times
    its score, which is 0 for all but the chosen experts."""

    layout: Layout
    activation: str


@dataclass(frozen=True)
class SoftmaxRouting:
    """How a block chooses experts: the top k of the softmax of logits, which is in fp32."""

    # The names of children: what makes the logits, and what computes a shared expert and its gate.
    router: str
    shared: str = ""
    shared_gate: str = ""
    # Whether the router is given (T, H), and not the tokens as the block got them.
    takes_rows: bool = True
    # Whether the weights of the chosen experts are divided by their sum.
    normalizes: bool = False
    # Whether forward returns the logits too.
    returns_logits: bool = True


@dataclass(frozen=True)
class ExpertListSpec:
    """A block whose experts are a list of gated MLPs with three linear layers each."""

    # The class of an expert, and its form.
    expert: type[nn.Module]
    mlp: MlpSpec
    # The other children of the block.
    others: tuple[str, ...]
    # None: a method `moe` of the block computes its experts of hidden, ids and weights.
    routing: SoftmaxRouting | None
    # Whether experts that no token goes to are called too, whose gradients then are 0 and not None.
    calls_all: bool = False


@dataclass(frozen=True)
class RopeSpec:
    """An attention whose forward calls the module-level function `function` to rotate q and k."""

    function: str
    style: Style
    angles: Angles
    # Where cos and sin gain a dimension when the call does not say; -2 counts from the right of q.
    unsqueeze_dim: int
    # True: the function takes one tensor, not q and k.
    is_single: bool
    # True: the result keeps q's dtype even if cos has a wider one.
    keeps_dtype: bool
    # True: it turns the other way round.
    is_backward: bool = False
    # True: it turns the last numbers of a head, not the first.
    is_last: bool = False
    # The module-level function that forward calls and that calls `function`; "" for forward itself.
    inside: str = ""
    # The same of other functions that forward may call instead, as its configuration decides.
    others: tuple[RopeSpec, ...] = ()


@dataclass(frozen=True)
class LoraSpec:
    """A linear layer of peft with LoRA adapters, and those beside it that read the same input."""

    # Names in the module that holds them, in the order of their calls; () for a layer alone.
    group: tuple[str, ...] = ()


@dataclass(frozen=True)
class HeadSpec:
    """The language-model head: whatever makes its logits is resolved when it is called."""


Spec = (
    NormSpec
    | LayerNormSpec
    | GatedNormSpec
    | MlpSpec
    | ExpertsSpec
    | MoeBlockSpec
    | ExpertListSpec
    | RopeSpec
    | LoraSpec
    | HeadSpec
)


@dataclass(frozen=True)
class Refusal:
    """Why a module that looks like a candidate is left as it is."""

    reason: str
    # True: the form is one the ops know, and a setting of this module rules it out.
    is_known_form: bool = False


@dataclass(frozen=True)
class LoraRefusal(Refusal):
    """A LoRA layer of a matrix that the op does not compute."""

    op: ClassVar[str] = "lora_linear"


@dataclass(frozen=True)
class BlockRefusal(Refusal):
    """Why a block of a router and experts of sorted rows is left as it is."""


@dataclass(frozen=True)
class ExpertListRefusal(Refusal):
    """Why the experts of a list run one by one."""

    op: ClassVar[str] = "moe_experts"


@dataclass(frozen=True)
class Mismatch(Refusal):
    """A class that does not compute what its family's row says."""


ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
    "gelu": F.gelu,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "linear": lambda x: x,
}
# The op that computes activation(gate) * up; the other activations have no kernel.
GLU_OPS = {"silu": "swiglu", "gelu_tanh": "geglu", "gelu": "geglu"}
# The activations of experts that moe_experts computes.
EXPERTS_ACTIVATIONS = frozenset({"silu", "gelu_tanh", "gelu", "relu2"})


# The end of a reason why a look-alike is left alone that no op computes.
NO_KERNEL = ": no kernel, its own code runs; nothing to do"


def unserved(what: str, *, is_known_form: bool = False) -> Refusal:
    """Return why a look-alike that no op computes is left alone."""
    return Refusal(what + NO_KERNEL, is_known_form)


def other_activation(activation: str) -> Refusal:
    """Return why a gated MLP or experts with another activation are left alone."""
    return unserved(f"activation {activation}", is_known_form=True)
