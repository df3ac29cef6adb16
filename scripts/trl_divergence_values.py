"""Write tests/ops/losses/trl_divergence.json: divergences and gradients by TRL's own function.

TRL is no dependency; its function is run as it is:

    python -m venv trl && trl/bin/pip install trl==1.16.0 transformers datasets
    trl/bin/python scripts/trl_divergence_values.py
"""

from __future__ import annotations

import json
import os
from pathlib import Path

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import torch
import trl
from trl.experimental.gkd import GKDTrainer

OUT = Path(__file__).parents[1] / "tests/ops/losses/trl_divergence.json"
SETTINGS = ((0.0, 1.0), (1.0, 1.0), (0.5, 1.0), (0.1, 0.7), (0.9, 2.0), (0.0, 2.0))
TOKENS, WIDTH, TEACHER_WIDTH, VOCABULARY = 3, 4, 3, 11


def main() -> None:
    """Write the file."""
    torch.manual_seed(0)
    shapes = (
        (TOKENS, WIDTH),
        (VOCABULARY, WIDTH),
        (TOKENS, TEACHER_WIDTH),
        (VOCABULARY, TEACHER_WIDTH),
    )
    tensors = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    hidden, weight = (x.requires_grad_() for x in tensors[:2])
    teacher = tensors[2] @ tensors[3].T
    cases = []
    for beta, temperature in SETTINGS:
        # A batch of one row, whose mean over the batch is the sum over its tokens.
        loss = GKDTrainer.generalized_jsd_loss(
            (hidden @ weight.T)[None], teacher[None], beta=beta, temperature=temperature
        )
        gradients = torch.autograd.grad(loss, (hidden, weight))
        cases.append(
            {
                "beta": beta,
                "temperature": temperature,
                "loss": loss.item(),
                "gradients": [gradient.flatten().tolist() for gradient in gradients],
            }
        )
    values = {"trl": trl.__version__, "tensors": [x.tolist() for x in tensors], "cases": cases}
    OUT.write_text(json.dumps(values) + "\n")


if __name__ == "__main__":
    main()
