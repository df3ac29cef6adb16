"""Experts as a list of gated MLPs: one op on weights that lie together, equal to the stock loop."""

from __future__ import annotations

import copy
import pickle
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
import zoo
from checks import assert_same, run
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.utils import parametrizations, prune

from liger_kernels.compare import error
from liger_kernels.transformers import apply_liger_kernel, apply_liger_kernel_to_mixtral
from liger_kernels.transformers.patching.plan import build_plan
from liger_kernels.transformers.recognise import recognise_expert_list
from liger_kernels.transformers.replacements.calls import tally_calls
from liger_kernels.transformers.replacements.joined_weights import lie_together
from liger_kernels.transformers.replacements.tiles import tile_modules

WIDTH, INNER, NUM_EXPERTS = 16, 24, 4


class Expert(nn.Module):
    """A gated MLP."""

    def __init__(self, inner=INNER, bias=False):
        super().__init__()
        self.gate_proj = nn.Linear(WIDTH, inner, bias=bias)
        self.up_proj = nn.Linear(WIDTH, inner, bias=bias)
        self.down_proj = nn.Linear(inner, WIDTH, bias=bias)
        self.act_fn = nn.SiLU()

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


def loop(experts, x, weights, ids, calls_all=False):
    """Run each expert on its tokens, one after another; those without tokens if calls_all."""
    y = torch.zeros_like(x)
    for i, expert in enumerate(experts):
        token, choice = torch.where(ids == i)
        if not calls_all and not len(token):
            continue
        y = y.index_add(0, token, (expert(x[token]) * weights[token, choice, None]).to(y.dtype))
    return y


class Routed(nn.Module):
    """A block that routes in its forward."""

    def __init__(self, *, num_experts=NUM_EXPERTS, top_k=2, normalizes=True, shared="", **options):
        super().__init__()
        self.top_k, self.normalizes = top_k, normalizes
        self.returns_logits, self.noise = options.pop("returns_logits", True), 0.0
        self.calls_all = options.pop("calls_all", False)
        self.gate = nn.Linear(WIDTH, num_experts, bias=False)
        self.experts = nn.ModuleList(Expert(**options) for _ in range(num_experts))
        self.shared_expert = Expert() if shared else None
        self.shared_expert_gate = nn.Linear(WIDTH, 1) if shared == "gated" else None

    def forward(self, x):
        shape = x.shape
        if self.training and self.noise > 0:
            x = x * torch.empty_like(x).uniform_(1 - self.noise, 1 + self.noise)
        x = x.view(-1, shape[-1])
        logits = self.gate(x)
        weights, ids = torch.topk(F.softmax(logits, dim=1, dtype=torch.float), self.top_k, dim=-1)
        if self.normalizes:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        y = loop(self.experts, x, weights.to(x.dtype), ids, self.calls_all)
        if self.shared_expert is not None:
            shared = self.shared_expert(x)
            if self.shared_expert_gate is not None:
                shared = F.sigmoid(self.shared_expert_gate(x)) * shared
            y = y + shared
        return (y.view(shape), logits) if self.returns_logits else y.view(shape)


class Sigmoids(nn.Module):
    """A router that returns ids and weights."""

    def __init__(self, num_experts, top_k):
        super().__init__()
        self.top_k = top_k
        self.weight = nn.Parameter(torch.randn(num_experts, WIDTH))

    def forward(self, x):
        weights, ids = torch.topk(F.linear(x.float(), self.weight.float()).sigmoid(), self.top_k)
        return ids, weights


class Given(nn.Module):
    """A block with a method that is given ids and weights."""

    def __init__(self, *, num_experts=NUM_EXPERTS, top_k=2, **options):
        super().__init__()
        self.gate = Sigmoids(num_experts, top_k)
        self.experts = nn.ModuleList(Expert(**options) for _ in range(num_experts))
        self.shared_experts = Expert()

    def moe(self, hidden_states, topk_indices, topk_weights):
        return loop(self.experts, hidden_states, topk_weights, topk_indices)

    def forward(self, x):
        ids, weights = self.gate(x.view(-1, x.shape[-1]))
        y = self.moe(x.view(-1, x.shape[-1]), ids, weights)
        return y.view(x.shape) + self.shared_experts(x)


class Model(nn.Module):
    """Two blocks; `loss` reads the logits of their routers too."""

    def __init__(self, block=Routed, **options):
        super().__init__()
        self.blocks = nn.ModuleList(block(**options) for _ in range(2))

    def forward(self, x):
        loss = 0
        for block in self.blocks:
            result = block(x)
            y, logits = result if isinstance(result, tuple) else (result, x)
            x, loss = x + y, loss + logits.square().mean()
        return SimpleNamespace(loss=x.square().mean() + loss, logits=x)


def build(block=Routed, **options):
    torch.manual_seed(0)
    return Model(block, **options).train()


def inputs(num_tokens=5, dtype=torch.float32):
    return {"x": torch.randn(2, num_tokens, WIDTH, generator=torch.Generator().manual_seed(1)).to(
        dtype
    )}  # fmt: skip


FORMS = {
    "normalized": (Routed, {}),
    "weights-as-they-are": (Routed, {"normalizes": False}),
    "no-logits": (Routed, {"returns_logits": False}),
    "shared": (Routed, {"shared": "plain"}),
    "shared-gated": (Routed, {"shared": "gated", "normalizes": False}),
    "one-expert": (Routed, {"num_experts": 1, "top_k": 1, "shared": "gated"}),
    "calls-all": (Routed, {"calls_all": True}),
    "every-expert": (Routed, {"top_k": NUM_EXPERTS}),
    "one-choice": (Routed, {"top_k": 1, "normalizes": False}),
    "odd-width": (Routed, {"inner": 19}),
    "method": (Given, {}),
    "method-one-choice": (Given, {"top_k": 1, "num_experts": 9}),
}


@pytest.mark.parametrize("num_tokens", [1, 5])
@pytest.mark.parametrize("name", FORMS)
def test_step_equals_the_loop(name, num_tokens):
    block, options = FORMS[name]
    model = build(block, **options)
    stock = run(model, inputs(num_tokens))
    record = apply_liger_kernel(model, "all")
    assert record.coverage["moe_experts"] == {"patched": 2, "candidates": 2}
    is_shared = any("shared" in name for name, _ in model.blocks[0].named_children())
    assert record.coverage.get("swiglu", {"patched": 0})["patched"] == 2 * is_shared
    with record.count_calls():
        assert_same(run(model, inputs(num_tokens)), stock)
    assert not record.unused
    record.undo()
    assert_same(run(model, inputs(num_tokens)), stock, tolerance=0)


def weights_of(block):
    layers = [(e.gate_proj, e.up_proj) for e in block.experts]
    return [layer.weight for pair in layers for layer in pair], [
        e.down_proj.weight for e in block.experts
    ]


def are_together(block):
    return all(len({w.untyped_storage().data_ptr() for w in group}) == 1
               for group in weights_of(block))  # fmt: skip


def reaches(model, record, **given):
    with record.count_calls():
        model(**(given or inputs()))
    return not record.unused


def test_parameters_stay_what_they_are():
    model, stock = build(), build()
    parameters = dict(model.named_parameters())
    record = apply_liger_kernel(model, "moe_experts")
    assert all(map(are_together, model.blocks))
    assert {n: id(p) for n, p in model.named_parameters()} == {
        n: id(p) for n, p in parameters.items()
    }
    for name, value in stock.state_dict().items():
        assert torch.equal(model.state_dict()[name], value)
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-2) for m in (model, stock)]
    for _ in range(3):
        for each, optimizer in zip((model, stock), optimizers, strict=True):
            optimizer.zero_grad()
            each(**inputs()).loss.backward()
            optimizer.step()
    for name, value in stock.state_dict().items():
        assert error(model.state_dict()[name], value) < 1e-4, name
    assert reaches(model, record)


def load(model, state):
    model.load_state_dict(state)
    return model


MOVES = {
    "dtype": lambda model: model.to(torch.bfloat16),
    "twice": lambda model: model.double().float(),
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "memory-of-processes": lambda model: model.share_memory(),
    "load": lambda model: load(model, build(type(model.blocks[0])).state_dict()),
}


@pytest.mark.parametrize("move", MOVES)
@pytest.mark.parametrize("block", [Routed, Given])
def test_weights_stay_together(block, move):
    model = build(block)
    apply_liger_kernel(model, "moe_experts")
    moved = MOVES[move](model)
    assert all(map(are_together, moved.blocks))
    dtype = next(moved.parameters()).dtype
    with tally_calls(moved.blocks) as tally:
        moved(**inputs(dtype=dtype))
    assert tally.called == set(map(id, moved.blocks))
    assert_same(run(moved, inputs(dtype=dtype)), run(build(block).to(dtype), inputs(dtype=dtype)),
                tolerance=2e-5 if dtype == torch.float32 else 0.05)  # fmt: skip


def _assign(model):
    model.load_state_dict(copy.deepcopy(build().state_dict()), assign=True)


def _replace_weight(model):
    layer = model.blocks[1].experts[2].up_proj
    layer.weight = nn.Parameter(layer.weight.detach() * 2)


def _set(path, value):
    def change(model):
        owner, _, name = path.rpartition(".")
        torch.manual_seed(5)
        setattr(model.get_submodule(owner), name, value())

    return change


def _hook(path):
    def change(model):
        model.get_submodule(path).register_forward_hook(lambda m, args, y: 2 * y)

    return change


def _prune(model):
    torch.manual_seed(5)
    prune.random_unstructured(model.blocks[0].experts[1].down_proj, "weight", 0.5)


def _normalize(model):
    parametrizations.weight_norm(model.blocks[0].experts[1].down_proj).weight = torch.ones(
        WIDTH, INNER
    )


CHANGES = {
    "pruned": _prune,
    "parametrized": _normalize,
    "assigned-weights": _assign,
    "a-weight": _replace_weight,
    "activation": _set("blocks.0.experts.1.act_fn", nn.Tanh),
    "layer": _set("blocks.0.experts.1.up_proj", lambda: nn.Linear(WIDTH, INNER)),
    "bias": _set("blocks.0.experts.1.up_proj.bias", lambda: nn.Parameter(torch.ones(INNER))),
    "expert": _set("blocks.1.experts.0", Expert),
    "experts": _set("blocks.1.experts", lambda: nn.ModuleList(Expert() for _ in range(4))),
    "top-k": _set("blocks.0.top_k", lambda: 1),
    "normalizes": _set("blocks.0.normalizes", lambda: False),
    "noise": _set("blocks.0.noise", lambda: 0.1),
    "hook-on-an-expert": _hook("blocks.0.experts.3"),
    "hook-on-a-layer": _hook("blocks.0.experts.3.down_proj"),
    "hook-on-an-activation": _hook("blocks.0.experts.3.act_fn"),
    "hook-on-the-router": _hook("blocks.0.gate"),
    "router": _set("blocks.0.gate", lambda: nn.Linear(WIDTH, NUM_EXPERTS)),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_after_the_patch_is_seen(name):
    model, stock = build(), build()
    before = run(stock, inputs())
    apply_liger_kernel(model, "moe_experts")
    for each in (model, stock):
        CHANGES[name](each)
    torch.manual_seed(3)
    wanted = run(stock, inputs())
    torch.manual_seed(3)
    assert_same(run(model, inputs()), wanted)
    if name != "assigned-weights":
        assert wanted.loss != before.loss
    # What it was changed to can be moved as well.
    assert_same(run(model.double().float(), inputs()), wanted) if name != "noise" else None


def test_another_code_of_the_experts_class(monkeypatch):
    model, stock = build(), build()
    apply_liger_kernel(model, "moe_experts")
    forward = Expert.forward
    monkeypatch.setattr(Expert, "forward", lambda self, x: 2 * forward(self, x))
    assert_same(run(model, inputs()), run(stock, inputs()))


@pytest.mark.parametrize("frozen", ["experts.1", "experts", "gate", "experts.2.up_proj"])
def test_frozen_parts(frozen):
    model, stock = build(), build()
    for each in (model, stock):
        for block in each.blocks:
            block.get_submodule(frozen).requires_grad_(False)
    record = apply_liger_kernel(model, "moe_experts")
    with record.count_calls():
        assert_same(run(model, inputs()), run(stock, inputs()))
    assert not record.unused


def test_a_weight_that_changes_before_backward_raises():
    model = build()
    apply_liger_kernel(model, "moe_experts")
    loss = model(**inputs()).loss
    with torch.no_grad():
        model.blocks[0].experts[3].gate_proj.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified in place between forward and backward"):
        loss.backward()


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing(use_reentrant):
    model, stock = build(), build()
    record = apply_liger_kernel(model, "moe_experts")
    results = []
    for each in (model, stock):
        x = inputs()["x"].requires_grad_()
        y = x
        for block in each.blocks:
            y = y + torch.utils.checkpoint.checkpoint(block, y, use_reentrant=use_reentrant)[0]
        y.square().mean().backward()
        results.append([x.grad, *(p.grad for p in each.parameters())])
    for ours, wanted in zip(*results, strict=True):
        assert error(ours, wanted) < 1e-5
    assert reaches(model, record)


def test_autocast():
    model, stock = build(), build()
    record = apply_liger_kernel(model, "moe_experts")
    with torch.autocast("cpu", torch.bfloat16):
        assert reaches(model, record)
        ours, wanted = run(model, inputs()), run(stock, inputs())
    assert ours.loss == pytest.approx(wanted.loss, rel=0.02)
    for name, grad in wanted.grads.items():
        assert ours.grads[name].dtype == torch.float32
        assert (ours.grads[name] - grad).norm() < 0.1 * grad.norm() + 1e-3, name


def test_memory_between_forward_and_backward():
    sizes = {}
    for save_memory in (True, False):
        model = build()
        apply_liger_kernel(model, "moe_experts", save_memory=save_memory)
        own = {p.untyped_storage().data_ptr() for p in model.parameters()}
        kept = []

        def pack(x, kept=kept, own=own):
            kept.append(0 if x.untyped_storage().data_ptr() in own else x.numel())
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            model(**inputs())
        sizes[save_memory] = sum(kept)
    # Of each of 10 tokens and 2 choices the gathered token and the activation, in 2 blocks.
    assert sizes[False] - sizes[True] == 2 * 10 * 2 * (WIDTH + INNER)


@pytest.mark.parametrize("is_built_inside", [True, False])
def test_inference_mode(is_built_inside):
    stock = build().eval()
    with torch.inference_mode():
        model = build() if is_built_inside else None
    model = model or build()
    with torch.inference_mode():
        record = apply_liger_kernel(model, "moe_experts")
        with record.count_calls():
            assert_same(run(model.eval(), inputs()), run(stock, inputs()))
        assert bool(record.unused) == is_built_inside
    if not is_built_inside:
        assert_same(run(model.train(), inputs()), run(stock.train(), inputs()))


@pytest.mark.filterwarnings("ignore")
def test_an_adapter_that_comes_and_goes():
    peft = pytest.importorskip("peft")
    model, stock = build(), build()
    record = apply_liger_kernel(model, "moe_experts")
    found = []
    for each in (model, stock):
        torch.manual_seed(4)
        config = peft.LoraConfig(target_modules=["up_proj"], init_lora_weights=False)
        wrapped = peft.PeftModel(each, config)
        found.append(run(wrapped, inputs()))
        wrapped.unload()
        each.requires_grad_()
    assert_same(*found)
    with record.count_calls():
        assert_same(run(model, inputs()), run(stock, inputs()))
    assert not record.unused


def test_transforms_of_functions():
    model, stock = build(), build()
    apply_liger_kernel(model, "moe_experts")

    def loss(parameters, each):
        return torch.func.functional_call(each, parameters, (inputs()["x"],)).logits.square().sum()

    for transform in (torch.func.grad, lambda function: function):
        results = [
            transform(loss)({n: p.detach() for n, p in each.named_parameters()}, each)
            for each in (model, stock)
        ]
        if isinstance(results[0], dict):
            results = [torch.cat([g.flatten() for g in result.values()]) for result in results]
        assert error(*results) < 1e-5


@pytest.mark.parametrize("block", [Routed, Given])
def test_pieces_of_tokens(block):
    model, stock = build(block), build(block)
    record = apply_liger_kernel(model, "moe_experts")
    assert tile_modules(model, 3) == 2
    with record.count_calls():
        assert_same(run(model, inputs()), run(stock, inputs()))
    assert not record.unused


def test_gradients_are_parts_of_one_tensor():
    model = build()
    apply_liger_kernel(model, "moe_experts")
    model(**inputs()).loss.backward()
    for group in weights_of(model.blocks[0]):
        assert len({w.grad.untyped_storage().data_ptr() for w in group}) == 1


def test_torch_compile():
    model, stock = build(), build()
    apply_liger_kernel(model, "moe_experts")
    torch._dynamo.reset()
    wanted = run(stock, inputs())
    for block in model.blocks:
        block.compile(backend="eager")
    assert_same(run(model, inputs()), wanted)


class OtherRouting(Routed):
    """A block whose weights are something else."""

    def forward(self, x):
        y, logits = super().forward(x)
        return 2 * y, logits


class OtherMoe(Given):
    """A block whose method computes something else."""

    def moe(self, *args):
        return super().moe(*args) + 1


def _share(block):
    block.experts[1].up_proj.weight = block.experts[0].up_proj.weight


def _adapt(block):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["up_proj"])
    peft.inject_adapter_in_model(config, block)


class Linear(nn.Linear):
    """A layer that quantises, or does anything else."""


def _other_layers(block):
    for expert in block.experts:
        expert.up_proj.__class__ = Linear


class Packed(nn.Module):
    """A linear layer whose weight has another name."""

    in_features, out_features = WIDTH, INNER


def _pack_layers(block):
    for expert in block.experts:
        expert.up_proj = Packed()


REFUSED = {
    "packed": (Routed, {}, _pack_layers, "no plain nn.Linear, but Packed"),
    "router": (OtherRouting, {}, None, "another way than as the top k of a softmax"),
    "method": (OtherMoe, {}, None, "another way than as the top k of a softmax"),
    "noise": (Routed, {}, lambda block: setattr(block, "noise", 0.1), "jitter noise to 0"),
    "bias": (Routed, {"bias": True}, None, "biases"),
    "shared-weights": (Routed, {}, _share, "share weights"),
    "lora": (Routed, {}, _adapt, "lora_target_modules"),
    "layers": (Routed, {}, _other_layers, "no plain nn.Linear, but Linear with a Parameter"),
    "dtypes": (Routed, {}, lambda block: block.experts[1].half(), "several sizes, dtypes"),
    "sizes": (
        Routed,
        {},
        lambda block: block.experts.__setitem__(1, Expert(8)),
        "several sizes, dtypes",
    ),
    "classes": (
        Routed,
        {},
        lambda block: block.experts.__setitem__(1, nn.Identity()),
        "several classes",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.filterwarnings("ignore")
def test_blocks_that_stay_stock_say_why(name):
    block, options, change, reason = REFUSED[name]
    model = build(block, **options)
    for each in model.blocks:
        if change is not None:
            change(each)
    plan = build_plan(model, "all")
    [first, second] = [skip for skip in plan.skips if skip.op == "moe_experts"]
    assert reason in first.reason
    assert first.reason == second.reason
    assert "each expert runs by itself" in first.reason
    # They are gated MLPs, then as before.
    assert plan.coverage["swiglu"]["patched"] >= 2 * (NUM_EXPERTS - 1)


def test_other_ops_leave_experts_as_they_are():
    model = build(shared="plain")
    record = apply_liger_kernel(model, "swiglu")
    assert record.coverage["moe_experts"] == {"patched": 0, "candidates": 2}
    assert record.coverage["swiglu"] == {"patched": 2, "candidates": 2}
    assert not are_together(model.blocks[0])


@pytest.mark.parametrize("loads", ["assign", "copy"])
def test_a_model_on_meta_is_planned_and_joined_once_it_has_weights(loads):
    with torch.device("meta"):
        model = build()
    record = apply_liger_kernel(model, "moe_experts")
    assert record.coverage["moe_experts"]["patched"] == 2
    model.train()
    if loads == "assign":
        model.load_state_dict(build().state_dict(), assign=True)
        assert not are_together(model.blocks[0])
    else:
        model.to_empty(device="cpu")
        model.load_state_dict(build().state_dict())
    model.eval().train()
    assert all(map(are_together, model.blocks))
    assert_same(run(model, inputs()), run(build(), inputs()))
    assert reaches(model, record)


def test_weights_that_were_assigned_are_moved_by_refresh():
    model = build()
    record = apply_liger_kernel(model, "moe_experts")
    _assign(model)
    assert not reaches(model, record)
    [row, _] = [row for row in record.modules if row["op"] == "moe_experts"]
    assert row["status"] == "unused"
    assert "do not lie together" in row["reason"]
    record.refresh()
    assert reaches(model, record)


@pytest.fixture
def one_rank(tmp_path):
    """Start a process group of this process alone."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("order", ["patch-first", "shard-first"])
def test_fsdp2_runs_the_stock_loop(order, one_rank):
    model, stock = build(), run(build(), inputs())
    record = apply_liger_kernel(model, "moe_experts") if order == "patch-first" else None
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)
    record = record or apply_liger_kernel(model, "moe_experts")
    with record.count_calls():
        ours = run(model, inputs())
    ours.grads = {name: grad.full_tensor() for name, grad in ours.grads.items()}
    assert_same(ours, stock)
    reasons = {row["reason"] for row in record.modules if row["op"] == "moe_experts"}
    [reason] = reasons
    assert "do not lie together" in reason if order == "patch-first" else "DTensor" in reason
    # Nothing is moved out of memory that FSDP2 manages.
    model.eval().train().to(torch.float32)
    with record.count_calls():
        ours = run(model, inputs())
    ours.grads = {name: grad.full_tensor() for name, grad in ours.grads.items()}
    assert_same(ours, stock)


@pytest.mark.skipif(zoo.IS_V5, reason="transformers 5 has experts in one tensor")
def test_models_that_are_loaded_in_class_mode(tmp_path):
    stock = zoo.build("mixtral").train()
    stock.save_pretrained(tmp_path)
    record = apply_liger_kernel_to_mixtral()
    try:
        model = transformers.MixtralForCausalLM.from_pretrained(tmp_path).train()
    finally:
        record.undo()
    assert record.coverage["moe_experts"] == {"patched": 2, "candidates": 2}
    for layer in model.model.layers:
        weights = [expert.w2.weight for expert in layer.block_sparse_moe.experts]
        assert lie_together(weights)
    assert_same(run(model, zoo.text_inputs()), run(stock, zoo.text_inputs()), tolerance=1e-4)


class OddExperts(nn.Module):
    """Experts whose form is no known one."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(NUM_EXPERTS, WIDTH, WIDTH))


def test_experts_of_another_form_say_so():
    model = build()
    model.blocks[1] = OddExperts()
    [skip] = [s for s in build_plan(model, "all").skips if s.module_class == "OddExperts"]
    assert skip.op is None
    assert skip.reason.startswith("experts of another form")


def test_modules_without_a_list_of_experts():
    block = build().blocks[0]
    block.experts = nn.ModuleList()
    assert recognise_expert_list(block) is None
    block.experts = nn.ModuleList([nn.Linear(WIDTH, WIDTH)])
    assert recognise_expert_list(block) is None
    assert recognise_expert_list(Expert()) is None
