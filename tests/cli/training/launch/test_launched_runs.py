"""`liger train --nproc 2`, whole: started, stopped, killed, and continued."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time

import psutil
import pytest
import torch
import yaml
from run_files import metrics, names

HOST = socket.gethostname()


@pytest.fixture
def start(data, run_dir):
    """Start `liger train` on the small data in a process, with more words."""
    started = []

    def launch(*words, command=("-m", "liger_cli"), cwd=None, environ=None):
        train = ["train", "-m", "qwen3", "-d", data, "-o", run_dir, "--use-cpu"]
        train += ["--max-length", 64, "--per-device-train-batch-size", 2]
        process = subprocess.Popen(
            [str(word) for word in (sys.executable, *command, *train, *words)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=cwd,
            env={**os.environ, "OMP_NUM_THREADS": "1", **(environ or {})},
        )
        started.append(process)
        return process

    yield launch
    for process in started:
        process.kill()


def wait_for_steps(process, run_dir, number=3):
    log = run_dir / "metrics.jsonl"
    deadline = time.monotonic() + 240
    while not (log.exists() and log.read_text().count("\n") >= number):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.1)


def errors(text):
    return [line for line in text.splitlines() if line.startswith("error: ")]


def ranks_of(process):
    """Return the processes of the ranks, rank 0 first."""
    found = psutil.Process(process.pid).children()
    return sorted(found, key=lambda child: int(child.environ()["RANK"]))


ENDLESS = ("--nproc", 2, "--max-steps", 100000, "--save-steps", 2, "--save-total-limit", 2)


def test_two_ranks_train_and_print_one_document(start, run_dir):
    process = start("--nproc", 2, "--max-steps", 3, "--json")
    out, err = process.communicate(timeout=280)
    assert process.returncode == 0, err
    assert json.loads(out)["train"]["steps"] == 3
    assert err.count("plan: 3 steps") == err.count("train 3/3") == 1
    # 23 rows, four in a step.
    assert err.count("6 an epoch") == 1
    assert len(list((run_dir / "checkpoint-3").glob("rng-*.pt"))) == 2
    assert "nproc" not in (run_dir / "config.yaml").read_text()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "sigterm"])
def test_a_signal_stops_all_after_the_same_step(start, run_dir, number):
    process = start(*ENDLESS)
    wait_for_steps(process, run_dir)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    [(last,)] = metrics(run_dir, "step")[-1:]
    assert process.returncode == 130
    assert names(run_dir)[-1] == f"checkpoint-{last}"
    [error] = errors(err)
    assert error.startswith(f"error: interrupted after step {last}; its checkpoint is ")


def test_sigterm_of_one_rank_stops_all(start, run_dir):
    process = start(*ENDLESS)
    wait_for_steps(process, run_dir)
    ranks_of(process)[1].terminate()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    [error] = errors(err)
    assert "interrupted after step" in error


def test_a_killed_rank_ends_all_and_the_run_continues(start, run_dir):
    process = start(*ENDLESS)
    wait_for_steps(process, run_dir)
    since = time.monotonic()
    ranks_of(process)[1].kill()
    _, err = process.communicate(timeout=60)
    assert time.monotonic() - since < 30
    assert process.returncode == 5
    [error] = errors(err)
    assert error.startswith(f"error: rank 1 on {HOST}: killed (signal 9)")
    newest = run_dir / names(run_dir)[-1]
    assert f"--resume {newest} continues" in err
    [(last,)] = metrics(run_dir, "step")[-1:]
    again = start("--nproc", 2, "--max-steps", last + 2, "--resume", newest)
    _, err = again.communicate(timeout=280)
    assert again.returncode == 0, err
    assert [step for (step,) in metrics(run_dir, "step")] == list(range(1, last + 3))


def test_a_rank_that_hangs_is_named(start, run_dir):
    process = start(*ENDLESS, "--ddp-timeout", 5)
    wait_for_steps(process, run_dir)
    since = time.monotonic()
    ranks_of(process)[1].suspend()
    _, err = process.communicate(timeout=90)
    assert time.monotonic() - since < 5 + 30
    assert process.returncode == 1
    [error] = errors(err)
    assert f"waited longer than ddp_timeout for rank 1 on {HOST}" in error


# The folder of each host, whether its rows are others, and the end.
HOSTS = {
    "shared": ((0, 0), False, 0, None),
    "elsewhere": ((0, 1), False, 3, "output_dir {tmp}/host1/run of rank 1 on {host} is not"),
    "other-data": ((0, 1), True, 4, "the data (training) is "),
}


@pytest.mark.parametrize("case", HOSTS)
def test_two_launchers_train_one_run(start, data, tmp_path, case):
    """Each with paths that are relative to its own folder."""
    folders, has_other_rows, code, message = HOSTS[case]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        endpoint = f"127.0.0.1:{free.getsockname()[1]}"
    run = tmp_path / "run" if has_other_rows else "run"
    hosts = []
    for node_rank, number in enumerate(folders):
        folder = tmp_path / f"host{number}"
        folder.mkdir(exist_ok=True)
        rows = data.read_text().splitlines(keepends=True)
        (folder / "rows.jsonl").write_text("".join(rows[number if has_other_rows else 0 :]))
        words = ("--nproc", 1, "--nnodes", 2, "--node-rank", node_rank, "--rdzv-endpoint", endpoint)
        words += ("--max-steps", 2, "--dataset", "rows.jsonl", "--output-dir", run)
        hosts.append(start(*words, cwd=folder))
    ends = [process.communicate(timeout=280) for process in hosts]
    assert [process.returncode for process in hosts] == [code, code], ends
    for _, err in ends:
        found = errors(err)
        assert len(found) == (message is not None)
        assert message is None or message.format(tmp=tmp_path, host=HOST) in found[0]
    if message is None:
        checkpoint = tmp_path / "host0" / "run" / "checkpoint-2"
        assert len(list(checkpoint.glob("rng-*.pt"))) == 2


def test_srun_starts_what_torchrun_does(start, run_dir):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    step = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "2", "MASTER_PORT": port}
    step |= {"SLURM_STEP_NODELIST": "localhost", "SLURM_NODEID": "0", "SLURM_JOB_ID": "7"}
    ranks = [
        start("--max-steps", 2, environ={**step, "SLURM_PROCID": rank, "SLURM_LOCALID": rank})
        for rank in ("0", "1")
    ]
    ends = [process.communicate(timeout=280) for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], ends
    assert len(list((run_dir / "checkpoint-2").glob("rng-*.pt"))) == 2
    assert "train 2/2" in ends[0][1]
    assert ends[1][0] == ""
    assert "train" not in ends[1][1]


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_killed_rank_on_a_gpu_ends_all(start, run_dir):
    process = start(*ENDLESS, "--no-use-cpu")
    wait_for_steps(process, run_dir)
    since = time.monotonic()
    ranks_of(process)[1].kill()
    _, err = process.communicate(timeout=60)
    assert time.monotonic() - since < 30
    assert process.returncode == 5
    [error] = errors(err)
    assert error.startswith(f"error: rank 1 on {HOST}: killed (signal 9)")


def test_an_error_of_rank_0_alone_is_said_once(start, run_dir):
    run_dir.mkdir()
    (run_dir / "note").write_text("mine")
    process = start("--nproc", 2, "--json")
    out, err = process.communicate(timeout=280)
    assert process.returncode == 2
    assert errors(err) == [f"error: output_dir {run_dir} exists and is not empty"]
    assert json.loads(out)["error"]["kind"] == "ConfigError"


def test_an_error_under_torchrun_is_said_once(start, run_dir):
    run_dir.mkdir()
    (run_dir / "note").write_text("mine")
    torchrun = ("-m", "torch.distributed.run", "--nproc-per-node", 2, "-m", "liger_cli")
    process = start(command=torchrun)
    _, err = process.communicate(timeout=280)
    assert process.returncode == 1
    [error] = errors(err)
    assert f"output_dir {run_dir} exists and is not empty" in error


FSDP_YAML = """
compute_environment: LOCAL_MACHINE
distributed_type: FSDP
mixed_precision: bf16
num_machines: 1
num_processes: 2
fsdp_config:
  fsdp_version: 2
  fsdp_reshard_after_forward: false
  fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP
  fsdp_state_dict_type: SHARDED_STATE_DICT
  fsdp_cpu_ram_efficient_loading: true
  fsdp_sync_module_states: true
"""


def test_accelerate_launch_with_fsdp_trains_shards(start, run_dir, tmp_path):
    """Its YAML as its own questionnaire writes it, with the keys of the run left alone."""
    (tmp_path / "fsdp.yaml").write_text(FSDP_YAML)
    launch = ("-m", "accelerate.commands.launch", "--config_file", tmp_path / "fsdp.yaml")
    words = ("--max-steps", 2, "--save-steps", 1, "--output-dir", run_dir)
    process = start(*words, command=(*launch, "-m", "liger_cli"))
    _, err = process.communicate(timeout=280)
    assert process.returncode == 0, err
    [line] = [line for line in err.splitlines() if line.startswith("launch: ")]
    assert "dp_shard_size -1, reshard_after_forward false, bf16 true" in line
    assert "without effect here: FSDP_AUTO_WRAP_POLICY" in line
    assert "parallel: FSDP2, sharded over 2 ranks, as the keys say" in err
    config = yaml.safe_load((run_dir / "config.yaml").read_text())
    assert (config["dp_shard_size"], config["reshard_after_forward"], config["bf16"]) == (
        *(-1, False, True),
    )
    assert {path.name for path in (run_dir / "checkpoint-1" / "dcp").glob("__*")} == {
        "__0_0.distcp",
        "__1_0.distcp",
    }
