"""Models and optimizers that ranks write and read, each rank a forked process."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import forked_runs
import torch
import torch.distributed as dist
import zoo

from liger_cli.config import RunConfig
from liger_cli.training.checkpoints import sharded_state
from liger_cli.training.optim.optimizers import make_optimizer
from liger_cli.training.parallel.checkpoint import read_shards, stage_sharded
from liger_cli.training.parallel.mesh import Layout, ParallelPlan
from liger_cli.training.parallel.wrapping import shard_model

# A family, whether head and embedding are one, and keys of the optimizer.
CASES = {
    "adamw": ("llama", False, {}),
    "sgd": ("llama", True, {"optim": "sgd", "optim_args": "momentum=0.9"}),
    "muon-master": ("llama", True, {"optim": "muon", "dtype": "bfloat16", "master_weights": True}),
    "adafactor": ("llama", False, {"optim": "adafactor"}),
    "moe": ("qwen3_moe", False, {}),
    "lora": ("llama", False, {"adapter": "lora"}),
    # Trained whole beside the adapter, under two names.
    "lora-head": ("llama", True, {"adapter": "lora", "lora_modules_to_save": "lm_head"}),
}


def build(name, plan=None):
    """Return the model of a case and its optimizer, after two steps; sharded where it has a plan.

    Every rank sees the same rows, so that gradients are those of one process.
    """
    family, is_tied, keys = CASES[name]
    config = RunConfig(model="x", dataset="x", learning_rate=1e-2, **keys)
    model = zoo.build(family, tie_word_embeddings=is_tied).train()
    model.to(getattr(torch, config.dtype if config.dtype != "auto" else "float32"))
    if "adapter" in keys:
        import peft

        whole = [keys["lora_modules_to_save"]] if "lora_modules_to_save" in keys else None
        settings = peft.LoraConfig(
            target_modules="all-linear", r=4, task_type="CAUSAL_LM", modules_to_save=whole
        )
        model = peft.get_peft_model(model, settings)
    if plan is not None:
        shard_model(model, Layout(config, plan, torch.device("cpu")))
    return model, make_optimizer(config, model)


def train(model, optimizer, steps=2):
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        ids = torch.randint(10, 90, (2, 13), generator=generator)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def state_of(model, optimizer):
    """Return all that a checkpoint is to keep, whole, by name."""
    saved = sharded_state.saved_tensors(model)
    names = sharded_state._names_of(saved, optimizer)
    tensors, rest = sharded_state._split_state(optimizer, names)
    found = {**{f"model.{name}": value.detach() for name, value in saved.items()}, **tensors}
    whole = {
        name: value.full_tensor() if hasattr(value, "full_tensor") else value.clone()
        for name, value in found.items()
    }
    return whole, [{**part, "copied": []} for part in rest]


def write(rank, plan, out):
    for name in CASES:
        model, optimizer = build(name, plan)
        train(model, optimizer)
        (out / name).mkdir(exist_ok=True)
        dist.barrier()
        stage_sharded(model, optimizer, lambda tree: tree, is_main=rank == 0)(out / name, None)
        state = state_of(model, optimizer)
        if rank == 0:
            torch.save(state, out / name / "wanted.pt")


def read(rank, plan, out):
    """Read each case into a model with other weights, and keep what it has then."""
    for name in CASES:
        model, optimizer = build(name, plan)
        read_shards(out / name, model, optimizer)
        state = state_of(model, optimizer)
        if rank == 0:
            torch.save(state, out / name / "found.pt")


def load_whole(rank, plan, out):
    """Load the state that one process has saved by torch alone."""
    for name in CASES:
        model, optimizer = build(name, plan)
        saved = torch.load(out / name / "whole.pt", weights_only=True)
        optimizer.load_state_dict(sharded_state.place_optimizer_state(optimizer, saved))
        state = state_of(model, optimizer)
        if rank == 0:
            torch.save(state, out / name / "found.pt")


def run_rank(do, sizes, rank, store, out):
    torch.set_num_threads(1)
    world = math.prod(sizes)
    store = dist.FileStore(str(store), world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    do(rank, ParallelPlan(*sizes), out)
    dist.destroy_process_group()


def run_ranks(do, sizes, out):
    """Call a function on the ranks of a plan: copies and shards of each."""
    store = Path(out) / "store"
    if store.exists():
        store.unlink()
    ranks = [
        forked_runs._FORKS.Process(target=run_rank, args=(do, sizes, rank, store, out))
        for rank in range(math.prod(sizes))
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(120)
        assert process.exitcode == 0


def copy_of(checkpoint, target):
    return Path(shutil.copytree(checkpoint, target))
