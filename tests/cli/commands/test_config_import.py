"""config import: files of axolotl and LLaMA-Factory train on the tokens they trained on there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

U, A, E = "<|im_start|>user\n", "<|im_start|>assistant\n", "<|im_end|>"
SPOKEN = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
WORDS = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n### Instruction:\ndo"
    "\n\n### Input:\nit\n\n### Response:\n"
)
ALPACA = {"instruction": "do", "input": "it", "output": "a"}
INFO = {
    "identity": {"file_name": "identity.json"},
    "talk": {
        "file_name": "talk.json",
        "formatting": "sharegpt",
        "columns": {"messages": "conversations", "system": "system"},
    },
    "oa": {
        "file_name": "oa.json",
        "formatting": "sharegpt",
        "columns": {"messages": "messages"},
        "tags": {
            "role_tag": "role",
            "content_tag": "content",
            "user_tag": "user",
            "assistant_tag": "assistant",
        },
    },
    "wiki": {"file_name": "wiki.json", "columns": {"prompt": "body"}},
    "pairs": {
        "file_name": "pairs.json",
        "ranking": True,
        "columns": {"prompt": "instruction", "chosen": "good", "rejected": "bad"},
    },
}
DATA = {
    "dialog.jsonl": [
        {
            "dialog": [
                {"who": "customer", "says": "q"},
                {"who": "agent", "says": "a"},
                {"who": "customer", "says": "p"},
                {"who": "agent", "says": "b"},
            ]
        }
    ],
    "alpaca.json": [ALPACA],
    "sharegpt.jsonl": [{"conversations": SPOKEN}],
    "qa.jsonl": [{"question": "q ", "reply": "a"}],
    "books.jsonl": [{"body": "once"}],
    "identity.json": [{**ALPACA, "system": "not named, so not used"}],
    "talk.json": [{"conversations": SPOKEN, "system": "s"}],
    "oa.json": [
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}] * 2}
    ],
    "wiki.json": [{"body": "text"}],
    "pairs.json": [{"instruction": "q", "good": "a", "bad": "b"}],
    "dataset_info.json": INFO,
}

# The files as those programs have them, the text that is trained by them in brackets, and the keys
# that are not translated.
FILES = {
    "axolotl-chat.yml": (
        """\
base_model: NousResearch/Llama-3.2-1B
model_type: AutoModelForCausalLM
strict: false
chat_template: tokenizer_default
datasets:
  - path: {folder}/dialog.jsonl
    type: chat_template
    field_messages: dialog
    message_property_mappings:
      role: who
      content: says
    roles:
      assistant: [agent, gpt]
      user: [customer]
    train_on_eos: turn
dataset_prepared_path: last_run_prepared
val_set_size: 0
output_dir: ./outputs/out
adapter: lora
lora_r: 16
lora_alpha: 32
lora_dropout: 0.05
lora_target_linear: true
sequence_len: 512
sample_packing: true
pad_to_sequence_len: true
gradient_accumulation_steps: 2
micro_batch_size: 2
num_epochs: 1
optimizer: adamw_bnb_8bit
lr_scheduler: cosine
learning_rate: 0.0002
bf16: auto
tf32: false
gradient_checkpointing: true
warmup_steps: 10
evals_per_epoch: 4
saves_per_epoch: 1
deepspeed: configs/zero2.json
weight_decay: 0.0
""",
        [f"{U}q{E}\n{A}[[a{E}]]\n{U}p{E}\n{A}[[b{E}]]\n"],
        ["evals_per_epoch", "saves_per_epoch", "deepspeed"],
    ),
    "axolotl-alpaca.yml": (
        """\
base_model: mistralai/Mistral-7B-v0.1
load_in_8bit: false
datasets:
  - path: {folder}/alpaca.json
    ds_type: json
    type: alpaca
val_set_size: 0.05
adapter: qlora
lora_r: 8
lora_alpha: 16
lora_target_modules: [q_proj, v_proj]
sequence_len: 256
micro_batch_size: 1
num_epochs: 2
optimizer: paged_adamw_32bit
learning_rate: 2e-4
train_on_inputs: false
group_by_length: true
flash_attention: true
""",
        [f"{WORDS}[[a{E}]]"],
        ["optimizer", "group_by_length"],
    ),
    "axolotl-many.yml": (
        """\
base_model: Qwen/Qwen2.5-0.5B
datasets:
  - path: {folder}/sharegpt.jsonl
    type: sharegpt
  - path: {folder}/qa.jsonl
    type:
      field_instruction: question
      field_output: reply
      format: "{{instruction}}"
  - path: {folder}/books.jsonl
    type: completion
    field: body
  - path: {folder}/identity.json
    type: pygmalion
sequence_len: 128
micro_batch_size: 4
max_steps: 5
optimizer: adamw_torch
learning_rate: 0.00001
special_tokens:
  bos_token: <s>
""",
        [f"{U}q{E}\n{A}[[a{E}]]\n", f"q [[a{E}]]", f"[[once{E}]]"],
        ["special_tokens.bos_token", "datasets[{folder}/identity.json].type"],
    ),
    "factory-lora.yaml": (
        """\
### model
model_name_or_path: meta-llama/Meta-Llama-3-8B-Instruct
trust_remote_code: true

### method
stage: sft
do_train: true
finetuning_type: lora
lora_rank: 8
lora_target: all

### dataset
dataset: identity,talk
dataset_dir: {folder}
template: llama3
cutoff_len: 2048
max_samples: 1000
overwrite_cache: true
preprocessing_num_workers: 1

### output
output_dir: saves/llama3-8b/lora/sft
logging_steps: 10
save_steps: 500
plot_loss: true
overwrite_output_dir: true

### train
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
learning_rate: 1.0e-4
num_train_epochs: 3.0
lr_scheduler_type: cosine
warmup_ratio: 0.1
bf16: true
ddp_timeout: 180000000
resume_from_checkpoint: null
rope_scaling: linear
""",
        [
            f"{U}do\nit{E}\n{A}[[a{E}]]\n",
            f"<|im_start|>system\ns{E}\n{U}q{E}\n{A}[[a{E}]]\n",
        ],
        ["rope_scaling"],
    ),
    "factory-full.yaml": (
        """\
model_name_or_path: Qwen/Qwen2.5-7B-Instruct
stage: sft
finetuning_type: full
deepspeed: examples/deepspeed/ds_z3_config.json
dataset: oa
dataset_dir: {folder}
template: qwen
mask_history: true
cutoff_len: 1024
pure_bf16: true
flash_attn: sdpa
val_size: 0.1
per_device_eval_batch_size: 1
eval_strategy: steps
eval_steps: 500
""",
        [f"{U}q{E}\n{A}a{E}\n{U}q{E}\n{A}[[a{E}]]\n"],
        ["deepspeed"],
    ),
    "factory-dpo.yaml": (
        """\
model_name_or_path: Qwen/Qwen2.5-0.5B
stage: dpo
finetuning_type: full
dataset: pairs
dataset_dir: {folder}
template: qwen
cutoff_len: 64
pref_beta: 0.2
pref_ftx: 0.5
dpo_label_smoothing: 0.1
pref_bco_weight: 0.3
""",
        [f"{U}q{E}\n{A}[[a{E}]]\n", f"{U}q{E}\n{A}[[b{E}]]\n"],
        ["pref_bco_weight"],
    ),
    "factory-reward.yaml": (
        """\
model_name_or_path: Qwen/Qwen2.5-0.5B
stage: rm
do_train: true
finetuning_type: lora
lora_rank: 8
lora_target: all
dataset: pairs
dataset_dir: {folder}
template: qwen
cutoff_len: 64
pref_beta: 0.2
mask_history: true
ppo_epochs: 4
""",
        [f"{U}q{E}\n{A}[[a{E}]]\n", f"{U}q{E}\n{A}[[b{E}]]\n"],
        ["ppo_epochs"],
    ),
    "factory-pretrain.yaml": (
        """\
model_name_or_path: Qwen/Qwen2.5-0.5B
stage: pt
finetuning_type: full
dataset: wiki
dataset_dir: {folder}
cutoff_len: 64
streaming: true
buffer_size: 100
max_steps: 10
use_badam: true
""",
        [f"[[text{E}]]"],
        ["use_badam"],
    ),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, rows in DATA.items():
        lines = "".join(json.dumps(row) + "\n" for row in rows) if name.endswith("l") else ""
        (tmp_path / name).write_text(lines or json.dumps(rows))
    return tmp_path


@pytest.mark.parametrize("name", FILES)
def test_trains_on_the_same_tokens(liger, folder, name):
    content, rows, lost = FILES[name]
    file, made = folder / name, folder / "train.yaml"
    file.write_text(content.format(folder=folder))
    done = liger("config", "import", file, "-o", made)
    assert done.code == 0, done.err
    named = [line.split(": ")[1] for line in done.err.splitlines() if line.startswith("not tr")]
    assert sorted(named) == sorted(key.format(folder=folder) for key in lost)
    for key in named:
        assert f"# not translated: {key}: " in made.read_text()
    # The same data, by a model that is here.
    words = ("-c", made, "--model", "qwen3", "--adapter", "none", "--no-load-in-4bit", "--json")
    resets = ("lora_r=16", "lora_alpha=32", "lora_dropout=0", "lora_target_modules=all-linear")
    sets = [word for text in resets for word in ("--set", text)]
    done = liger("data", "preview", *words, *sets)
    assert done.code == 0, done.err
    shown = [
        "".join(f"[[{p['text']}]]" if p["is_trained"] else p["text"] for p in row["pieces"])
        for row in done.json()["rows"]
    ]
    # The first token of a row, which is a letter here, is in no loss.
    assert shown == [f"{r[2]}[[{r[3:]}" if r.startswith("[[") else r for r in rows]


def test_values_of_a_run(liger, folder):
    file = folder / "axolotl.yml"
    more = "hub_model_id: org/tiny\n"
    file.write_text(FILES["axolotl-chat.yml"][0].format(folder=folder) + more)
    done = liger("config", "import", file)
    (folder / "c.yaml").write_text(done.out)
    values = liger("config", "show", "-c", folder / "c.yaml", "--json").json()["keys"]
    wanted = {"model": "NousResearch/Llama-3.2-1B", "adapter": "lora", "lora_r": 16}
    wanted |= {"max_length": 512, "packing": True, "per_device_train_batch_size": 2}
    wanted |= {"push_to_hub": True, "hub_model_id": "org/tiny"}
    wanted |= {"optim": "adamw_8bit", "lr_scheduler_type": "cosine", "learning_rate": 2e-4}
    assert {key: values[key]["value"] for key in wanted} == wanted
    file.write_text(FILES["factory-lora.yaml"][0].format(folder=folder))
    values = liger("config", "import", file, "-o", folder / "c.yaml", "--force")
    values = liger("config", "show", "-c", folder / "c.yaml", "--json").json()["keys"]
    # The scale that LLaMA-Factory takes where none is given is twice the rank.
    wanted = {"lora_r": 8, "lora_alpha": 16, "gradient_checkpointing": True, "bf16": True}
    assert {key: values[key]["value"] for key in wanted} == wanted


@pytest.mark.parametrize(
    ("loss", "keys"),
    [
        ("", {"objective": "dpo", "loss_type": "sigmoid,sft", "loss_weights": "1,0.5"}),
        ("hinge", {"objective": "dpo", "loss_type": "hinge,sft", "loss_weights": "1,0.5"}),
        ("ipo", {"objective": "ipo", "loss_type": None}),
        ("orpo", {"objective": "orpo", "loss_type": None}),
        ("simpo", {"objective": "simpo", "loss_type": None}),
    ],
)
def test_preferences_of_llama_factory(liger, folder, loss, keys):
    content = FILES["factory-dpo.yaml"][0].format(folder=folder) + f"pref_loss: {loss}\n"
    # Some losses take no smoothing, and other objectives no loss beside theirs.
    if loss:
        content = content.replace("dpo_label_smoothing: 0.1\n", "")
    if keys["loss_type"] is None:
        content = content.replace("pref_ftx: 0.5\n", "")
    (folder / "f.yaml").write_text(content)
    assert liger("config", "import", folder / "f.yaml", "-o", folder / "c.yaml").code == 0
    values = liger("config", "show", "-c", folder / "c.yaml", "--json").json()["keys"]
    wanted = {"beta": 0.2, "label_smoothing": 0.0 if loss else 0.1, **keys}
    assert {key: values[key]["value"] for key in wanted} == wanted


def test_kto_of_llama_factory(liger, folder):
    content = "stage: kto\nmodel_name_or_path: m\nfinetuning_type: full\ndataset: labelled\n"
    content += f"dataset_dir: {folder}\npref_beta: 0.2\npref_loss: sigmoid\npref_ftx: 0\n"
    (folder / "f.yaml").write_text(f"{content}kto_chosen_weight: 1.5\nkto_rejected_weight: 0.5\n")
    done = liger("config", "import", folder / "f.yaml", "-o", folder / "c.yaml")
    assert done.code == 0, done.err
    assert "not translated" not in done.err
    values = liger("config", "show", "-c", folder / "c.yaml", "--json").json()["keys"]
    wanted = {"objective": "kto", "beta": 0.2, "desirable_weight": 1.5, "undesirable_weight": 0.5}
    assert {key: values[key]["value"] for key in wanted} == wanted


def test_reward_models_of_llama_factory(liger, folder):
    file, made = folder / "f.yaml", folder / "c.yaml"
    file.write_text(FILES["factory-reward.yaml"][0].format(folder=folder))
    done = liger("config", "import", file, "-o", made)
    assert done.code == 0, done.err
    assert "whose head is called score" in done.err
    values = liger("config", "show", "-c", made, "--json").json()["keys"]
    wanted = {"objective": "reward", "adapter": "lora", "beta": 0.1, "train_on": None}
    assert {key: values[key]["value"] for key in wanted} == wanted


def test_likelihood_beside_kto_is_named(liger, folder):
    content = "stage: kto\nmodel_name_or_path: m\ndataset: a\npref_ftx: 0.5\n"
    (folder / "f.yaml").write_text(content)
    done = liger("config", "import", folder / "f.yaml")
    assert "not translated: pref_ftx: it is for dpo" in done.err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("base_model: m\nrl: dpo\n", "rl: dpo: preferences of axolotl are not translated"),
        ("stage: ppo\n", "stage: ppo: liger trains on text, on preferences and reward models"),
        ("base_model: m\nreward_model: true\n", "reward_model: reward models of axolotl are"),
        ("stage: dpo\npref_loss: kto_pair\n", "pref_loss: kto_pair: liger has sigmoid, ipo"),
        ("model: llama\nmax_length: 8\n", "is a configuration of liger already"),
        ("a: 1\n", "is of none of the programs that are read"),
        ("base_model: m\nbase_model: n\n", "f.yaml:2:1: 'base_model' is set twice"),
        (
            "base_model: m\ndatasets: [{path: a.json, type: oasst}]\n",
            "none of its datasets can be translated:\ndatasets[a.json].type: 'oasst' writes",
        ),
        ("base_model: [\n", "f.yaml:2:1: not valid YAML"),
    ],
)
def test_other_files_are_refused(liger, tmp_path, content, message):
    file = tmp_path / "f.yaml"
    file.write_text(content)
    done = liger("config", "import", file)
    assert done.code == 2
    assert message in done.err


def test_a_file_that_exists_is_kept(liger, folder):
    file = folder / "f.yaml"
    file.write_text("base_model: m\n")
    done = liger("config", "import", file, "-o", file)
    assert done.code == 2
    assert file.read_text() == "base_model: m\n"
