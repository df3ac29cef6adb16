"""Chat templates by name: those in the folder templates, and the file of a user."""

from __future__ import annotations

import contextlib
from pathlib import Path

import jinja2

from liger_cli.common.readers import JsonError, expand_path, parse_json, read_file_bytes
from liger_cli.data.rendering import free_names
from liger_cli.errors import ConfigError
from liger_kernels.nearest import nearest_name

__all__ = ["read_template", "template_names"]

_FOLDER = Path(__file__).parent / "templates"

# Templates with thoughts are there twice: as the models have them, without the thoughts of earlier
# turns, and with all of them.
_KEEPS = "-keep"
_DROPS_THOUGHTS = "{%- set keeps_thoughts = false -%}"

_MAX_BYTES = 1024 * 1024


def template_names() -> list[str]:
    """Return the names that chat_template takes."""
    names = []
    for path in sorted(_FOLDER.glob("*.jinja")):
        names.append(path.stem)
        if _DROPS_THOUGHTS in path.read_text("utf-8"):
            names.append(path.stem + _KEEPS)
    return names


def read_template(name: str) -> str:
    """Return the Jinja text of a chat template.

    A name goes before a file of the same name; write ./name for the file.

    Args:
        name: One of template_names, or the path of a file.

    Raises:
        ConfigError: It is neither, or the file is not a chat template.
    """
    names = template_names()
    if name in names:
        plain = name.removesuffix(_KEEPS)
        text = (_FOLDER / f"{plain}.jinja").read_text("utf-8")
        kept = _DROPS_THOUGHTS.replace("false", "true")
        return text if plain == name else text.replace(_DROPS_THOUGHTS, kept)
    path = expand_path(name, "chat_template")
    if not path.exists():
        near = nearest_name(name.lower().replace("_", "-"), names)
        raise ConfigError(
            f"chat_template {name!r} is neither a file nor the name of a chat template"
            + (f"; did you mean {near}?" if near else ""),
            hint=f"Names: {', '.join(names)}.",
        )
    text = _read_file(path)
    _check(text, path)
    return text


def _read_file(path: Path) -> str:
    if path.is_dir():
        raise ConfigError(
            f"chat_template {path} is a directory",
            hint="Name the file in it: chat_template.jinja, where it is that of a model.",
        )
    try:
        return read_file_bytes(path, max_bytes=_MAX_BYTES).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"chat_template {path} is not text in UTF-8: {error}") from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"chat_template {path} cannot be read: {reason}") from error


def _check(text: str, path: Path) -> None:
    with contextlib.suppress(JsonError):
        if isinstance(parse_json(text), dict):
            raise ConfigError(
                f"chat_template {path} is JSON, and a chat template is Jinja alone",
                hint="Write the text of its key chat_template into a file.",
            )
    try:
        names = free_names(text)
    except jinja2.TemplateSyntaxError as error:
        raise ConfigError(
            f"chat_template {path}:{error.lineno}: not valid Jinja: {error.message}"
        ) from error
    # What it raises on nesting that is too deep.
    except RecursionError as error:
        raise ConfigError(f"chat_template {path}: it is nested too deep") from error
    if "messages" not in names:
        raise ConfigError(
            f"chat_template {path} never reads the variable messages, so it is no chat template",
            hint="It is Jinja as in a model's chat_template.jinja.",
        )
