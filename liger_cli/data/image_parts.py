"""The images of a row, in parts of its messages or in a column, in the order they are shown."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from liger_cli.common.readers import expand_path
from liger_cli.data.values import check_list, describe
from liger_cli.errors import DataError

__all__ = ["place_images"]


def place_images(
    messages: Sequence[Mapping[str, Any]], given: Any, where: str, folder: Path | None
) -> tuple[tuple[Mapping[str, Any], ...], list[Any]]:
    """Return messages whose image parts hold no image, and the images in their order."""
    column = [image for _, image in check_list(given, "images", where)] if given else []
    parts = [
        part
        for message in messages
        if isinstance(message["content"], list)
        for part in message["content"]
        if part["type"] == "image"
    ]
    if not parts:
        # A column of images and plain messages: the images are what the user shows first.
        position = next((i for i, m in enumerate(messages) if m["role"] == "user"), None)
        if position is None:
            raise DataError(f"{where}: there are images, and no message of the user to show them")
        text = {"type": "text", "text": messages[position]["content"]}
        shown = [{"type": "image"} for _ in column]
        placed = list(messages)
        placed[position] = {**messages[position], "content": [*shown, text]}
        return tuple(placed), [_check_image(image, where, folder) for image in column]
    rest = iter(column)
    images = []
    for part in parts:
        own = next((part[key] for key in ("image", "path", "url", "image_url") if part.get(key)), 0)
        image = own or next(rest, None)
        if image is None:
            raise DataError(f"{where}: {len(parts)} image parts, but {len(column)} images for them")
        images.append(_check_image(image, where, folder))
    if (unused := len(list(rest))) and column:
        raise DataError(f"{where}: {unused} of {len(column)} images have no image part")
    bare = [
        {**message, "content": [_without_image(part) for part in message["content"]]}
        if isinstance(message["content"], list)
        else message
        for message in messages
    ]
    return tuple(bare), images


def _without_image(part: Mapping[str, Any]) -> Mapping[str, Any]:
    return {"type": "image"} if part["type"] == "image" else part


def _check_image(image: Any, where: str, folder: Path | None) -> Any:
    """Check an image: a path, the bytes of a file or a PIL image; datasets writes {bytes, path}."""
    if isinstance(image, dict):
        image = image.get("bytes") or image.get("path") or image.get("url")
    if not isinstance(image, str):
        if image is None or isinstance(image, int | float | list):
            raise DataError(f"{where}: an image must be a path, found {describe(image)}")
        return image
    if image.startswith("data:"):
        try:
            return base64.b64decode(image.partition(",")[2], validate=True)
        except ValueError as error:
            raise DataError(f"{where}: the image {image[:40]}... is not base64") from error
    if "://" in image:
        raise DataError(f"{where}: the image {image[:80]} is remote; images are read from files")
    path = expand_path(image, f"{where}: the image", DataError)
    path = path if path.is_absolute() or folder is None else folder / path
    if not path.is_file():
        raise DataError(f"{where}: there is no image {path}")
    return str(path)
