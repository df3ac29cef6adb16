"""Files of a layout that is not read: the error says how to make one that is."""

from __future__ import annotations

import csv
import gzip
import io
import json
import random
import subprocess
import sys

import pytest

from liger_cli.data.examples import RowOptions, load_examples
from liger_cli.errors import DataError
from liger_cli.training.model.tokenizers import byte_tokenizer

ROWS = [{"prompt": f"say {i}", "completion": "w\u00f6rd"} for i in range(3)]
CHATS = [
    {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": f"a{i}"}]}
    for i in range(3)
]


def load(path):
    return load_examples(str(path), byte_tokenizer(), RowOptions(512, 264))


def problem(path) -> DataError:
    with pytest.raises(DataError) as error:
        load(path)
    assert str(path) in error.value.message
    return error.value


def columns_of(rows) -> dict:
    return {key: [row[key] for row in rows] for key in rows[0]}


WRAPPED = {
    "data": (lambda rows: {"data": rows}, "under data;"),
    "train": (lambda rows: {"train": rows, "version": 1}, "under train;"),
    "deep": (lambda rows: {"a b": {"train": rows}}, "under a b.train;"),
    "columns": (columns_of, "each column is one list"),
    "pandas": (
        lambda rows: {k: {str(i): v for i, v in enumerate(c)} for k, c in columns_of(rows).items()},
        "each column is one object",
    ),
    "index": (lambda rows: {str(i): row for i, row in enumerate(rows)}, "values of an object"),
}


@pytest.mark.parametrize("rows", [ROWS, CHATS], ids=["prompts", "messages"])
@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("kind", WRAPPED)
def test_case_229_wrapped_json_has_a_command_that_unwraps_it(tmp_path, kind, indent, rows):
    wrap, words = WRAPPED[kind]
    path = tmp_path / "d.json"
    path.write_text(json.dumps(wrap(rows), indent=indent))
    hint = problem(path).hint
    assert words in hint
    code = hint.partition('python -c "')[2].partition('" <')[0]
    made = subprocess.run(
        [sys.executable, "-c", code], input=path.read_bytes(), stdout=subprocess.PIPE, check=True
    )
    assert json.loads(made.stdout) == rows


def test_case_229_one_object_over_several_lines_is_a_row(tmp_path):
    path = tmp_path / "d.json"
    path.write_text(json.dumps(ROWS[0], indent=2))
    assert load(path).stats.rows == 1


def table(delimiter: str) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, ROWS[0], delimiter=delimiter)
    writer.writeheader()
    writer.writerows(ROWS)
    return text.getvalue()


@pytest.mark.parametrize(
    ("ending", "delimiter", "hint"),
    [
        (".csv", ";", "delimiter=';'"),
        (".csv", "|", "delimiter='|'"),
        (".tsv", ";", "delimiter=';'"),
        (".csv", "\t", "name it d.tsv"),
        (".tsv", ",", "name it d.csv"),
    ],
)
def test_case_229_another_delimiter_is_named(tmp_path, ending, delimiter, hint):
    path = tmp_path / f"d{ending}"
    path.write_text("\ufeff" + table(delimiter), encoding="utf-8")
    assert hint in problem(path).hint
    own = "\t" if ending == ".tsv" else ","
    path.write_text(table(own))
    assert load(path).stats.rows == 3


CONTENT = {
    ".csv": table(","),
    ".tsv": table("\t"),
    ".txt": "w\u00f6rd\n",
    ".json": json.dumps(ROWS, ensure_ascii=False),
    ".jsonl": "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS),
}


@pytest.mark.parametrize("encoding", ["cp1252", "utf-16", "utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("ending", CONTENT)
def test_case_229_another_encoding_is_named(tmp_path, ending, encoding):
    path = tmp_path / f"d{ending}"
    path.write_bytes(CONTENT[ending].encode(encoding))
    found = problem(path)
    assert "not UTF-8" in found.message
    assert ("CP1252" if encoding == "cp1252" else "iconv -f UTF-16 ") in found.hint


@pytest.mark.parametrize("ending", CONTENT)
def test_case_229_a_mark_of_utf8_is_no_part_of_the_data(tmp_path, ending):
    plain, marked = tmp_path / f"a{ending}", tmp_path / f"b{ending}"
    plain.write_text(CONTENT[ending], encoding="utf-8")
    marked.write_text(CONTENT[ending], encoding="utf-8-sig")
    assert load(marked).examples[:] == load(plain).examples[:]


@pytest.mark.parametrize("name", ["d.jsonl.gz", "d.jsonl", "d.csv"])
def test_case_229_compressed_files_are_unpacked_first(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(gzip.compress(CONTENT[".jsonl"].encode()))
    assert "gunzip" in problem(path).hint


def test_case_229_other_names_say_how_to_name_them(tmp_path):
    upper, parquet = tmp_path / "d.CSV", tmp_path / "d.jsonl"
    upper.write_text(CONTENT[".csv"])
    assert problem(upper).hint == "endings are lower case: name it d.csv"
    parquet.write_bytes(b"PAR1...")
    assert problem(parquet).hint == "name it .parquet"


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("ending", [".csv", ".json"])
def test_case_244_a_byte_error_names_its_line(tmp_path, ending, mark, newline):
    """Fields of several lines, and files longer than any buffer."""
    generator = random.Random(0)
    for _ in range(12):
        words = [["w\u00f6rd"] * generator.randint(1, 5) for _ in range(generator.choice([3, 400]))]
        rows = [{"prompt": "say", "completion": newline.join(said)} for said in words]
        if ending == ".json":
            text = json.dumps(rows, indent=1, ensure_ascii=False).replace("\n", newline)
        else:
            stream = io.StringIO()
            writer = csv.writer(stream, lineterminator=newline)
            writer.writerows([("prompt", "completion"), *(row.values() for row in rows)])
            text = stream.getvalue()
        content = text.encode()
        place = content.index(b"rd", generator.randrange(len(content) - 20))
        path = tmp_path / f"d{ending}"
        path.write_bytes(mark + content[:place] + b"\xff" + content[place:])
        line = content[:place].count(b"\n") + 1
        assert f"d{ending}:{line}: not UTF-8" in problem(path).message


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_case_244_rows_of_csv_are_named_by_their_first_line(tmp_path, newline):
    path = tmp_path / "d.csv"
    lines = ["prompt,completion", '"a', "", 'b",c', "", "only"]
    path.write_bytes(newline.join(lines).encode())
    assert "d.csv:6: 1 fields, but the header names 2" in problem(path).message
    path.write_bytes(newline.join([*lines[:5], '"x', "y"]).encode())
    assert "d.csv:7: not CSV: unexpected end of data in the row that begins on line 6" in (
        problem(path).message
    )
    path.write_bytes(newline.join([*lines[:2], "", 'b",c,d', "e,f"]).encode())
    assert "d.csv:2: 3 fields" in problem(path).message
