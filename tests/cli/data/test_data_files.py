"""Data files as people have them: the exact text, ids and labels of each, or the exact error."""

from __future__ import annotations

import re
from itertools import chain

import pytest
from data_files import FILES

from liger_cli.config.datasets import COLUMNS, MARKS, read_datasets
from liger_cli.data.encode import IGNORED
from liger_cli.data.examples import RowOptions, load_examples
from liger_cli.data.formats import FORMATS, MESSAGE_FIELDS, OPTIONAL, ROW_FIELDS
from liger_cli.data.pair_formats import ANSWERS, FIGURES
from liger_cli.errors import LigerError
from liger_cli.training.model.tokenizers import byte_tokenizer

# Shows tools, calls and every role.
TEMPLATE = """\
{%- if tools -%}{{ '<tools>' }}{%- for tool in tools -%}{{ tool.function.name }}{%- endfor -%}\
{{ '</tools>\\n' }}{%- endif -%}
{%- for message in messages -%}{{ '<|im_start|>' + message.role + '\\n' }}\
{%- for call in message.tool_calls or [] -%}\
{{ '<call>' + call.function.name + call.function.arguments | tojson + '</call>' }}{%- endfor -%}\
{{ message.content + '<|im_end|>\\n' }}{%- endfor -%}\
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"""


def tokenizer_of(name: str):
    tokenizer = byte_tokenizer()
    if not name.startswith("plain"):
        tokenizer.chat_template = TEMPLATE
    return tokenizer


def ids_and_labels(text: str, tokenizer) -> tuple[list[int], list[int]]:
    """Return what a text with its trained parts in brackets should be."""
    pieces = re.split(r"\[\[(.*?)\]\]", text, flags=re.DOTALL)
    ids = [tokenizer(piece, add_special_tokens=False)["input_ids"] for piece in pieces]
    labels = [piece if i % 2 else [IGNORED] * len(piece) for i, piece in enumerate(ids)]
    found = list(chain.from_iterable(labels))
    # Nothing predicts the first token.
    return list(chain.from_iterable(ids)), [IGNORED, *found[1:]]


@pytest.mark.parametrize("name", FILES)
def test_data_file(tmp_path, name):
    file = FILES[name]
    path = tmp_path / file.name
    file.write(path)
    tokenizer = tokenizer_of(file.name)
    entries = read_datasets([{"path": str(path), **file.entry}])
    options = RowOptions(512, 264, **file.options)
    if file.error:
        with pytest.raises(LigerError) as error:
            load_examples(entries, tokenizer, options)
        assert error.value.message.replace(str(path), "FILE") == file.error
        return
    found = load_examples(entries, tokenizer, options)
    rows = [(row["input_ids"], row["labels"]) for row in found.examples]
    assert rows == [ids_and_labels(text, tokenizer) for text in file.rows]
    assert found.stats.unused_columns == file.unused


def test_there_are_sixty():
    assert len(FILES) >= 60
    assert sum(bool(file.error) for file in FILES.values()) >= 25
    assert sum(bool(file.rows) for file in FILES.values()) >= 30


def test_names_that_can_be_mapped_are_those_of_the_formats():
    columns = {name for part in (FORMATS, OPTIONAL) for names in part.values() for name in names}
    assert set(COLUMNS) == columns | {*ROW_FIELDS, *ANSWERS, *FIGURES}
    honoured = {name for name, kind in MESSAGE_FIELDS.items() if kind != "refuse"}
    assert set(MARKS) == honoured - {"label"}
