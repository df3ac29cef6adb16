"""A resumed run of another length: every learning rate is that of the new schedule at its step."""

from __future__ import annotations

import itertools

import pytest
import torch
from run_files import metrics
from torch import nn

from liger_cli.config import load_config
from liger_cli.config.conflicts import METRIC_SCHEDULES
from liger_cli.config.describe import choices
from liger_cli.training.optim.optimizers import Schedule, make_optimizer

# The arguments that a schedule cannot do without.
NEEDED = {
    "cosine_with_min_lr": "min_lr_rate=0.1",
    "cosine_warmup_with_min_lr": "min_lr_rate=0.1,warmup_lr_rate=0.1",
    "warmup_stable_decay": "num_decay_steps=2",
}
SCHEDULES = [name for name in choices("lr_scheduler_type") if name not in METRIC_SCHEDULES]
OPTIMIZERS = {
    "adamw_torch": {},
    "sgd": {},
    "muon": {},
    "master_weights": {"master_weights": True, "dtype": "bfloat16"},
}


def parts_of(config, num_steps):
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model = model.to(torch.bfloat16 if config.master_weights else torch.float32)
    optimizer = make_optimizer(config, model)
    return optimizer, Schedule(config, optimizer, num_steps)


def rates(optimizer, schedule, num_steps):
    """The learning rates that the optimizer has in so many steps, and the schedule reports."""
    found = []
    for _ in range(num_steps):
        used = {group["lr"] for group in optimizer.param_groups}
        assert used == {schedule.learning_rate}
        found.append(schedule.learning_rate)
        optimizer.step()
        schedule.step()
    return found


def config_of(name, warmup, optim="sgd"):
    more = OPTIMIZERS[optim]
    values = {"optim": optim if not more else "adamw_torch", "learning_rate": 0.5, **more}
    values |= {"lr_scheduler_type": name, "lr_scheduler_kwargs": NEEDED.get(name), **warmup}
    return load_config(flags={"model": "qwen3", **values})


@pytest.mark.parametrize("warmup", [{}, {"warmup_steps": 4}, {"warmup_ratio": 0.3}], ids=str)
@pytest.mark.parametrize("name", SCHEDULES)
def test_case_222_rates_after_a_resume(name, warmup):
    """Lengths longer, as long and shorter, after every step that both lengths have."""
    config = config_of(name, warmup)
    for old, new in itertools.product((7, 10), (7, 8, 15)):
        unbroken = rates(*parts_of(config, new), new)
        for done in range(1, min(old, new) + 1):
            optimizer, schedule = parts_of(config, old)
            rates(optimizer, schedule, done)
            saved = optimizer.state_dict(), schedule.state_dict()
            optimizer, schedule = parts_of(config, new)
            optimizer.load_state_dict(saved[0])
            schedule.load_state_dict(saved[1])
            assert rates(optimizer, schedule, new - done) == unbroken[done:]


@pytest.mark.parametrize("optim", OPTIMIZERS)
@pytest.mark.parametrize("name", ["linear", "polynomial"])
def test_case_222_rates_of_every_parameter_group(name, optim):
    config = config_of(name, {"warmup_steps": 2}, optim)
    unbroken = rates(*parts_of(config, 9), 9)
    optimizer, schedule = parts_of(config, 6)
    rates(optimizer, schedule, 6)
    longer, its_schedule = parts_of(config, 9)
    longer.load_state_dict(optimizer.state_dict())
    its_schedule.load_state_dict(schedule.state_dict())
    assert rates(longer, its_schedule, 3) == unbroken[6:]


@pytest.mark.parametrize(
    ("first", "then"),
    [
        (("--max-steps", 4), ("--max-steps", 7)),
        (("--max-steps", 4), ("--max-steps", -1, "--num-train-epochs", 2)),
        (
            ("--max-steps", -1, "--num-train-epochs", 1),
            ("--max-steps", -1, "--num-train-epochs", 1.5),
        ),
        (("--max-steps", 9, "--save-steps", 3), ("--max-steps", 5)),
    ],
    ids=["max_steps", "to epochs", "num_train_epochs", "shorter"],
)
def test_case_222_finished_run_is_lengthened(train, run_dir, tmp_path, first, then):
    words = ["--lr-scheduler-type", "cosine", "--warmup-ratio", 0.2, "--save-steps", 0]
    assert train(*words, *first).code == 0
    done = 3 if "--save-steps" in first else len(metrics(run_dir))
    done_at = run_dir / f"checkpoint-{done}"
    result = train(*words, *then, "--resume", done_at)
    assert result.code == 0, result.err
    assert train(*words, *then, "--output-dir", tmp_path / "unbroken").code == 0
    found, wanted = (
        metrics(path, "step", "learning_rate") for path in (run_dir, tmp_path / "unbroken")
    )
    assert len(found) == len(wanted) > done
    assert found[done:] == wanted[done:]
