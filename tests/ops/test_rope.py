"""rope against transformers' own functions, and what the table of test_ops.py cannot say."""

from __future__ import annotations

import dataclasses
import dis
import importlib
import mmap

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from liger_kernels.compare import FLOOR, compare, error
from liger_kernels.ops import backend, rope_kernel
from liger_kernels.ops.op import Case
from liger_kernels.ops.rope import OP, rope, rope_ref

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
STYLES = ("half", "pairs", "pairs_to_half")


def transformers_function(family: str, name: str = "apply_rotary_pos_emb"):
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    return getattr(module, name)


def sample(shape, device, dtype=torch.float32, seed=0, **options):
    """q, k, cos, sin of a case's shape (B, T, HQ, HK, D), and the options that are rope's own."""
    generator = torch.Generator().manual_seed(seed)
    made = OP.sample(Case("", shape, options), dtype, device, generator)
    return made.args, made.kwargs


def like(y: torch.Tensor, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(y.shape, generator=generator).to(y.device, y.dtype)


def gradients(function, q, k, dyq, dyk):
    """Outputs and gradients of function(q, k) in a direction, by fresh leaves."""
    q, k = (x.detach().requires_grad_() for x in (q, k))
    outputs = function(q, k)
    torch.autograd.backward(outputs, (dyq, dyk))
    return [y.detach() for y in outputs], [q.grad, k.grad]


# One row a convention: the family and what rope is told to compute the same. Sizes are those of
# cases 23, 24, 25 and 45: no powers of two, partial widths, every kind of head sharing.
FAMILIES = {
    "llama-gqa-case_45": ("llama", (1, 7, 6, 2, 96), {}),
    "llama-mqa-case_45": ("llama", (1, 2, 71, 1, 80), {}),
    "llama-3-1-case_45": ("llama", (2, 5, 3, 1, 40), {"layout": "heads"}),
    "llama-tokens-first": ("llama", (2, 5, 3, 1, 16), {"unsqueeze_dim": 2}),
    "llama-case_23": ("llama", (2, 16, 4, 2, 32), {"table": "per-sample"}),
    "olmo2-fp32-table": ("olmo2", (2, 5, 4, 2, 24), {"table_dtype": torch.float32}),
    "phi3-case_25": ("phi3", (1, 5, 6, 2, 96), {"rotary_dim": 72}),
    "phi3-quarter-case_25": ("phi3", (1, 5, 6, 2, 80), {"rotary_dim": 20}),
    "glm4-case_25": ("glm4", (2, 5, 6, 2, 128), {"rotary_dim": 64, "style": "pairs"}),
    "cohere": (
        "cohere",
        (2, 5, 4, 2, 24),
        {"rotary_dim": 24, "style": "pairs", "table": "interleaved"},
    ),
    "gpt_oss": ("gpt_oss", (2, 5, 4, 2, 24), {"rotary_dim": 24, "table": "half"}),
    "deepseek_v3": ("deepseek_v3", (2, 5, 4, 1, 24), {"style": "pairs_to_half"}),
    "qwen2_vl-case_24": ("qwen2_vl", (1, 12, 3, 3, 40), {"layout": "vision", "table": "2-D"}),
}
NAMES = {
    "qwen2_vl": "apply_rotary_pos_emb_vision",
    "deepseek_v3": "apply_rotary_pos_emb_interleave",
}


# bf16 is compared on the same conventions by test_ops.py; the interpreter truncates it.
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=("float32", "float16"))
@pytest.mark.parametrize("row", FAMILIES)
def test_equals_transformers(row, dtype, device):
    family, shape, options = FAMILIES[row]
    function = transformers_function(family, NAMES.get(family, "apply_rotary_pos_emb"))

    def reference(q, k, cos, sin, *, style="half", rotary_dim=None, unsqueeze_dim=1):
        if options.get("table") == "interleaved":
            cos, sin = cos.repeat_interleave(2, -1), sin.repeat_interleave(2, -1)
        keywords = {} if family == "qwen2_vl" else {"unsqueeze_dim": unsqueeze_dim}
        return function(q, k, cos, sin, **keywords)

    op = dataclasses.replace(OP, reference=reference)
    result = compare(op, Case(row, shape, options), dtype, device)
    assert result.ok, str(result)


def test_complex_tables_of_llama4_are_read_through_their_strides(device):
    (q, k, cos, sin), _ = sample((2, 5, 4, 2, 24), device, table="half", unsqueeze_dim=2)
    frequencies = torch.complex(cos, sin)
    dyq, dyk = like(q, 1), like(k, 2)
    wanted, theirs = gradients(
        lambda q, k: transformers_function("llama4", "apply_rotary_emb")(q, k, frequencies),
        q, k, dyq, dyk,
    )  # fmt: skip
    got, ours = gradients(
        lambda q, k: rope(
            q, k, frequencies.real, frequencies.imag,
            style="pairs", rotary_dim=24, unsqueeze_dim=2,
        ),
        q, k, dyq, dyk,
    )  # fmt: skip
    for mine, other in zip((*got, *ours), (*wanted, *theirs), strict=True):
        assert error(mine, other) <= FLOOR[torch.float32]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("style", STYLES)
def test_case_25_the_tail_is_bit_identical(style, dtype, device):
    (q, k, cos, sin), options = sample((1, 5, 6, 2, 80), device, dtype, rotary_dim=20, style=style)
    dyq, dyk = like(q, 1), like(k, 2)
    outputs, grads = gradients(lambda q, k: rope(q, k, cos, sin, **options), q, k, dyq, dyk)
    for out, x in zip((*outputs, *grads), (q, k, dyq, dyk), strict=True):
        assert torch.equal(out[..., 20:], x[..., 20:])
        assert not torch.equal(out[..., :20], x[..., :20])


def test_case_26_is_called_as_transformers_is(device):
    function = transformers_function("llama")
    (q, k, cos, sin), _ = sample((2, 4, 3, 1, 16), device)
    for mine, other in zip(rope(q, k, cos, sin), function(q, k, cos, sin), strict=True):
        assert error(mine, other) <= FLOOR[torch.float32]
    arguments = {
        "q": q.transpose(1, 2), "k": k.transpose(1, 2), "cos": cos, "sin": sin, "unsqueeze_dim": 2
    }  # fmt: skip
    for mine, other in zip(rope(**arguments), function(**arguments), strict=True):
        assert error(mine, other) <= FLOOR[torch.float32]


def test_case_28_kernels_read_no_module_globals():
    if not backend.HAS_TRITON:
        pytest.skip("needs Triton")
    for kernel in (rope_kernel.rope_kernel, rope_kernel._turn_rows):
        loads = [i for i in dis.get_instructions(kernel.fn) if i.opname == "LOAD_GLOBAL"]
        assert loads
        for name in {load.argval for load in loads}:
            value = getattr(rope_kernel, name)
            assert value is backend.tl or hasattr(value, "fn"), name


@pytest.mark.skipif(backend.INTERPRETED, reason="the interpreter does not trace")
@pytest.mark.parametrize("has_k", [True, False])
def test_case_28_the_torch_code_compiles_whole(has_k, true_allocators):
    (q, k, cos, sin), options = sample((2, 3, 4, 2, 16), torch.device("cpu"), rotary_dim=12)
    leaves = (q, k) if has_k else (q,)

    def loss(q, k):
        return sum(y.square().sum() for y in rope(q, k, cos, sin, **options) if y is not None)

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    k = k if has_k else None
    wanted = torch.autograd.grad(loss(q, k), leaves)
    for mine, other in zip(torch.autograd.grad(compiled(q, k), leaves), wanted, strict=True):
        assert error(mine, other) <= FLOOR[torch.float32]


@pytest.mark.parametrize("layout", ["attention", "heads", "fused", "scattered"])
def test_results_and_gradients_keep_the_memory_order_of_q_and_k(layout, device):
    (q, k, cos, sin), _ = sample((2, 5, 4, 2, 16), device, layout=layout)
    turned = rope(q, k, cos, sin)
    # Row-major directions, so that the order cannot come from them.
    grads = torch.autograd.grad(turned, (q, k), (like(q, 1), like(k, 2)))
    for x, y, dx in zip((q, k), turned, grads, strict=True):
        packed = x.contiguous()
        if layout not in ("heads", "scattered"):
            packed = x.transpose(1, 2).contiguous().transpose(1, 2)
        assert y.stride() == dx.stride() == packed.stride()


def test_strided_inputs_are_not_copied(device, monkeypatch):
    (q, k, cos, sin), _ = sample((2, 5, 4, 2, 16), device, layout="fused")
    dyq, dyk = (like(x.transpose(1, 2), 1).transpose(1, 2) for x in (q, k))
    wanted = gradients(lambda q, k: rope(q, k, cos, sin), q, k, dyq, dyk)

    def refuse(self, *args, **kwargs):
        raise AssertionError("copied")

    monkeypatch.setattr(torch.Tensor, "contiguous", refuse)
    got = gradients(lambda q, k: rope(q, k, cos, sin), q, k, dyq, dyk)
    assert all(torch.equal(a, b) for a, b in zip(sum(got, []), sum(wanted, []), strict=True))


@pytest.mark.parametrize("style", STYLES)
def test_case_37_expanded_gradients(style, device):
    (q, k, cos, sin), _ = sample((2, 5, 4, 2, 16), device)

    def run(function, reduce):
        leaves = [x.detach().requires_grad_() for x in (q, k)]
        yq, yk = function(*leaves, cos, sin, style=style)
        reduce(yq, yk).backward()
        return [leaf.grad for leaf in leaves]

    # A plain sum gives stride 0 everywhere; heads summed first give it over the heads alone.
    weight = like(q[:, :1], 3)
    for reduce in (
        lambda yq, yk: yq.sum() + yk.sum(),
        lambda yq, yk: ((yq.sum(1, keepdim=True) + yk.sum(1, keepdim=True)) * weight).sum(),
    ):
        for mine, other in zip(run(rope, reduce), run(rope_ref, reduce), strict=True):
            assert error(mine, other) <= FLOOR[torch.float32]


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("shape", [(2, 0, 4, 2, 16), (0, 3, 4, 2, 16)])
def test_case_44_no_tokens(shape, style, device):
    (q, k, cos, sin), _ = sample(shape, device)
    yq, yk = rope(q, k, cos, sin, style=style)
    assert yq.shape == q.shape
    assert yk.shape == k.shape
    (yq.sum() + yk.sum()).backward()
    assert q.grad.shape == q.shape
    assert k.grad.shape == k.shape


def test_case_46_a_second_derivative_is_an_error(device):
    (q, k, cos, sin), _ = sample((1, 3, 2, 1, 8), device)
    yq, yk = rope(q, k, cos, sin)
    loss = yq.sum() + yk.sum()
    with pytest.raises(RuntimeError, match="rope is not differentiable twice"):
        torch.autograd.grad(loss, q, create_graph=True)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_case_91_checkpoint_under_autocast(use_reentrant, device):
    (q, _, cos, sin), _ = sample((2, 6, 3, 1, 8), device)
    hidden = like(q.transpose(1, 2).flatten(2), 1)
    weight = like(hidden[0, :1].expand(24, 24), 2).requires_grad_()

    def block(x):
        # bf16 out of the product, changed in place, turned by fp32 tables.
        y = (x @ weight).mul_(2.0).unflatten(-1, (3, 8)).transpose(1, 2)
        turned, _ = rope(y, None, cos, sin)
        return turned.transpose(1, 2).flatten(2)

    def run(function):
        x = hidden.clone().requires_grad_()
        weight.grad = None
        with torch.autocast(device.type, torch.bfloat16):
            y = function(x)
        y.backward(like(y, 3))
        return y.detach(), x.grad, weight.grad

    plain = run(block)
    again = run(lambda x: checkpoint(block, x, use_reentrant=use_reentrant))
    assert plain[0].dtype == torch.bfloat16
    assert all(map(torch.equal, plain, again))


@pytest.mark.parametrize("style", STYLES)
def test_the_backward_undoes_the_forward(style, device):
    (q, k, cos, sin), options = sample((2, 5, 3, 1, 24), device, style=style, rotary_dim=20)
    leaves = [x.detach().requires_grad_() for x in (q, k)]
    turned = rope(*leaves, cos, sin, **options)
    back = torch.autograd.grad(turned, leaves, [y.detach() for y in turned])
    for x, dx in zip((q, k), back, strict=True):
        assert error(dx, x) <= FLOOR[torch.float32]


@pytest.mark.parametrize("flags", [(True, False), (False, True), (False, False)])
def test_gradients_exist_exactly_where_asked(flags, device):
    (q, k, cos, sin), _ = sample((2, 3, 4, 2, 16), device)
    dyq, dyk = like(q, 1), like(k, 2)
    _, both = gradients(lambda q, k: rope(q, k, cos, sin), q, k, dyq, dyk)
    leaves = [x.detach().requires_grad_(flag) for x, flag in zip((q, k), flags, strict=True)]
    turned = rope(*leaves, cos, sin)
    assert all(y.requires_grad == any(flags) for y in turned)
    if any(flags):
        torch.autograd.backward(turned, (dyq, dyk))
    for leaf, flag, wanted in zip(leaves, flags, both, strict=True):
        assert torch.equal(leaf.grad, wanted) if flag else leaf.grad is None


def test_an_output_nobody_reads_gives_a_zero_gradient(device):
    (q, k, cos, sin), _ = sample((2, 3, 4, 2, 16), device)
    rope(q, k, cos, sin)[0].sum().backward()
    assert q.grad.any()
    assert not k.grad.any()


def test_inputs_and_grad_outputs_are_left_alone_and_a_second_backward_agrees(device):
    (q, k, cos, sin), _ = sample((2, 3, 4, 2, 16), device)
    dyq, dyk = like(q, 1), like(k, 2)
    before = [x.detach().clone() for x in (q, k, cos, sin, dyq, dyk)]
    turned = rope(q, k, cos, sin)
    first = torch.autograd.grad(turned, (q, k), (dyq, dyk), retain_graph=True)
    second = torch.autograd.grad(turned, (q, k), (dyq, dyk))
    assert all(map(torch.equal, first, second))
    assert all(map(torch.equal, before, (q, k, cos, sin, dyq, dyk)))


def test_q_and_k_of_two_dtypes(device):
    (q, k, cos, sin), _ = sample((2, 3, 4, 2, 16), device)
    dyq, dyk = like(q, 1), like(k, 2)
    wanted = gradients(lambda q, k: rope_ref(q, k, cos, sin), q, k, dyq, dyk)
    got = gradients(lambda q, k: rope(q, k, cos, sin), q.half(), k, dyq.half(), dyk)
    for mine, other, dtype in zip(
        sum(got, []), sum(wanted, []), (torch.float16, torch.float32) * 2, strict=True
    ):
        assert mine.dtype == dtype
        assert error(mine, other) <= 2 * FLOOR[dtype]


def test_cos_and_sin_of_two_layouts(device):
    (q, k, cos, sin), _ = sample((2, 5, 4, 2, 16), device, table="per-sample")
    wanted = rope(q, k, cos, sin)
    got = rope(q, k, cos, sin.transpose(0, 1).contiguous().transpose(0, 1))
    assert all(map(torch.equal, wanted, got))


def test_fp64_is_computed_in_fp64(device):
    (q, k, cos, sin), _ = sample((2, 5, 4, 2, 16), device, torch.float64)
    for mine, other in zip(rope(q, k, cos, sin), rope_ref(q, k, cos, sin), strict=True):
        assert error(mine, other) <= FLOOR[torch.float64]


def far(x: torch.Tensor, axis: int) -> torch.Tensor:
    """x in fp16, three entries of an axis apart; the memory between them is never touched."""
    # The stride fits 32 bits and twice the stride does not, which a product in int32 would wrap.
    stride = 2**30 + 16
    strides = list(x.movedim(axis, 0)[0].contiguous().stride())
    strides.insert(axis, stride)
    buffer = torch.frombuffer(mmap.mmap(-1, 2 * (2 * stride + x.numel())), dtype=torch.half)
    return buffer.as_strided(x.shape, strides).copy_(x.detach())


@pytest.mark.skipif(torch.cuda.is_available() and not backend.INTERPRETED, reason="host memory")
@pytest.mark.parametrize("axis", [0, 1, 2], ids=["batch", "heads", "tokens"])
def test_case_1_rows_are_addressed_in_64_bits(axis, device):
    (q, k, cos, sin), _ = sample((3, 3, 3, 3, 16), device)
    tensors = [far(x, axis) for x in (q, k, like(q, 1), like(k, 2))]
    got = gradients(lambda q, k: rope(q, k, cos, sin), *tensors)
    near = [x.clone(memory_format=torch.contiguous_format) for x in tensors]
    wanted = gradients(lambda q, k: rope(q, k, cos, sin), *near)
    assert all(map(torch.equal, sum(got, []), sum(wanted, [])))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"style": "thirds"}, "style must be one of half, pairs, pairs_to_half, got 'thirds'"),
        ({"rotary_dim": 33}, "rotary_dim must be even and from 2 to the head size 16, got 33"),
        ({"rotary_dim": 18}, "from 2 to the head size 16, got 18"),
        ({"rotary_dim": 0}, "from 2 to the head size 16, got 0"),
        ({"rotary_dim": 12}, "cos must be as wide as rotary_dim 12 or half of it, got 16"),
        ({"unsqueeze_dim": 3}, "unsqueeze_dim must be 1, 2, -3 or -2 for q of rank 4, got 3"),
        ({"unsqueeze_dim": 0}, "unsqueeze_dim must be .* got 0"),
        ({"unsqueeze_dim": 2}, r"k must be .* but for the heads at 2"),
        ({"cos": torch.zeros(1, 4, 16)}, r"cos must be \(5, W\), \(1, 5, W\) or \(2, 5, W\)"),
        ({"q": torch.zeros(16)}, r"q must be floating of rank 3 or 4, got torch.float32 \(16,\)"),
        ({"q": torch.zeros(2, 4, 5, 16).long()}, "q must be floating"),
        ({"k": torch.zeros(2, 2, 4, 16)}, r"k must be .* got torch.float32 \(2, 2, 4, 16\)"),
        ({"k": torch.zeros(2, 5, 16)}, "k must be"),
        ({"cos": torch.zeros(3, 5, 16)}, r"cos must be .* got \(3, 5, 16\)"),
        ({"cos": torch.zeros(1, 1, 5, 16)}, "cos must be"),
        ({"cos": torch.zeros(1, 5, 16).long()}, "cos must be floating, got torch.int64"),
        ({"sin": torch.zeros(2, 5, 16)}, r"sin must be as cos \(1, 5, 16\), got \(2, 5, 16\)"),
        ({"sin": torch.zeros(1, 5, 8)}, "sin must be as cos"),
        ({"cos": torch.zeros(1, 5, 16, requires_grad=True)}, "cos must not require grad"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    (q, k, cos, sin), _ = sample((2, 5, 4, 2, 16), torch.device("cpu"))
    arguments = {"q": q, "k": k, "cos": cos, "sin": sin, **change}
    with pytest.raises(ValueError, match=message):
        rope(**arguments)


def test_case_45_an_odd_width_is_an_error(device):
    q, cos = torch.zeros(1, 2, 3, 33), torch.zeros(1, 3, 33)
    with pytest.raises(
        ValueError, match=r"the width of cos\) must be even .* head size 33, got 33"
    ):
        rope(q, q, cos, cos)


@pytest.mark.whole_card
@pytest.mark.gpu
@pytest.mark.parametrize("unsqueeze_dim", [1, 2])
def test_case_1_more_than_2_31_elements(unsqueeze_dim, device):
    # 4.3 GB each for q, its result and both gradients.
    num_tokens, dtype = 524289, torch.bfloat16
    q_shape, k_shape = (1, num_tokens, 32, 128), (1, num_tokens, 1, 128)
    if unsqueeze_dim == 1:
        q_shape, k_shape = (1, 32, num_tokens, 128), (1, 1, num_tokens, 128)
    q, k, dyq, dyk = (
        torch.empty(shape, dtype=dtype, device=device).normal_()
        for shape in (q_shape, k_shape, q_shape, k_shape)
    )
    angles = torch.rand(1, num_tokens, 64, device=device) * 6.3
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    options = {"rotary_dim": 128, "unsqueeze_dim": unsqueeze_dim}
    q.requires_grad_()
    k.requires_grad_()
    turned = rope(q, k, cos, sin, **options)
    grads = torch.autograd.grad(turned, (q, k), (dyq, dyk))
    for start in (0, num_tokens - 8):
        few_q, few_k, *few_dys, few_yq, few_yk, few_dq, few_dk = (
            x.detach().narrow(3 - unsqueeze_dim, start, 8)
            for x in (q, k, dyq, dyk, *turned, *grads)
        )
        few_cos, few_sin = cos[:, start : start + 8], sin[:, start : start + 8]
        wanted, few_grads = gradients(
            lambda q, k, c=few_cos, s=few_sin: rope(q, k, c, s, **options), few_q, few_k, *few_dys
        )
        for mine, other in zip(
            (few_yq, few_yk, few_dq, few_dk), (*wanted, *few_grads), strict=True
        ):
            # Not bitwise: another specialisation may contract products and sums differently.
            assert error(mine, other) <= 2 * FLOOR[dtype]


@pytest.mark.gpu
@pytest.mark.parametrize("style", STYLES)
def test_case_28_inside_torch_compile(style, device, true_allocators):
    (q, k, cos, sin), options = sample(
        (2, 64, 8, 2, 64), device, torch.bfloat16, style=style, rotary_dim=32
    )
    dyq, dyk = like(q, 1), like(k, 2)
    wanted = gradients(lambda q, k: rope(q, k, cos, sin, **options), q, k, dyq, dyk)
    compiled = torch.compile(rope, fullgraph=False)
    got = gradients(lambda q, k: compiled(q, k, cos, sin, **options), q, k, dyq, dyk)
    for mine, other in zip(sum(got, []), sum(wanted, []), strict=True):
        assert error(mine, other) <= 2 * FLOOR[torch.bfloat16]


@pytest.mark.gpu
def test_case_30_compilations_do_not_follow_the_tokens(device):
    def num_compiled() -> int:
        return len(rope_kernel.rope_kernel.device_caches[torch.cuda.current_device()][0])

    def run(lengths):
        for num_tokens in lengths:
            (q, k, cos, sin), _ = sample((1, num_tokens, 4, 2, 64), device, torch.bfloat16)
            yq, yk = rope(q, k, cos, sin)
            torch.autograd.backward((yq, yk), (like(yq, 1), like(yk, 2)))

    # The first sixteen lengths meet both kinds of argument, multiples of 16 and others.
    run(range(100, 116))
    before = num_compiled()
    run(range(116, 141))
    assert before > 0
    assert num_compiled() == before


@pytest.mark.gpu
def test_a_graph_captures_forward_and_backward(device):
    (q, k, cos, sin), _ = sample((2, 64, 8, 2, 64), device, torch.bfloat16)
    dyq, dyk = like(q, 1), like(k, 2)

    def step():
        turned = rope(q, k, cos, sin)
        return *turned, *torch.autograd.grad(turned, (q, k), (dyq, dyk))

    # Kernels are compiled before the capture, on a stream of their own: leaves remember the stream
    # of their first gradient, and a capture cannot wait for the default one.
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        wanted = [x.clone() for x in step()]
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    torch.cuda.synchronize()
    assert all(map(torch.equal, captured, wanted))
