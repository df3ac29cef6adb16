"""The short flags of `liger estimate`, as the keys that they mean."""

from __future__ import annotations

import typer

from liger_cli.config import RunConfig
from liger_cli.errors import ConfigError

__all__ = ["as_sharded", "with_sizes"]


def with_sizes(
    config: RunConfig, context: typer.Context, batch_size: int | None, seq_len: int | None
) -> RunConfig:
    """Apply the short flags, which win over a file and --set.

    Raises:
        ConfigError: The flag of the key is given too.
    """
    sizes = {"per_device_train_batch_size": batch_size, "max_length": seq_len}
    given = {key: size for key, size in sizes.items() if size is not None}
    for key in (key for key in given if context.params.get(key) is not None):
        short = "--batch-size" if key.startswith("per") else "--seq-len"
        raise ConfigError(f"{short} and {key} are the same; give one of them")
    return config.model_copy(update=given)


def as_sharded(config: RunConfig, nproc: int | None, fsdp: int) -> RunConfig:
    """Return the configuration of --fsdp.

    Raises:
        ConfigError: Other flags say the same.
    """
    if nproc is not None or config.dp_shard_size is not None or config.dp_replicate_size != 1:
        raise ConfigError(
            f"--fsdp {fsdp} is short for --nproc {fsdp} --dp-shard-size -1, and one of these is "
            "given too",
            hint="Leave --fsdp out.",
        )
    return config.model_copy(update={"dp_shard_size": -1})
