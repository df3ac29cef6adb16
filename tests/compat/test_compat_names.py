"""The drop-in's further results of losses, classes of families, helpers, and import lines."""

from __future__ import annotations

import importlib
import importlib.util
import operator
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.glm4.modeling_glm4 import Glm4RMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm
from transformers.models.phi3.modeling_phi3 import Phi3MLP
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeMLP
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextRMSNorm

from liger_kernels.compat import loss_results
from liger_kernels.ops.backend import INTERPRETED

pytestmark = [
    pytest.mark.skipif(INTERPRETED, reason="runs without the interpreter"),
    pytest.mark.skipif(
        "liger_kernel" in sys.modules or importlib.util.find_spec("liger_kernel") is not None,
        reason="the original liger_kernel is installed; the drop-in refuses then",
    ),
]

TARGET = torch.tensor([3, 4, -100, 0, 10, 4, 7, -100, 10])
VALID = TARGET != -100
CLASS_WEIGHT = torch.linspace(0.2, 2.0, 11, dtype=torch.float64)


def randn(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()


def capped(logits: Tensor, softcap: float | None) -> Tensor:
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def reduced(values: Tensor, reduction: str, count: Tensor | None = None) -> Tensor:
    values = values * VALID
    if reduction == "none":
        return values
    return (
        values.sum()
        if reduction == "sum"
        else values.sum() / (VALID.sum() if count is None else count)
    )


# Further results --------------------------------------------------------------------------------

ALL = {"return_z_loss": True, "return_token_accuracy": True, "return_predicted_tokens": True}


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("kind", ["logits", "hidden"])
def test_results_beside_a_loss_are_their_definitions(kind, reduction, softcap, alias, monkeypatch):
    # Two rows a chunk, and one that is left over.
    monkeypatch.setattr(loss_results, "_CHUNK_LOGITS", 22)
    options = {"reduction": reduction, "softcap": softcap, "lse_square_scale": 0.1}
    hidden, head, bias = randn(9, 5), randn(11, 5, seed=1), randn(11, seed=2)
    logits = F.linear(hidden, head, bias)
    if kind == "logits":
        found = alias.LigerCrossEntropyLoss(**options, **ALL)(logits, TARGET)
    else:
        loss = alias.LigerFusedLinearCrossEntropyLoss(**options, **ALL)
        found = loss(head, hidden, TARGET, bias)
    assert isinstance(found, alias.CrossEntropyOutput)
    z = capped(logits, softcap)
    z_loss = reduced(0.1 * z.logsumexp(-1).square(), reduction)
    torch.testing.assert_close(found.z_loss, z_loss, rtol=1e-10, atol=1e-10)
    nll = F.cross_entropy(z, TARGET, reduction="none")
    torch.testing.assert_close(found.loss, reduced(nll, reduction) + z_loss, rtol=1e-9, atol=1e-9)
    best = z.argmax(-1)
    assert torch.equal(found.predicted_tokens, best.masked_fill(~VALID, -1))
    correct = ((best == TARGET) & VALID).float()
    wanted = correct if reduction == "none" else correct.sum() / VALID.sum()
    torch.testing.assert_close(found.token_accuracy, wanted)
    # The loss has its gradient, the rest none.
    grads = torch.autograd.grad(found.loss.sum(), (hidden, head), retain_graph=True)
    stock = torch.autograd.grad((reduced(nll, reduction) + z_loss).sum(), (hidden, head))
    torch.testing.assert_close(grads, stock, rtol=1e-8, atol=1e-8)
    assert not found.z_loss.requires_grad
    assert not found.token_accuracy.requires_grad


def test_one_result_is_asked_for(alias):
    logits = randn(9, 11)
    found = alias.LigerCrossEntropyLoss(return_token_accuracy=True)(logits, TARGET)
    assert found.token_accuracy is not None
    assert found.z_loss is None
    assert found.predicted_tokens is None
    # In torch's layout the classes are second, and predictions have the labels' shape.
    images = randn(2, 11, 3, 4)
    labels = torch.arange(24).view(2, 3, 4) % 11
    found = alias.LigerCrossEntropyLoss(return_predicted_tokens=True)(images, labels)
    assert torch.equal(found.predicted_tokens, images.argmax(1))
    # Without a label there is nothing to divide by.
    nothing = torch.full((9,), -100)
    found = alias.LigerCrossEntropyLoss(**ALL)(logits, nothing)
    assert found.token_accuracy == found.z_loss == found.loss == 0.0


@pytest.mark.parametrize("has_class_weight", [False, True], ids=["plain", "class-weight"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_token_scaling_is_the_loss_times_the_probability(reduction, has_class_weight, alias):
    weight = CLASS_WEIGHT if has_class_weight else None
    hidden, head = randn(9, 5), randn(11, 5, seed=1)
    loss = alias.LigerFusedLinearCrossEntropyLoss(
        use_token_scaling=True, reduction=reduction, ce_weight=weight, softcap=2.0
    )
    ours = loss(head, hidden, TARGET)
    z = capped(hidden @ head.T, 2.0)
    probability = z.softmax(-1)[torch.arange(9), TARGET.clamp(min=0)].detach()
    losses = F.cross_entropy(z, TARGET, weight, reduction="none")
    count = None if weight is None else weight[TARGET[VALID]].sum()
    wanted = reduced(losses * probability, reduction, count)
    torch.testing.assert_close(ours, wanted, rtol=1e-9, atol=1e-9)
    grads = torch.autograd.grad(ours.sum(), (hidden, head))
    stock = torch.autograd.grad(wanted.sum(), (hidden, head))
    torch.testing.assert_close(grads, stock, rtol=1e-8, atol=1e-8)


def test_functions_of_losses_take_their_arguments_in_order(alias):
    ops = importlib.import_module("liger_kernel.ops")
    hidden, head, bias = randn(9, 5), randn(11, 5, seed=1), randn(11, seed=2)
    logits = F.linear(hidden, head, bias)
    # weight, ignore_index, lse_square_scale, label_smoothing, reduction, softcap, z-loss, accuracy,
    # predictions: each option has a value that no other place would take for the same.
    options = (CLASS_WEIGHT, -100, 0.0, 0.2, "sum", 3.0)
    z = capped(logits, 3.0)
    wanted = F.cross_entropy(z, TARGET, CLASS_WEIGHT, reduction="sum", label_smoothing=0.2)
    of_logits = ops.LigerCrossEntropyFunction.apply(logits, TARGET, *options, True, True, True)
    of_hidden = ops.LigerFusedLinearCrossEntropyFunction.apply(
        hidden, head, TARGET, bias, *options, True, None, False, True, True
    )
    for found in (of_logits, of_hidden):
        loss, z_loss, accuracy, predicted = found
        torch.testing.assert_close(loss, wanted, rtol=1e-9, atol=1e-9)
        assert z_loss == 0.0
        assert accuracy.dtype == torch.float32
        assert torch.equal(predicted, z.argmax(-1).masked_fill(~VALID, -1))
    plain = ops.LigerFusedLinearCrossEntropyFunction.apply(hidden, head, TARGET)
    assert plain[1:] == (None, None, None)
    assert ops.LigerCrossEntropyFunction.apply(logits, TARGET)[1:] == (None, None, None)
    scaled = ops.LigerCrossEntropyFunction.apply(logits, TARGET, None, -100, 0.5, 0.0, "sum")[0]
    z_loss = 0.5 * (logits.logsumexp(-1).square() * VALID).sum()
    torch.testing.assert_close(scaled, F.cross_entropy(logits, TARGET, reduction="sum") + z_loss)
    with pytest.raises(TypeError, match="at most 11 arguments, got 12"):
        ops.LigerCrossEntropyFunction.apply(logits, TARGET, *options, True, True, True, 1)


def test_the_loss_of_a_model_returns_accuracy_and_ignores_what_is_of_its_attention(alias):
    loss_utils = importlib.import_module("liger_kernel.transformers.model.loss_utils")
    labels = torch.tensor([[3, 4, -100, 0, 10]])
    hidden, head = randn(1, 5, 6), randn(11, 6, seed=1)
    found = loss_utils.LigerForCausalLMLoss(
        hidden_states=hidden,
        lm_head_weight=head,
        labels=labels,
        hidden_size=6,
        num_items_in_batch=7,
        return_token_accuracy=True,
        return_predicted_tokens=True,
        return_z_loss=True,
        lse_square_scale=0.1,
        cu_seq_lens_q=torch.tensor([0, 5]),
        output_attentions=True,
    )
    logits = (hidden @ head.T)[0]
    shifted = torch.tensor([4, -100, 0, 10, -100])
    z_loss = 0.1 * (logits.logsumexp(-1).square() * (shifted != -100)).sum() / 7
    torch.testing.assert_close(found.z_loss, z_loss)
    wanted = F.cross_entropy(logits, shifted, reduction="sum") / 7 + z_loss
    torch.testing.assert_close(found.loss, wanted)
    is_right = (logits.argmax(-1) == shifted).float()
    torch.testing.assert_close(found.token_accuracy, is_right.sum() / 3)
    assert found.predicted_tokens.shape == (5,)


# Classes of families ----------------------------------------------------------------------------


def config() -> Any:
    return LlamaConfig(hidden_size=24, intermediate_size=40, num_attention_heads=4)


class Gemma4RMSNorm(nn.Module):
    """Its definition, as not every version of transformers has it: rounded after the weight."""

    def __init__(self, dim: int, eps: float = 1e-6, with_scale: bool = True) -> None:
        super().__init__()
        self.eps = eps
        self.register_parameter("weight", nn.Parameter(torch.ones(dim)) if with_scale else None)

    def forward(self, x: Tensor) -> Tensor:
        y = F.rms_norm(x.float(), x.shape[-1:], eps=self.eps)
        return (y if self.weight is None else y * self.weight.float()).type_as(x)


class MixtralMLP(nn.Module):
    """An expert of Mixtral, which transformers keeps in stacked matrices today."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.w1 = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.w2 = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.w3 = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


# name: (ours, the stock module)
FAMILIES: dict[str, tuple[Callable[[Any], nn.Module], Callable[[], nn.Module]]] = {
    "LigerRMSNormForGemma": (lambda c: c(24), lambda: GemmaRMSNorm(24)),
    "LigerRMSNormForGemma2": (lambda c: c(24, 1e-5), lambda: Gemma2RMSNorm(24, 1e-5)),
    "LigerRMSNormForGemma3": (lambda c: c(24), lambda: Gemma3RMSNorm(24)),
    "LigerRMSNormForGemma4": (lambda c: c(24, eps=1e-5), lambda: Gemma4RMSNorm(24, 1e-5)),
    "LigerRMSNormForGlm4": (lambda c: c(24), lambda: Glm4RMSNorm(24)),
    "LigerRMSNormForOlmo2": (lambda c: c(24), lambda: Olmo2RMSNorm(24)),
    "LigerRMSNormForQwen3Next": (lambda c: c(24), lambda: Qwen3NextRMSNorm(24)),
    "LigerPhi3SwiGLUMLP": (lambda c: c(config()), lambda: Phi3MLP(config())),
    "LigerBlockSparseTop2MLP": (lambda c: c(config()), lambda: MixtralMLP(config())),
    "LigerQwen3MoeSwiGLUMLP": (lambda c: c(config(), 16), lambda: Qwen3MoeMLP(config(), 16)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FAMILIES)
def test_class_of_a_family_is_that_of_transformers(name, dtype, alias):
    make, make_stock = FAMILIES[name]
    ours, stock = make(getattr(alias, name)), make_stock()
    if "Norm" in name:
        assert torch.equal(ours.weight, stock.weight)
    with torch.no_grad():
        for i, parameter in enumerate(stock.parameters()):
            parameter.copy_(randn(*parameter.shape, seed=i))
    ours.load_state_dict(stock.state_dict())
    x, dy = (randn(3, 24, seed=i).detach().to(dtype).requires_grad_() for i in (5, 6))
    bound = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    sides = []
    for module in (ours.to(dtype), stock.to(dtype)):
        y = module(x)
        sides.append([y, *torch.autograd.grad(y, (x, *module.parameters()), dy)])
    assert [v.dtype for v in sides[0]] == [v.dtype for v in sides[1]]
    torch.testing.assert_close(*sides, **bound)


def test_norms_without_a_weight_and_without_a_cast(alias):
    x = randn(3, 24).detach()
    for norm in (
        alias.LigerRMSNorm(24, elementwise_affine=False),
        alias.LigerRMSNormForGemma4(24, with_scale=False),
    ):
        assert not list(norm.parameters())
        assert "(24,)" in repr(norm)
        torch.testing.assert_close(norm(x), F.rms_norm(x, (24,), eps=1e-6))
    norm = alias.LigerRMSNorm(24, casting_mode="none", in_place=True)
    with torch.no_grad():
        norm.weight.copy_(randn(24, seed=1))
    wanted = F.rms_norm(x, (24,), norm.weight.double(), eps=1e-6)
    torch.testing.assert_close(norm(x.float()).double(), wanted, rtol=1e-5, atol=1e-5)
    half = norm.bfloat16()(x.bfloat16())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.double(), wanted, rtol=3e-2, atol=3e-2)


def test_another_activation_than_the_class_has_is_refused(alias):
    gelu = SimpleNamespace(hidden_size=8, intermediate_size=16, hidden_act="gelu")
    for name in ("LigerPhi3SwiGLUMLP", "LigerBlockSparseTop2MLP", "LigerQwen3MoeSwiGLUMLP"):
        with pytest.raises(ValueError, match=f"{name}.*silu, swish.*'gelu'"):
            getattr(alias, name)(gelu)


# Helpers ----------------------------------------------------------------------------------------


def test_helpers_for_kernels_of_others(alias):
    utils = importlib.import_module("liger_kernel.ops.utils")
    assert utils.compare_version("torch", operator.ge, "2.0.0")
    assert not utils.compare_version("torch", operator.ge, "99.0")
    for width in (1, 7, 128, 4096, 5000, 65536):
        block, num_warps = utils.calculate_settings(width)
        assert width <= block < 2 * width
        assert num_warps in (4, 8, 16, 32)
    with pytest.raises(RuntimeError, match="at most 65536.*got 65537"):
        utils.calculate_settings(65537)
    seen = utils.ensure_contiguous(lambda x, n, *, y: (x.is_contiguous(), n, y.is_contiguous()))
    assert seen(torch.ones(3, 4).T, 5, y=torch.ones(3, 4).T) == (True, 5, True)
    general = importlib.import_module("liger_kernel.utils")
    assert general.is_npu_available() is False
    assert (importlib.util.find_spec("peft") is not None) == general.PEFT_AVAILABLE
    pytest.importorskip("triton")
    assert str(utils.torch_to_triton_dtype[torch.bfloat16]) == "bf16"


def test_a_function_runs_inside_the_forward_of_a_wrapper(alias):
    trainer = importlib.import_module("liger_kernel.transformers.trainer.orpo_trainer")

    class Wrapper(nn.Module):
        """Counts its forwards, in which the parameters of an FSDP module would be whole."""

        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module, self.depth = module, 0

        def forward(self, *args: Any, **options: Any) -> Any:
            self.depth += 1
            try:
                return self.module(*args, **options)
            finally:
                self.depth -= 1

    wrapper = Wrapper(nn.Linear(3, 2))
    x = torch.ones(1, 3)
    stock = wrapper(x)

    def seen(module: nn.Module, y: Tensor, *, factor: int) -> tuple[int, Tensor]:
        # The module's forward is its own again.
        return wrapper.depth, module(y) * factor

    redirect = trainer._FSDPForwardRedirection()
    depth, y = redirect(wrapper, seen, wrapper.module, x, factor=2)
    assert depth == 1
    assert torch.equal(y, stock * 2)
    assert torch.equal(wrapper(x), stock)

    def fails() -> None:
        raise KeyError("inside")

    with pytest.raises(KeyError, match="inside"):
        redirect(wrapper, fails)
    assert torch.equal(wrapper(x), stock)
    # A forward that the instance had of somebody else stays.
    wrapper.module.forward = lambda x: x + 1
    assert redirect(wrapper, lambda: 5) == 5
    assert torch.equal(wrapper(x), x + 1)


# Import lines -----------------------------------------------------------------------------------

_FACTORY = (
    *("gemma", "gemma2", "gemma3", "gemma3_text", "glm4", "glm4v", "granite", "llama", "llava"),
    *("mistral", "mixtral", "mllama", "olmo2", "paligemma", "phi3", "qwen2", "qwen2_vl"),
    *("qwen2_5_vl", "qwen3", "qwen3_moe", "qwen3_next", "qwen3_5", "gpt_oss"),
)
# The lines of llamafactory 0.9.5 and axolotl 0.19.0, as their packages have them.
LINES = [
    "import liger_kernel",
    "import liger_kernel.transformers as liger_transformers",
    *(
        f"from liger_kernel.transformers import apply_liger_kernel_to_{name} as apply_liger_kernel"
        for name in _FACTORY
    ),
    "import liger_kernel.ops.fused_linear_cross_entropy",
    "from liger_kernel.ops.backends.registry import IMPL_REGISTRY",
    "from liger_kernel.ops.utils import calculate_settings, compare_version, torch_to_triton_dtype",
    "from liger_kernel.ops.utils import ensure_contiguous",
    "from liger_kernel.ops.grpo_loss import fused_selective_log_softmax",
    "from liger_kernel.transformers import apply_liger_kernel_to_granite",
    "from liger_kernel.transformers import functional",
    "from liger_kernel.transformers.cross_entropy import LigerCrossEntropyLoss",
    "from liger_kernel.transformers.functional import liger_cross_entropy",
    "from liger_kernel.transformers.fused_linear_cross_entropy import "
    "LigerFusedLinearCrossEntropyLoss",
    "from liger_kernel.transformers.geglu import LigerGEGLUMLP",
    "from liger_kernel.transformers.layer_norm import LigerLayerNorm",
    "from liger_kernel.transformers.model.loss_utils import LigerForCausalLMLoss",
    "from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN",
    "from liger_kernel.transformers.rms_norm import LigerRMSNorm",
    "from liger_kernel.transformers.rms_norm import LigerRMSNormForGemma2, LigerRMSNormForGemma4",
    "from liger_kernel.transformers.rope import liger_rotary_pos_emb",
    "from liger_kernel.transformers.swiglu import LigerSwiGLUMLP",
    "from liger_kernel.transformers.trainer.orpo_trainer import _FSDPForwardRedirection",
    "from liger_kernel.utils import PEFT_AVAILABLE",
    "from liger_kernel.utils import is_npu_available",
]
# A line of theirs that is an ImportError: a base class of one plugin of axolotl (distillation).
NOT_HERE = [
    "from liger_kernel.chunked_loss.fused_linear_distillation import "
    "LigerFusedLinearDistillationBase",
]


def test_import_lines_of_launchers_resolve(alias):
    unresolved = []
    for line in LINES:
        try:
            exec(line, {})
        except ImportError as error:
            unresolved.append(f"{line}: {error}")
    assert not unresolved
    for line in NOT_HERE:
        with pytest.raises(ModuleNotFoundError):
            exec(line, {})


def test_axolotl_turns_token_scaling_on_for_every_loss(alias):
    """axolotl replaces the function and the constructor by ones that set use_token_scaling."""
    functional = importlib.import_module("liger_kernel.transformers.functional")
    hidden, head = randn(9, 5), randn(11, 5, seed=1)
    ours = functional.liger_fused_linear_cross_entropy(hidden, head, TARGET, use_token_scaling=True)
    loss = alias.LigerFusedLinearCrossEntropyLoss(use_token_scaling=True)
    torch.testing.assert_close(loss(head, hidden, TARGET), ours)
    assert ours < alias.LigerFusedLinearCrossEntropyLoss()(head, hidden, TARGET)
