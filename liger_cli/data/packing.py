"""Packing: several documents in one row, each as if it were alone.

Positions restart at every document, which is how transformers learns where one begins: attention
then stays inside it. The first token of a document has no label, so nothing is predicted from the
document before. A packed row is (T,) ids of at most max_length; no document is split.

Not every model keeps documents apart. What is known from the configuration is refused at once, and
a model in memory is asked: the gradient of a document's logits with respect to the embeddings of
the one before must be zero to the bit.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from transformers import masking_utils

from liger_cli.data.class_formats import TARGETS
from liger_cli.data.encode import WEIGHTS, default_weights
from liger_cli.data.pair_formats import ANSWER_FIGURES, ANSWERS, DESIRABLE
from liger_cli.errors import ConfigError
from liger_kernels.transformers.wrappers import forward_takes, inner_model

__all__ = [
    "MISMATCHED",
    "PackedRows",
    "Strategy",
    "answer_lengths",
    "answers_of",
    "check_packed",
    "document_lengths",
    "join_rows",
    "mismatched_of",
    "pack",
    "pack_lengths",
    "packing_problem",
    "refuse_packing",
    "row_lengths",
    "token_logits",
    "weights_of",
]

Strategy = Literal["bfd", "sequential"]

# Before the names of the columns of another row's answer behind the prompt of a row.
MISMATCHED = "kl_"

# Layers whose every token sees all or the nearest tokens before it; others carry a state.
_ATTENTION_LAYERS = {"full_attention", "sliding_attention", "chunked_attention", "attention"}


def pack(lengths: Sequence[int], max_length: int, strategy: Strategy = "bfd") -> list[list[int]]:
    """Return rows of documents, as numbers of the documents; no row is longer than max_length.

    Args:
        lengths: Of the documents, each at most max_length.
        strategy: bfd, the longest first, each into the row it fills best: the fewest rows.
            sequential keeps the order and starts a row where the next document does not fit.
    """
    return (_best_fit if strategy == "bfd" else _next_fit)(lengths, max_length)


def _best_fit(lengths: Sequence[int], max_length: int) -> list[list[int]]:
    rows: list[list[int]] = []
    open_rows: dict[int, list[int]] = {}
    # The different amounts of space that some row has, in order.
    spaces: list[int] = []
    # A stable sort: documents of one length stay in their order.
    for document in np.argsort(-np.asarray(lengths), kind="stable").tolist():
        place = bisect.bisect_left(spaces, lengths[document])
        if place == len(spaces):
            row, space = len(rows), max_length
            rows.append([])
        else:
            space = spaces[place]
            row = open_rows[space].pop()
            if not open_rows[space]:
                del open_rows[space], spaces[place]
        rows[row].append(document)
        left = space - lengths[document]
        if left:
            if left not in open_rows:
                bisect.insort(spaces, left)
                open_rows[left] = []
            open_rows[left].append(row)
    return rows


def _next_fit(lengths: Sequence[int], max_length: int) -> list[list[int]]:
    rows: list[list[int]] = []
    space = 0
    for document, length in enumerate(lengths):
        if length > space:
            rows.append([])
            space = max_length
        rows[-1].append(document)
        space -= length
    return rows


def answers_of(row: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the documents of a row: itself, or the answers of a pair with their prompt."""
    if f"{ANSWERS[0]}_input_ids" not in row:
        return [row]
    return [
        {name: row[f"{answer}_{name}"] for name in ("input_ids", "labels")} for answer in ANSWERS
    ]


def answer_lengths(row: Mapping[str, Any]) -> list[int]:
    """Return the tokens of each document of a row."""
    return [len(answer["input_ids"]) for answer in answers_of(row)]


def weights_of(row: Mapping[str, Any]) -> Sequence[float]:
    """Return the weights of the tokens of a row, which it may have as a column."""
    given: Sequence[float] | None = row.get(WEIGHTS)
    return default_weights(row["labels"]) if given is None else given


def join_rows(documents: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Return one row of input_ids, labels and position_ids, which restart at each document.

    One of pairs or of labelled answers also has answer_ids, the number of the answer of each token,
    and lists of what else they have; and the same, prefixed, of their mismatched answers. One of
    rows with targets has a list of them.
    """
    row: dict[str, list[Any]] = {"input_ids": [], "labels": [], "position_ids": []}
    answers = [answer for document in documents for answer in answers_of(document)]
    for answer in answers:
        row["input_ids"] += answer["input_ids"]
        row["labels"] += answer["labels"]
        row["position_ids"] += range(len(answer["input_ids"]))
    if any(WEIGHTS in answer for answer in answers):
        row[WEIGHTS] = [weight for answer in answers for weight in weights_of(answer)]
    if TARGETS in documents[0]:
        row[TARGETS] = [document[TARGETS] for document in documents]
    if len(answers) > len(documents) or DESIRABLE in documents[0]:
        row |= _answer_columns(answers, documents)
    others = [other for document in documents if (other := mismatched_of(document))]
    if others:
        joined = {**join_rows(others), **_answer_columns(others, others)}
        row |= {f"{MISMATCHED}{name}": values for name, values in joined.items()}
    return row


def _answer_columns(
    answers: Sequence[Mapping[str, Any]], owners: Sequence[Mapping[str, Any]]
) -> dict[str, list[Any]]:
    """Return the number of the answer of each token, and the figures of what has the answers."""
    numbers = [n for n, one in enumerate(answers) for _ in one["input_ids"]]
    names = [name for name in ANSWER_FIGURES if name in owners[0]]
    return {"answer_ids": numbers} | {name: [one[name] for one in owners] for name in names}


def mismatched_of(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return the mismatched answer of a row, or of packed rows; empty where there is none."""
    prefix = MISMATCHED
    return {name[len(prefix) :]: row[name] for name in row if name.startswith(prefix)}


def document_lengths(position_ids: torch.Tensor) -> dict[str, Any]:
    """Return the arguments of transformers that say where the documents of a batch begin.

    Args:
        position_ids: (B, T), on the host; 0 at the first token of each document.
    """
    positions = position_ids.flatten()
    starts = (positions == 0).nonzero().flatten()
    ends = torch.cat((starts, torch.tensor([len(positions)]))).to(torch.int32)
    longest = int(ends.diff().max())
    return {
        "cu_seq_lens_q": ends,
        "cu_seq_lens_k": ends,
        "max_length_q": longest,
        "max_length_k": longest,
    }


def row_lengths(rows: Any) -> np.ndarray[Any, Any]:
    """Return the tokens of each row of a datasets.Dataset, (N,), or of each answer, (N, 2).

    Rows with mismatched answers say it themselves.
    """
    import pyarrow.compute

    if (lengths := getattr(rows, "lengths", None)) is not None:
        return np.asarray(lengths)
    names = [name for name in rows.column_names if name.endswith("input_ids")]
    parts = [
        np.stack([pyarrow.compute.list_value_length(batch[name]).to_numpy() for name in names], 1)
        for batch in rows.select_columns(names).with_format("arrow").iter(10_000)
    ]
    lengths = np.concatenate(parts)
    return lengths if len(names) > 1 else lengths[:, 0]


def pack_lengths(
    lengths: np.ndarray[Any, Any], max_length: int, strategy: Strategy
) -> tuple[list[list[int]], int]:
    """Return rows of documents as pack does, and the tokens that a row holds.

    A row of pairs holds whole pairs, of which each answer may have max_length tokens.

    Args:
        lengths: As row_lengths returns them.
    """
    num_answers = 1 if lengths.ndim == 1 else lengths.shape[1]
    totals = lengths if lengths.ndim == 1 else lengths.sum(1)
    return pack(totals.tolist(), num_answers * max_length, strategy), num_answers * max_length


@dataclass(frozen=True)
class PackedRows:
    """The rows of a dataset, packed; a row is put together when it is asked for.

    Args:
        rows: A datasets.Dataset.
        order: Row numbers, pack after pack.
        starts: Where in `order` each pack starts, and at last the end.
    """

    rows: Any
    order: np.ndarray[Any, Any]
    starts: np.ndarray[Any, Any]

    @classmethod
    def of(cls, rows: Any, max_length: int, strategy: Strategy) -> PackedRows:
        packs, _ = pack_lengths(row_lengths(rows), max_length, strategy)
        starts = np.cumsum([0, *map(len, packs)])
        return cls(rows, np.concatenate([np.asarray(p) for p in packs]), starts)

    @property
    def num_documents(self) -> int:
        return len(self.order)

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, number: int) -> dict[str, list[Any]]:
        documents = self.order[self.starts[number] : self.starts[number + 1]]
        return join_rows([self.rows[int(document)] for document in documents])


def refuse_packing(model: Any, max_length: int, *, has_images: bool = False) -> None:
    """Refuse what packing_problem finds, whose arguments it takes.

    Raises:
        ConfigError: Documents in one row would see each other; says why.
    """
    reason = packing_problem(model, max_length, has_images=has_images)
    if reason is not None:
        raise _refused(model, reason)


def packing_problem(model: Any, max_length: int, *, has_images: bool = False) -> str | None:
    """Return why documents in one row would see each other, as far as a configuration says.

    Args:
        model: The model, or what wraps it; it may be on the meta device.
        max_length: Of the rows.
        has_images: Whether rows have more than ids.
    """
    config = inner_model(model).config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    layers = set(getattr(config, "layer_types", None) or ())
    others = layers - _ATTENTION_LAYERS
    reason = None
    if has_images:
        reason = "rows with images are not packed"
    elif "mrope_section" in rope:
        reason = "its positions have three dimensions, which do not mark where documents begin"
    elif getattr(inner_model(model), "_is_stateful", False):
        reason = "its layers carry a state from token to token, across documents too"
    elif others:
        reason = f"layers of the kind {', '.join(sorted(others))} carry a state across documents"
    elif forward_takes(model, "position_ids") is False:
        reason = "its forward takes no position_ids, which mark where documents begin"
    elif (
        "chunked_attention" in layers
        and max_length > config.attention_chunk_size
        and not hasattr(masking_utils, "remap_positions_for_packed_sequence")
    ):
        reason = (
            f"this release of transformers counts its chunks of {config.attention_chunk_size} "
            f"tokens from the start of a row, and rows have {max_length} (max_length)"
        )
    return reason


def token_logits(model: Any, **inputs: Any) -> torch.Tensor:
    """Compute the logits of each token, (B, T, V)."""
    logits: torch.Tensor = model(**inputs, use_cache=False).logits
    return logits


def check_packed(
    model: Any,
    *,
    flatten: bool = False,
    has_lengths: bool = False,
    outputs: Callable[..., torch.Tensor] = token_logits,
) -> None:
    """Check that a model in memory keeps documents apart.

    Args:
        model: On the device, with the attention and the autocast that it is trained with.
        flatten: Whether it is given batches of one long row.
        has_lengths: Whether they say where documents begin.
        outputs: Called with the model and the arguments of forward for what the model says of each
            token, (B, T, N); by default its logits.

    Raises:
        ConfigError: It does not.
    """
    inner = inner_model(model)
    vocabulary = inner.config.get_text_config().vocab_size
    documents = [[(7 * i + 3) % vocabulary for i in range(n)] for n in (5, 9, 6)]
    packed = join_rows([join_rows([{"input_ids": ids, "labels": ids}]) for ids in documents])
    # The second document.
    place = slice(5, 14)
    was_training = model.training
    try:
        model.eval()
        batch = _repeated(packed, 1 if flatten else 2, has_lengths=has_lengths)
        # Layers that are compiled would be compiled for these few tokens.
        with torch.compiler.set_stance("force_eager"):
            logits, gradient = _packed_gradient(outputs, model, batch, place)
            with torch.no_grad():
                alone = torch.tensor([documents[1]], device=logits.device)
                wanted = outputs(model, input_ids=alone).float()
    finally:
        model.train(was_training)
    gradient[:, place] = 0
    if gradient.any():
        raise _refused(
            model,
            f"with its attention {inner.config._attn_implementation!r} a document in a row sees "
            "the one before it",
        )
    # Rounding differs with the shape of a batch; another position moves logits by far more.
    if (logits - wanted).norm() > 0.1 * wanted.norm() * len(logits) ** 0.5:
        raise _refused(model, "its logits differ from those of the documents one by one")


def _repeated(packed: dict[str, list[int]], num_rows: int, *, has_lengths: bool) -> dict[str, Any]:
    """Return a batch of one row, so many times."""
    names = ("input_ids", "position_ids")
    batch: dict[str, Any] = {name: torch.tensor([packed[name]] * num_rows) for name in names}
    return batch | (document_lengths(batch["position_ids"]) if has_lengths else {})


def _packed_gradient(
    outputs: Callable[..., torch.Tensor], model: Any, batch: dict[str, Any], place: slice
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the logits at a place of packed rows, and their gradient in all embeddings."""
    device = next(model.parameters()).device
    inputs = {
        key: value.to(device) if isinstance(value, torch.Tensor) else value
        for key, value in batch.items()
    }
    embedded: list[torch.Tensor] = []

    def record(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        embedded.append(output.detach().requires_grad_())
        return embedded[-1]

    handle = inner_model(model).get_input_embeddings().register_forward_hook(record)
    try:
        with torch.enable_grad():
            logits = outputs(model, **inputs).float()[:, place]
            [gradient] = torch.autograd.grad(logits.square().sum(), embedded)
    finally:
        handle.remove()
    return logits.detach(), gradient.clone()


def _refused(model: Any, reason: str) -> ConfigError:
    return ConfigError(
        f"packing: {inner_model(model).config.model_type} cannot train on packed rows: {reason}",
        hint="--no-packing --no-padding-free trains the rows one by one.",
    )
