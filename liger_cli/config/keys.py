"""Every key of a run's configuration, with its type, default, limits and meaning.

Those of the model and of what it learns are in model_keys.py. A key added to either is a flag, a
line of docs/configuration.md (scripts/config_page.py writes it) and a part of the JSON schema;
nothing else needs to know of it.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Literal

from liger_cli.config.datasets import ColumnNames, Datasets, FieldNames, RoleNames
from liger_cli.config.eval_sets import EvalSets
from liger_cli.config.key_checks import TRACKERS
from liger_cli.config.model_keys import ModelKeys
from liger_cli.config.pairs import Pairs
from liger_cli.config.value_types import Names, Tiles, Tokens, key

__all__ = ["ALIASES", "Keys"]

ALIASES = {
    "model_name_or_path": "model",
    "dataset_name": "dataset",
    "teacher_model": "teacher_model_name_or_path",
}


_data = functools.partial(key, "Data")
_template = functools.partial(key, "Chat template")
_tokens = functools.partial(key, "Tokens")
_batch = functools.partial(key, "Batches")
_optimizer = functools.partial(key, "Optimizer and schedule")
_run = functools.partial(key, "Run directory")
_machine = functools.partial(key, "Precision and device")
_parallel = functools.partial(key, "Several ranks")


class Keys(ModelKeys):
    """The keys that train, eval and bench know; RunConfig is the class that others use."""

    dataset: Datasets = _data(
        "chitchat",
        "A file, folder, glob or hub name, chitchat or synthetic; several as NAME:WEIGHT,NAME. In "
        "a file also entries of path, weight, columns and more (docs/data.md).",
        min_length=1,
    )
    columns: ColumnNames | None = _data(
        None, "Our names of columns to those of the data: prompt=question,completion=answer."
    )
    roles: RoleNames | None = _data(
        None, "Our roles to those of the data: assistant=bot,assistant=gpt; user=customer."
    )
    message_fields: FieldNames | None = _data(
        None, "Our fields of a message to those of the data: role=from,content=value."
    )
    eval_dataset: EvalSets | None = _data(
        None,
        "Evaluation data, named as the dataset is; several sets as NAME=DATA,NAME=DATA. In a file "
        "also entries of name, path, columns and more (docs/evaluation.md).",
    )
    eval_fraction: float = _data(0.0, "Part of the dataset kept for evaluation.", ge=0, lt=1)
    max_eval_samples: int | None = _data(
        None,
        "Rows evaluated at most (of the sample's own split 32, of pairs and of kto 16; else all).",
        ge=1,
    )
    max_length: int = _data(1024, "Longest row in tokens; longer ones are cut.", ge=2)
    completion_only_loss: bool | None = _data(
        None, "Of prompt and completion train the completion only. null: as train_on, or yes."
    )
    assistant_only_loss: bool | None = _data(
        None, "Of a conversation train what the assistant says only. null: as train_on, or yes."
    )
    train_on: Literal["assistant", "last", "all"] | None = _data(
        None,
        "assistant: answers and completions, as null; last: of several answers the last alone; "
        "all: prompts and whole conversations.",
    )
    text_mode: Literal["document", "stream"] = _data(
        "document",
        "Rows of text: each cut to max_length; or all as one stream of rows of max_length.",
    )
    packing: bool = _data(False, "Fill rows of max_length with whole documents, kept apart.")
    packing_strategy: Literal["bfd", "sequential"] = _data(
        "bfd", "Best fit, the longest first; or in the order of the data."
    )
    streaming: bool = _data(False, "Read the data as the run goes; for more than memory holds.")
    shuffle_buffer_size: int = _data(10_000, "Rows shuffled at a time in streaming.", ge=1)
    dataset_num_proc: int = _data(1, "Processes that tokenise.", ge=1)
    dataloader_num_workers: int = _data(0, "Processes that collate batches.", ge=0)

    chat_template: str | None = _template(
        None,
        "Template of conversations: a Jinja file or a name; saved with the model.",
        min_length=1,
    )
    enable_thinking: bool | None = _template(
        None, "For the template, which decides what it means; null passes nothing."
    )
    reasoning: Literal["keep", "last", "drop"] | None = _template(
        None,
        "Thoughts of answers: all, those since the last question or none; null: as the template.",
    )

    add_tokens: Tokens | None = _tokens(
        None, "New tokens, as A,B: words that are one token each from now on."
    )
    add_special_tokens: Tokens | None = _tokens(
        None, "New special tokens, such as <|im_start|>: marks, left out of generated text."
    )
    eos_token: str | None = _tokens(None, "Token that ends a text.", min_length=1)
    pad_token: str | None = _tokens(None, "Token of padding.", min_length=1)
    resize_to_multiple_of: int | None = _tokens(
        None, "Fill the embeddings up to a multiple of as many rows, such as 64.", ge=1, le=65536
    )

    per_device_train_batch_size: int = _batch(8, "Rows of a forward pass on each device.", ge=1)
    per_device_eval_batch_size: int = _batch(8, "The same in evaluation.", ge=1)
    padding_free: Literal["auto", "true", "false"] = _batch(
        "auto", "Lay rows end to end instead of padding them; auto does where varlen serves."
    )
    gradient_accumulation_steps: int = _batch(1, "Forward passes of an optimizer step.", ge=1)
    num_train_epochs: float = _batch(3.0, "Passes over the dataset.", gt=0)
    max_steps: int = _batch(-1, "Optimizer steps, not 0; -1 leaves it to num_train_epochs.", ge=-1)
    auto_fit: bool = _batch(
        False, "Out of memory: halve the micro-batch, double the accumulation and go on."
    )

    optim: Literal[
        "adamw_torch",
        "adamw_torch_fused",
        "adamw_8bit",
        "paged_adamw_8bit",
        "adafactor",
        "sgd",
        "muon",
    ] = _optimizer("adamw_torch_fused", "Optimizer.")
    optim_args: Pairs | None = _optimizer(
        None, "More arguments of the optimizer, such as momentum=0.9,nesterov=true."
    )
    learning_rate: float = _optimizer(5e-5, "Highest learning rate.", ge=0)
    weight_decay: float = _optimizer(0.0, "Decay of matrices; vectors have none.", ge=0)
    adam_beta1: float = _optimizer(0.9, "Decay of the first moment.", ge=0, lt=1)
    adam_beta2: float = _optimizer(0.999, "Decay of the second moment.", ge=0, lt=1)
    adam_epsilon: float = _optimizer(1e-8, "Added to the root of the second moment.", gt=0)
    max_grad_norm: float = _optimizer(1.0, "Norm the gradient is clipped to; 0 is off.", ge=0)
    neftune_noise_alpha: float | None = _optimizer(
        None, "Size of noise on the embeddings in training steps (NEFTune), such as 5.", ge=0
    )
    lr_scheduler_type: Literal[
        "linear",
        "cosine",
        "constant",
        "constant_with_warmup",
        "cosine_with_restarts",
        "cosine_with_min_lr",
        "cosine_warmup_with_min_lr",
        "polynomial",
        "inverse_sqrt",
        "warmup_stable_decay",
        "reduce_lr_on_plateau",
        "greedy",
    ] = _optimizer("linear", "Learning rate after the warm-up.")
    lr_scheduler_kwargs: Pairs | None = _optimizer(
        None, "More arguments of the schedule, such as num_cycles=2."
    )
    warmup_steps: int = _optimizer(0, "Steps of warm-up.", ge=0)
    warmup_ratio: float = _optimizer(0.0, "Warm-up as a part of all steps.", ge=0, lt=1)

    output_dir: Path | None = _run(
        None, "Directory of the run (runs/MODEL-TIME when not given).", strict=False
    )
    logging_steps: int = _run(10, "Steps between printed lines; metrics.jsonl has all.", ge=1)
    eval_strategy: Literal["no", "steps", "epoch"] | None = _run(
        None, "Evaluate never, every eval_steps, or after each epoch; and in the end unless no."
    )
    eval_steps: int = _run(0, "Steps between evaluations; 0 evaluates at the end.", ge=0)
    eval_on_start: bool = _run(False, "Also evaluate before the first step.")
    save_steps: int = _run(500, "Steps between checkpoints; 0 saves at the end.", ge=0)
    save_minutes: float = _run(0.0, "Minutes between checkpoints, in addition to save_steps.", ge=0)
    save_total_limit: int | None = _run(
        None, "Checkpoints kept, the best among them; older ones are deleted.", ge=1
    )
    save_consolidated: Literal["final", "every", "none"] = _run(
        "final",
        "Checkpoints of a sharded run that also get the safetensors which other programs load.",
    )
    async_save: Literal["auto", True, False] = _run(
        "auto",
        "Train on while a checkpoint is written, from a copy on the host; auto: on several ranks.",
    )
    load_best_model_at_end: bool = _run(
        False, "Save whenever an evaluation is the best, which `best` in the directory links to."
    )
    metric_for_best_model: str | None = _run(
        None,
        "loss (the default), perplexity, token_accuracy, entropy; of pairs rewards/accuracies, "
        "rewards/margins and more; of classes accuracy, f1; of a named set NAME_loss.",
    )
    greater_is_better: bool | None = _run(
        None,
        "Whether the best metric is the largest; by default that of accuracies and margins is.",
    )
    early_stopping_patience: int | None = _run(
        None, "Evaluations in turn without a better metric that end the run.", ge=1
    )
    early_stopping_threshold: float = _run(0.0, "How much better counts as better.", ge=0)
    report_to: Names | None = _run(
        None, f"Trackers of the metrics: none, or some of {', '.join(TRACKERS)}."
    )
    push_to_hub: bool = _run(
        False, "Push the model to the Hugging Face hub when the run has ended."
    )
    hub_model_id: str | None = _run(
        None, "Repository of push_to_hub (the name of output_dir when not given)."
    )
    hub_private_repo: bool = _run(True, "Whether a repository that push_to_hub creates is private.")
    profile_steps: str | None = _run(
        None, "Steps to trace with torch.profiler, as 3 or 3-5, into profile-3-5.json."
    )
    seed: int = _run(42, "Seed of weights and dropout.", ge=0, lt=2**31)
    data_seed: int | None = _run(
        None, "Seed of the data's order (the seed when not given).", ge=0, lt=2**31
    )

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = _machine(
        "auto", "Parameters; auto is bfloat16 on a GPU that has it, else float32."
    )
    bf16: bool = _machine(False, "Autocast to bfloat16 over float32 parameters.")
    fp16: bool = _machine(False, "Autocast to float16, with loss scaling.")
    master_weights: bool = _machine(
        False, "Keep float32 copies of bfloat16 parameters in the optimizer, and update those."
    )
    gradient_checkpointing: bool = _machine(False, "Recompute activations to save memory.")
    activation_offloading: Literal["auto", True, False] = _machine(
        "auto",
        "With gradient_checkpointing: keep the inputs of layers in host memory until backward; "
        "auto: where a step does not fit without.",
    )
    tile_tokens: Tiles = _machine(
        "auto",
        "Run gated MLPs and experts over pieces of so many tokens, and keep their input alone; "
        "auto: where a step does not fit without; none: never.",
    )
    use_cpu: bool = _machine(False, "Stay on the CPU although there is a GPU.")

    ddp_timeout: int = _parallel(
        1800, "Seconds that a rank waits for the others before the run ends.", ge=1, le=10**8
    )
    dp_replicate_size: int = _parallel(1, "Copies of the model, each on other rows.", ge=1)
    dp_shard_size: int | None = _parallel(
        None,
        "Ranks that share a copy (FSDP2), -1 for the rest; null: as many as its memory asks for.",
        ge=-1,
    )
    reshard_after_forward: bool = _parallel(
        True, "Gather layers again in backward; false keeps them and all memory of the weights."
    )
    cpu_offload: bool = _parallel(False, "Keep shards and optimizer in the memory of the host.")
    reduce_dtype: Literal["auto", "float32", "bfloat16"] = _parallel(
        "auto", "Dtype in which gradients of shards are summed; auto: float32 for bf16."
    )

    @property
    def evaluates_during_training(self) -> bool:
        """Whether there are evaluations between the first step and the last."""
        return self.eval_steps > 0 or self.eval_strategy == "epoch"
