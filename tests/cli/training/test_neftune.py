"""NEFTune: noise as transformers adds it, in training alone, and the same after a resume."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from liger_cli.training.embedding_noise import add_embedding_noise
from liger_cli.training.model.source import load_model, resolve_model

try:
    from transformers.trainer_utils import neftune_post_forward_hook as noise_of_transformers
except ImportError:
    from transformers.integrations.neftune import (
        neftune_post_forward_hook as noise_of_transformers,
    )


def embedded(hook: bool, ids: torch.Tensor, *, trains: bool) -> torch.Tensor:
    model = load_model(resolve_model("qwen3"))
    model.train(trains)
    table = model.get_input_embeddings()
    if hook:
        add_embedding_noise(model, 5.0)
    else:
        table.neftune_noise_alpha = 5.0
        table.register_forward_hook(noise_of_transformers)
    torch.manual_seed(3)
    return table(ids)


@pytest.mark.parametrize("shape", [(1, 1), (2, 7), (3, 64)])
def test_noise_is_that_of_transformers(shape):
    ids = torch.randint(264, shape, generator=torch.Generator().manual_seed(0))
    ours, theirs = (embedded(hook, ids, trains=True) for hook in (True, False))
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)
    plain = embedded(True, ids, trains=False)
    assert torch.equal(plain, embedded(False, ids, trains=False))
    noise = (ours - plain).abs()
    bound = 5.0 / math.sqrt(shape[1] * plain.shape[2])
    assert 0.5 * bound < noise.max() <= bound * (1 + 1e-5)


def test_gradient_passes_the_noise():
    model = load_model(resolve_model("qwen3")).train()
    add_embedding_noise(model, 5.0)
    table: nn.Embedding = model.get_input_embeddings()
    table(torch.tensor([[5, 6, 5]])).sum().backward()
    assert table.weight.grad[5].tolist() == [2.0] * table.embedding_dim
    assert table.weight.grad[6].tolist() == [1.0] * table.embedding_dim


def losses(run: Path) -> list[float]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def test_run_resumes_exactly_and_evaluates_without_noise(train, data, tmp_path):
    constant = ["--lr-scheduler-type", "constant", "--eval-dataset", data, "--max-steps", 3]
    noisy = [*constant, "--neftune-noise-alpha", 9]
    whole, broken, plain, still = (
        tmp_path / name for name in ("whole", "broken", "plain", "still")
    )
    done = train(*noisy, "--output-dir", whole)
    assert done.code == 0, done.err
    assert "neftune: noise of alpha 9 on the embeddings in training steps" in done.err
    assert train(*noisy, "--output-dir", broken, "--max-steps", 2).code == 0
    done = train(*noisy, "--output-dir", broken, "--resume", "auto")
    assert done.code == 0, done.err
    assert losses(broken) == losses(whole)
    other = train(*constant, "--output-dir", broken, "--resume", "auto", "--max-steps", 4)
    assert other.code == 2
    assert "neftune_noise_alpha is None, but" in other.err
    assert train(*constant, "--output-dir", plain).code == 0
    assert losses(plain) != losses(whole)
    # Without a learning rate the model stays what it is: what differs is the noise alone.
    done = train(*noisy, "--output-dir", still, "--learning-rate", 0, "--eval-on-start")
    assert done.code == 0, done.err
    first, last = (json.loads(x) for x in (still / "eval.jsonl").read_text().splitlines())
    assert first["eval_loss"] == last["eval_loss"]
