"""Residual sums fused with the norm after them: which layers, the same numbers, and when not."""

from __future__ import annotations

import copy
import functools
import inspect
import io
import traceback
import types

import accelerate.hooks
import pytest
import torch
import transformers
import zoo
from checks import assert_same, run, snapshot
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from liger_kernels.compare import FLOOR, error
from liger_kernels.ops import fused_add_rms_norm, rms_norm
from liger_kernels.transformers import AutoLigerKernelForCausalLM, apply_liger_kernel, inspect_model
from liger_kernels.transformers.replacements import layers as residual_module
from liger_kernels.transformers.replacements.subclasses import is_patched

OPS = "rms_norm,fused_add_rms_norm"
OP = "fused_add_rms_norm"
WIDTH = 8


# Forms of source --------------------------------------------------------------------------------


class Layer(nn.Module):
    """A layer of two sublayers; its subclasses differ in how forward is written."""

    def __init__(self):
        super().__init__()
        self.first, self.second = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(2))
        self.norm, self.other_norm = LlamaRMSNorm(WIDTH), LlamaRMSNorm(WIDTH)
        self.plain_norm = nn.LayerNorm(WIDTH)
        self.dropout = nn.Dropout(0.5)
        self.scale = 0.3
        self.is_odd = True


class Usual(Layer):
    def forward(self, hidden):
        residual = hidden
        hidden = self.first(hidden)
        hidden = residual + hidden
        # A comment is no statement.
        residual = hidden
        hidden = self.norm(hidden)
        return residual + self.second(hidden)


class TurnedAround(Layer):
    def forward(self, x):
        x = self.first(x) + x
        y = self.norm(x)
        return x + self.second(y)


class NormFirst(Layer):
    def forward(self, hidden):
        stream = hidden + self.first(hidden)
        normed = self.norm(stream)
        kept = stream
        return kept + self.second(normed) + stream


class SumNotKept(Layer):
    def forward(self, hidden):
        hidden = hidden + self.first(hidden)
        hidden = self.norm(hidden)
        residual = hidden
        return residual + self.second(hidden)


class Renamed(Layer):
    def forward(self, hidden):
        old = hidden
        new = old + self.first(hidden)
        kept = new
        also = kept
        old = hidden
        out = self.norm(new)
        return old + kept + also + self.second(out)


class Scaled(Layer):
    def forward(self, hidden):
        residual = hidden
        hidden = residual + self.first(hidden) * self.scale
        residual = hidden
        hidden = self.norm(hidden)
        return residual + self.second(hidden) * self.scale


class Dropped(Layer):
    def forward(self, hidden):
        residual = hidden
        hidden = self.dropout(self.first(hidden)) + self.dropout(residual)
        residual = hidden
        hidden = self.norm(hidden)
        return residual + self.dropout(self.second(hidden))


class Nested(Layer):
    def forward(self, hidden):
        hidden = hidden + self.first(self.other_norm(hidden))
        hidden = hidden + self.second(self.norm(hidden))
        return hidden


class Chained(Layer):
    def forward(self, hidden):
        hidden = hidden + self.first(hidden)
        hidden = hidden + self.second(self.norm(hidden))
        hidden = hidden + self.first(self.other_norm(hidden))
        return self.norm(hidden)


class InBranches(Layer):
    def forward(self, hidden):
        for _ in range(2):
            if self.is_odd:
                hidden = hidden + self.first(hidden)
                hidden = self.norm(hidden)
            else:
                hidden = self.plain_norm(hidden)
        return hidden


class PrivateNames(Layer):
    def __init__(self):
        super().__init__()
        self.__factor = 2.0

    def forward(self, hidden, *, times=3.0):
        super().extra_repr()
        hidden = hidden + self.__factor * times * self.first(hidden)
        return self.second(self.norm(hidden))


def doubled(forward):
    @functools.wraps(forward)
    def wrapper(self, *args, **kwargs):
        return 2 * forward(self, *args, **kwargs)

    return wrapper


class Decorated(Layer):
    @doubled
    @doubled
    def forward(self, hidden, times=3.0):
        hidden = hidden + times * self.first(hidden)
        return self.second(self.norm(hidden))


class OfModules(Layer):
    def forward(self, hidden):
        # The compiler calls functions of imported modules in another way than methods.
        hidden = hidden + torch.tanh(self.first(hidden))
        return nn.functional.relu(self.norm(hidden))


def make_enclosed(times):
    class Enclosed(Layer):
        def forward(self, hidden):
            hidden = hidden + times * self.first(hidden)
            return self.second(self.norm(hidden))

    return Enclosed


Enclosed = make_enclosed(3.0)

FORMS = {
    Usual: ("norm",),
    TurnedAround: ("norm",),
    NormFirst: ("norm",),
    SumNotKept: ("norm",),
    Renamed: ("norm",),
    Scaled: ("norm",),
    Dropped: ("norm",),
    Nested: ("norm",),
    Chained: ("norm", "other_norm"),
    InBranches: ("norm",),
    PrivateNames: ("norm",),
    Decorated: ("norm",),
    OfModules: ("norm",),
    Enclosed: ("norm",),
}


def build(cls):
    """Return a model that holds one layer, with weights that all matter."""
    torch.manual_seed(0)
    model = nn.Sequential(cls())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def step(model, x):
    """Return the output and every gradient; dropout draws the same numbers each time."""
    torch.manual_seed(5)
    x = x.detach().requires_grad_()
    model.zero_grad(set_to_none=True)
    y = model(x)
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype))
    return [y.detach(), x.grad, *(p.grad for p in model.parameters() if p.grad is not None)]


def make_x(*shape, dtype=torch.float32):
    shape = shape or (2, 5, WIDTH)
    return torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(dtype)


def assert_close(ours, stock, dtype=torch.float32):
    for mine, theirs in zip(ours, stock, strict=True):
        assert mine.dtype == theirs.dtype
        assert error(mine, theirs) <= 4 * FLOOR[dtype]


@pytest.mark.parametrize("cls", FORMS, ids=lambda cls: cls.__name__)
def test_form_is_fused(cls):
    model = build(cls)
    stock = step(model, make_x())
    signature = inspect.signature(model[0].forward)
    record = apply_liger_kernel(model, OPS)
    (patch,) = (patch for patch in record.patches if patch.op == OP)
    assert patch.spec.norms == FORMS[cls]
    assert inspect.signature(model[0].forward) == signature
    with record.count_calls():
        ours = step(model, make_x())
    assert "0" not in record.unused
    assert_close(ours, stock)
    record.undo()
    assert step(model, make_x())[0].equal(stock[0])


def test_bf16_is_no_worse_than_stock():
    model = build(Usual)
    truth = step(copy.deepcopy(model).double(), make_x(dtype=torch.float64))
    model = model.bfloat16()
    stock = step(model, make_x(dtype=torch.bfloat16))
    apply_liger_kernel(model, OPS)
    ours = step(model, make_x(dtype=torch.bfloat16))
    for mine, theirs, wanted in zip(ours, stock, truth, strict=True):
        assert error(mine, wanted) <= 2 * error(theirs, wanted) + FLOOR[torch.bfloat16]


class InPlace(Layer):
    def forward(self, hidden):
        residual = hidden
        hidden = self.first(hidden)
        hidden += residual
        return residual + self.second(self.norm(hidden))


class PostNorm(Layer):
    def forward(self, hidden):
        residual = hidden
        hidden = residual + self.norm(self.first(hidden))
        return hidden + self.other_norm(self.second(hidden))


class SomethingBetween(Layer):
    def forward(self, hidden):
        hidden = hidden + self.first(hidden)
        out = self.second(hidden)
        return out + self.norm(hidden)


class MaybeNormed(Layer):
    def forward(self, hidden):
        hidden = hidden + self.first(hidden)
        return self.norm(hidden) if self.is_odd else hidden


class NormSecond(Layer):
    def forward(self, hidden):
        hidden = hidden + self.first(hidden)
        return self.dropout(hidden) + self.norm(hidden)


class NormOfPart(Layer):
    def forward(self, hidden):
        hidden = hidden + self.first(hidden)
        hidden = self.norm(hidden.flatten(0, 1))
        return hidden


class Overwritten(Layer):
    def forward(self, hidden):
        residual = hidden
        hidden = residual + self.first(hidden)
        hidden = residual
        return self.norm(hidden)


OTHER_FORMS = (
    InPlace,
    PostNorm,
    SomethingBetween,
    MaybeNormed,
    NormSecond,
    NormOfPart,
    Overwritten,
)


@pytest.mark.parametrize("cls", OTHER_FORMS, ids=lambda cls: cls.__name__)
def test_other_form_is_told_once(cls):
    plan = inspect_model(nn.Sequential(cls(), cls()), OPS)
    assert OP not in plan.coverage
    told = [(skip.name, skip.reason) for skip in plan.skips if skip.op is None]
    assert told == [("0", "no RMS norm follows a residual sum of this layer: nothing to fuse")]


class LayerNormed(Layer):
    def forward(self, hidden):
        hidden = hidden + self.first(hidden)
        return self.plain_norm(hidden)


class NoSum(Layer):
    def forward(self, hidden):
        return self.norm(self.first(hidden)) + 1


class Stack(Layer):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList()

    def forward(self, hidden):
        hidden = hidden + self.first(hidden)
        hidden = self.second(hidden)
        return self.norm(hidden)


NO_CANDIDATES = (LayerNormed, NoSum, Stack)


@pytest.mark.parametrize("cls", NO_CANDIDATES, ids=lambda cls: cls.__name__)
def test_what_is_no_candidate_is_not_told(cls):
    plan = inspect_model(nn.Sequential(cls()), OPS)
    assert OP not in plan.coverage
    assert not [skip for skip in plan.skips if skip.op is None]
    assert plan.missing == (OP,)


def test_source_that_is_not_what_runs_is_left_alone():
    class Changed(Usual):
        pass

    assert OP in inspect_model(nn.Sequential(Changed()), OPS).coverage
    # The lines of its code are those of another forward, as after an edit of the file.
    line = Usual.forward.__code__.co_firstlineno
    code = NoSum.forward.__code__.replace(co_firstlineno=line)
    Changed.forward = types.FunctionType(code, globals())
    assert OP not in inspect_model(nn.Sequential(Changed()), OPS).coverage


# What happens at run time -----------------------------------------------------------------------


class Ordered(Layer):
    def forward(self, hidden, log):
        def note(name, value):
            log.append(name)
            return value

        hidden = note("left", hidden) + note("right", self.first(hidden))
        residual = hidden
        hidden = note("around", self.second(self.norm(hidden)))
        return note("last", residual) + hidden


def test_everything_runs_in_the_order_of_the_source():
    model = build(Ordered)
    layer = model[0]
    layer.first.register_forward_hook(lambda *_: log.append("first"))
    layer.second.register_forward_hook(lambda *_: log.append("second"))
    log: list[str] = []
    stock = layer(make_x(), log)
    wanted, log = log, []
    apply_liger_kernel(model, OPS)
    ours = layer(make_x(), log)
    assert log == wanted == ["left", "first", "right", "second", "around", "last"]
    assert_close([ours], [stock])


class Failing(Layer):
    def forward(self, hidden):
        residual = hidden.sum()
        hidden = self.first(hidden)
        hidden = (
            residual + self.dropout(hidden, 1, 2, 3)  # the line that fails
        )
        hidden = self.norm(hidden)
        return hidden


def test_traceback_shows_the_line_of_the_source():
    model = build(Failing)
    apply_liger_kernel(model, OPS)
    assert is_patched(model[0])
    with pytest.raises(TypeError) as problem:
        model(make_x())
    frames = [f for f in traceback.extract_tb(problem.tb) if f.name == "forward"]
    assert "the line that fails" in frames[-1].line
    assert frames[-1].filename == inspect.getsourcefile(Failing)


def test_variables_live_no_longer_than_in_the_stock_forward():
    apply_liger_kernel(model := build(Usual), OPS)
    names = set()

    class Spy(nn.Linear):
        def forward(self, x):
            names.update(inspect.currentframe().f_back.f_back.f_back.f_locals)
            return super().forward(x)

    model[0].second.__class__ = Spy
    model(make_x())
    assert {"self", "hidden", "residual"} <= names
    assert not {name for name in names if "normed" in name}


def add_hook(model):
    seen = []
    model[0].norm.register_forward_hook(lambda module, args, y: seen.append(y))
    return seen


def test_hook_on_the_norm_still_runs():
    model = build(Usual)
    stock = step(model, make_x())
    record = apply_liger_kernel(model, OPS)
    seen = add_hook(model)
    with record.count_calls():
        ours = step(model, make_x())
    assert_close(ours, stock)
    assert len(seen) == 1
    assert record.unused == {"0", "0.other_norm"}


def test_hook_set_before_is_a_reason():
    model = build(Usual)
    add_hook(model)
    (skip,) = (s for s in inspect_model(model, OPS).skips if s.op == OP)
    assert skip.reason == (
        "a hook or another forward is set on norm, which the op would not call: remove it"
    )


class OwnTensor(torch.Tensor):
    pass


UNSERVED = {
    "fp64": lambda model, x: (model.double(), x.double()),
    "wrapped-norm": lambda model, x: (model, x),
    "stock-norm": lambda model, x: (model, x),
    "subclass": lambda model, x: (model, x.as_subclass(OwnTensor)),
}


@pytest.mark.parametrize("case", UNSERVED)
def test_call_that_is_not_served_is_the_stock_one(case):
    def prepare(model):
        if case == "wrapped-norm":
            model[0].norm = nn.Sequential(model[0].norm)
        elif case == "stock-norm":
            model[0].norm = copy.deepcopy(model[0].norm)
            model[0].norm.__class__ = LlamaRMSNorm
        return UNSERVED[case](model, make_x())

    stock_model, x = prepare(build(Usual))
    stock = stock_model(x)
    model = build(Usual)
    record = apply_liger_kernel(model, OPS)
    model, x = prepare(model)
    with record.count_calls():
        ours = model(x)
    assert type(ours) is type(stock)
    assert_close([ours.detach()], [stock.detach()])
    assert "0" in record.unused


# What autocast does: the stream stays in fp32.
@pytest.mark.parametrize("save_memory", [True, False])
def test_sum_of_two_dtypes_is_fused(save_memory):
    model = build(Usual)
    with torch.autocast("cpu", torch.bfloat16):
        stock = step(model, make_x())
        record = apply_liger_kernel(model, OPS, save_memory=save_memory)
        with record.count_calls():
            ours = step(model, make_x())
    assert "0" not in record.unused
    for mine, theirs in zip(ours, stock, strict=True):
        assert mine.dtype == theirs.dtype
        assert error(mine, theirs) <= 4 * FLOOR[torch.bfloat16]


def test_sum_that_broadcasts_is_the_stock_one():
    class Broadcast(Layer):
        def forward(self, hidden):
            hidden = hidden[:, :1] + self.first(hidden)
            return self.norm(hidden)

    model = build(Broadcast)
    stock = step(model, make_x())
    record = apply_liger_kernel(model, OPS)
    with record.count_calls():
        assert_close(step(model, make_x()), stock)
    assert "0" in record.unused


def test_output_is_the_norms_to_the_bit(device):
    # What is remembered to make the output again is the norm of the sum.
    for dtype in (torch.float32, torch.bfloat16):
        x, other = (make_x(3, 127, dtype=dtype).to(device) * scale for scale in (1, 0.3))
        weight = make_x(127).to(device)
        for options in ({"cast": "mid"}, {"cast": "end", "offset": 1.0}):
            y, total = fused_add_rms_norm(x, other, weight, 1e-5, **options)
            assert y.equal(rms_norm(total, weight, 1e-5, **options))


def test_output_is_not_kept_for_backward(monkeypatch):
    model = build(Usual)
    apply_liger_kernel(model, OPS)
    remembered = []
    monkeypatch.setattr(residual_module, "remember", lambda y, make: remembered.append((y, make)))
    model(make_x())
    ((y, make),) = remembered
    assert make().equal(y)


# Plans ------------------------------------------------------------------------------------------


def test_needs_rms_norm():
    plan = inspect_model(zoo.build("llama"), OP)
    assert plan.coverage[OP] == {"patched": 0, "candidates": 2}
    assert {s.reason for s in plan.skips if s.op == OP} == {
        "needs rms_norm, which was not requested: add it to ops"
    }
    plan = inspect_model(zoo.build("llama"), "flce")
    assert {s.reason for s in plan.skips if s.op == OP} == {f"not requested: add {OP} to ops"}


def test_norm_that_is_left_alone_is_a_reason():
    model = zoo.build("llama")
    model.model.layers[0].post_attention_layernorm.forward = lambda x: x
    plan = inspect_model(model, "all")
    assert plan.coverage[OP] == {"patched": 1, "candidates": 2}
    (skip,) = (skip for skip in plan.skips if skip.op == OP)
    assert (skip.name, skip.reason) == (
        "model.layers.0",
        "its post_attention_layernorm is not patched: see there",
    )


class Rotating(Layer):
    def forward(self, hidden):
        cos = sin = torch.ones(1, hidden.shape[1], WIDTH)
        _, turned = apply_rotary_pos_emb(hidden[:, None], hidden[:, None], cos, sin)
        hidden = hidden + turned[:, 0]
        return self.norm(hidden)


def test_layer_that_rotates_by_itself_has_one_patch():
    plan = inspect_model(nn.Sequential(Rotating()), "rope," + OPS)
    assert {patch.op for patch in plan.patches if patch.name == "0"} == {"rope"}
    reasons = [s.reason for s in plan.skips if s.op == OP]
    assert reasons == ["it runs rope, and a module runs one op: nothing to do"]


def test_modules_are_listed():
    rows = [row for row in inspect_model(zoo.build("qwen3"), "auto").modules if row["op"] == OP]
    assert [(row["name"], row["class"], row["status"]) for row in rows] == [
        ("model.layers.0", "Qwen3DecoderLayer", "patched"),
        ("model.layers.1", "Qwen3DecoderLayer", "patched"),
    ]


# Families ---------------------------------------------------------------------------------------

# Layers with the pattern, of those that an image reaches.
LAYERS = dict.fromkeys(zoo.ALL, 2) | {"olmo2": 0, "mllama": 3, "qwen2_5_vl": 4}


@pytest.mark.parametrize("family", zoo.ALL)
def test_family_equals_stock(family):
    model = zoo.build(family).train()
    inputs = zoo.inputs_of(family)
    stock = run(model, inputs)
    before = snapshot(model)
    record = apply_liger_kernel(model, OPS)
    num_layers = LAYERS[family]
    wanted = {"patched": num_layers, "candidates": num_layers} if num_layers else None
    assert record.coverage.get(OP) == wanted
    with record.count_calls():
        ours = run(model, inputs)
    # Norms inside the op count as called.
    assert not record.unused
    assert_same(ours, stock)
    model.zero_grad(set_to_none=True)
    record.undo()
    assert snapshot(model).keys() == before.keys()
    assert not any(map(is_patched, model.modules()))


def test_norms_after_sublayers_are_told():
    plan = inspect_model(zoo.build("olmo2"), "all")
    told = [(skip.name, skip.module_class) for skip in plan.skips if skip.op is None]
    assert told == [("model.layers.0", "Olmo2DecoderLayer")]


def test_parallel_layers_with_layer_norms_are_no_candidates():
    config = transformers.CohereConfig(**zoo._text())
    with torch.device("meta"):
        model = transformers.CohereForCausalLM(config)
    plan = inspect_model(model, "all")
    assert OP not in plan.coverage
    assert not [s for s in plan.skips if "DecoderLayer" in s.module_class]


# Ways a model is used ---------------------------------------------------------------------------


def test_copies_and_pickles_stay_patched():
    model = zoo.build("gemma2").train()
    stock = run(model, zoo.text_inputs())
    record = apply_liger_kernel(model, "all")
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for twin in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert type(twin.model.layers[0]) is type(model.model.layers[0])
        assert_same(run(twin, zoo.text_inputs()), stock)
    record.undo()
    assert type(model.model.layers[0]).__name__ == "Gemma2DecoderLayer"
    assert not is_patched(model.model.layers[0])


def test_names_stay(tmp_path):
    model = zoo.build("llama")
    shown, keys = repr(model), list(model.state_dict())
    splits = model._no_split_modules
    apply_liger_kernel(model, "all")
    assert (repr(model), list(model.state_dict()), model._no_split_modules) == (shown, keys, splits)
    assert type(model.model.layers[0]).__name__ in splits


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_runs_a_layer_as_often_as_stock(use_reentrant):
    model = zoo.build("llama").train()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    calls = []
    for layer in model.model.layers:
        layer.self_attn.register_forward_hook(lambda *_: calls.append(1))
    stock = run(model, zoo.text_inputs())
    num_calls = len(calls)
    assert num_calls == 4
    record = apply_liger_kernel(model, "all")
    with record.count_calls():
        ours = run(model, zoo.text_inputs())
    assert len(calls) == 2 * num_calls
    assert not record.unused
    assert_same(ours, stock)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gemma2", "phi3"])
def test_compiles_without_graph_breaks(family):
    model = zoo.build(family, num_hidden_layers=2).train()
    stock = run(model, zoo.text_inputs())
    apply_liger_kernel(model, "rope," + OPS)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    model.zero_grad(set_to_none=True)
    loss = compiled(**zoo.text_inputs()).loss
    loss.backward()
    torch.compiler.reset()
    assert loss.item() == pytest.approx(stock.loss, rel=1e-5)
    for name, parameter in model.named_parameters():
        assert error(parameter.grad, stock.grads[name]) <= 1e-4, name


def test_layers_beneath_accelerate_hooks():
    model = zoo.build("llama").train()
    stock = run(model, zoo.text_inputs())

    class Counting(accelerate.hooks.ModelHook):
        num_calls = 0

        def pre_forward(self, module, *args, **kwargs):
            Counting.num_calls += 1
            return args, kwargs

    for layer in model.model.layers:
        accelerate.hooks.add_hook_to_module(layer, Counting())
    record = apply_liger_kernel(model, "all")
    with record.count_calls():
        ours = run(model, zoo.text_inputs())
    assert not record.unused
    assert Counting.num_calls == 2
    assert_same(ours, stock)
    record.undo()
    assert run(model, zoo.text_inputs()).loss == stock.loss


def test_layer_with_a_forward_of_its_own_is_skipped():
    model = zoo.build("llama")
    layer = model.model.layers[1]
    layer.forward = lambda hidden_states, **_: hidden_states
    plan = inspect_model(model, "all")
    (skip,) = (skip for skip in plan.skips if skip.op == OP)
    assert skip.name == "model.layers.1"
    assert "another forward is set on the module" in skip.reason


@pytest.mark.parametrize("order", ["patch-then-peft", "peft-then-patch"])
def test_norms_that_peft_wraps_run_as_modules(order):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=2, target_modules=["q_proj"], modules_to_save=["post_attention_layernorm"]
    )

    def wrap(model):
        torch.manual_seed(3)
        return peft.get_peft_model(model, config).train()

    inputs = zoo.text_inputs()
    stock = run(wrap(zoo.build("llama")), inputs)
    if order == "patch-then-peft":
        record = apply_liger_kernel(model := zoo.build("llama"), OPS)
        wrapped = wrap(model)
        assert record.coverage[OP]["patched"] == 2
    else:
        record = apply_liger_kernel(wrapped := wrap(zoo.build("llama")), OPS)
        assert record.coverage[OP] == {"patched": 0, "candidates": 2}
        reasons = {skip.reason for skip in record.skipped if skip.op == OP}
        assert reasons == {"its post_attention_layernorm is not patched: see there"}
    assert_same(run(wrapped, inputs), stock)


def test_options_choose_the_op():
    config = zoo.config_of("llama")
    model = AutoLigerKernelForCausalLM.from_config(config)
    assert sum(map(is_patched, model.model.layers)) == 2
    model = AutoLigerKernelForCausalLM.from_config(config, fused_add_rms_norm=False)
    assert not any(map(is_patched, model.model.layers))
