"""Rows with images, through the processor of an image-text model.

An image is as many tokens as the processor says, so a row is tokenised by the processor. Pixels are
made when a row is asked for and not kept, since one image is megabytes of them.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from liger_cli.data.borders import TokenBorders
from liger_cli.data.cache import Counts, Tokenised
from liger_cli.data.chat import ChatRenderer
from liger_cli.data.collate import TOKEN_KEYS
from liger_cli.data.encode import IGNORED, Encoder, labels_of
from liger_cli.data.rows import Row
from liger_cli.data.used import count_names
from liger_cli.errors import DataError, EnvironmentProblem

__all__ = ["ImageRows", "ImagesFound"]

# A private character: in no text, and no template trims or splits at it.
_MARK = "\ue000"


class ImagesFound(Exception):
    """A row has images, and ids alone are not all of it."""

    def __init__(self, where: str) -> None:
        super().__init__(where)
        self.where = where


@dataclass(frozen=True)
class ImageRows:
    """Rows that are encoded when they are asked for.

    Args:
        rows: Those that have a token to train on.
        encoder: Of the text.
        renderer: Of the conversations, whose template is the processor's where it has one.
        processor: Of the model.
        max_length: A row is cut to this many tokens, behind its last image.
    """

    rows: Sequence[Row]
    encoder: Encoder
    renderer: ChatRenderer
    processor: Any
    max_length: int

    @classmethod
    def of(
        cls,
        rows: Iterable[Row],
        encoder: Encoder,
        renderer: ChatRenderer,
        processor: Any,
        *,
        max_length: int,
        vocab_size: int,
    ) -> Tokenised:
        """Return the rows that can be trained on; those whose images do not fit are dropped."""
        kept: list[Row] = []
        counts = Counts()
        found = cls(kept, encoder, renderer, processor, max_length)
        for row in rows:
            count_names(counts, [row], found._renderer)
            encoded = found.encode(row)
            ids, labels = encoded["input_ids"], encoded["labels"][:max_length]
            num_trained = sum(label != IGNORED for label in labels)
            if not num_trained or encoded.pop("last_image") >= max_length:
                counts.dropped_rows += 1
                continue
            encoder.check_vocabulary(ids[:max_length], row.where, vocab_size)
            kept.append(row)
            counts.add_left_out(encoded["left_out"])
            counts.rows += 1
            counts.tokens += len(labels)
            counts.trained_tokens += num_trained
            counts.truncated_rows += len(ids) > max_length
        return Tokenised(found, counts)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> dict[str, Any]:
        row = self.encode(self.rows[number])
        del row["last_image"], row["left_out"]
        for key in ("input_ids", "labels", *TOKEN_KEYS):
            if key in row:
                row[key] = row[key][: self.max_length]
        return row

    def select(self, numbers: Iterable[int]) -> ImageRows:
        rows = [self.rows[number] for number in numbers]
        return replace(self, rows=rows)

    def encode(self, row: Row) -> dict[str, Any]:
        """Return input_ids, labels, what the processor makes of the images, last_image: the place
        of the last token of an image, or -1; and left_out, as of a Conversation.
        """
        if row.has_weights:
            raise DataError(f"{row.where}: rows with images have no loss weights but 0 and 1")
        if not row.images:
            [encoded] = self.encoder.encode([row], self._renderer)
            found = {**encoded._asdict(), "last_image": -1}
            del found["weights"]
            return found
        chat = self.encoder.conversation(row, self._renderer)
        text, placeholder = chat.text, self._placeholder
        images = [_open(image, row.where) for image in row.images]
        if (num_shown := text.count(placeholder)) != len(images):
            raise DataError(
                f"{row.where}: {len(images)} images, but the chat template shows "
                f"{num_shown}; a text must not hold {placeholder!r}"
            )
        outputs = self._process(text, images, row)
        ids = outputs.pop("input_ids")[0].tolist()

        def ids_before(place: int) -> list[int]:
            before, near = text[:place], text[max(place - len(placeholder) + 1, 0) : place]
            if placeholder in near + text[place : place + len(placeholder) - 1]:
                # Within what shows an image no token ends.
                return [IGNORED]
            shown = images[: before.count(placeholder)]
            return self._process(before, shown, row)["input_ids"][0].tolist()

        borders = TokenBorders(text, ids, ids_before, self.encoder.decode, row.where)
        labels = labels_of(ids, chat.trained, borders)
        # Where the last image ends: behind it nothing but text is left to cut.
        last_image = len(ids_before(text.rindex(placeholder) + len(placeholder))) - 1
        return {
            "input_ids": ids,
            "labels": labels,
            **self._of_images(ids, outputs, row),
            "last_image": last_image,
            "left_out": chat.left_out,
        }

    def _of_images(self, ids: Sequence[int], outputs: dict[str, Any], row: Row) -> dict[str, Any]:
        """Return the checked outputs of a processor for the images."""
        outputs.pop("attention_mask", None)
        result: dict[str, Any] = {
            key: outputs.pop(key)[0].tolist() for key in TOKEN_KEYS if key in outputs
        }
        for key, value in outputs.items():
            if value.ndim > 1 and value.shape[:2] == (1, len(ids)):
                raise DataError(
                    f"{row.where}: the processor gives {key} for every token, which is not batched"
                )
            result[key] = value
        return result

    def _process(self, text: str, images: Sequence[Any], row: Row) -> dict[str, Any]:
        try:
            return dict(
                self.processor(
                    text=[text],
                    images=[list(images)] if images else None,
                    add_special_tokens=False,
                    return_tensors="pt",
                )
            )
        # A processor is a program that sees the user's text and images.
        except Exception as error:
            raise DataError(
                f"{row.where}: the processor refuses this row: {error or repr(error)}"
            ) from error

    @cached_property
    def _renderer(self) -> ChatRenderer:
        own = getattr(self.processor, "chat_template", None)
        return replace(self.renderer, template=own)

    @cached_property
    def _placeholder(self) -> str:
        """The text that the template writes for an image."""
        text = {"type": "text", "text": _MARK}
        with_image, without = (
            self._renderer.render([{"role": "user", "content": parts}])
            for parts in ([{"type": "image"}, text], [text])
        )
        start = len(os.path.commonprefix([with_image, without.partition(_MARK)[0]]))
        placeholder = with_image[start:].partition(_MARK)[0]
        if not placeholder.strip():
            raise DataError("the chat template of this model shows no images")
        return placeholder


def _open(image: Any, where: str) -> Any:
    try:
        from PIL import Image
    except ImportError:
        raise EnvironmentProblem(
            "rows with images need the package pillow, which is not installed",
            hint="pip install pillow",
        ) from None
    try:
        if isinstance(image, str | bytes):
            image = Image.open(io.BytesIO(image) if isinstance(image, bytes) else image)
        return image.convert("RGB")
    except (OSError, ValueError, AttributeError) as error:
        raise DataError(f"{where}: an image cannot be read: {error}") from error
