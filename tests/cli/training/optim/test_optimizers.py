"""Optimizers and schedules: each trains, decays what it should, and goes on exactly."""

from __future__ import annotations

import json
import math
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from liger_cli.config import load_config
from liger_cli.config.describe import choices
from liger_cli.errors import EnvironmentProblem
from liger_cli.training.model.source import load_model, resolve_model
from liger_cli.training.optim.optimizers import (
    EIGHT_BIT,
    Schedule,
    check_optimization,
    make_optimizer,
)

CPU = torch.device("cpu")
ON_A_CPU = [name for name in choices("optim") if name not in EIGHT_BIT]
# What a schedule cannot do without.
NEEDED = {
    "cosine_with_min_lr": "min_lr_rate=0.1",
    "cosine_warmup_with_min_lr": "min_lr_rate=0.1,warmup_lr_rate=0.1",
    "warmup_stable_decay": "num_decay_steps=2",
}


def config(**flags):
    return load_config(flags={"model": "qwen3", **flags})


def metrics(run_dir: Path, *keys: str) -> list:
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [tuple(row[key] for key in keys) for row in rows]


@pytest.mark.parametrize("optim", ON_A_CPU)
def test_loss_falls(train, run_dir, optim):
    rate = 0.3 if optim == "sgd" else 3e-3
    words = ("--optim", optim, "--learning-rate", rate, "--lr-scheduler-type", "constant")
    done = train(*words, "--max-steps", 20, "--per-device-train-batch-size", 23, "--json")
    assert done.code == 0, done.err
    result = done.json()["train"]
    assert result["final_loss"] < 0.85 * result["first_loss"]


MASTER_WEIGHTS = ("--dtype", "bfloat16", "--master-weights")


@pytest.mark.parametrize(
    ("optim", "more"),
    [
        *((name, ()) for name in ON_A_CPU),
        ("sgd", ("--optim-args", "momentum=0.9,nesterov=true")),
        ("adamw", MASTER_WEIGHTS),
        ("muon", MASTER_WEIGHTS),
    ],
    ids=[*ON_A_CPU, "sgd-momentum", "adamw-master", "muon-master"],
)
def test_case_93_resume_is_exact_with_every_optimizer(train, run_dir, tmp_path, optim, more):
    words = ["--optim", optim, "--max-steps", 6, "--save-steps", 3, "--learning-rate", 1e-3]
    words += ["--weight-decay", 0.1, "--warmup-steps", 2, *more]
    done = train(*words)
    assert done.code == 0, done.err
    stopped = tmp_path / "stopped"
    shutil.copytree(run_dir, stopped)
    shutil.rmtree(stopped / "checkpoint-6")
    done = train(*words, "--output-dir", stopped, "--resume", "auto")
    assert done.code == 0, done.err
    keys = ("step", "loss", "grad_norm", "learning_rate")
    assert metrics(stopped, *keys) == metrics(run_dir, *keys)
    one, two = (load_file(path / "checkpoint-6/model.safetensors") for path in (run_dir, stopped))
    assert all(torch.equal(one[key], two[key]) for key in one)


@pytest.mark.parametrize("optim", ON_A_CPU)
def test_matrices_decay_and_vectors_do_not(optim):
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    optimizer = make_optimizer(config(optim=optim, weight_decay=0.5, learning_rate=0.1), model)
    decayed = {
        id(parameter): group["weight_decay"]
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    assert [decayed[id(p)] for p in model.parameters()] == [0.5, 0.0, 0.0, 0.0]
    for parameter in model.parameters():
        parameter.data.fill_(1.0)
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    matrix, bias, *_ = model.parameters()
    torch.testing.assert_close(matrix.detach(), torch.full((4, 4), 0.95))
    assert torch.equal(bias.detach(), torch.ones(4))


@pytest.mark.parametrize("optim", ["adamw", "muon"])
def test_biases_of_experts_are_no_matrices(optim):
    """A row for each expert makes two dimensions of them."""
    model = nn.Linear(4, 4)
    model.down_proj_bias = nn.Parameter(torch.zeros(3, 4))
    optimizer = make_optimizer(config(optim=optim, weight_decay=0.5), model)
    [group] = [g for g in optimizer.param_groups if any(p is model.bias for p in g["params"])]
    assert any(parameter is model.down_proj_bias for parameter in group["params"])
    assert group["weight_decay"] == 0.0


@pytest.mark.parametrize("optim", ["sgd", "adamw", "adafactor", "muon"])
def test_master_weights_keep_updates_that_bfloat16_loses(optim):
    """Steps of 1e-4 change no bfloat16 near 1; a hundred of them do, exactly as in float32."""

    # Its steps are orthogonal matrices: of 16 alike entries each is small.
    rate = 1e-3 if optim == "muon" else 1e-4

    def trained(kind: torch.dtype, **flags) -> torch.Tensor:
        model = nn.Linear(4, 4, bias=False).to(kind)
        nn.init.ones_(model.weight)
        optimizer = make_optimizer(config(optim=optim, learning_rate=rate, **flags), model)
        generator = torch.Generator().manual_seed(0)
        for _ in range(100):
            gradient = 1 + 0.3 * torch.randn(4, 4, generator=generator)
            model.weight.grad = gradient.bfloat16().to(kind)
            optimizer.step()
            optimizer.zero_grad()
            assert model.weight.grad is None
        return model.weight.detach()

    exact = trained(torch.float32)
    assert (exact - 1).abs().max() > 4e-3
    assert torch.equal(trained(torch.bfloat16), torch.ones(4, 4, dtype=torch.bfloat16))
    kept = trained(torch.bfloat16, dtype="bfloat16", master_weights=True)
    assert torch.equal(kept, exact.bfloat16())


def test_master_weights_train_a_model(train, run_dir):
    words = (*MASTER_WEIGHTS, "--learning-rate", 1e-3, "--lr-scheduler-type", "constant")
    done = train(*words, "--max-steps", 20, "--per-device-train-batch-size", 23, "--json")
    assert done.code == 0, done.err
    result = done.json()["train"]
    assert result["final_loss"] < 0.9 * result["first_loss"]
    weights = load_file(run_dir / "checkpoint-20" / "model.safetensors")
    assert {value.dtype for value in weights.values()} == {torch.bfloat16}


def test_muon_takes_hidden_matrices_and_adamw_the_rest():
    model = load_model(resolve_model("qwen3"), dtype=torch.float32)
    optimizer = make_optimizer(config(optim="muon"), model)
    muon, *rest = optimizer.param_groups
    assert "ns_steps" in muon
    assert all("betas" in group for group in rest)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    hidden = {names[id(parameter)] for parameter in muon["params"]}
    assert {name.split(".")[-2] for name in hidden} == {
        *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    }
    others = {names[id(parameter)] for group in rest for parameter in group["params"]}
    assert "model.embed_tokens.weight" in others
    assert hidden | others == set(names.values())
    # The learning rate of the schedule reaches both.
    Schedule(config(optim="muon", warmup_steps=2), optimizer, 4)
    assert {group["lr"] for group in optimizer.param_groups} == {0.0}


def test_muon_says_which_torch_it_needs(monkeypatch):
    monkeypatch.delattr(torch.optim, "Muon")
    with pytest.raises(EnvironmentProblem, match=r"needs torch 2\.9 or newer"):
        check_optimization(config(optim="muon"), CPU)


@pytest.mark.parametrize("name", EIGHT_BIT)
def test_8_bit_says_what_it_needs(train, monkeypatch, name):
    done = train("--optim", name)
    assert done.code == 3
    assert f"optim {name} needs a CUDA GPU, and this run is on cpu" in done.err
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(EnvironmentProblem, match="bitsandbytes") as caught:
        check_optimization(config(optim=name), torch.device("cuda"))
    assert caught.value.hint == "pip install 'liger-kernels[quant]'"


@pytest.mark.parametrize("name", EIGHT_BIT)
def test_8_bit_gets_groups_and_keys(monkeypatch, name):
    made = {}

    class Adam(torch.optim.SGD):
        def __init__(self, params, lr=1e-3, betas=(0.9, 0.99), eps=1e-8, min_8bit_size=4096):
            made.update(betas=betas, eps=eps, min_8bit_size=min_8bit_size)
            super().__init__(params, lr=lr)

    package = SimpleNamespace(optim=SimpleNamespace(**{EIGHT_BIT[name]: Adam}))
    monkeypatch.setitem(sys.modules, "bitsandbytes", package)
    wanted = config(optim=name, adam_beta2=0.95, optim_args="min_8bit_size=1")
    check_optimization(wanted, torch.device("cuda"))
    assert made == {"betas": (0.9, 0.95), "eps": 1e-8, "min_8bit_size": 1}


@pytest.mark.gpu
@pytest.mark.parametrize("name", EIGHT_BIT)
def test_8_bit_trains(train, name):
    pytest.importorskip("bitsandbytes")
    words = ("--optim", name, "--no-use-cpu", "--learning-rate", 3e-3, "--max-steps", 20)
    done = train(*words, "--json")
    assert done.code == 0, done.err
    assert done.json()["train"]["final_loss"] < done.json()["train"]["first_loss"]


def rates(name: str, num_steps: int = 8, **flags) -> list[float]:
    parameter = nn.Parameter(torch.ones(2, 2))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    flags = {"lr_scheduler_kwargs": NEEDED.get(name), "learning_rate": 1.0, **flags}
    schedule = Schedule(config(lr_scheduler_type=name, **flags), optimizer, num_steps)
    found = []
    for _ in range(num_steps):
        found.append(schedule.learning_rate)
        optimizer.step()
        schedule.step()
    return found


@pytest.mark.parametrize(
    "name", [n for n in choices("lr_scheduler_type") if n not in ("reduce_lr_on_plateau", "greedy")]
)
def test_schedules_warm_up_and_stay_below_the_top(name):
    found = rates(name, warmup_steps=3)
    assert found[0] < found[1] < found[2]
    assert 0.9 < max(found) <= 1.0
    is_flat = name.startswith("constant")
    assert (found[-1] == 1.0) == is_flat


def test_arguments_reach_the_schedule():
    found = rates("cosine_with_restarts", lr_scheduler_kwargs="num_cycles=2")
    assert found[4] == pytest.approx(1.0)
    assert found[5] == pytest.approx(0.5 * (1 + math.cos(math.pi / 4)))
    assert rates("polynomial", lr_scheduler_kwargs="lr_end=0.5")[-1] > 0.5


@pytest.mark.parametrize("name", ["reduce_lr_on_plateau", "greedy"])
def test_schedules_that_follow_the_evaluations(train, run_dir, tmp_path, name):
    """No loss is good enough, so every evaluation counts; a resumed run hears of the last one."""
    given = {
        "reduce_lr_on_plateau": "factor=0.5,patience=0,threshold=100",
        "greedy": "factor=0.5,patience=0,threshold=100,min_lr=0.0",
    }
    words = ("--lr-scheduler-type", name, "--lr-scheduler-kwargs", given[name], "--optim", "sgd")
    words += ("--learning-rate", 1e-3, "--eval-steps", 2, "--eval-fraction", 0.2)
    words += ("--max-steps", 8, "--save-steps", 4)
    done = train(*words)
    assert done.code == 0, done.err
    unbroken = metrics(run_dir, "learning_rate")
    assert unbroken[0] == unbroken[1] == (1e-3,)
    assert len({rate for (rate,) in unbroken}) > 1
    for is_evaluated in (True, False):
        stopped = tmp_path / f"stopped-{is_evaluated}"
        shutil.copytree(run_dir, stopped)
        shutil.rmtree(stopped / "checkpoint-8")
        (stopped / "report.json").unlink()
        lines = (run_dir / "eval.jsonl").read_text().splitlines(keepends=True)
        (stopped / "eval.jsonl").write_text("".join(lines[: 1 + is_evaluated]))
        done = train(*words, "--output-dir", stopped, "--resume", "auto")
        assert done.code == 0, done.err
        assert metrics(stopped, "learning_rate") == unbroken
        assert (stopped / "eval.jsonl").read_text() == (run_dir / "eval.jsonl").read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--optim", "adamm"), "optim should be 'adamw_torch', "),
        (("--optim", "sgd", "--optim-args", "momentun=0.9"), "takes no 'momentun'; allowed: damp"),
        (("--optim", "sgd", "--optim-args", "momentum=-1"), "Invalid momentum value"),
        (("--optim", "sgd", "--optim-args", "lr=1"), "takes no 'lr'"),
        (("--master-weights", "--bf16"), "master_weights is for bfloat16 parameters"),
        (("--master-weights", "--dtype", "float32"), "master_weights is for bfloat16 parameters"),
        (("--master-weights", "--adapter", "lora"), "those of an adapter are float32"),
        (("--optim-args", "fused"), "optim_args should be NAME=VALUE,NAME=VALUE, got 'fused'"),
        (("--optim", "sgd", "--adam-beta1", 0.5), "adam_beta1 is for AdamW and muon"),
        (("--lr-scheduler-type", "cosin"), "did you mean 'cosine'?"),
        (("--lr-scheduler-kwargs", "num_cycles=2"), "linear takes no 'num_cycles'; allowed: none"),
        (
            ("--lr-scheduler-type", "warmup_stable_decay"),
            "lr_scheduler_kwargs: warmup_stable_decay",
        ),
        (("--lr-scheduler-type", "greedy"), "needs eval_steps"),
        (
            ("--lr-scheduler-type", "greedy", "--eval-steps", 1, "--warmup-steps", 1),
            "has no warm-up",
        ),
    ],
)
def test_case_99_wrong_input(train, run_dir, words, message):
    done = train(*words)
    assert done.code == 2
    assert message in done.err
    assert not run_dir.exists()


def test_a_mapping_in_a_file_means_the_same(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("model: qwen3\noptim: sgd\noptim_args:\n  momentum: 0.9\n  nesterov: true\n")
    wanted = load_config(path)
    assert wanted == config(optim="sgd", optim_args="momentum=0.9,nesterov=true")
    assert wanted.optimizer_arguments == {"momentum": 0.9, "nesterov": True}
    path.write_text(wanted.to_yaml())
    assert load_config(path) == wanted
