"""The drop-in for liger_kernel: its names, what they compute, who may use it, and the way back."""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import importlib.util
import inspect
import pickle
import re
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
import zoo
from checks import assert_same, run
from torch import Tensor, nn
from transformers.models.gemma.modeling_gemma import GemmaMLP, GemmaRMSNorm
from transformers.models.llama.modeling_llama import (
    LlamaMLP,
    LlamaRMSNorm,
    apply_rotary_pos_emb,
)
from transformers.utils import is_liger_kernel_available

from liger_kernels import compat
from liger_kernels.ops.backend import INTERPRETED
from liger_kernels.transformers import restore
from liger_kernels.transformers.patching.families import FAMILIES
from liger_kernels.transformers.replacements.subclasses import is_patched

pytestmark = [
    pytest.mark.skipif(INTERPRETED, reason="runs without the interpreter"),
    pytest.mark.skipif(
        "liger_kernel" in sys.modules or importlib.util.find_spec("liger_kernel") is not None,
        reason="the original liger_kernel is installed; the drop-in refuses then",
    ),
]


@pytest.fixture
def alias() -> Iterator[Any]:
    """liger_kernel.transformers while the drop-in is installed."""
    compat.install()
    try:
        yield importlib.import_module("liger_kernel.transformers")
    finally:
        compat.uninstall()


# Installing -------------------------------------------------------------------------------------


def test_installing_is_undone():
    finders, modules = list(sys.meta_path), set(sys.modules)
    assert not is_liger_kernel_available()
    for _ in range(2):
        compat.install()
        compat.install()
        assert len(sys.meta_path) == len(finders) + 1
        # A check that was made before counts for nothing.
        assert is_liger_kernel_available()
        assert importlib.import_module("liger_kernel").__version__ == compat.INTERFACE_VERSION
        importlib.import_module("liger_kernel.transformers.functional")
        for name in ("liger_kernel", "liger-kernel"):
            assert importlib.metadata.version(name) == compat.INTERFACE_VERSION
        assert importlib.metadata.packages_distributions()["liger_kernel"] == ["liger-kernel"]
        compat.uninstall()
        compat.uninstall()
        assert sys.meta_path == finders
        assert not {name for name in set(sys.modules) - modules if name.startswith("liger_kernel.")}
        assert "liger_kernel" not in sys.modules
        assert not is_liger_kernel_available()
        assert importlib.util.find_spec("liger_kernel") is None
        with pytest.raises(importlib.metadata.PackageNotFoundError):
            importlib.metadata.version("liger_kernel")
        assert "liger_kernel" not in importlib.metadata.packages_distributions()


def test_the_version_is_high_enough_and_says_whose_it_is():
    version = pytest.importorskip("packaging.version")
    found = version.parse(compat.INTERFACE_VERSION)
    assert found >= version.parse("0.8.2")
    assert found.local.startswith("liger.kernels")


def test_the_original_is_refused(tmp_path, monkeypatch):
    finders = list(sys.meta_path)
    (tmp_path / "liger_kernel").mkdir()
    (tmp_path / "liger_kernel" / "__init__.py").write_text("")
    with monkeypatch.context() as patch:
        patch.syspath_prepend(tmp_path)
        with pytest.raises(ImportError, match=f"installed, at {tmp_path}.*pip uninstall"):
            compat.install()
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "liger_kernel", types.ModuleType("liger_kernel"))
        with pytest.raises(ImportError, match="imported, from"):
            compat.install()
    assert sys.meta_path == finders
    importlib.invalidate_caches()


# What tools import, as they do it.
SNIPPETS = {
    "readme": "from liger_kernel.transformers import AutoLigerKernelForCausalLM\n"
    "from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss\n"
    "from liger_kernel.transformers import apply_liger_kernel_to_llama",
    "hf": "from liger_kernel.transformers import _apply_liger_kernel_to_instance",
    "axolotl": "from liger_kernel.transformers.cross_entropy import LigerCrossEntropyLoss\n"
    "from liger_kernel.transformers.functional import liger_cross_entropy\n"
    "from liger_kernel.transformers.fused_linear_cross_entropy import (\n"
    "    LigerFusedLinearCrossEntropyLoss,\n"
    ")\n"
    "from liger_kernel.transformers.geglu import LigerGEGLUMLP\n"
    "from liger_kernel.transformers.layer_norm import LigerLayerNorm\n"
    "from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN\n"
    "from liger_kernel.transformers.rms_norm import LigerRMSNorm\n"
    "from liger_kernel.transformers.rope import liger_rotary_pos_emb\n"
    "from liger_kernel.transformers.swiglu import LigerSwiGLUMLP",
    "llamafactory": "import liger_kernel.transformers as kernels\n"
    + "\n".join(f"kernels.apply_liger_kernel_to_{family}" for family in FAMILIES),
}


@pytest.mark.parametrize("tool", SNIPPETS)
def test_imports_of_tools(tool, alias):
    names: dict[str, Any] = {}
    exec(SNIPPETS[tool], names)
    for name, value in names.items():
        if name.startswith(("Liger", "liger_", "apply_")):
            assert value.__module__.startswith("liger_kernels."), name


def test_what_is_not_there_is_an_import_error(alias):
    with pytest.raises(ImportError, match="apply_liger_kernel_to_no_such_family"):
        exec("from liger_kernel.transformers import apply_liger_kernel_to_no_such_family")
    # Nor are the modules behind the drop-in.
    for name in ("chunked_loss", "ops", "transformers.modules", "transformers.finder"):
        assert importlib.util.find_spec(f"liger_kernel.{name}") is None
    with pytest.raises(ModuleNotFoundError, match="liger_kernel.chunked_loss"):
        importlib.import_module("liger_kernel.chunked_loss")


# What the names compute -------------------------------------------------------------------------


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def gradients(function: Callable[..., Any], *inputs: Tensor | None) -> list[Tensor]:
    """Return what a function gives, and the gradients of its inputs and parameters."""
    leaves = [x.detach().clone().requires_grad_(x.requires_grad) for x in inputs if x is not None]
    given = iter(leaves)
    out = function(*(None if x is None else next(given) for x in inputs))
    outputs = list(out) if isinstance(out, tuple) else [out]
    wanted = [x for x in leaves if x.requires_grad]
    wanted += list(function.parameters()) if isinstance(function, nn.Module) else []
    dy = [randn(*y.shape, seed=9).detach() for y in outputs]
    return [y.detach() for y in outputs] + list(torch.autograd.grad(outputs, wanted, dy))


def same(ours: list[Tensor], wanted: list[Tensor]) -> None:
    assert len(ours) == len(wanted) > 1
    for got, value in zip(ours, wanted, strict=True):
        torch.testing.assert_close(got, value, rtol=2e-5, atol=2e-5)


def config(**options: Any) -> Any:
    return transformers.LlamaConfig(
        hidden_size=24, intermediate_size=40, num_attention_heads=4, **options
    )


def gemma_config() -> Any:
    return transformers.GemmaConfig(hidden_size=24, intermediate_size=40)


# name: (how ours is made, the stock module it equals)
MODULES: dict[str, tuple[Callable[[Any], nn.Module], Callable[[], nn.Module]]] = {
    "rms-llama": (lambda a: a.LigerRMSNorm(24, eps=1e-5), lambda: LlamaRMSNorm(24, eps=1e-5)),
    "rms-torch": (lambda a: a.LigerRMSNorm(24), lambda: nn.RMSNorm(24, eps=1e-6)),
    "rms-gemma": (
        lambda a: a.LigerRMSNorm(24, 1e-6, offset=1.0, casting_mode="gemma", init_fn="zeros"),
        lambda: GemmaRMSNorm(24, eps=1e-6),
    ),
    "layer": (
        lambda a: a.LigerLayerNorm(24, eps=1e-5, bias=True),
        lambda: nn.LayerNorm(24, eps=1e-5),
    ),
    "layer-no-bias": (
        lambda a: a.LigerLayerNorm(24),
        lambda: nn.LayerNorm(24, eps=1e-6, bias=False),
    ),
    "swiglu": (lambda a: a.LigerSwiGLUMLP(config()), lambda: LlamaMLP(config())),
    "swiglu-bias": (
        lambda a: a.LigerSwiGLUMLP(config(mlp_bias=True)),
        lambda: LlamaMLP(config(mlp_bias=True)),
    ),
    "geglu": (lambda a: a.LigerGEGLUMLP(gemma_config()), lambda: GemmaMLP(gemma_config())),
    # gelu alone is the exact form.
    "geglu-exact": (
        lambda a: a.LigerGEGLUMLP(config(hidden_act="gelu")),
        lambda: LlamaMLP(config(hidden_act="gelu")),
    ),
}


@pytest.mark.parametrize("name", MODULES)
def test_module(name, alias):
    make, make_stock = MODULES[name]
    ours, stock = make(alias), make_stock()
    if "glu" not in name:
        assert all(torch.equal(*p) for p in zip(ours.parameters(), stock.parameters(), strict=True))
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in stock.parameters():
            parameter.copy_(torch.randn(parameter.shape))
    ours.load_state_dict(stock.state_dict())
    x = randn(3, 5, 24)
    same(gradients(ours, x), gradients(stock, x))
    # Without the drop-in, what was made with it still works and can be copied.
    compat.uninstall()
    assert torch.equal(pickle.loads(pickle.dumps(ours))(x), ours(x))


def test_norms_round_where_stock_ones_do(alias):
    x = randn(4, 24).detach().bfloat16()
    for name in ("rms-llama", "rms-gemma"):
        make, make_stock = MODULES[name]
        ours, stock = make(alias), make_stock()
        with torch.no_grad():
            stock.weight.copy_(randn(24, seed=1))
        ours.load_state_dict(stock.state_dict())
        for dtype in (torch.float32, torch.bfloat16):
            got, wanted = ours.to(dtype)(x), stock.to(dtype)(x)
            assert got.dtype == wanted.dtype
            torch.testing.assert_close(got, wanted, rtol=1e-2, atol=1e-2)


CLASS_WEIGHT = torch.linspace(0.2, 2.0, 11)
LOSSES: dict[str, dict[str, Any]] = {
    "plain": {},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none"},
    "smoothing": {"label_smoothing": 0.1},
    "ignore": {"ignore_index": 4},
    "weight": {"weight": CLASS_WEIGHT},
}
TARGET = torch.tensor([3, 4, -100, 0, 10, 4, 7])


def target_of(options: dict[str, Any]) -> Tensor:
    return TARGET.abs() % 11 if "ignore_index" in options else TARGET


@pytest.mark.parametrize("name", LOSSES)
def test_cross_entropy_is_that_of_torch(name, alias):
    options = LOSSES[name]
    functional = importlib.import_module("liger_kernel.transformers.functional")
    target = target_of(options)
    ours, stock = alias.LigerCrossEntropyLoss(**options), nn.CrossEntropyLoss(**options)
    logits = randn(7, 11)
    wanted = gradients(lambda x: stock(x, target), logits)
    same(gradients(lambda x: ours(x, target), logits), wanted)
    same(gradients(lambda x: functional.liger_cross_entropy(x, target, **options), logits), wanted)
    assert ours.state_dict().keys() == stock.state_dict().keys()
    # As torch, classes second: tools put it in the place of F.cross_entropy.
    images = randn(7, 11, 2, 3)
    targets = target[:, None, None].expand(7, 2, 3).contiguous()
    wanted = gradients(lambda x: F.cross_entropy(x, targets, **options), images)
    same(gradients(lambda x: functional.liger_cross_entropy(x, targets, **options), images), wanted)


@pytest.mark.parametrize("has_bias", [False, True], ids=["no-bias", "bias"])
@pytest.mark.parametrize("name", LOSSES)
def test_fused_cross_entropy_is_linear_and_cross_entropy(name, has_bias, alias):
    options = dict(LOSSES[name])
    functional = importlib.import_module("liger_kernel.transformers.functional")
    target = target_of(options)
    hidden, head, bias = randn(7, 5), randn(11, 5, seed=1), randn(11, seed=2) if has_bias else None
    wanted = gradients(
        lambda x, w, b: F.cross_entropy(F.linear(x, w, b), target, **options), hidden, head, bias
    )
    if "weight" in options:
        options["ce_weight"] = options.pop("weight")
    ours = alias.LigerFusedLinearCrossEntropyLoss(**options)
    same(gradients(lambda x, w, b: ours(w, x, target, b), hidden, head, bias), wanted)
    function = functional.liger_fused_linear_cross_entropy
    same(
        gradients(lambda x, w, b: function(x, w, target, b, **options), hidden, head, bias), wanted
    )


def test_losses_cap_logits_and_add_the_z_loss(alias):
    functional = importlib.import_module("liger_kernel.transformers.functional")
    options = {"softcap": 2.0, "lse_square_scale": 0.1}
    hidden, head = randn(7, 5), randn(11, 5, seed=1)

    def reference(logits: Tensor) -> Tensor:
        logits = 2.0 * torch.tanh(logits / 2.0)
        z = logits.logsumexp(-1)[TARGET != -100].square().mean()
        return F.cross_entropy(logits, TARGET) + 0.1 * z

    logits = randn(7, 11)
    wanted = gradients(reference, logits)
    for loss in (
        lambda x: functional.liger_cross_entropy(x, TARGET, **options),
        lambda x: alias.LigerCrossEntropyLoss(**options)(x, TARGET),
    ):
        same(gradients(loss, logits), wanted)
    wanted = gradients(lambda x, w: reference(x @ w.T), hidden, head)
    for fused in (
        lambda x, w: functional.liger_fused_linear_cross_entropy(x, w, TARGET, **options),
        lambda x, w: alias.LigerFusedLinearCrossEntropyLoss(**options)(w, x, TARGET),
    ):
        same(gradients(fused, hidden, head), wanted)


@pytest.mark.parametrize("unsqueeze_dim", [1, 2])
def test_rope_is_that_of_transformers(unsqueeze_dim, alias):
    rope = importlib.import_module("liger_kernel.transformers.rope").liger_rotary_pos_emb
    functional = importlib.import_module("liger_kernel.transformers.functional")
    shapes = ((2, 4, 6, 8), (2, 2, 6, 8)) if unsqueeze_dim == 1 else ((2, 6, 4, 8), (2, 6, 2, 8))
    q, k = (randn(*shape, seed=i) for i, shape in enumerate(shapes))
    angles = randn(2, 6, 4, seed=3).detach().repeat(1, 1, 2)
    tables = angles.cos(), angles.sin()
    wanted = gradients(
        lambda q, k: apply_rotary_pos_emb(q, k, *tables, unsqueeze_dim=unsqueeze_dim), q, k
    )
    for function in (rope, alias.liger_rotary_pos_emb, functional.liger_rope):
        same(
            gradients(lambda q, k: function(q, k, *tables, unsqueeze_dim=unsqueeze_dim), q, k),  # noqa: B023
            wanted,
        )


def test_functions_without_parameters(alias):
    functional = importlib.import_module("liger_kernel.transformers.functional")
    a, b, w = randn(3, 8), randn(3, 8, seed=1), randn(8, seed=2)
    same(gradients(functional.liger_swiglu, a, b), gradients(lambda a, b: F.silu(a) * b, a, b))
    same(
        gradients(functional.liger_geglu, a, b),
        gradients(lambda a, b: F.gelu(a, approximate="tanh") * b, a, b),
    )
    same(
        gradients(lambda x, w: functional.liger_rms_norm(x, w, 1e-5), a, w),
        gradients(lambda x, w: F.rms_norm(x, (8,), w, 1e-5), a, w),
    )
    same(
        gradients(lambda x, w: functional.liger_rms_norm(x, w, 1e-5, 1.0, "gemma"), a, w),
        gradients(lambda x, w: F.rms_norm(x, (8,), w + 1.0, 1e-5), a, w),
    )
    same(
        gradients(lambda x, w, b: functional.liger_layer_norm(x, w, b, 1e-5), a, w, w),
        gradients(lambda x, w, b: F.layer_norm(x, (8,), w, b, 1e-5), a, w, w),
    )


X, V = torch.ones(2, 4), torch.tensor([1, 2])
# What we do not have: the call, the words of the error.
REFUSALS: dict[str, tuple[Callable[[Any, Any], Any], str]] = {
    "in-place": (lambda a, f: a.LigerRMSNorm(4, in_place=True), "in_place=True"),
    "in-place-function": (lambda a, f: f.liger_rms_norm(X, None, 1e-6, in_place=True), "in_place"),
    "casting": (lambda a, f: a.LigerRMSNorm(4, casting_mode="none"), "casting_mode.*'none'"),
    "init": (lambda a, f: a.LigerLayerNorm(4, init_fn="normal"), "init_fn.*'normal'"),
    "activation": (lambda a, f: a.LigerSwiGLUMLP(gemma_config()), "silu, swish.*gelu_pytorch_tanh"),
    "gelu": (lambda a, f: a.LigerGEGLUMLP(config()), "gelu_pytorch_tanh.*'silu'"),
    "z-loss": (lambda a, f: a.LigerCrossEntropyLoss(return_z_loss=True), "return_z_loss=True"),
    "fused-z-loss": (
        lambda a, f: f.liger_fused_linear_cross_entropy(X, X, V, return_z_loss=True),
        "return_z_loss=True",
    ),
    "size-average": (
        lambda a, f: f.liger_cross_entropy(X, V, size_average=False),
        "size_average=False",
    ),
    "reduce": (lambda a, f: f.liger_cross_entropy(X, V, reduce=True), "reduce=True"),
    "positions": (
        lambda a, f: f.liger_rope(X, X, X, X, position_ids=V),
        "position_ids",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_no_op_has_is_refused(name, alias):
    call, words = REFUSALS[name]
    functional = importlib.import_module("liger_kernel.transformers.functional")
    with pytest.raises(ValueError, match=words):
        call(alias, functional)


def test_unknown_arguments_are_named(alias):
    for make in (alias.LigerCrossEntropyLoss, alias.LigerFusedLinearCrossEntropyLoss):
        with pytest.raises(TypeError, match="accum_dtype"):
            make(accum_dtype=torch.float32)
        # In torch the second is another than in the original; neither is guessed.
        with pytest.raises(TypeError, match="positional"):
            make(CLASS_WEIGHT)


# Patching ---------------------------------------------------------------------------------------


def _parts(family: str) -> set[str]:
    return {f"{family}{part}" for part in ("RMSNorm", "MLP")}


def patched_classes(model: nn.Module) -> set[str]:
    """Return the classes of patched modules; Linear is the head."""
    return {type(module).__name__ for module in model.modules() if is_patched(module)}


def test_signatures_are_those_of_the_families(alias):
    functions = alias.MODEL_TYPE_TO_APPLY_LIGER_FN
    assert functions.keys() == FAMILIES.keys()
    for family, function in functions.items():
        assert function is getattr(alias, f"apply_liger_kernel_to_{family}")
        parameters = inspect.signature(function).parameters
        options = {name: p.default for name, p in parameters.items() if name != "model"}
        assert options == FAMILIES[family].options
        with pytest.raises(ValueError, match=r"unknown option 'rms_nrom'; did you mean 'rms_norm'"):
            function(rms_nrom=False)


@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_instance(family, alias):
    model = zoo.build(family).train()
    inputs = zoo.inputs_of(family)
    stock = run(model, inputs)
    other = zoo.build(family)
    function = getattr(alias, f"apply_liger_kernel_to_{family}")
    for apply in (function, alias._apply_liger_kernel_to_instance):
        # Again with other options: the last call wins, where ours would raise.
        assert apply(model=model, rms_norm=False, rope=None) is None
        assert not any("Norm" in name or "Attention" in name for name in patched_classes(model))
        assert apply(model=model) is None
        assert any("Norm" in name for name in patched_classes(model))
        assert_same(run(model, inputs), stock)
        assert model(**inputs, skip_logits=True).logits is None
    assert not patched_classes(other)
    # An option of ours that chooses no op is taken too.
    for model_of in (zoo.build_unlisted(), model):
        alias._apply_liger_kernel_to_instance(model_of, save_memory=False)
        assert patched_classes(model_of)
    with pytest.raises(ValueError, match="unknown option 'layernorm'"):
        alias._apply_liger_kernel_to_instance(model, layernorm=True)
    restore(model)
    assert not patched_classes(model)


def test_instance_of_a_type_without_a_function(alias):
    model = zoo.build_unlisted().train()
    stock = run(model, zoo.text_inputs())
    alias._apply_liger_kernel_to_instance(
        model, rope=False, cross_entropy=True, fused_linear_cross_entropy=None
    )
    assert patched_classes(model) == {*_parts("SmolLM3"), "Linear"}
    assert_same(run(model, zoo.text_inputs()), stock)
    for options, words in (({"rop": False}, "did you mean 'rope'"), ({"rope": 1}, "rope must be")):
        with pytest.raises(ValueError, match=words):
            alias._apply_liger_kernel_to_instance(model, **options)
    with pytest.raises(ValueError, match="transformers model, got Linear"):
        alias._apply_liger_kernel_to_instance(nn.Linear(2, 2))


def test_class_mode_ends_with_the_drop_in(alias):
    before = zoo.build("llama")
    for _ in range(2):
        alias.apply_liger_kernel_to_llama(rope=False)
        alias._apply_liger_kernel("qwen2", swiglu=None)
    assert patched_classes(zoo.build("llama")) == {*_parts("Llama"), "Linear"}
    assert patched_classes(zoo.build("qwen2")) == {
        *(_parts("Qwen2") - {"Qwen2MLP"}),
        "Qwen2Attention",
        "Linear",
    }
    # Built patched and asked for again, as Trainer does.
    model = zoo.build("llama")
    alias._apply_liger_kernel_to_instance(model=model)
    assert "LlamaAttention" in patched_classes(model)
    assert not patched_classes(before)
    with pytest.warns(UserWarning, match="'smollm3' has no function"):
        alias._apply_liger_kernel("smollm3")
    compat.uninstall()
    assert not patched_classes(zoo.build("llama"))
    assert not patched_classes(zoo.build("qwen2"))


def test_llama4_stands_for_its_text_model_too(alias):
    model = zoo.build("llama4_text")
    with pytest.raises(ValueError, match="unknown option 'rms_nrom'"):
        alias.apply_liger_kernel_to_llama4(model=model, rms_nrom=False)
    # Text has no layer norm.
    alias.apply_liger_kernel_to_llama4(model=model, rms_norm=False, layer_norm=True)
    assert "Llama4TextMLP" in patched_classes(model)
    assert "Llama4TextRMSNorm" not in patched_classes(model)
    alias.apply_liger_kernel_to_llama4(layer_norm=True, rope=False)
    assert "Llama4TextRMSNorm" in patched_classes(zoo.build("llama4_text"))
    assert "LayerNorm" in patched_classes(zoo.build("llama4"))


def test_auto_class(alias, tmp_path):
    stock = zoo.build("qwen3").train()
    stock.save_pretrained(tmp_path)
    load = alias.AutoLigerKernelForCausalLM.from_pretrained
    model = load(tmp_path, rope=False, dtype=torch.float32).train()
    assert patched_classes(model) == {*_parts("Qwen3"), "Linear"}
    assert_same(run(model, zoo.text_inputs()), run(stock, zoo.text_inputs()))
    with pytest.raises(ValueError, match="unknown option 'rms_nrom'"):
        load(tmp_path, rms_nrom=True)


# Trainer ----------------------------------------------------------------------------------------


def rows(count: int) -> list[dict[str, list[int]]]:
    ids = torch.randint(10, 90, (count, 12), generator=torch.Generator().manual_seed(7)).tolist()
    return [
        {"input_ids": row, "attention_mask": [1] * 12, "labels": [-100] * i + row[i:]}
        for i, row in enumerate(ids)
    ]


TRAININGS: dict[str, tuple[dict[str, Any], set[str]]] = {
    "default": ({}, {"Attention", "RMSNorm", "MLP"}),
    "config": (
        {"liger_kernel_config": {"rope": False, "swiglu": True}},
        {"RMSNorm", "MLP"},
    ),
    "cross-entropy": (
        {
            "liger_kernel_config": {
                "cross_entropy": True,
                "fused_linear_cross_entropy": False,
                "rms_norm": False,
            }
        },
        {"Attention", "MLP"},
    ),
    "metrics": ({}, {"Attention", "RMSNorm", "MLP"}),
}


def accuracy(prediction: Any) -> dict[str, float]:
    guesses, labels = prediction.predictions.argmax(-1)[:, :-1], prediction.label_ids[:, 1:]
    return {"accuracy": float((guesses == labels)[labels != -100].mean())}


# Case 67: metrics get the logits they need, and training still makes none.
@pytest.mark.parametrize("training", TRAININGS)
@pytest.mark.filterwarnings("ignore")
def test_trainer_asks_for_liger_kernel_case_67(training, tmp_path, monkeypatch):
    options, parts = TRAININGS[training]
    num_losses = 0
    head_loss = importlib.import_module("liger_kernels.transformers.lazy_logits.loss")
    is_plain = training == "cross-entropy"
    name = "cross_entropy" if is_plain else "fused_linear_cross_entropy"
    original = getattr(head_loss, name)

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal num_losses
        num_losses += 1
        return original(*args, **kwargs)

    monkeypatch.setattr(head_loss, name, counted)

    def train(**more: Any) -> tuple[list[float], nn.Module]:
        model = zoo.build("llama")
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path),
            per_device_train_batch_size=2,
            per_device_eval_batch_size=2,
            gradient_accumulation_steps=2,
            max_steps=2,
            logging_steps=1,
            learning_rate=1e-3,
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            **more,
        )
        trainer = transformers.Trainer(
            model,
            arguments,
            train_dataset=rows(8),
            eval_dataset=rows(4),
            compute_metrics=accuracy if training == "metrics" else None,
        )
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        metrics = trainer.evaluate()
        losses += [
            metrics[f"eval_{name}"] for name in ("loss", "accuracy") if f"eval_{name}" in metrics
        ]
        assert len(losses) == (4 if training == "metrics" else 3)
        # A second run asks again.
        trainer.train()
        return losses, model

    wanted, _ = train()
    assert num_losses == 0
    with contextlib.ExitStack() as stack:
        compat.install()
        stack.callback(compat.uninstall)
        got, model = train(use_liger_kernel=True, **options)
    torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-4)
    assert patched_classes(model) == {"Linear", *(f"Llama{part}" for part in parts)}
    # 2 steps of 2 batches, twice. Trainer of version 5 evaluates without logits unless metrics
    # need them; that of 4 always makes them.
    assert num_losses == (10 if zoo.IS_V5 and training != "metrics" else 8)


@pytest.mark.filterwarnings("ignore")
def test_trainer_without_the_drop_in_says_what_is_missing(tmp_path):
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), use_liger_kernel=True, use_cpu=True, report_to=[], max_steps=1
    )
    with pytest.raises(ImportError, match="liger-kernel"):
        transformers.Trainer(zoo.build("llama"), arguments, train_dataset=rows(2)).train()


# Documentation ----------------------------------------------------------------------------------

PAGE = Path(__file__).parents[2] / "docs" / "migrating.md"
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)


def test_the_page_runs(tmp_path, monkeypatch):
    """Every Python block of docs/migrating.md, one after the other, in one namespace."""
    zoo.build("llama").save_pretrained(tmp_path)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {
        "path": str(tmp_path),
        "model": zoo.build("llama").train(),
        "inputs": zoo.text_inputs(),
        "train_dataset": rows(4),
    }
    assert len(BLOCKS) >= 5
    try:
        for block in BLOCKS:
            exec(compile(block, PAGE.name, "exec"), names)
    finally:
        compat.uninstall()
    assert not patched_classes(names["model"])
