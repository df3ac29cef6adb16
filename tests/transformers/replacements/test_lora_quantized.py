"""LoRA on layers that bitsandbytes packs in 4 bits, and on a GPU in half precision."""

from __future__ import annotations

import copy

import pytest
import torch
import zoo
from test_lora import ATTENTION, MLP, OP, add_lora, coverage, errors, reasons, step
from torch import nn

from liger_kernels.transformers import apply_liger_kernel

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def to_4bit(model, quant_type, compute_dtype, device, *, double=True):
    """Pack the linear layers of the decoder's layers."""
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    for layer in model.model.layers:
        for name, linear in list(layer.named_modules()):
            if type(linear) is not nn.Linear:
                continue
            packed = bnb.nn.Linear4bit(
                linear.in_features,
                linear.out_features,
                bias=linear.bias is not None,
                compute_dtype=compute_dtype,
                compress_statistics=double,
                quant_type=quant_type,
            )
            packed.load_state_dict(linear.state_dict())
            packed.weight = bnb.nn.Params4bit(
                linear.weight.data.clone(),
                requires_grad=False,
                quant_type=quant_type,
                compress_statistics=double,
            )
            parent, _, child = name.rpartition(".")
            setattr(layer.get_submodule(parent), child, packed)
    model.is_loaded_in_4bit = model.is_quantized = True
    return model.to(device)


def wide(**options):
    """Wide enough for blocks of 64 numbers."""
    return zoo.build("llama", hidden_size=64, intermediate_size=128, head_dim=16, **options)


def to(inputs, device):
    return {name: value.to(device) for name, value in inputs.items()}


def mean(values):
    values = list(values)
    return sum(values) / len(values)


@pytest.mark.parametrize("cast", [None, BF16], ids=["plain", "autocast"])
@pytest.mark.parametrize("compute", [FP32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_packed_layers_train_as_stock_peft(quant_type, compute, cast, dropout, dora, device):
    if cast is not None and compute != cast:
        # Products of two dtypes: peft's own code.
        compute = cast
    torch.manual_seed(0)
    base = to_4bit(wide().to(compute), quant_type, compute, device)
    options = {"lora_dropout": dropout, "use_dora": dora}
    model = add_lora(base, target_modules=[*ATTENTION, *MLP], **options).to(device)
    inputs = to(zoo.text_inputs(), device)

    def run():
        # Masks on a GPU are drawn there.
        torch.cuda.manual_seed_all(11) if device.type == "cuda" else None
        return step(model, inputs, cast)

    stock = run()
    record = apply_liger_kernel(model, "all")
    assert coverage(record) == (14, 14)
    with record.count_calls():
        ours = run()
    assert not record.unused
    found = errors(ours, stock)
    if compute == FP32:
        assert max(found.values()) < 1e-4
    else:
        assert mean(found.values()) < 0.1
    record.undo()


def test_a_packed_model_is_no_worse_than_stock(device):
    base = to_4bit(wide().to(BF16), "nf4", BF16, device)
    model = add_lora(base, target_modules=[*ATTENTION, *MLP]).to(device)
    inputs = to(zoo.text_inputs(), device)
    truth_model = copy.deepcopy(model).float()
    for module in truth_model.modules():
        if hasattr(module, "compute_dtype"):
            module.compute_dtype = FP32
    truth = step(truth_model, inputs)
    usual = errors(step(model, inputs, BF16), truth)
    record = apply_liger_kernel(model, "all")
    assert not reasons(record)
    ours = errors(step(model, inputs, BF16), truth)
    assert mean(ours.values()) <= 2 * mean(usual.values()) + 4e-3


def test_layers_of_8_bits_run_stock_code(device):
    """Their products are of integers: no weight that is unpacked gives the same numbers."""
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    model = wide()
    for layer in model.model.layers:
        attention = layer.self_attn
        old = attention.q_proj
        attention.q_proj = bnb.nn.Linear8bitLt(
            old.in_features, old.out_features, bias=False, has_fp16_weights=False
        )
        attention.q_proj.weight = bnb.nn.Int8Params(
            old.weight.data.clone(), requires_grad=False, has_fp16_weights=False
        )
    model.is_loaded_in_8bit = model.is_quantized = True
    model = add_lora(model.to(device), target_modules=["q_proj", "v_proj"]).to(device)
    record = apply_liger_kernel(model, "all")
    assert coverage(record) == (2, 4)
    assert all("Linear8bitLt computes it" in reason for reason in reasons(record).values())
    assert OP in record.coverage


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("checkpoint", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_half_precision_on_a_gpu(dtype, checkpoint, dropout, dora, device):
    model = add_lora(
        zoo.build("llama", hidden_size=256, intermediate_size=512, head_dim=64).train(),
        r=16,
        lora_dropout=dropout,
        use_dora=dora,
    ).to(device)
    for parameter in model.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    if checkpoint:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    inputs = to(zoo.text_inputs(length=64), device)

    def run(one, cast):
        torch.cuda.manual_seed_all(11)
        model.zero_grad()
        with torch.autocast("cuda", dtype=dtype, enabled=cast):
            loss = one(**inputs).loss
        loss.backward()
        trained = {n: p for n, p in one.named_parameters() if p.grad is not None}
        return {"loss": loss.detach().double(), **{n: p.grad.double() for n, p in trained.items()}}

    usual = run(model, True)
    # In fp64 masks are drawn otherwise.
    truth = None if dropout else run(copy.deepcopy(model).double(), False)
    record = apply_liger_kernel(model, "all")
    assert coverage(record) == (14, 14)
    with record.count_calls():
        ours = run(model, True)
    assert not record.unused
    if truth is None:
        # The same masks as peft's: others would give other gradients altogether.
        assert mean(errors(ours, usual).values()) < 0.1
        return
    by_peft = errors(usual, truth)
    for name, value in errors(ours, truth).items():
        assert value <= 2 * by_peft[name] + (4e-3 if dtype == BF16 else 5e-4) * 4, name
