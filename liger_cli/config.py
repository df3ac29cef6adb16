"""The configuration of a run: one flat set of keys from defaults, a YAML file, --set and flags.

Keys are the names of Hugging Face's TrainingArguments, plus model, ops and dataset. Every key is
checked before anything else happens; one that does not exist is an error that names the nearest.
Importing this module costs pydantic and PyYAML, never torch.
"""

from __future__ import annotations

import difflib
import functools
import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import typer
import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from liger_cli.errors import ConfigError

__all__ = ["ALIASES", "RunConfig", "config_flags", "load_config"]

ALIASES = {"model_name_or_path": "model", "dataset_name": "dataset"}

_Result = TypeVar("_Result")


def _join_names(value: object) -> object:
    """A YAML list of op names means the same as the comma-separated string."""
    if isinstance(value, list) and all(isinstance(name, str) for name in value):
        return ",".join(value)
    return value


def _key(group: str, default: Any, description: str, **limits: Any) -> Any:
    return Field(default, description=description, json_schema_extra={"group": group}, **limits)


_model = functools.partial(_key, "Model and kernels")
_data = functools.partial(_key, "Data")
_batch = functools.partial(_key, "Batches")
_optimizer = functools.partial(_key, "Optimizer and schedule")
_run = functools.partial(_key, "Run directory")
_machine = functools.partial(_key, "Precision and device")


class RunConfig(BaseModel):
    """Every key that train, eval and bench know, with its type, default and limits."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    model: str = _model(..., "Preset, directory, config.json or hub id.", min_length=1)
    ops: Annotated[str, BeforeValidator(_join_names)] = _model(
        "auto", "auto, all, none, a list such as rope,rmsnorm,flce, or auto,-rope."
    )
    attn_implementation: str | None = _model(None, "Attention of transformers: eager, sdpa, ...")

    dataset: str = _data("chitchat", "A .jsonl or .json file, chitchat or synthetic.", min_length=1)
    eval_dataset: str | None = _data(None, "Evaluation data, named as the dataset is.")
    eval_fraction: float = _data(0.0, "Part of the dataset kept for evaluation.", ge=0, lt=1)
    max_eval_samples: int | None = _data(
        None, "Rows evaluated at most (32 of the sample's own split, else all).", ge=1
    )
    max_length: int = _data(1024, "Longest row in tokens; longer ones are cut.", ge=2)
    dataloader_num_workers: int = _data(0, "Processes that collate batches.", ge=0)

    per_device_train_batch_size: int = _batch(8, "Rows of a forward pass on each device.", ge=1)
    per_device_eval_batch_size: int = _batch(8, "The same in evaluation.", ge=1)
    gradient_accumulation_steps: int = _batch(1, "Forward passes of an optimizer step.", ge=1)
    num_train_epochs: float = _batch(3.0, "Passes over the dataset.", gt=0)
    max_steps: int = _batch(-1, "Optimizer steps; -1 leaves it to num_train_epochs.", ge=-1)

    optim: Literal["adamw"] = _optimizer("adamw", "Optimizer.")
    learning_rate: float = _optimizer(5e-5, "Highest learning rate.", ge=0)
    weight_decay: float = _optimizer(0.0, "Decay of matrices; vectors have none.", ge=0)
    adam_beta1: float = _optimizer(0.9, "Decay of the first moment.", ge=0, lt=1)
    adam_beta2: float = _optimizer(0.999, "Decay of the second moment.", ge=0, lt=1)
    adam_epsilon: float = _optimizer(1e-8, "Added to the root of the second moment.", gt=0)
    max_grad_norm: float = _optimizer(1.0, "Norm the gradient is clipped to; 0 is off.", ge=0)
    lr_scheduler_type: Literal["linear", "cosine", "constant"] = _optimizer(
        "linear", "Learning rate after the warm-up."
    )
    warmup_steps: int = _optimizer(0, "Steps of warm-up.", ge=0)
    warmup_ratio: float = _optimizer(0.0, "Warm-up as a part of all steps.", ge=0, lt=1)

    output_dir: Path | None = _run(
        None, "Directory of the run (runs/MODEL-TIME when not given).", strict=False
    )
    logging_steps: int = _run(10, "Steps between printed lines; metrics.jsonl has all.", ge=1)
    eval_steps: int = _run(0, "Steps between evaluations; 0 evaluates at the end.", ge=0)
    save_steps: int = _run(500, "Steps between checkpoints; 0 saves at the end.", ge=0)
    save_total_limit: int | None = _run(None, "Checkpoints kept; older ones are deleted.", ge=1)
    seed: int = _run(42, "Seed of weights and dropout.", ge=0, lt=2**31)
    data_seed: int | None = _run(
        None, "Seed of the data's order (the seed when not given).", ge=0, lt=2**31
    )

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = _machine(
        "auto", "Parameters; auto is bfloat16 on a GPU that has it, else float32."
    )
    bf16: bool = _machine(False, "Autocast to bfloat16 over float32 parameters.")
    fp16: bool = _machine(False, "Autocast to float16, with loss scaling.")
    gradient_checkpointing: bool = _machine(False, "Recompute activations to save memory.")
    use_cpu: bool = _machine(False, "Stay on the CPU although there is a GPU.")

    @field_validator("max_steps")
    @classmethod
    def _some_steps(cls, value: int) -> int:
        if value == 0:
            raise ValueError("should be -1 or at least 1")
        return value

    @model_validator(mode="after")
    def _no_conflicts(self) -> RunConfig:
        if self.bf16 and self.fp16:
            raise ValueError("bf16 and fp16 exclude each other")
        if self.fp16 and self.dtype == "float16":
            raise ValueError("fp16 needs float32 or bfloat16 parameters, dtype is float16")
        if self.warmup_steps and self.warmup_ratio:
            raise ValueError("warmup_steps and warmup_ratio exclude each other; set one to 0")
        if self.eval_dataset is not None and self.eval_fraction:
            raise ValueError("eval_dataset and eval_fraction exclude each other")
        return self

    @property
    def order_seed(self) -> int:
        """The seed of the data's order."""
        return self.seed if self.data_seed is None else self.data_seed

    def to_yaml(self) -> str:
        """Returns the YAML that load_config reads back to an equal configuration."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


class _Loader(yaml.SafeLoader):
    """YAML 1.1, but 1e-4 is a number: PyYAML wants a dot in it."""


_Loader.yaml_implicit_resolvers = {
    first: list(resolvers) for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


class _Settings:
    """Values by key, each with the place it came from; a later source wins."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}
        self.places: dict[str, str] = {}
        self.problems: list[str] = []

    def add_source(self, entries: Iterable[tuple[str, Any, str]]) -> None:
        seen: dict[str, str] = {}
        for name, value, place in entries:
            key = ALIASES.get(name, name)
            if key not in RunConfig.model_fields:
                self.problems.append(f"{place}: unknown key {name!r}{_nearest(name)}")
            elif key in seen:
                self.problems.append(f"{place}: {name!r} is set twice, first at {seen[key]}")
            else:
                self.values[key] = value
                self.places[key] = seen[key] = place


def load_config(
    path: Path | None = None,
    flags: Mapping[str, Any] | None = None,
    sets: Iterable[str] = (),
) -> RunConfig:
    """Returns the configuration of a run: defaults, then the file, then --set, then flags.

    Args:
        path: A YAML file of keys.
        flags: Values by key; a value of None is a flag that was not given.
        sets: "key=value" strings; the value is read as YAML.

    Raises:
        ConfigError: For an unreadable file and for unknown, repeated or invalid keys, all of them
            at once, each with its file and line.
    """
    settings = _Settings()
    if path is not None:
        settings.add_source(_read_file(path))
    settings.add_source(_read_set(text) for text in sets)
    given = {key: value for key, value in (flags or {}).items() if value is not None}
    settings.add_source((key, value, _flag(key)) for key, value in given.items())
    if settings.problems:
        raise ConfigError("\n".join(settings.problems))
    try:
        return RunConfig(**settings.values)
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(error, settings.places))) from None


def config_flags(command: Callable[..., _Result]) -> Callable[..., _Result]:
    """Gives a typer command -c, --set and a flag for every key; it receives `config`.

    The command is called with the resolved RunConfig; `config.model_fields_set` tells which keys
    the user set. Its other parameters stay as they are.
    """
    keys = {name: _flag_parameter(name) for name in RunConfig.model_fields}
    switches = [name for name in keys if _is_switch(name)]
    hints = get_type_hints(command, include_extras=True)
    own = [
        parameter.replace(annotation=hints[name], kind=inspect.Parameter.KEYWORD_ONLY)
        for name, parameter in inspect.signature(command).parameters.items()
        if name != "config"
    ]

    @functools.wraps(command)
    def with_config(*, config_file: Path | None, set_: list[str], **arguments: Any) -> _Result:
        flags = {name: arguments.pop(name) for name in keys}
        flags |= {name: False for name in switches if arguments.pop(f"no_{name}")}
        return command(config=load_config(config_file, flags, set_ or ()), **arguments)

    parameters = [*_SOURCES, *own, *keys.values(), *map(_off_parameter, switches)]
    annotations = {parameter.name: parameter.annotation for parameter in parameters}
    with_config.__annotations__ = annotations
    with_config.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    # typer would otherwise read the hints of the wrapped function, which has a `config`.
    del with_config.__wrapped__
    return with_config


_SOURCES = [
    inspect.Parameter(
        "config_file",
        inspect.Parameter.KEYWORD_ONLY,
        annotation=Path | None,
        default=typer.Option(None, "--config", "-c", metavar="FILE", help="YAML file of keys."),
    ),
    inspect.Parameter(
        "set_",
        inspect.Parameter.KEYWORD_ONLY,
        annotation=list[str] | None,
        default=typer.Option(
            None, "--set", metavar="KEY=VALUE", help="Set a key; may be repeated. Flags win."
        ),
    ),
]
_SHORT = {"model": "-m", "dataset": "-d", "output_dir": "-o"}


def _flag(key: str) -> str:
    return "--" + key.replace("_", "-")


def _flag_parameter(name: str) -> inspect.Parameter:
    """The typer option of a key. snake_case spellings are folded by the app, not listed here."""
    field = RunConfig.model_fields[name]
    kind: Any = field.annotation
    metavar = None
    if get_origin(kind) is Literal:
        # The choices stand in the help: as a metavar they would cut the names of other flags.
        metavar, kind = "NAME", str
    elif get_args(kind):
        [kind] = [part for part in get_args(kind) if part is not type(None)]
    names = [_flag(name), *(_flag(alias) for alias, key in ALIASES.items() if key == name)]
    if name in _SHORT:
        names.append(_SHORT[name])
    extra = field.json_schema_extra
    assert isinstance(extra, dict)
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        annotation=kind | None,
        default=typer.Option(
            None,
            *names,
            help=_help(name),
            metavar=metavar,
            rich_help_panel=str(extra["group"]),
            show_default=False,
        ),
    )


def _is_switch(name: str) -> bool:
    return RunConfig.model_fields[name].annotation is bool


def _off_parameter(name: str) -> inspect.Parameter:
    """The flag that turns a switch off; a column of its own would cut the names in the help."""
    return inspect.Parameter(
        f"no_{name}",
        inspect.Parameter.KEYWORD_ONLY,
        annotation=bool,
        default=typer.Option(False, f"--no-{_flag(name)[2:]}", hidden=True),
    )


def _help(name: str) -> str:
    field = RunConfig.model_fields[name]
    notes = [str(limit) for limit in map(_limit, field.metadata) if limit]
    if not field.is_required() and field.default is not None and field.default is not False:
        notes.insert(0, f"default {field.default}")
    if get_origin(field.annotation) is Literal:
        notes.append(f"one of {', '.join(get_args(field.annotation))}")
    if _is_switch(name):
        notes.append(f"--no-{_flag(name)[2:]} turns it off")
    return f"{field.description} ({'; '.join(notes)})" if notes else str(field.description)


def _limit(constraint: object) -> str | None:
    for attribute, sign in (("ge", ">="), ("gt", ">"), ("le", "<="), ("lt", "<")):
        if hasattr(constraint, attribute):
            return f"{sign} {getattr(constraint, attribute)}"
    return None


def _read_file(path: Path) -> Iterable[tuple[str, Any, str]]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise ConfigError(f"the configuration {path} cannot be read: {reason}") from None
    try:
        loader = _Loader(text)
    except yaml.reader.ReaderError as error:
        raise ConfigError(f"the configuration {path} cannot be read: {error.reason}") from None
    try:
        root = loader.get_single_node()
        if not isinstance(root, yaml.MappingNode):
            what = "is empty" if root is None else "is no mapping of keys to values"
            raise ConfigError(f"{path}:1: the configuration {what}")
        entries = []
        for key, value in root.value:
            place = f"{path}:{key.start_mark.line + 1}"
            if not isinstance(key, yaml.ScalarNode):
                raise ConfigError(f"{place}: a key must be a name, found a {key.id}")
            entries.append((str(key.value), loader.construct_object(value, deep=True), place))
        return entries
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        raise ConfigError(f"{path}:{line}: not valid YAML: {error.problem}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from None
    finally:
        loader.dispose()


def _read_set(text: str) -> tuple[str, Any, str]:
    name, equals, value = text.partition("=")
    if not equals:
        raise ConfigError(f"--set {text}: expected KEY=VALUE")
    try:
        parsed = yaml.load(value, Loader=_Loader)
    except yaml.YAMLError:
        raise ConfigError(f"--set {text}: the value is not valid YAML") from None
    return name.strip().replace("-", "_"), parsed, f"--set {text}"


def _nearest(name: str) -> str:
    names = [*RunConfig.model_fields, *ALIASES]
    close = difflib.get_close_matches(name.lower().replace("-", "_"), names, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def _explain(error: ValidationError, places: Mapping[str, str]) -> Iterable[str]:
    for problem in error.errors():
        message = re.sub("^(Value error, |Input |String )", "", problem["msg"])
        key = str(problem["loc"][0]) if problem["loc"] else ""
        if problem["type"] == "missing":
            yield f"{key} is missing: give {_flag(key)} or set it in the file"
        elif key:
            yield f"{places[key]}: {key} {message}, got {problem['input']!r}"
        else:
            yield message
