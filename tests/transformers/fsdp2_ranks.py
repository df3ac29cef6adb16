"""Run by test_fsdp2.py, a process a rank: sharded and patched models against one stock process.

python fsdp2_ranks.py RANK STORE OUT    (a JSON list of cases on stdin; rank 0 writes OUT)
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
import zoo
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.fsdp._fully_shard import _fsdp_param_group
from torch.distributed.tensor import DTensor

from liger_kernels.transformers import apply_liger_kernel, token_logprobs
from liger_kernels.transformers.lazy_logits import loss as head_loss
from liger_kernels.transformers.lazy_logits.head import num_fused

WORLD = 2


def groups_of(name: str, model: Any) -> list[list[nn.Module]]:
    """Return the modules that are sharded together, before the model itself."""
    body, head = model.model, model.lm_head
    embed, norm, layers = body.embed_tokens, body.norm, list(body.layers)
    alone = [[layer] for layer in layers]
    return {
        "root": [],
        "layers": alone,
        "head": [*alone, [head]],
        "head-only": [[head]],
        "norm+head": [*alone, [norm, head]],
        "embed/head": [*alone, [embed], [head]],
        "embed/norm/head": [*alone, [embed], [norm], [head]],
        "embed/norm+head": [*alone, [embed], [norm, head]],
        "embed+head": [*alone, [embed, head]],
        "embed+norm+head": [*alone, [embed, norm, head]],
        "layer+norm+head": [*alone[:-1], [layers[-1], norm, head]],
        "body/head": [[body], [head]],
        "body+head": [[body, head]],
    }[name]


def batches(rank: int) -> list[dict[str, Tensor]]:
    """Return two micro-batches of a rank; their label counts differ."""
    found = []
    for part in range(2):
        generator = torch.Generator().manual_seed(10 * rank + part)
        ids = torch.randint(10, 90, (2, 13), generator=generator)
        labels = ids.clone()
        labels[0, : 4 + part + 3 * rank] = -100
        found.append({"input_ids": ids, "labels": labels})
    return found


def loss_of(model: Any, batch: dict[str, Tensor], kind: str) -> Tensor:
    """Return a loss that the model computes, its caller does, or token_logprobs, or of logits."""
    if kind == "logprobs":
        labels = batch["labels"]
        found = token_logprobs(model, {"input_ids": batch["input_ids"]}, labels)
        return -found.logprob.sum() / (labels[:, 1:] != -100).sum()
    out = model(**batch)
    if kind == "model":
        return out.loss
    labels = batch["labels"][:, 1:].flatten()
    logits = out.logits[:, :-1].flatten(0, 1).float()
    loss = F.cross_entropy(logits, labels)
    return loss if kind == "caller" else loss + logits.logsumexp(-1).square().mean()


@torch.no_grad()
def eval_loss(model: Any, batch: dict[str, Tensor], **options: Any) -> float:
    loss: float = model.eval()(**batch, **options).loss.item()
    return loss


def build(case: dict[str, Any]) -> Any:
    model = zoo.build(case["family"], tie_word_embeddings=case["tied"])
    if case["frozen"] == "body":
        model.requires_grad_(False)
        model.lm_head.requires_grad_(True)
    elif case["frozen"] == "head":
        model.lm_head.requires_grad_(False)
    if case["head"] == "scaled":
        # No plain linear layer: the loss is computed in chunks.
        model.lm_head.__class__ = type("Head", (nn.Linear,), {"forward": _other_forward})
    if case["checkpointing"]:
        model.gradient_checkpointing_enable({"use_reentrant": case["checkpointing"] == "reentrant"})
        if case["checkpointing"] == "reentrant":
            model.enable_input_require_grads()
    return model.train()


def _other_forward(self: Any, x: Tensor) -> Tensor:
    return F.linear(x, self.weight).mul(1.5)


def stock_run(case: dict[str, Any]) -> tuple[list[float], dict[str, Tensor]]:
    """Return rank 0's losses and the weights at the end of two steps of the stock model."""
    model = build(case)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    losses = []
    for _ in range(2):
        for rank in range(WORLD):
            for batch in batches(rank)[: case["accumulate"]]:
                loss = loss_of(model, batch, case["loss"]) / WORLD
                loss.backward()
                losses += [loss.item() * WORLD] if rank == 0 else []
        optimizer.step()
        optimizer.zero_grad()
    losses.append(eval_loss(model, batches(0)[0]))
    return losses, {name: p.detach() for name, p in model.named_parameters()}


def sharded_run(
    case: dict[str, Any], rank: int, gathers: list[list[set[int]]]
) -> tuple[list[float], dict[str, Tensor], Any]:
    """Return the same of this rank's part of the sharded and patched model, and the model.

    Each forward begins a list in gathers, which is that of its backward too.
    """
    model = build(case)
    if case["order"] == "patch-shard":
        apply_liger_kernel(model, case["ops"])
    for modules in groups_of(case["groups"], model):
        group: Any = modules if len(modules) > 1 else modules[0]
        fully_shard(group, reshard_after_forward=case["reshard"])
    fully_shard(model, reshard_after_forward=case["reshard"])
    if case["order"] == "shard-patch":
        # FSDP has changed the classes of other modules.
        apply_liger_kernel(model, "fused_linear_cross_entropy")
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    losses = []
    for _ in range(2):
        parts = batches(rank)[: case["accumulate"]]
        if case["abandons"]:
            # A forward without a backward must leave no weights of before the step.
            gathers.append([])
            loss_of(model, parts[0], case["loss"])
        for i, batch in enumerate(parts):
            if case["no_sync"]:
                model.set_requires_gradient_sync(i == len(parts) - 1)
            gathers.append([])
            loss = loss_of(model, batch, case["loss"])
            losses.append(loss.item())
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    gathers.append([])
    options = {} if case["ops"] == "none" else {"skip_logits": True}
    losses.append(eval_loss(model, batches(rank)[0], **options))
    # What does not reshard after the evaluation's forward is whole already.
    weights = {
        name: p.detach().full_tensor() if isinstance(p, DTensor) else p.detach().clone()
        for name, p in model.named_parameters()
    }
    return losses, weights, model


def run_case(case: dict[str, Any], rank: int) -> dict[str, Any] | None:
    gathers: list[list[set[int]]] = []
    original = _fsdp_param_group.foreach_all_gather

    def counted(params: Any, *args: Any) -> Any:
        found = [p._module_info for p in params]
        gathers[-1].append({id(m) for info in found for m in (info.module, *info.shared_modules)})
        return original(params, *args)

    _fsdp_param_group.foreach_all_gather = counted
    try:
        losses, weights, model = sharded_run(case, rank, gathers)
    except RuntimeError as error:
        if REFUSAL not in str(error):
            raise
        return {"refusal": str(error)}
    finally:
        _fsdp_param_group.foreach_all_gather = original
    if rank:
        return None
    key = json.dumps({name: case[name] for name in _STOCK})
    if key not in _stock_runs:
        _stock_runs[key] = stock_run(case), dict(build(case).named_parameters())
    (wanted, stock), initial = _stock_runs[key]
    return {
        "loss": max(abs(a - b) / abs(b) for a, b in zip(losses, wanted, strict=True)),
        "weights": max(_distance(weights, stock).values()),
        "moved": max(_distance(initial, stock).values()),
        "num_fused": num_fused(model.lm_head),
        "head_gathers": [sum(id(model.lm_head) in modules for modules in of) for of in gathers],
    }


# Of logits that are made after the weights of their head were sharded again.
REFUSAL = "the head's weights are sharded again"
# Fields of a case that change the stock run.
_STOCK = ("family", "tied", "frozen", "head", "checkpointing", "accumulate", "loss")
_stock_runs: dict[str, Any] = {}


def _distance(some: dict[str, Tensor], others: dict[str, Tensor]) -> dict[str, float]:
    return {name: float((some[name] - other).abs().max()) for name, other in others.items()}


def main() -> None:
    rank, store, out = int(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
    torch.set_num_threads(1)
    # Four tokens a chunk.
    head_loss.CHUNK_ELEMENTS = 4 * zoo.VOCAB_SIZE
    dist.init_process_group("gloo", store=dist.FileStore(store, WORLD), rank=rank, world_size=WORLD)
    found = {}
    for case in json.loads(sys.stdin.read()):
        print(case["name"], file=sys.stderr, flush=True)
        found[case["name"]] = run_case(case, rank)
        if rank == 0:
            out.write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
