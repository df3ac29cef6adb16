"""Limits on the modules of a model that a configuration asks for, far above any there is."""

from __future__ import annotations

import itertools
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from liger_cli.errors import ConfigError

__all__ = ["check_sizes", "counted_modules"]

_COUNT_OF_MODULES = re.compile(r"(^|_)(layers?|blocks?|experts?|depths?|stages?)$|^num_.*_layers_")
_MAX_MODULES = 10_000
# The largest mixtures of experts have some 120 000, where each expert has separate modules.
_MAX_REGISTERED = 1_000_000


def check_sizes(values: Mapping[str, Any], name: str, parents: str = "") -> None:
    """Raise a ConfigError for more layers or experts than any model has."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            check_sizes(value, name, f"{parents}{key}.")
        elif _COUNT_OF_MODULES.search(str(key)):
            numbers = value if isinstance(value, list) else [value]
            for number in numbers:
                if isinstance(number, int | float) and abs(number) > _MAX_MODULES:
                    raise ConfigError(
                        f"the configuration of {name}: {parents}{key} is {number}; at most "
                        f"{_MAX_MODULES} are built"
                    )


@contextmanager
def counted_modules(name: str) -> Iterator[None]:
    """Raise a ConfigError once the model that is built has more modules than any there is."""
    from torch.nn.modules.module import register_module_module_registration_hook

    thread, count = threading.get_ident(), itertools.count(1)

    def look(*_: Any) -> None:
        if threading.get_ident() == thread and next(count) > _MAX_REGISTERED:
            raise ConfigError(
                f"the configuration of {name} asks for more than {_MAX_REGISTERED} modules"
            )

    hook = register_module_module_registration_hook(look)
    try:
        yield
    finally:
        hook.remove()
