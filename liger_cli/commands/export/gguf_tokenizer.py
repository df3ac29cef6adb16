"""The tokenizer part of a GGUF file: byte-level BPE, and BPE that was converted from SentencePiece.

llama.cpp has the rules of splitting text in its code and chooses them by a name. A tokenizer whose
rules have no name is refused: it would run there and give other tokens.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

__all__ = ["UnknownTokenizer", "add_tokenizer"]

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_TEKKEN_WORD = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
# Name in llama.cpp of a pattern that splits text, and of whether whole words go before merges.
_SPLITS = {
    (rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_REST}", True): "llama-bpe",
    (rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_REST}", False): "smaug-bpe",
    (rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_REST}", False): "qwen2",
    (
        rf"{_TEKKEN_WORD}*{_TEKKEN_LOWER}+|{_TEKKEN_WORD}+{_TEKKEN_LOWER}*|\p{{N}}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        True,
    ): "tekken",
}
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_SPACE = "\u2581"


class UnknownTokenizer(Exception):
    """Rules of a tokenizer that llama.cpp has no name for, in words."""


def add_tokenizer(writer: Any, tokenizer: Any, num_rows: int) -> None:
    """Write the vocabulary, merges, special tokens and chat template.

    Args:
        writer: A gguf.GGUFWriter.
        tokenizer: Of transformers.
        num_rows: Rows of the embedding; those without a token get a name.

    Raises:
        UnknownTokenizer: llama.cpp would give other tokens.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UnknownTokenizer(f"{type(tokenizer).__name__} has no fast form")
    rules = json.loads(backend.to_str())
    model = rules["model"]
    if model["type"] != "BPE":
        raise UnknownTokenizer(f"it is a {model['type']} tokenizer, not BPE")
    # Pairs in newer files, "a b" in older ones.
    merges = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in model["merges"]]
    if not merges:
        raise UnknownTokenizer("it has no merges, which llama.cpp asks for")
    tokens = _tokens(tokenizer, num_rows)
    if model.get("byte_fallback"):
        types = _add_pieces(writer, rules, tokens, merges)
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(_split_name(rules))
        writer.add_token_merges([" ".join(pair) for pair in merges])
        types = ["NORMAL"] * len(tokens)
    _add_tokens(writer, tokenizer, tokens, types)
    _add_special_tokens(writer, tokenizer)


def _tokens(tokenizer: Any, num_rows: int) -> list[str | None]:
    tokens: list[str | None] = [None] * num_rows
    for token, index in tokenizer.get_vocab().items():
        if index >= num_rows:
            raise UnknownTokenizer(
                f"its token {token!r} has id {index}, and the embedding {num_rows} rows"
            )
        tokens[index] = token
    return tokens


def _split_name(rules: dict[str, Any]) -> str:
    """Return llama.cpp's name for the splitting of a byte-level tokenizer."""
    splitter = rules["pre_tokenizer"] or {}
    steps = splitter.get("pretokenizers", [splitter])
    normalizer = (rules["normalizer"] or {}).get("type")
    if any(step.get("add_prefix_space") for step in steps):
        raise UnknownTokenizer("it puts a space before the text")
    kinds = [step.get("type") for step in steps]
    is_whole = bool(rules["model"].get("ignore_merges"))
    name = None
    if kinds == ["ByteLevel"] and steps[0].get("use_regex", True):
        name = None if is_whole else "gpt-2"
    elif kinds == ["Digits", "ByteLevel"] and steps[1].get("use_regex", True):
        name = "smollm" if steps[0]["individual_digits"] and not is_whole else None
    elif kinds == ["Split", "ByteLevel"] and not steps[1].get("use_regex", True):
        plain = steps[0]["behavior"] == "Isolated" and not steps[0]["invert"]
        pattern = steps[0]["pattern"].get("Regex")
        name = _SPLITS.get((pattern, is_whole)) if plain else None
    # Qwen's is NFC, which llama.cpp leaves to the caller.
    if name is None or (normalizer is not None and (name, normalizer) != ("qwen2", "NFC")):
        raise UnknownTokenizer(
            f"llama.cpp has no name for its splitting ({', '.join(map(str, kinds))})"
        )
    return name


def _add_pieces(
    writer: Any, rules: dict[str, Any], tokens: list[str | None], merges: list[tuple[str, ...]]
) -> list[str]:
    """Write a vocabulary of SentencePiece, whose order of merges is in the scores of the pieces."""
    ranks: dict[str, int] = {}
    for rank, pair in enumerate(merges):
        ranks.setdefault("".join(pair), rank)
    known, given = {token for token in tokens if token is not None}, set(merges)
    for piece in ranks:
        for i in range(1, len(piece)):
            pair = piece[:i], piece[i:]
            if pair not in given and pair[0] in known and pair[1] in known:
                raise UnknownTokenizer(
                    f"{piece!r} is not merged from {pair}, as SentencePiece does"
                )
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_add_space_prefix(_puts_space_first(rules))
    writer.add_token_scores([float(-ranks.get(token or "", len(ranks))) for token in tokens])
    unknown = rules["model"].get("unk_token")
    return [
        "UNKNOWN" if token == unknown else "BYTE" if _BYTE.fullmatch(token or "") else "NORMAL"
        for token in tokens
    ]


def _steps(rule: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    for name in ("normalizers", "pretokenizers"):
        if rule and name in rule:
            for step in rule[name]:
                yield from _steps(step)
            return
    if rule:
        yield rule


def _puts_space_first(rules: dict[str, Any]) -> bool:
    """Return whether a space is put before the text, which must be all that happens to it."""
    puts = False
    for step in (*_steps(rules["normalizer"]), *_steps(rules["pre_tokenizer"])):
        kind = step["type"]
        spelled = step.get("content") == _SPACE and step.get("pattern") == {"String": " "}
        if kind == "Prepend" and step["prepend"] == _SPACE:
            puts = True
        elif kind == "Metaspace" and step["replacement"] == _SPACE and not step.get("split", False):
            puts = puts or step.get("prepend_scheme", "always") != "never"
        elif not (kind == "Replace" and spelled) and not (
            # Gemma's, after which no space is left to split at.
            kind == "Split" and step["pattern"] == {"String": " "}
        ):
            raise UnknownTokenizer(f"llama.cpp has no name for its {kind} step")
    return puts


def _add_tokens(writer: Any, tokenizer: Any, tokens: list[str | None], types: list[str]) -> None:
    import gguf

    for index, added in tokenizer.added_tokens_decoder.items():
        if types[index] != "UNKNOWN":
            types[index] = "CONTROL" if added.special else "USER_DEFINED"
    types = [
        kind if token is not None else "UNUSED" for kind, token in zip(types, tokens, strict=True)
    ]
    writer.add_token_list(
        [f"[PAD{i}]" if token is None else token for i, token in enumerate(tokens)]
    )
    writer.add_token_types([gguf.TokenType[kind] for kind in types])


def _add_special_tokens(writer: Any, tokenizer: Any) -> None:
    for name in ("bos", "eos", "unk", "pad", "sep", "mask"):
        index = getattr(tokenizer, f"{name}_token_id", None)
        if index is not None:
            getattr(writer, f"add_{name}_token_id")(index)
    ids = tokenizer("a")["input_ids"]
    writer.add_add_bos_token(bool(ids) and ids[0] == tokenizer.bos_token_id)
    writer.add_add_eos_token(bool(ids) and ids[-1] == tokenizer.eos_token_id)
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)
