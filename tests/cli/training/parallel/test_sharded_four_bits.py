"""QLoRA on shards: a frozen model whose layers bitsandbytes packs in 4 bits, on two ranks."""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
from pathlib import Path

import pytest
import torch

from liger_kernels.ops.backend import INTERPRETED

pytestmark = pytest.mark.skipif(INTERPRETED, reason="runs without the interpreter")

_FORKS = multiprocessing.get_context("forkserver")


def adapted(directory):
    """A patched model of 4 bits with an adapter, and its record."""
    import peft
    from transformers import BitsAndBytesConfig, LlamaForCausalLM

    from liger_kernels.transformers import apply_liger_kernel

    packing = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    options = {"quantization_config": packing, "dtype": torch.bfloat16}
    model = LlamaForCausalLM.from_pretrained(directory, **options)
    torch.manual_seed(0)
    # Matrices that are not zero: the adapter computes something from the first step on.
    settings = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    model = peft.get_peft_model(model, settings)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return model.train(), apply_liger_kernel(model)


def gradients_of(model, record):
    """The loss of a batch, the gradients, and the modules that took no part."""
    ids = torch.arange(3, 43).view(2, 20)
    with torch.autocast("cpu", torch.bfloat16), record.count_calls():
        loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    whole = {n: g.full_tensor() if hasattr(g, "full_tensor") else g for n, g in grads.items()}
    model.zero_grad()
    return {"loss": loss.detach(), "gradients": whole, "unused": sorted(record.unused)}


def train(rank, port, directory):
    from liger_cli.config import RunConfig
    from liger_cli.training.parallel.mesh import Layout, ParallelPlan
    from liger_cli.training.parallel.wrapping import shard_model

    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115 (for as long as it lives)
    torch.set_num_threads(1)
    values = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": rank, "WORLD_SIZE": 2}
    os.environ.update({name: str(value) for name, value in values.items()})
    torch.distributed.init_process_group("gloo")
    found = {"alone": gradients_of(*adapted(directory))}
    model, record = adapted(directory)
    config = RunConfig(model="x", dp_shard_size=-1, adapter="lora", bf16=True)
    shard_model(model, Layout(config, ParallelPlan(dp_shard=2), torch.device("cpu")))
    packed = model.get_submodule("base_model.model.model.layers.0.mlp.up_proj.base_layer").weight
    found["share"] = packed.to_local().numel() / packed.numel()
    # The second step gathers into the same places.
    found["shared"] = [gradients_of(model, record) for _ in range(2)]
    if rank == 0:
        torch.save(found, directory / "found.pt")
    torch.distributed.destroy_process_group()


def test_shards_of_4_bits_have_the_gradients_of_one_process(tmp_path: Path):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"vocab_size": 99, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    LlamaForCausalLM(LlamaConfig(**shape, **heads)).save_pretrained(tmp_path)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = [_FORKS.Process(target=train, args=(rank, port, tmp_path)) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    assert [process.exitcode for process in ranks] == [0, 0]
    found = torch.load(tmp_path / "found.pt", weights_only=True)
    assert found["share"] == 0.5
    for shared in found["shared"]:
        assert shared["unused"] == found["alone"]["unused"] == []
        assert shared["loss"] == found["alone"]["loss"]
        assert len(shared["gradients"]) == 28
        for name, wanted in found["alone"]["gradients"].items():
            torch.testing.assert_close(shared["gradients"][name], wanted, rtol=1e-3, atol=1e-6)
