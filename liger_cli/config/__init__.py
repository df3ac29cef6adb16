"""The configuration of a run: one flat set of keys from defaults, a YAML file, --set and flags.

Keys are the names of Hugging Face's TrainingArguments, plus model, ops and dataset. Every key is
checked before anything else happens; one that does not exist is an error that names the nearest.
Importing this package costs pydantic and PyYAML; torch only where a list of ops is checked.
"""

from __future__ import annotations

from liger_cli.config.flags import adapter_flags, config_flags
from liger_cli.config.keys import ALIASES
from liger_cli.config.launch_flags import Launch, launch_flags
from liger_cli.config.resolve import ResolvedConfig, find_problems, load_config, resolve_config
from liger_cli.config.run_config import RunConfig

__all__ = [
    "ALIASES",
    "Launch",
    "ResolvedConfig",
    "RunConfig",
    "adapter_flags",
    "config_flags",
    "find_problems",
    "launch_flags",
    "load_config",
    "resolve_config",
]
