"""Rows with images: through the processor, exact labels, batches, and who refuses them."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path

import datasets
import pytest
import tokenizers
import torch
import transformers
from PIL import Image

from liger_cli.data.batches import count_labels
from liger_cli.data.collate import Collator
from liger_cli.data.encode import IGNORED
from liger_cli.data.examples import RowOptions, load_examples
from liger_cli.errors import DataError
from liger_cli.training.forward import LossOf
from liger_cli.training.model.source import load_model, resolve_model
from liger_cli.training.model.tokenizers import byte_tokenizer, load_processor, load_tokenizer

# The byte tokenizer's reserved words, at the numbers that the presets' configurations give them;
# version 4 takes the name of a token for a regular expression.
PAD, START, END = "<img>", "<boi>", "<eoi>"

TEMPLATE = """\
{%- for message in messages -%}{{ '<|im_start|>' + message['role'] + '\\n' }}\
{%- if message['content'] is string -%}{{ message['content'] }}{%- else -%}\
{%- for part in message['content'] -%}{%- if part['type'] == 'image' -%}SHOWN\
{%- else -%}{{ part['text'] }}{%- endif -%}{%- endfor -%}{%- endif -%}\
{{ '<|im_end|>\\n' }}{%- endfor -%}"""


def image_class(family: str):
    """The image processor that needs no torchvision, whatever a release calls it."""
    name = {"gemma3": "Gemma3ImageProcessor", "qwen2-vl": "Qwen2VLImageProcessor"}[family]
    return getattr(transformers, f"{name}Pil", None) or getattr(transformers, name)


def make_processor(family: str):
    words = byte_tokenizer().backend_tokenizer.to_str()
    for number, word in enumerate((PAD, START, END)):
        words = words.replace(f"<|reserved_{number}|>", word)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer.from_str(words),
        pad_token="<|pad|>",
        eos_token="<|im_end|>",
        extra_special_tokens={"image_token": PAD, "boi_token": START, "eoi_token": END},
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )
    if family == "gemma3":
        template = TEMPLATE.replace("SHOWN", START)
        images = image_class(family)(size={"height": 32, "width": 32})
        return transformers.Gemma3Processor(images, tokenizer, template, image_seq_length=4)

    class NoVideo(transformers.Qwen2VLProcessor):
        """Videos need torchvision."""

        attributes = ("image_processor", "tokenizer")
        # Version 4 checks the class of each.
        tokenizer_class = "PreTrainedTokenizerFast"

        @classmethod
        def get_attributes(cls):
            return list(cls.attributes)

        def __init__(self, image_processor, tokenizer, chat_template=None):
            self.image_token, self.video_token = PAD, "<|reserved_3|>"
            self.image_token_id, self.video_token_id = 259, 262
            transformers.ProcessorMixin.__init__(
                self, image_processor, tokenizer, chat_template=chat_template
            )

    images = image_class(family)(patch_size=8, merge_size=2, min_pixels=256, max_pixels=4096)
    template = TEMPLATE.replace("SHOWN", START + PAD + END)
    return NoVideo(images, tokenizer, chat_template=template)


def picture(path: Path, width: int = 40, height: int = 24, shade: int = 9) -> Path:
    Image.new("RGB", (width, height), (shade, 100, 200)).save(path)
    return path


def chat(*turns: tuple[str, object]) -> list[dict]:
    return [{"role": role, "content": content} for role, content in turns]


def text(words: str) -> dict:
    return {"type": "text", "text": words}


IMAGE = {"type": "image"}


def write(path: Path, *rows: dict) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def load(name, family: str = "gemma3", max_length: int = 256):
    processor = make_processor(family)
    options = RowOptions(max_length, 264)
    return load_examples(str(name), processor.tokenizer, options, processor=processor)


def trained(row) -> str:
    return byte_tokenizer().decode([label for label in row["labels"] if label != IGNORED])


@pytest.fixture
def rows(tmp_path) -> list[dict]:
    picture(tmp_path / "a.png")
    picture(tmp_path / "b.png", 64, 64, shade=200)
    talk = chat(
        ("user", [IMAGE, text("what is it?")]),
        ("assistant", [text("a "), text("sky")]),
        ("user", [text("and "), IMAGE]),
        ("assistant", "a sea"),
    )
    return [
        {"messages": talk, "images": ["a.png", "b.png"]},
        {"messages": chat(("user", "hi"), ("assistant", "hello"))},
        {
            "messages": chat(
                ("user", [{"type": "image", "path": str(tmp_path / "a.png")}, text("?")]),
                ("assistant", "sky"),
            )
        },
    ]


@pytest.mark.parametrize("family", ["gemma3", "qwen2-vl"])
def test_labels_are_what_the_assistant_says(tmp_path, rows, family):
    examples = load(write(tmp_path / "d.jsonl", *rows), family)
    assert (examples.stats.rows, examples.has_images) == (3, True)
    assert examples.stats.columns == ("messages", "images")
    first, plain, _ = (examples.examples[i] for i in range(3))
    assert trained(first) == "a sky<|im_end|>a sea<|im_end|>"
    assert trained(plain) == "hello<|im_end|>"
    # The ids are those that the processor gives for the whole conversation.
    processor = make_processor(family)
    shown = {"gemma3": START, "qwen2-vl": START + PAD + END}[family]
    whole = processor(
        text=[
            f"<|im_start|>user\n{shown}what is it?<|im_end|>\n"
            "<|im_start|>assistant\na sky<|im_end|>\n"
            f"<|im_start|>user\nand {shown}<|im_end|>\n"
            "<|im_start|>assistant\na sea<|im_end|>\n"
        ],
        images=[[Image.open(tmp_path / name) for name in ("a.png", "b.png")]],
        return_tensors="pt",
    )
    assert first["input_ids"] == whole["input_ids"][0].tolist()
    assert first["input_ids"].count(259) > 2
    assert torch.equal(first["pixel_values"], whole["pixel_values"])
    for row in (first, plain):
        pairs = zip(row["input_ids"], row["labels"], strict=True)
        assert all(label in (IGNORED, token) for token, label in pairs)
    assert examples.stats.trained_tokens == sum(
        sum(label != IGNORED for label in examples.examples[i]["labels"]) for i in range(3)
    )


@pytest.mark.parametrize("family", ["gemma3", "qwen2-vl"])
def test_batch_of_rows_with_and_without_images(tmp_path, rows, family):
    """The loss of a batch is that of its rows, each with its own images."""
    examples = load(write(tmp_path / "d.jsonl", *rows), family).examples
    # gemma3 wants to be told of every token whether it is of an image, but in training only.
    model = load_model(resolve_model(family), dtype=torch.float32, seed=3).train()
    # Its projection starts as zeros, with which all images are the same.
    for name, parameter in model.named_parameters():
        if "mm_input_projection" in name:
            torch.nn.init.normal_(parameter)
    loss_of = LossOf(model, torch.device("cpu"))
    batch = Collator(0)([examples[i] for i in range(3)])
    num_labels = count_labels(batch)
    whole = loss_of(model, batch, num_labels)
    whole.backward()
    assert any(
        p.grad is not None and p.grad.abs().sum() > 0
        for n, p in model.named_parameters()
        if "vision" in n or "visual" in n
    )
    parts = [loss_of(model, Collator(0)([examples[i]]), num_labels) for i in range(3)]
    torch.testing.assert_close(whole, sum(parts))
    # Another image is another loss.
    picture(tmp_path / "a.png", shade=255)
    changed = loss_of(model, Collator(0)([examples[2]]), num_labels)
    assert not torch.equal(changed, parts[2])


def test_where_images_come_from(tmp_path, rows):
    """A path, bytes and a path of a table, an image column of datasets: the same pixels."""
    wanted = load(write(tmp_path / "d.jsonl", rows[2])).examples[0]
    content = (tmp_path / "a.png").read_bytes()
    messages = chat(("user", "?"), ("assistant", "sky"))
    table = {"messages": [messages], "images": [[Image.open(io.BytesIO(content))]]}
    saved = datasets.Dataset.from_dict(table).cast_column(
        "images", datasets.Sequence(datasets.Image())
    )
    saved.save_to_disk(tmp_path / "saved")
    saved.to_parquet(tmp_path / "d.parquet")
    column = write(tmp_path / "e.jsonl", {"messages": messages, "images": ["a.png"]})
    url = f"data:image/png;base64,{base64.b64encode(content).decode()}"
    part = {"type": "image_url", "image_url": {"url": url}}
    inline = write(
        tmp_path / "f.jsonl", {"messages": chat(("user", [part, text("?")]), ("assistant", "sky"))}
    )
    for name in (tmp_path / "saved", tmp_path / "d.parquet", column, inline):
        found = load(name).examples[0]
        assert found["input_ids"] == wanted["input_ids"]
        assert torch.equal(found["pixel_values"], wanted["pixel_values"])


def test_a_row_is_cut_behind_its_last_image(tmp_path, rows):
    examples = load(write(tmp_path / "d.jsonl", rows[0], rows[2]), max_length=60)
    # The second image of the first row ends behind token 60.
    assert (examples.stats.rows, examples.stats.dropped_rows) == (1, 1)
    long = dict(rows[2], messages=[*rows[2]["messages"][:1], *chat(("assistant", "sky" * 50))])
    examples = load(write(tmp_path / "d.jsonl", long), max_length=60)
    assert examples.stats.truncated_rows == 1
    row = examples.examples[0]
    assert {len(row[key]) for key in ("input_ids", "labels", "token_type_ids")} == {60}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": ["a.png"]}, "d.jsonl:1: 2 image parts, but 1 images"),
        ({"images": ["a.png"] * 3}, "d.jsonl:1: 1 of 3 images have no image part"),
        ({"images": ["a.png", "no.png"]}, "d.jsonl:1: there is no image .*no.png"),
        ({"images": ["a.png", "d.jsonl"]}, "d.jsonl:1: an image cannot be read"),
        ({"images": ["a.png", "https://x.y/z.png"]}, "d.jsonl:1: the image https.* is remote"),
        (
            {"images": ["a.png", "data:image/png;base64,?"]},
            "d.jsonl:1: the image data.* not base64",
        ),
        ({"images": ["a.png", 5]}, "d.jsonl:1: an image must be a path, found a number"),
        (
            {"messages": chat(("user", f"{START}?"), ("assistant", "a")), "images": ["a.png"]},
            "d.jsonl:1: 1 images, but the chat template shows 2",
        ),
        (
            {"messages": chat(("system", "?"), ("assistant", "a")), "images": ["a.png"]},
            "d.jsonl:1: there are images, and no message of the user",
        ),
    ],
)
def test_refused_rows(tmp_path, rows, change, message):
    path = write(tmp_path / "d.jsonl", {**rows[0], **change})
    with pytest.raises(DataError, match=message):
        load(path)


def test_text_models_refuse_images(tmp_path, rows, liger):
    path = write(tmp_path / "d.jsonl", rows[1], rows[0])
    words = ("train", "--use-cpu", "--dataset", path, "--dry-run")
    done = liger(*words, "--model", "qwen3")
    assert done.code == 4
    assert "d.jsonl:2: the row has images, and this model has no processor" in done.err
    done = liger(*words, "--model", "qwen3", "--streaming", "--max-steps", 1)
    assert done.code == 4
    assert "d.jsonl:2: images are not streamed" in done.err


def test_train_with_images(tmp_path, rows, liger):
    """From a model's directory with its processor, through the program."""
    model = load_model(resolve_model("gemma3"), dtype=torch.float32, seed=3)
    model.save_pretrained(tmp_path / "model")
    make_processor("gemma3").save_pretrained(tmp_path / "model")
    source = resolve_model(str(tmp_path / "model"))
    assert load_processor(source) is not None
    assert load_processor(resolve_model("gemma3")) is None
    assert load_tokenizer(source).convert_tokens_to_ids(PAD) == 259
    path = write(tmp_path / "d.jsonl", *rows * 3)
    words = ["train", "--model", tmp_path / "model", "--dataset", path, "--use-cpu"]
    words += ["--max-steps", 4, "--per-device-train-batch-size", 2, "--eval-fraction", 0.2]
    words += ["--learning-rate", 1e-2, "--output-dir", tmp_path / "run"]
    done = liger(*words, "--json")
    assert done.code == 0, done.err
    report = done.json()
    assert load_processor(resolve_model(str(tmp_path / "run"))) is not None
    assert report["data"]["rows"] == 9
    assert report["train"]["final_loss"] < report["train"]["first_loss"]
    done = liger(*words, "--packing", "--output-dir", tmp_path / "packed")
    assert done.code == 2
    assert "rows with images are not packed" in done.err
