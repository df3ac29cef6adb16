"""What wraps a patched model, or calls it in another way: adapters, accelerate, compile, trainers.

Each test runs the same thing around a stock model and around a patched one. What concerns the head
alone is in test_lazy_logits.py, single modules in test_engine.py, plain steps in test_families.py.
"""

from __future__ import annotations

import contextlib
import importlib.util
from typing import Any

import accelerate
import pytest
import torch
import transformers
import zoo
from checks import Run, assert_same, run
from torch import nn

from liger_kernels import compat
from liger_kernels.ops.backend import INTERPRETED
from liger_kernels.transformers import apply_liger_kernel, restore
from liger_kernels.transformers.replacements import attention as rotary_module
from liger_kernels.transformers.replacements.subclasses import is_patched

pytestmark = pytest.mark.skipif(INTERPRETED, reason="runs without the interpreter")

FAMILIES = ("llama", "gemma2", "mixtral", "phi3")


def seeded(model: nn.Module, inputs: dict[str, Any]) -> Run:
    """Run a step whose dropout draws the same numbers each time."""
    torch.manual_seed(5)
    return run(model, inputs)


# Adapters ---------------------------------------------------------------------------------------

_LINEAR = r".*\.(q_proj|v_proj|qkv_proj|gate_up_proj|up_proj|down_proj)"
ADAPTERS: dict[str, dict[str, Any]] = {
    "lora": {"target_modules": _LINEAR, "lora_dropout": 0.2},
    "lora-head": {"target_modules": rf"{_LINEAR}|lm_head"},
    "dora": {"target_modules": rf"{_LINEAR}|lm_head", "use_dora": True},
    "saved": {"target_modules": _LINEAR, "modules_to_save": ["norm", "mlp", "lm_head"]},
}


def adapt(model: nn.Module, **options: Any) -> Any:
    """Wrap a model by PEFT; the adapter's weights depend on nothing but their names."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, init_lora_weights=False, **options)
    wrapped = peft.get_peft_model(model, config).train()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in sorted(wrapped.named_parameters()):
            if "lora_" in name and "magnitude" not in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return wrapped


def patch_and_adapt(model: Any, order: str, **options: Any) -> tuple[Any, Any]:
    if order == "patch-first":
        record = apply_liger_kernel(model, "all")
        return adapt(model, **options), record
    wrapped = adapt(model, **options)
    return wrapped, apply_liger_kernel(wrapped, "all")


# Cases 54, 55: whatever holds the weight, it is the one that is read and trained.
@pytest.mark.parametrize("order", ["patch-first", "adapter-first"])
@pytest.mark.parametrize("kind", ADAPTERS)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.filterwarnings("ignore")
def test_adapter_case_54_55(family, kind, order):
    inputs = zoo.text_inputs()
    stock = adapt(zoo.build(family), **ADAPTERS[kind])
    reference = seeded(stock, inputs)
    wrapped, record = patch_and_adapt(zoo.build(family), order, **ADAPTERS[kind])
    with record.count_calls():
        ours = seeded(wrapped, inputs)
    assert_same(ours, reference, tolerance=1e-4)
    assert ours.grads
    if kind != "saved":
        # Of a saved module the original stays, and is not called.
        assert not record.unused
    with stock.disable_adapter(), wrapped.disable_adapter():
        plain = [run(each, inputs, backward=False) for each in (stock, wrapped)]
    assert_same(plain[1], plain[0], tolerance=1e-4)
    record.undo()
    # PEFT copied saved modules that were patched; of copies the record knows nothing.
    restore(wrapped)
    assert not any(is_patched(module) for module in wrapped.modules())
    assert seeded(wrapped, inputs).loss == reference.loss


@pytest.mark.filterwarnings("ignore")
def test_merged_adapter_stays_patched():
    wrapped, record = patch_and_adapt(zoo.build("llama"), "patch-first", **ADAPTERS["lora-head"])
    stock = adapt(zoo.build("llama"), **ADAPTERS["lora-head"])
    merged, stock = (each.merge_and_unload().requires_grad_() for each in (wrapped, stock))
    with record.count_calls():
        ours = run(merged, zoo.text_inputs())
    assert_same(ours, run(stock, zoo.text_inputs()))
    assert not record.unused


# Adapters of the experts' 3-D weights stand around the module that holds them.
@pytest.mark.skipif(not zoo.IS_V5, reason="version 4 has one MLP an expert")
@pytest.mark.parametrize("order", ["patch-first", "adapter-first"])
@pytest.mark.filterwarnings("ignore")
def test_adapter_of_experts(order):
    options = {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
    reference = run(adapt(zoo.build("mixtral"), **options), zoo.text_inputs())
    wrapped, record = patch_and_adapt(zoo.build("mixtral"), order, **options)
    with record.count_calls():
        assert_same(run(wrapped, zoo.text_inputs()), reference)
    assert not record.unused
    assert record.coverage["moe_experts"] == {"patched": 2, "candidates": 2}


@pytest.mark.parametrize("kind", ["prompt", "prefix", "ia3"])
@pytest.mark.filterwarnings("ignore")
def test_other_adapters(kind):
    peft = pytest.importorskip("peft")

    def wrap(model):
        torch.manual_seed(4)
        if kind == "ia3":
            config = peft.IA3Config(
                target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]
            )
        elif kind == "prefix":
            config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
        else:
            config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
        return peft.get_peft_model(model, config).train()

    reference = run(wrap(zoo.build("llama")), zoo.text_inputs())
    model = zoo.build("llama")
    record = apply_liger_kernel(model, "all")
    wrapped = wrap(model)
    with record.count_calls():
        assert_same(run(wrapped, zoo.text_inputs()), reference)
    assert not record.unused


# The way adapters are trained: checkpoints, autocast and a frozen base at once.
@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "not-reentrant"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.filterwarnings("ignore")
def test_adapter_with_checkpoints_and_autocast_case_91(use_reentrant, dtype):
    steps = []
    # The truth, which fp32 without autocast is beside half precision; stock; ours.
    for has_autocast, is_ours in ((False, False), (True, False), (True, True)):
        model = zoo.build("llama")
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        model.enable_input_require_grads()
        if is_ours:
            wrapped, record = patch_and_adapt(model, "patch-first", **ADAPTERS["lora"])
        else:
            wrapped, record = adapt(model, **ADAPTERS["lora"]), None
        counted = record.count_calls() if record else contextlib.nullcontext()
        with torch.autocast("cpu", dtype, enabled=has_autocast), counted:
            steps.append(seeded(wrapped, zoo.text_inputs()))
    assert not record.unused
    truth, stock, ours = steps
    assert ours.loss == pytest.approx(stock.loss, rel=0.01)
    assert ours.grads.keys() == stock.grads.keys()
    for name, grad in stock.grads.items():
        assert ours.grads[name].dtype == grad.dtype == torch.float32
        true = truth.grads[name]
        by_stock, by_ours = (grad - true).norm(), (ours.grads[name] - true).norm()
        assert by_ours <= 2 * by_stock + 1e-3 * true.norm(), name


# Case 8 for every op: in autocast each op answers in the dtype that the stock module does.
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "olmo2", "qwen2_5_vl"])
def test_autocast_dtypes_case_8(family, dtype):
    model = zoo.build(family).train()
    inputs = zoo.inputs_of(family)

    def dtypes() -> dict[str, Any]:
        seen = {}
        hooks = [
            module.register_forward_hook(lambda m, a, out, n=name: seen.update({n: out.dtype}))
            for name, module in model.named_modules()
            if "Norm" in type(module).__name__ or "MLP" in type(module).__name__
        ]
        with torch.autocast("cpu", dtype):
            seen["loss"] = run(model, inputs).loss
        for hook in hooks:
            hook.remove()
        return seen

    stock = dtypes()
    apply_liger_kernel(model, "all")
    ours = dtypes()
    assert ours.pop("loss") == pytest.approx(stock.pop("loss"), rel=0.02)
    assert ours == stock


# Placement --------------------------------------------------------------------------------------

PLACEMENTS: dict[str, dict[str, Any]] = {
    "whole": {"": "cpu"},
    "split": {"model.embed_tokens": "cpu", "model.layers": "cpu", "model.norm": "cpu"},
    # Weights on disk are on meta except while their module runs.
    "disk": {"model.embed_tokens": "cpu", "model.layers": "disk", "model.norm": "disk"},
}


@pytest.mark.parametrize("order", ["patch-first", "dispatch-first"])
@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_dispatch_case_82(family, placement, order, tmp_path):
    model = zoo.build(family).eval()
    inputs = zoo.text_inputs()
    reference = run(model, inputs)
    places = dict(PLACEMENTS[placement])
    if placement != "whole":
        places |= {"model.rotary_emb": "cpu", "lm_head": places["model.norm"]}

    def dispatch() -> None:
        accelerate.dispatch_model(
            model, places, main_device="cpu", offload_dir=tmp_path, force_hooks=True
        )

    if order == "patch-first":
        record = apply_liger_kernel(model, "all")
        dispatch()
    else:
        dispatch()
        record = apply_liger_kernel(model, "all")
    with record.count_calls():
        assert_same(run(model, inputs), reference)
        with torch.no_grad():
            skipped = model(**inputs, skip_logits=True).loss
    assert skipped.item() == pytest.approx(reference.loss, rel=1e-5)
    heads = [row for row in record.modules if row["name"] == "lm_head"]
    # Hooks on the layers of version 4's experts, which one op would go past.
    lists = [row for row in record.modules if row["op"] == "moe_experts" and not zoo.IS_V5]
    assert record.unused == {row["name"] for row in lists if order == "patch-first"}
    if order == "dispatch-first" and placement != "whole":
        # Its weight is there while its own forward runs, not when the loss is computed.
        assert heads[0]["status"] == "skipped"
        assert "patch before wrapping" in heads[0]["reason"]
    others = (row for row in record.modules if row not in heads and row not in lists)
    assert all(row["status"] == "patched" for row in others)


# Ways to call -----------------------------------------------------------------------------------


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value.detach() + 0]
    if isinstance(value, dict):
        value = list(value.values())
    return [x for v in value for x in _tensors(v)] if isinstance(value, (list, tuple)) else []


def _embedded(model: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    embeddings = model.get_input_embeddings()(inputs["input_ids"]).detach()
    return {"inputs_embeds": embeddings, "labels": inputs["labels"]}


def _packed(model: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    # Two documents in each row, at places that differ from row to row.
    positions = torch.stack([torch.arange(12) % 5, torch.arange(12) % 7])
    return {**inputs, "attention_mask": None, "position_ids": positions}


CALLS = {
    "hidden-states": lambda m, i: {**i, "output_hidden_states": True},
    "attentions": lambda m, i: {**i, "output_attentions": True},
    "tuple": lambda m, i: {**i, "return_dict": False, "output_hidden_states": True},
    "no-cache": lambda m, i: {**i, "use_cache": False},
    "embeddings": _embedded,
    "packed": _packed,
    "items": lambda m, i: {**i, "num_items_in_batch": 37, "use_cache": False},
}


# Case 61: what the caller adds reaches the layers, and what comes out is what stock gives.
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("family", ["llama", "gemma2", "mixtral", "granite"])
def test_call_case_61(family, call, mode):
    model = zoo.build(family, attn_implementation="eager").train(mode == "train")
    inputs = CALLS[call](model, zoo.text_inputs())
    wanted = _tensors(model(**inputs))
    apply_liger_kernel(model, "all")
    got = _tensors(model(**inputs))
    assert len(got) == len(wanted) > 1
    for ours, stock in zip(got, wanted, strict=True):
        assert ours.dtype == stock.dtype
        torch.testing.assert_close(ours, stock, rtol=1e-4, atol=1e-4)


def test_keywords_reach_rope_and_every_layer_case_61(monkeypatch):
    model = zoo.build("llama").train()
    apply_liger_kernel(model, "all")
    given: list[dict[str, Any]] = []
    num_turned = 0

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal num_turned
        num_turned += 1
        return rope(*args, **kwargs)

    attention = type(model.model.layers[0].self_attn)
    forward, rope = attention.forward, rotary_module.rope
    monkeypatch.setattr(
        attention, "forward", lambda self, *a, **k: given.append(k) or forward(self, *a, **k)
    )
    monkeypatch.setattr(rotary_module, "rope", counted)
    lengths = torch.tensor([0, 12], dtype=torch.int32)
    model(**zoo.text_inputs(), cu_seq_lens_q=lengths, max_length_q=12, anything="else")
    assert len(given) == num_turned == 2
    assert all(kwargs["cu_seq_lens_q"] is lengths for kwargs in given)
    assert all(kwargs["anything"] == "else" for kwargs in given)


GENERATION: dict[str, dict[str, Any]] = {
    "cache": {},
    "no-cache": {"use_cache": False},
    "static-cache": {"cache_implementation": "static"},
    "beams": {"num_beams": 3},
    "sampling": {"do_sample": True, "top_k": 20},
}


@pytest.mark.parametrize("mode", GENERATION)
@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3"])
@pytest.mark.filterwarnings("ignore")
def test_generate_case_62(family, mode):
    model = zoo.build(family).eval()
    ids = zoo.text_inputs()["input_ids"]
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, **GENERATION[mode]}

    def generate() -> torch.Tensor:
        torch.manual_seed(0)
        return model.generate(ids, attention_mask=torch.ones_like(ids), **options)

    wanted = generate()
    record = apply_liger_kernel(model, "all")
    with record.count_calls():
        assert torch.equal(generate(), wanted)
    # A step of training in between leaves nothing behind.
    run(model.train(), zoo.text_inputs())
    model.eval()
    assert torch.equal(generate(), wanted)
    assert record.unused <= {"lm_head"}


# torch.compile ----------------------------------------------------------------------------------


@pytest.fixture
def compiler():
    torch.compiler.reset()
    yield lambda model: torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.compiler.reset()


# One layer is traced in seconds; the others show other forms of norm, rope, MLP and tail.
@pytest.mark.parametrize(
    "family",
    [
        "llama",
        *(
            pytest.param(f, marks=pytest.mark.slow)
            for f in ("gemma2", "qwen3", "phi3", "glm4", "olmo2", "granite", "qwen2_5_vl")
        ),
    ],
)
def test_compile(family, compiler):
    options = {} if family in zoo.MULTIMODAL else {"num_hidden_layers": 1}
    model = zoo.build(family, **options).train()
    inputs = zoo.text_inputs()
    reference = run(model, inputs)
    apply_liger_kernel(model, "all")
    out = compiler(model)(**inputs)
    assert out.logits is None
    model.zero_grad(set_to_none=True)
    out.loss.backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert_same(Run(out.loss.item(), None, grads), reference, tolerance=1e-4)


# Trainers ---------------------------------------------------------------------------------------


def _rows(count: int) -> list[dict[str, list[int]]]:
    generator = torch.Generator().manual_seed(7)
    rows = []
    for index in range(count):
        ids = torch.randint(10, 90, (12,), generator=generator).tolist()
        labels = [-100] * (index % 5) + ids[index % 5 :]
        rows.append({"input_ids": ids, "attention_mask": [1] * 12, "labels": labels})
    return rows


def _accuracy(prediction: Any) -> dict[str, float]:
    guesses, labels = prediction.predictions[:, :-1], prediction.label_ids[:, 1:]
    return {"accuracy": float((guesses == labels)[labels != -100].mean())}


def _argmax(logits: Any, labels: Any) -> Any:
    # An output of several fields is a tuple, in which logits are what has a vocabulary.
    fields = logits if isinstance(logits, tuple) else (logits,)
    return next(x for x in fields if x.dim() == 3).argmax(-1)


TRAININGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "smoothing": {"label_smoothing_factor": 0.1},
    "checkpoints": {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
    },
    "loss-only": {"prediction_loss_only": True},
}


# Cases 59, 66, 67: accumulation with ragged labels; metrics get the logits they need.
@pytest.mark.parametrize("training", TRAININGS)
@pytest.mark.parametrize("family", ["llama", "granite", "mixtral"])
@pytest.mark.filterwarnings("ignore")
def test_trainer_case_59_66_67(family, training, tmp_path):
    def train(is_ours: bool) -> tuple[list[float], Any]:
        model = zoo.build(family)
        record = apply_liger_kernel(model, "all") if is_ours else None
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
            **TRAININGS[training],
        )
        has_metrics = training != "loss-only"
        trainer = transformers.Trainer(
            model,
            arguments,
            train_dataset=_rows(8),
            eval_dataset=_rows(4),
            compute_metrics=_accuracy if has_metrics else None,
            preprocess_logits_for_metrics=_argmax if has_metrics else None,
        )
        with record.count_calls() if record else contextlib.nullcontext():
            trainer.train()
        values = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        metrics = trainer.evaluate()
        values += [value for name, value in sorted(metrics.items()) if name in _METRICS]
        assert len(values) == (4 if has_metrics else 3)
        return values, record

    wanted, _ = train(is_ours=False)
    got, record = train(is_ours=True)
    torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-4)
    # The label smoother takes the labels away and wants logits.
    assert record.unused == ({"lm_head"} if training == "smoothing" else set())


_METRICS = ("eval_loss", "eval_accuracy")


# TRL brings a fused head of its own, which reads the head's weight and leaves our loss unused; the
# record says so. Norms, MLPs and rope stay ours. With use_liger_kernel it asks for those alone.
@pytest.mark.parametrize("way", ["patched", "use_liger_kernel"])
@pytest.mark.parametrize("kind", ["sft", "sft-nll", "dpo"])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.filterwarnings("ignore")
def test_trl(family, kind, way, tmp_path):
    trl = pytest.importorskip("trl", reason="trl is not installed: pip install trl")
    datasets = pytest.importorskip("datasets")
    texts = [" ".join(f"t{(7 * row + 3 * i) % 90}" for i in range(10)) for row in range(8)]
    if kind == "dpo":
        columns = [
            {"prompt": text[:14], "chosen": text[14:], "rejected": text[20:]} for text in texts
        ]
    else:
        columns = [{"text": text} for text in texts]
    common = {
        "output_dir": str(tmp_path),
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "logging_steps": 1,
        "use_cpu": True,
        "bf16": False,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "gradient_checkpointing": False,
    }

    asks = way == "use_liger_kernel"
    if asks and importlib.util.find_spec("liger_kernel") is not None:
        pytest.skip("the original liger_kernel is installed; the drop-in refuses then")

    def train(is_ours: bool) -> tuple[list[float], Any, Any]:
        model = zoo.build(family)
        record = apply_liger_kernel(model, "all") if is_ours and not asks else None
        common["use_liger_kernel"] = is_ours and asks
        parts = {"model": model, "train_dataset": datasets.Dataset.from_list(columns)}
        parts["processing_class"] = zoo.tokenizer()
        if kind == "dpo":
            arguments = trl.DPOConfig(**common)
            trainer = trl.DPOTrainer(ref_model=zoo.build(family), args=arguments, **parts)
        else:
            options = {"loss_type": "nll"} if kind == "sft-nll" else {}
            trainer = trl.SFTTrainer(args=trl.SFTConfig(**common, **options), **parts)
        with record.count_calls() if record else contextlib.nullcontext():
            trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        assert len(losses) == 2
        return losses, record, model

    wanted, *_ = train(is_ours=False)
    if asks:
        compat.install()
    try:
        got, record, model = train(is_ours=True)
    finally:
        compat.uninstall()
    torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-4)
    if asks:
        found = {type(module).__name__ for module in model.modules() if is_patched(module)}
        wanted_classes = {
            f"{family.capitalize()}{part}" for part in ("Attention", "RMSNorm", "MLP")
        }
        # Trainer of version 4 asks when it is built, before TRL has said that the head is its own.
        assert found == (wanted_classes if zoo.IS_V5 else {*wanted_classes, "Linear"})
    else:
        assert record.unused <= {"lm_head"}
