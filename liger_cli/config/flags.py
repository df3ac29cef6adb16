"""One flag for every key, for the commands that run something."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

import typer

from liger_cli.common.text import printable
from liger_cli.config.command_flags import own_parameters, shows_parameters
from liger_cli.config.describe import choices, default_text, group, limits, value_type
from liger_cli.config.keys import ALIASES
from liger_cli.config.objectives import REFERENCE_KEYS
from liger_cli.config.resolve import ResolvedConfig, flag_name, load_config, resolve_config
from liger_cli.config.run_config import RunConfig

__all__ = ["adapter_flags", "config_flags"]

_Result = TypeVar("_Result")

# The headings of the keys of an adapter and of objectives.
_ADAPTER, _OBJECTIVE = "Adapter", "Objective"
_SHORT = {"model": "-m", "dataset": "-d", "output_dir": "-o"}


def config_flags(
    command: Callable[..., _Result],
    *,
    file_of: Callable[[dict[str, Any]], Path | None] = lambda arguments: None,
) -> Callable[..., _Result]:
    """Give a typer command -c, --set and a flag for every key; it receives `config`.

    Args:
        command: The function of the command.
        file_of: (arguments of the command) -> the file of keys where -c gives none, or None. Its
            output_dir does not count.

    The command is called with the resolved RunConfig; `config.model_fields_set` holds the keys
    the user set. One whose `config` is annotated as a ResolvedConfig gets that, with the source of
    every value. Its other parameters stay as they are.
    """
    keys = {name: _flag_parameter(name) for name in RunConfig.model_fields}
    switches = [name for name in keys if _is_switch(name) or _takes_switch(name)]
    wants_sources = get_type_hints(command)["config"] is ResolvedConfig
    own = own_parameters(command, "config")

    @functools.wraps(command)
    def with_config(
        *,
        config_file: Path | None,
        set_: list[str] | None,
        ignore_unknown_keys: bool,
        **arguments: Any,
    ) -> _Result:
        flags = {name: _value_of(name, arguments.pop(name)) for name in keys}
        flags |= {name: False for name in switches if arguments.pop(f"no_{name}")}
        load: Callable[..., Any] = resolve_config if wants_sources else load_config
        warn = _warn if ignore_unknown_keys else None
        drops: tuple[str, ...] = ()
        if config_file is None and (config_file := file_of(arguments)) is not None:
            drops = ("output_dir",)
        config = load(config_file, flags, set_ or (), warn_unknown=warn, drops=drops)
        return command(config=config, **arguments)

    parameters = [*_SOURCES, *own, *keys.values(), *map(_off_parameter, switches)]
    return shows_parameters(with_config, parameters)


def adapter_flags(
    command: Callable[..., _Result], *, trains: bool = False
) -> Callable[..., _Result]:
    """Give a typer command a flag for every key of an adapter, and for the sizes of a layout.

    It receives them as `adapter`, a RunConfig with the command's `model` and `ops`. Its other
    parameters stay as they are.

    Args:
        trains: Adds the keys of objectives, but those of a reference.
    """
    groups = {_ADAPTER, _OBJECTIVE} if trains else {_ADAPTER}
    names = [
        name
        for name in RunConfig.model_fields
        if group(name) in groups and name not in REFERENCE_KEYS
    ]
    names += ["dp_replicate_size", "dp_shard_size"]
    keys = {name: _flag_parameter(name) for name in names}
    switches = [name for name in keys if _is_switch(name)]
    own = own_parameters(command, "adapter")

    @functools.wraps(command)
    def with_adapter(**arguments: Any) -> _Result:
        flags = {name: arguments.pop(name) for name in keys}
        flags |= {name: False for name in switches if arguments.pop(f"no_{name}")}
        flags |= {name: arguments[name] for name in ("model", "ops")}
        return command(adapter=load_config(None, flags), **arguments)

    parameters = [*own, *keys.values(), *map(_off_parameter, switches)]
    return shows_parameters(with_adapter, parameters)


def _option(name: str, annotation: Any, option: Any) -> inspect.Parameter:
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, annotation=annotation, default=option
    )


_SOURCES = [
    _option(
        "config_file",
        Path | None,
        typer.Option(None, "--config", "-c", metavar="FILE", help="YAML file of keys."),
    ),
    _option(
        "set_",
        list[str] | None,
        typer.Option(
            None, "--set", metavar="KEY=VALUE", help="Set a key; may be repeated. Flags win."
        ),
    ),
    _option(
        "ignore_unknown_keys",
        bool,
        typer.Option(
            False,
            "--ignore-unknown-keys",
            help="Warn of keys that liger does not know instead of refusing the file.",
        ),
    ),
]


def _flag_parameter(name: str) -> inspect.Parameter:
    """Return the typer option of a key; the app folds snake_case spellings, so none is here."""
    # The choices stand in the help: as a metavar they would cut the names of other flags.
    kind, metavar = (str, "NAME") if choices(name) else (value_type(name), None)
    if _is_switch(name):
        kind, metavar = bool, None
    names = [flag_name(name), *(flag_name(alias) for alias, key in ALIASES.items() if key == name)]
    if name in _SHORT:
        names.append(_SHORT[name])
    option = typer.Option(
        None,
        *names,
        help=_help(name),
        metavar=metavar,
        rich_help_panel=group(name),
        show_default=False,
    )
    return _option(name, kind | None, option)


def _is_switch(name: str) -> bool:
    return value_type(name) is bool


def _takes_switch(name: str) -> bool:
    """Return whether a key with more values can be turned on and off like a switch."""
    return {"true", "false"} <= set(choices(name))


def _value_of(name: str, word: Any) -> Any:
    """Return the value of a flag's word: of a key that takes booleans and words, a boolean."""
    if isinstance(word, str) and True in get_args(value_type(name)):
        return {"true": True, "false": False}.get(word, word)
    return word


def _off_parameter(name: str) -> inspect.Parameter:
    """Return the flag that turns a switch off; another column would cut the names in the help."""
    option = typer.Option(False, f"--no-{flag_name(name)[2:]}", hidden=True)
    return _option(f"no_{name}", bool, option)


def _help(name: str) -> str:
    field = RunConfig.model_fields[name]
    notes = limits(name)
    if default_text(name) not in ("", "null", "false"):
        notes.insert(0, f"default {default_text(name)}")
    if choices(name):
        notes.append(f"one of {', '.join(choices(name))}")
    if _is_switch(name) or _takes_switch(name):
        notes.append(f"--no-{flag_name(name)[2:]} turns it off")
    return f"{field.description} ({'; '.join(notes)})" if notes else str(field.description)


def _warn(message: str) -> None:
    typer.secho(printable(f"warning: {message}; it is ignored"), err=True, fg=typer.colors.YELLOW)
