"""What `accelerate launch` asks for by variables is done, or refused with exit code 3."""

from __future__ import annotations

import fnmatch
import importlib.util
import json
import re
from pathlib import Path

import pytest

from liger_cli.commands.train import prepare
from liger_cli.config import RunConfig
from liger_cli.errors import EnvironmentProblem
from liger_cli.training.runtime.launch_translation import _FSDP, _WITHOUT_EFFECT
from liger_cli.training.runtime.launch_variables import (
    HARMLESS,
    HONOURED,
    REFUSED,
    TRANSLATED,
    config_of_launch,
)

# name: (a value, more words of the command line, words of the message)
LAUNCHES = {
    "deepspeed": ("ACCELERATE_USE_DEEPSPEED", "true", (), "DeepSpeed"),
    "megatron": ("ACCELERATE_USE_MEGATRON_LM", "true", (), "Megatron-LM"),
    "sagemaker": ("ACCELERATE_USE_SAGEMAKER", "1", (), "SageMaker"),
    "tpu-pod": ("ACCELERATE_IN_TPU_POD", "1", (), "a TPU pod"),
    "downcast": ("ACCELERATE_DOWNCAST_BF16", "true", (), "bf16 on a TPU"),
    "tp": ("PARALLELISM_CONFIG_TP_SIZE", "2", (), "what this version has nothing like"),
    "cp": ("PARALLELISM_CONFIG_CP_SIZE", "4", (), "what this version has nothing like"),
    "sp": ("PARALLELISM_CONFIG_SP_SIZE", "2", (), "what this version has nothing like"),
    "size": ("PARALLELISM_CONFIG_DP_SHARD_SIZE", "-2", (), "what this version has nothing like"),
    "fp16": ("ACCELERATE_MIXED_PRECISION", "fp16", ("--bf16",), "bf16 false, .* for true"),
    "fp8": ("ACCELERATE_MIXED_PRECISION", "fp8", (), "what this version has nothing like"),
    "dynamo": ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR", (), "torch.compile"),
    "accumulation": (
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS",
        "4",
        ("--gradient-accumulation-steps", "2"),
        "gradient_accumulation_steps 4, and the configuration for 2",
    ),
}


@pytest.mark.parametrize("command", ["train", "eval"])
@pytest.mark.parametrize("launch", LAUNCHES)
def test_case_242_a_launch_of_another_kind_is_refused(
    launch, command, train, liger, data, run_dir, monkeypatch
):
    name, value, words, asks = LAUNCHES[launch]
    monkeypatch.setenv(name, value)
    monkeypatch.setattr(prepare, "resolve_model", lambda *_: pytest.fail("a model was looked for"))
    if command == "train":
        done = train(*words)
    else:
        done = liger("eval", "--model", "qwen3", "--dataset", data, "--use-cpu", *words)
    assert done.code == 3
    said = " ".join(done.err.split())
    assert f"({name}={value})" in said
    said = said.replace(f" ({name}={value})", "")
    assert re.search(f"the launch asks for .*{asks}", said), said
    assert not run_dir.exists()


def test_every_refusal_has_a_launch():
    assert {name for name, *_ in LAUNCHES.values()} >= set(REFUSED)


def names_read(package):
    """Return the launch variables that a package's source names, whole or put together."""
    found = set()
    spec = importlib.util.find_spec(package)
    for path in Path(spec.origin).parent.rglob("*.py"):
        text = "" if "models" in path.parts else path.read_text()
        if "ACCELERATE_" not in text and "PARALLELISM_CONFIG_" not in text:
            continue
        names = r"(ACCELERATE_\w*[A-Z0-9]|PARALLELISM_CONFIG_\w+_SIZE)"
        found.update(re.findall(rf"[\"']{names}[\"']", text))
        for part in re.split(r"^class ", text, flags=re.MULTILINE):
            for prefix in re.findall(r"prefix = \"(ACCELERATE_\w+_)\"", part):
                found.update(prefix + end for end in re.findall(r"prefix \+ \"(\w+)\"", part))
    return found - {"ACCELERATE_MIN_VERSION"}


def test_case_242_every_variable_of_accelerate_is_in_one_table():
    found = names_read("accelerate") | names_read("transformers")
    assert len(found) > 30
    tables = [*REFUSED, *TRANSLATED, *HONOURED, *HARMLESS]
    for name in sorted(found):
        assert sum(fnmatch.fnmatch(name, pattern) for pattern in tables) == 1, name


def test_every_variable_of_fsdp_is_known():
    import accelerate.utils.launch as launch

    found = set(re.findall(r"\"(FSDP_\w+)\"", Path(launch.__file__).read_text()))
    assert len(found) > 10
    assert found <= {*_FSDP, *_WITHOUT_EFFECT}


# Variables of a launch on eight ranks of two hosts, and the keys that mean the same.
FSDP = {"ACCELERATE_USE_FSDP": "true"}
MESH = {"ACCELERATE_USE_PARALLELISM_CONFIG": "true"}
SHARD, KEEP = {"dp_shard_size": -1}, {"dp_shard_size": -1, "reshard_after_forward": False}
KEYS = [
    ({**FSDP}, SHARD),
    (
        {
            **FSDP,
            "FSDP_VERSION": "2",
            "FSDP_SHARDING_STRATEGY": "NO_SHARD",
            "FSDP_RESHARD_AFTER_FORWARD": "true",
            "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
            "FSDP_OFFLOAD_PARAMS": "false",
        },
        SHARD,
    ),
    ({**FSDP, "FSDP_VERSION": "2", "FSDP_RESHARD_AFTER_FORWARD": "false"}, KEEP),
    ({**FSDP, "FSDP_SHARDING_STRATEGY": "SHARD_GRAD_OP"}, KEEP),
    ({**FSDP, "FSDP_RESHARD_AFTER_FORWARD": "shard_grad_op"}, KEEP),
    ({**FSDP, "FSDP_SHARDING_STRATEGY": "3"}, {"dp_shard_size": 1, "dp_replicate_size": 8}),
    ({**FSDP, "FSDP_SHARDING_STRATEGY": "HYBRID_SHARD"}, {**SHARD, "dp_replicate_size": 2}),
    ({**FSDP, "FSDP_SHARDING_STRATEGY": "5"}, {**KEEP, "dp_replicate_size": 2}),
    (
        {
            **FSDP,
            "FSDP_OFFLOAD_PARAMS": "true",
            "FSDP_ACTIVATION_CHECKPOINTING": "true",
            "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
            "ACCELERATE_MIXED_PRECISION": "bf16",
            "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4",
        },
        {
            **SHARD,
            "cpu_offload": True,
            "gradient_checkpointing": True,
            "save_consolidated": "every",
            "bf16": True,
            "gradient_accumulation_steps": 4,
        },
    ),
    (
        {
            **MESH,
            "PARALLELISM_CONFIG_DP_REPLICATE_SIZE": "2",
            "PARALLELISM_CONFIG_DP_SHARD_SIZE": "4",
            "PARALLELISM_CONFIG_TP_SIZE": "1",
        },
        {"dp_replicate_size": 2, "dp_shard_size": 4},
    ),
    # A mesh says how many ranks share, FSDP how.
    (
        {
            **FSDP,
            **MESH,
            "FSDP_VERSION": "2",
            "FSDP_RESHARD_AFTER_FORWARD": "false",
            "PARALLELISM_CONFIG_DP_REPLICATE_SIZE": "4",
            "PARALLELISM_CONFIG_DP_SHARD_SIZE": "2",
        },
        {"reshard_after_forward": False, "dp_replicate_size": 4, "dp_shard_size": 2},
    ),
    ({"ACCELERATE_MIXED_PRECISION": "fp16"}, {"fp16": True}),
]
RANKS = {"WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"}


@pytest.mark.parametrize(("environ", "keys"), KEYS)
def test_case_242_a_launch_is_translated_into_keys(environ, keys):
    lines, had, environ = [], environ, {**RANKS, **environ}
    config = config_of_launch(RunConfig(model="qwen3"), lines.append, environ)
    assert config.model_dump() == RunConfig(model="qwen3", **keys).model_dump()
    # accelerate and transformers would shard the model as well.
    assert not [name for name in environ if name.startswith(("ACCELERATE_USE", "FSDP", "PARAL"))]
    [line] = lines
    assert all(f"{key} {str(value).lower()}" in line for key, value in keys.items())
    assert ("without effect here: FSDP_AUTO_WRAP_POLICY" in line) == (
        "FSDP_AUTO_WRAP_POLICY" in had
    )


@pytest.mark.parametrize(
    ("environ", "given", "said"),
    [
        (
            FSDP,
            {"dp_replicate_size": 8, "dp_shard_size": 1},
            "dp_replicate_size 1 (ACCELERATE_USE_FSDP=true), and the configuration for 8",
        ),
        (
            {**FSDP, "FSDP_SHARDING_STRATEGY": "SHARD_GRAD_OP"},
            {"reshard_after_forward": True},
            "reshard_after_forward false (FSDP_SHARDING_STRATEGY=SHARD_GRAD_OP), and the "
            "configuration for true",
        ),
        (
            {**FSDP, "FSDP_OFFLOAD_PARAMS": "true"},
            {"cpu_offload": False},
            "cpu_offload true (FSDP_OFFLOAD_PARAMS=true), and the configuration for false",
        ),
    ],
)
def test_case_242_keys_that_say_otherwise_are_refused(environ, given, said):
    with pytest.raises(EnvironmentProblem) as error:
        config_of_launch(RunConfig(model="qwen3", **given), print, {**RANKS, **environ})
    assert said in error.value.message


def test_sizes_in_other_words_agree():
    config = RunConfig(model="qwen3", dp_shard_size=8)
    assert config_of_launch(config, print, {**RANKS, **FSDP}).dp_shard_size == -1


DEEPSPEED = {"ACCELERATE_USE_DEEPSPEED": "true"}
KEEPS = "--dp-shard-size -1 --no-reshard-after-forward"
FLAGS = [
    ({"ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}, "--dp-shard-size -1"),
    ({"ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}, KEEPS),
    (
        {
            "ACCELERATE_DEEPSPEED_ZERO_STAGE": "1",
            "ACCELERATE_GRADIENT_CLIPPING": "0.5",
            "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4",
            "ACCELERATE_MIXED_PRECISION": "bf16",
        },
        "--max-grad-norm 0.5 --bf16 --gradient-accumulation-steps 4",
    ),
    (
        {
            "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu",
            "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "cpu",
        },
        "--dp-shard-size -1 --cpu-offload",
    ),
]


@pytest.mark.parametrize(("environ", "flags"), FLAGS)
def test_case_242_deepspeed_names_the_keys_that_mean_the_same(environ, flags):
    with pytest.raises(EnvironmentProblem) as error:
        config_of_launch(RunConfig(model="qwen3"), print, {**DEEPSPEED, **environ})
    line = f"The same by keys of the run, without that launch: liger train --nproc auto {flags}"
    assert error.value.hint == line.rstrip()


@pytest.mark.parametrize(
    ("environ", "unknown"),
    [
        ({**FSDP, "FSDP_IGNORED_MODULES": "head"}, "FSDP_IGNORED_MODULES=head"),
        ({**FSDP, "FSDP_SHARDING_STRATEGY": "HALF"}, "FSDP_SHARDING_STRATEGY=HALF"),
        ({**FSDP, "FSDP_NEW": "1"}, "FSDP_NEW=1"),
        ({**FSDP, "ACCELERATE_MIXED_PRECISION": "fp8"}, "ACCELERATE_MIXED_PRECISION=fp8"),
        (
            {**DEEPSPEED, "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "nvme"},
            "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE=nvme",
        ),
    ],
)
def test_case_242_what_has_no_counterpart_is_named(environ, unknown):
    with pytest.raises(EnvironmentProblem) as error:
        config_of_launch(RunConfig(model="qwen3"), print, environ)
    assert "nothing like" in f"{error.value.message} {error.value.hint}"
    assert unknown in f"{error.value.message} {error.value.hint}"


# What `accelerate launch` writes where it is asked for nothing, and values that agree.
@pytest.mark.parametrize(
    ("environ", "options"),
    [
        (
            {
                "ACCELERATE_USE_CPU": "False",
                "ACCELERATE_MIXED_PRECISION": "no",
                "ACCELERATE_DYNAMO_BACKEND": "NO",
                "ACCELERATE_DYNAMO_MODE": "default",
                "ACCELERATE_DYNAMO_USE_FULLGRAPH": "False",
            },
            {"bf16": True},
        ),
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, {"bf16": True}),
        ({"ACCELERATE_MIXED_PRECISION": "fp16"}, {"fp16": True}),
        (
            {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"},
            {"gradient_accumulation_steps": 4},
        ),
        (dict.fromkeys((*REFUSED, *FSDP, *MESH), "false"), {}),
        ({"PARALLELISM_CONFIG_TP_SIZE": "1"}, {}),
    ],
)
def test_a_launch_that_agrees_changes_nothing(environ, options):
    config = RunConfig(model="qwen3", **options)
    assert config_of_launch(config, pytest.fail, environ) is config


def test_a_launch_on_the_cpu_is_a_run_on_the_cpu():
    config = RunConfig(model="qwen3")
    assert not config.use_cpu
    assert config_of_launch(config, print, {"ACCELERATE_USE_CPU": "True"}).use_cpu


def test_accumulation_that_agrees_trains_the_same(train, run_dir, monkeypatch):
    words = ("--gradient-accumulation-steps", 2, "--max-steps", 2, "--json")
    alone = train(*words)
    assert alone.code == 0, alone.err
    run_dir.rename(run_dir.with_name("alone"))
    # accelerate would divide each micro-batch's loss by it.
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "2")
    launched = train(*words)
    assert launched.code == 0, launched.err
    for field in ("loss", "grad_norm"):
        rows = [
            [json.loads(line)[field] for line in (directory / "metrics.jsonl").open()]
            for directory in (run_dir.with_name("alone"), run_dir)
        ]
        assert rows[0] == rows[1]
