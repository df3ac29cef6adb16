"""Long rows are cut before they are tokenised, and have the ids that they have without that."""

from __future__ import annotations

import json
import random

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from liger_cli.data import examples as examples_module
from liger_cli.data.chat import ChatRenderer
from liger_cli.data.clip import TextClipper
from liger_cli.data.encode import Encoder
from liger_cli.data.examples import RowOptions, load_examples
from liger_cli.data.rows import make_row
from liger_cli.training.model.tokenizers import byte_tokenizer

MAX_LENGTH = 64
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
)


def text_of(length: int, seed: int = 0) -> str:
    """Words, numbers and marks of several scripts, in no language."""
    generator = random.Random(seed)
    letters = "abcdefghijklmnopqrstuvwxyz\u00e4\u00e9\u00df\u4e2d\u6587\u5b57\u03c3\u03a3"
    marks = [
        " ",
        "  ",
        "\n",
        "\n\n",
        ", ",
        ". ",
        "'s ",
        "-",
        "\u3002",
        "\uff0c",
        " 12345 ",
        "\t",
        "! ",
    ]
    parts: list[str] = []
    size = 0
    while size < length:
        word = "".join(generator.choices(letters, k=generator.randint(1, 9)))
        parts += [word, generator.choice(marks)]
        size += len(parts[-1]) + len(word)
    return "".join(parts)


def fast(model, trainer, pre=None, normalizer=None) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(model)
    if pre is not None:
        tokenizer.pre_tokenizer = pre
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator([text_of(400, seed) for seed in range(60)], trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>")
    made.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    made.chat_template = TEMPLATE
    return made


SPECIAL = ["<unk>", "<|im_end|>"]


def byte_bpe():
    trainer = trainers.BpeTrainer(
        vocab_size=900,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    return fast(models.BPE(), trainer, pre_tokenizers.ByteLevel(add_prefix_space=False))


def unsplit_bpe():
    """Without words: tokens may have spaces in them, as superword vocabularies do."""
    trainer = trainers.BpeTrainer(vocab_size=1500, special_tokens=SPECIAL, show_progress=False)
    return fast(models.BPE(unk_token="<unk>"), trainer)


def unigram():
    trainer = trainers.UnigramTrainer(
        vocab_size=600, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False
    )
    return fast(models.Unigram(), trainer, pre_tokenizers.Metaspace(), normalizers.NFKC())


def wordpiece():
    trainer = trainers.WordPieceTrainer(vocab_size=600, special_tokens=SPECIAL, show_progress=False)
    model = models.WordPiece(unk_token="<unk>")
    return fast(model, trainer, pre_tokenizers.BertPreTokenizer(), normalizers.BertNormalizer())


TOKENIZERS = {
    "bytes": byte_tokenizer,
    "byte-bpe": byte_bpe,
    "unsplit-bpe": unsplit_bpe,
    "unigram": unigram,
    "wordpiece": wordpiece,
}


@pytest.fixture(scope="module", params=TOKENIZERS)
def tokenizer(request):
    return TOKENIZERS[request.param]()


def rows_of(long: str, other: str) -> list:
    turns = [("user", other), ("assistant", other), ("user", "why?"), ("assistant", long)]
    messages = [{"role": role, "content": text} for role, text in turns]
    contents = {
        "text": [{"text": long}, {"text": other}],
        "prompt and completion": [
            {"prompt": other, "completion": long},
            {"prompt": long, "completion": other},
        ],
        "messages": [{"messages": messages}, {"messages": [messages[3], messages[1]][::-1]}],
    }
    return [
        make_row(form, content, f"row {i}")
        for form, several in contents.items()
        for i, content in enumerate(several)
    ]


@pytest.mark.parametrize("max_length", [2, 900])
def test_case_235_a_cut_row_has_the_ids_of_the_whole_one(tokenizer, max_length):
    renderer = ChatRenderer(tokenizer)
    rows = rows_of(text_of(20_000, max_length), text_of(50))
    for flags in ((True, True), (False, False)):
        whole = Encoder(tokenizer, *flags).encode(rows, renderer)
        found = Encoder(tokenizer, *flags, max_length).encode(rows, renderer)
        for row, one, other in zip(rows, found, whole, strict=True):
            assert one.input_ids[:max_length] == other.input_ids[:max_length], row.where
            assert one.labels[:max_length] == other.labels[:max_length], row.where
            is_longer = len(other.input_ids) > max_length
            assert (len(one.input_ids) > max_length) == is_longer


@pytest.mark.parametrize("name", ["bytes", "byte-bpe", "unigram", "wordpiece"])
def test_case_235_a_text_of_any_length_costs_the_same(name, monkeypatch):
    given = []
    ids_of = Encoder._ids
    monkeypatch.setattr(
        Encoder, "_ids", lambda self, texts: (given.append(texts), ids_of(self, texts))[1]
    )
    made = TOKENIZERS[name]()
    encoder = Encoder(made, max_length=MAX_LENGTH)
    text = text_of(3000) * 1000
    [row] = encoder.encode([make_row("text", {"text": text}, "row")], ChatRenderer(made))
    assert len(row.input_ids) > MAX_LENGTH
    assert sum(len(text) for texts in given for text in texts) < 100_000


def test_case_235_a_cut_is_never_within_a_token():
    """Where tokens have a letter and a space in them, that is no place to cut at."""
    made = unsplit_bpe()
    clipper = TextClipper(made, MAX_LENGTH)
    text = text_of(2000)
    whole = made(text, add_special_tokens=False)["input_ids"]
    cuts = [clipper.clip([text], size) for size in range(1, 2000, 20)]
    places = {len(cut[0]) for cut in cuts if cut is not None}
    for place in places:
        ids = made(text[:place], add_special_tokens=False)["input_ids"]
        assert whole[: len(ids)] == ids
    assert any(" " in token.strip() for token in made.get_vocab())


def test_case_235_a_text_without_a_place_is_not_cut():
    clipper = TextClipper(byte_tokenizer(), MAX_LENGTH)
    assert clipper.clip(["x" * 50_000], 10_000) is None
    assert clipper.clip(["x" * 50_000, "y z"], 10_000) == ["x" * 50_000, "y"]
    assert clipper.clip(["short text"], 10_000) is None
    assert clipper.clip(["it'4 1 2 3 a"], 1) is None


def test_case_235_rows_are_counted_as_cut(tmp_path):
    path = tmp_path / "d.jsonl"
    rows = [{"text": "word " * 20_000}, {"text": "short"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = load_examples(str(path), byte_tokenizer(), RowOptions(MAX_LENGTH, 264))
    assert (found.stats.rows, found.stats.truncated_rows) == (2, 1)
    assert [len(row["input_ids"]) for row in found.examples] == [MAX_LENGTH, 6]


def test_case_235_batches_of_long_rows_are_small(tmp_path, monkeypatch):
    path = tmp_path / "d.jsonl"
    path.write_text("".join(json.dumps({"text": "word " * 1000}) + "\n" for _ in range(100)))
    wanted = load_examples(str(path), byte_tokenizer(), RowOptions(MAX_LENGTH, 264))
    monkeypatch.setattr(examples_module, "_BATCH_BYTES", 20_000)
    sizes = []
    make = examples_module.RowMaker.__call__
    monkeypatch.setattr(
        examples_module.RowMaker,
        "__call__",
        lambda self, records, *more: (sizes.append(len(records)), make(self, records, *more))[1],
    )
    found = load_examples(str(path), byte_tokenizer(), RowOptions(MAX_LENGTH, 264))
    assert sizes == [4] * 25
    assert found.examples[:] == wanted.examples[:]
