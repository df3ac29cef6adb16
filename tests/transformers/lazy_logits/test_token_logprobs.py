"""Log-probabilities of a model's tokens: those of its real logits, which are not made."""

from __future__ import annotations

import functools
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from lazy_models import FUSED, VOCAB, LargestTensor, make, make_inputs
from torch import Tensor, nn

from liger_kernels.ops import sequence_sums
from liger_kernels.ops.backend import INTERPRETED
from liger_kernels.ops.fused_linear_logprobs import LOGPROB_OUTPUTS
from liger_kernels.transformers import apply_liger_kernel, token_logprobs
from liger_kernels.transformers.lazy_logits import loss as head_loss
from liger_kernels.transformers.lazy_logits.head import install_head, num_fused

pytestmark = pytest.mark.skipif(INTERPRETED, reason="runs without the interpreter")


def given(length: int = 10) -> tuple[dict[str, Any], Tensor]:
    inputs: dict[str, Any] = make_inputs(length)
    return inputs, inputs.pop("labels")


def wanted(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> dict[str, Tensor]:
    """The definition, from a model's logits."""
    z = logits[:, :-1].float() / temperature
    labels = labels[:, 1:]
    log_p, is_here = z.log_softmax(-1), labels != -100
    column = labels.clamp(min=0)[..., None]
    found = {
        "logprob": log_p.gather(-1, column)[..., 0],
        "entropy": -(log_p.exp() * log_p).sum(-1),
        "logsumexp": z.logsumexp(-1).detach(),
        "correct": z.argmax(-1) == labels,
        "mean_logit": z.mean(-1).detach(),
    }
    return {name: value.masked_fill(~is_here, 0) for name, value in found.items()}


def gradients(model: Any, values: dict[str, Tensor]) -> tuple[dict[str, Tensor], ...]:
    """The values, and the gradients of all parameters under a random gradient of each value."""
    model.zero_grad(set_to_none=True)
    trained = [value for value in values.values() if value.requires_grad]
    generator = torch.Generator().manual_seed(5)
    torch.autograd.backward(
        trained, [torch.randn(value.shape, generator=generator) for value in trained]
    )
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: value.detach() for name, value in values.items()}, grads


def assert_equal(ours: Any, stock: Any, tolerance: float = 2e-5) -> None:
    for mine, other in zip(ours, stock, strict=True):
        assert mine.keys() == other.keys()
        for name, value in other.items():
            floor = tolerance * value.float().abs().max().item()
            torch.testing.assert_close(
                mine[name], value, rtol=tolerance, atol=floor, msg=lambda text, n=name: n + text
            )


def check(model: Any, call: Any = None, **options: Any) -> None:
    """Compare all outputs and gradients with those of the model's own logits."""
    call = model if call is None else call
    inputs, labels = given()
    torch.manual_seed(3)
    stock = wanted(model(**inputs).logits, labels, options.get("temperature", 1.0))
    stock = gradients(model, stock)
    torch.manual_seed(3)
    values = token_logprobs(call, inputs, labels, outputs=LOGPROB_OUTPUTS, **options)
    ours = gradients(model, values._asdict())
    assert values._fields == LOGPROB_OUTPUTS
    assert_equal(ours, stock)


def biased() -> Any:
    model = make()
    model.lm_head.bias = nn.Parameter(torch.randn(VOCAB))
    return model


def with_lora(*targets: str, **options: Any) -> Any:
    peft = pytest.importorskip("peft")
    torch.manual_seed(4)
    config = peft.LoraConfig(r=4, target_modules=list(targets), init_lora_weights=False, **options)
    return peft.get_peft_model(make(), config).train()


HEADS = {
    "plain": make,
    "softcap": functools.partial(make, "gemma2"),
    "scale": functools.partial(make, "granite"),
    "tied": functools.partial(make, "gemma2", tie_word_embeddings=True),
    "experts": functools.partial(make, "mixtral"),
    "bias": biased,
    "frozen": lambda: frozen(make()),
    "lora": lambda: with_lora("q_proj"),
    "lora-head": lambda: with_lora("q_proj", "lm_head"),
    "saved-head": lambda: with_lora("q_proj", modules_to_save=["lm_head"]),
}


def frozen(model: Any) -> Any:
    model.lm_head.requires_grad_(False)
    return model


@pytest.mark.filterwarnings("error:token_logprobs")
@pytest.mark.parametrize("head", HEADS)
def test_every_head_gives_the_values_of_its_logits_without_them(head, monkeypatch):
    monkeypatch.setattr(head_loss, "CHUNK_ELEMENTS", 5 * VOCAB)
    model = HEADS[head]()
    install_head(model, FUSED)
    inputs, labels = given()
    num_logits = labels.numel() * VOCAB
    with LargestTensor() as stock:
        model(**inputs)
    assert stock.numel >= num_logits
    with LargestTensor() as largest:
        token_logprobs(model, inputs, labels).logprob.sum().backward()
    assert largest.numel < num_logits
    check(model, temperature=0.7)


@pytest.mark.parametrize("mode", ["eval", "no_grad", "inference"])
def test_evaluation_makes_no_logits_either(mode):
    model = make("gemma2").train(mode != "eval")
    inputs, labels = given()
    stock = wanted(model(**inputs).logits, labels)
    install_head(model, FUSED)
    grad = {"eval": torch.enable_grad, "no_grad": torch.no_grad, "inference": torch.inference_mode}
    with LargestTensor() as largest, grad[mode]():
        values = token_logprobs(model, inputs, labels, outputs=("entropy", "logprob"))
    assert values._fields == ("entropy", "logprob")
    assert values.logprob.requires_grad == (mode == "eval")
    assert values.logprob.shape == (2, 9)
    for name, value in values._asdict().items():
        torch.testing.assert_close(value.detach().clone(), stock[name].detach())
    assert largest.numel < labels.numel() * VOCAB
    assert type(model(**inputs).logits) is Tensor


def test_positions_left_out_take_no_part_in_the_product(monkeypatch):
    from liger_kernels.ops.losses import linear_loss

    rows = []
    loss_rows = linear_loss.loss_rows
    monkeypatch.setattr(
        linear_loss, "loss_rows", lambda z, *a, **k: rows.append(len(z)) or loss_rows(z, *a, **k)
    )
    model = make()
    install_head(model, FUSED)
    inputs, labels = given()
    labels[:, :6] = -100
    token_logprobs(model, inputs, labels)
    assert sum(rows) == (labels[:, 1:] != -100).sum()


@pytest.mark.parametrize("case", ["unpatched", "cross-entropy", "sliced"])
def test_where_logits_are_made_a_warning_says_why(case):
    model = make()
    stock_reason = "is not patched"
    if case == "cross-entropy":
        install_head(model, "cross_entropy")
        stock_reason = "patched with cross_entropy"
    elif case == "sliced":
        # Reads a number of the logits before it returns them.
        forward = type(model).forward

        def reads(self: Any, *args: Any, **kwargs: Any) -> Any:
            out = forward(self, *args, **kwargs)
            out.logits = out.logits.sort(-1).values.sort(-1).values + 0.0 * out.logits
            return out

        model.__class__ = type("Reads", (type(model),), {"forward": reads})
        install_head(model, FUSED)
        stock_reason = "forward reads them"
    with pytest.warns(UserWarning, match=f"makes all logits: .*{stock_reason}"):
        check(model)


def test_prepared_models_see_the_forward(accelerate):
    """The call is that of the wrapper: its hooks run, and its output is what is returned."""
    model = make()
    install_head(model, FUSED)
    calls = []

    class Wrapper(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            out = self.module(*args, **kwargs)
            calls.append(out)
            return out

    prepared = accelerate.Accelerator(cpu=True, mixed_precision="bf16").prepare(Wrapper(model))
    inputs, labels = given()
    values = token_logprobs(prepared, inputs, labels)
    assert len(calls) == 1
    assert values.logprob.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        stock = wanted(model(**inputs).logits, labels)["logprob"]
    torch.testing.assert_close(values.logprob, stock, rtol=0.05, atol=0.05)
    values.logprob.sum().backward()
    assert model.lm_head.weight.grad is not None


@pytest.fixture
def process_group(tmp_path):
    if not torch.distributed.is_available():
        pytest.skip("torch without distributed")
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("error:token_logprobs")
@pytest.mark.parametrize("find_unused", [False, True])
@pytest.mark.parametrize("head", ["plain", "lora-head"])
def test_ddp_reduces_the_gradients(head, find_unused, process_group, monkeypatch):
    monkeypatch.setattr(head_loss, "CHUNK_ELEMENTS", 5 * VOCAB)
    model = HEADS[head]()
    install_head(model, FUSED)
    ddp = nn.parallel.DistributedDataParallel(model, find_unused_parameters=find_unused)
    check(model, ddp)


@pytest.mark.parametrize("targets", [("q_proj",), ("q_proj", "lm_head")], ids="-".join)
def test_a_new_adapter_and_the_model_below_it_differ_by_exactly_0(targets, monkeypatch):
    monkeypatch.setattr(head_loss, "CHUNK_ELEMENTS", 5 * VOCAB)
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(make(), peft.LoraConfig(r=4, target_modules=list(targets))).train()
    install_head(model, FUSED)
    inputs, labels = given()
    outputs = ("logprob", "mean_logit", "entropy")
    policy = token_logprobs(model, inputs, labels, outputs=outputs).logprob
    with torch.no_grad(), model.disable_adapter():
        reference = token_logprobs(model, inputs, labels).logprob
    assert policy.requires_grad
    assert torch.equal(policy, reference)


@pytest.mark.parametrize("family", zoo.MULTIMODAL)
def test_images_pass_through(family):
    model = zoo.build(family).train()
    apply_liger_kernel(model, "all")
    inputs = zoo.inputs_of(family)
    labels = inputs.pop("labels")
    stock = wanted(model(**inputs).logits, labels)["logprob"]
    before = num_fused(model.get_output_embeddings())
    values = token_logprobs(model, inputs, labels)
    torch.testing.assert_close(values.logprob, stock, rtol=1e-4, atol=1e-4)
    assert num_fused(model.get_output_embeddings()) == before + 1


def test_packed_documents_equal_their_own_rows():
    model = make()
    install_head(model, FUSED)
    ids = torch.randint(3, VOCAB, (1, 12), generator=torch.Generator().manual_seed(2))
    # The first position of a document has no label, as packing leaves it.
    labels = ids.clone()
    labels[0, 5] = -100
    positions = torch.cat([torch.arange(5), torch.arange(7)])[None]
    packed = token_logprobs(model, {"input_ids": ids, "position_ids": positions}, labels).logprob
    rows = [
        token_logprobs(model, {"input_ids": part}, part).logprob for part in ids.split([5, 7], 1)
    ]
    alone = torch.cat([rows[0], torch.zeros(1, 1), rows[1]], 1)
    torch.testing.assert_close(packed, alone)


@pytest.mark.slow
def test_a_compiled_model_has_them_in_its_graph():
    torch._dynamo.reset()
    model = make("gemma2")
    install_head(model, FUSED)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    check(model, compiled, temperature=0.7)
    torch._dynamo.reset()


def test_the_loss_of_the_page_is_log_2_at_first_and_learns():
    page = (Path(__file__).parents[3] / "docs" / "library.md").read_text()
    (code,) = (x for x in re.findall(r"```python\n(.*?)```", page, re.S) if "dpo_loss" in x)
    scope: dict[str, Any] = {}
    exec(code, scope)
    model = make()
    install_head(model, FUSED)
    inputs, labels = given()
    answers = torch.tensor([[0], [1]]).expand(labels.shape)
    batch = {**inputs, "labels": labels, "answer_ids": answers}
    with torch.no_grad():
        found = token_logprobs(model, inputs, labels).logprob
    reference = sequence_sums(found, answers[:, 1:], 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for _ in range(3):
        losses.append(scope["dpo_loss"](model, reference, batch))
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[0].item() == math.log(2)
    assert losses[2] < losses[1] < losses[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": torch.zeros(2, 10)}, "labels must be int64"),
        ({"labels": torch.zeros(10, dtype=torch.int64)}, "labels must be int64"),
        ({"labels": torch.zeros(2, 9, dtype=torch.int64)}, "a label for each position"),
        ({"labels": [1, 2]}, "labels must be int64"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"outputs": ("other",)}, "outputs must be some of logprob"),
        ({"outputs": "logprob"}, "outputs must be some of logprob"),
        ({"inputs": {"labels": 1}}, "inputs must not hold labels"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_named(change, message):
    model = make()
    install_head(model, FUSED)
    inputs, labels = given()
    arguments = {"inputs": inputs, "labels": labels, **change}
    with pytest.raises(ValueError, match=message):
        token_logprobs(model, **arguments)


def test_an_encoder_with_a_decoder_is_refused():
    model = nn.Linear(1, 1)
    model.config = type("Config", (), {"is_encoder_decoder": True})()
    with pytest.raises(ValueError, match="must be a causal language model, got Linear"):
        token_logprobs(model, {}, torch.zeros(1, 2, dtype=torch.int64))
