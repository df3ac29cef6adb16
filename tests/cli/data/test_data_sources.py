"""Where rows come from: kinds of files, folders, mixtures, the cache, processes, and streams."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from liger_cli.common import hub
from liger_cli.config import load_config
from liger_cli.data import cache
from liger_cli.data import examples as data_module
from liger_cli.data.batches import BatchPlan
from liger_cli.data.collate import Collator
from liger_cli.data.encode import IGNORED
from liger_cli.data.examples import RowOptions, load_examples
from liger_cli.data.feed import make_feed
from liger_cli.data.mixture import next_source, row_counts
from liger_cli.data.sources import find_source, split_names
from liger_cli.data.stream import open_stream
from liger_cli.errors import ConfigError, DataError, EnvironmentProblem
from liger_cli.training.model.tokenizers import byte_tokenizer

OPTIONS = RowOptions(64, 264)
ROWS = [{"prompt": f"say {i}: ", "completion": "wo\u00e9 " * (i % 5)} for i in range(1, 12)]


def write(path: Path, rows=ROWS) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def load(name, options: RowOptions = OPTIONS, tokenizer=None, **more):
    return load_examples(str(name), tokenizer or byte_tokenizer(), options, **more)


def texts(examples) -> list[str]:
    return [byte_tokenizer().decode(row["input_ids"]) for row in examples.examples]


# Files.


def test_case_100_every_kind_of_file_gives_the_same_rows(tmp_path):
    wanted = load(write(tmp_path / "d.jsonl"))
    assert wanted.stats.rows == 9
    table = pa.Table.from_pylist(ROWS)
    pq.write_table(table, tmp_path / "d.parquet", row_group_size=3)
    csv = ["prompt,id,completion", *(f'"{r["prompt"]}",7,{r["completion"]}' for r in ROWS)]
    (tmp_path / "d.csv").write_text("\ufeff" + "\r\n".join(csv), encoding="utf-8")
    tabs = ["prompt\tcompletion", *("\t".join(row.values()) for row in ROWS)]
    (tmp_path / "d.tsv").write_text("\n".join(tabs), encoding="utf-8")
    dataset = datasets.Dataset.from_list(ROWS)
    dataset.save_to_disk(tmp_path / "saved")
    both = datasets.DatasetDict({"train": dataset, "test": dataset.select([0])})
    both.save_to_disk(tmp_path / "dict")
    for name in ("d.parquet", "d.csv", "d.tsv", "saved", "dict"):
        found = load(tmp_path / name)
        assert found.examples[:] == wanted.examples[:], name
        unused = ("id",) if name == "d.csv" else ()
        assert found.stats == replace(wanted.stats, unused_columns=unused)
    assert texts(load(tmp_path / "dict", split="eval")) == texts(wanted)[:1]


def test_text_file_is_a_row_a_line(tmp_path):
    (tmp_path / "d.txt").write_bytes(b"\xef\xbb\xbfone \r\n\n   \n  two\nthree")
    wanted = [f"{text}<|im_end|>" for text in ("one ", "  two", "three")]
    assert texts(load(tmp_path / "d.txt")) == wanted


def test_folders_and_globs_are_read_in_the_order_of_names(tmp_path):
    (tmp_path / "in" / "deep").mkdir(parents=True)
    (tmp_path / "in" / ".hidden").mkdir()
    write(tmp_path / "in" / "b.jsonl", ROWS[3:6])
    write(tmp_path / "in" / "a.json", ROWS[:3])
    write(tmp_path / "in" / ".hidden" / "c.jsonl", [{"text": "no"}])
    pq.write_table(pa.Table.from_pylist(ROWS[6:]), tmp_path / "in" / "deep" / "c.parquet")
    (tmp_path / "in" / "README.md").write_text("# data")
    wanted = load(write(tmp_path / "all.jsonl"))
    assert texts(load(tmp_path / "in")) == texts(wanted)
    assert texts(load(tmp_path / "in" / "*.json*")) == texts(wanted)[:5]
    assert texts(load(tmp_path / "in" / "**" / "*.parquet")) == texts(wanted)[5:]
    with pytest.raises(DataError, match=r"no file matches .*\*\.csv"):
        load(tmp_path / "in" / "*.csv")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.md").touch()
    with pytest.raises(DataError, match=r"holds no data file: wanted .jsonl, .*; found .md"):
        load(tmp_path / "empty")


def test_case_100_instructions(tmp_path):
    """Through the chat template where there is one, else in the words of Alpaca."""
    rows = [
        {"instruction": "Add", "input": "1 2", "output": "3", "text": "unused"},
        {"instruction": "Say hi", "input": "", "output": "hi"},
    ]
    path = write(tmp_path / "d.jsonl", rows)
    tokenizer = byte_tokenizer()
    wide = RowOptions(999, 264)
    chat = load(path, wide)
    assert texts(chat)[0] == (
        "<|im_start|>user\nAdd\n\n1 2<|im_end|>\n<|im_start|>assistant\n3<|im_end|>\n"
    )
    tokenizer.chat_template = None
    plain = load(path, wide, tokenizer)
    assert texts(plain)[0].endswith("\n\n### Input:\n1 2\n\n### Response:\n3<|im_end|>")
    assert texts(plain)[1].endswith(
        "request.\n\n### Instruction:\nSay hi\n\n### Response:\nhi<|im_end|>"
    )
    for examples in (chat, plain):
        labels = [[x for x in row["labels"] if x != IGNORED] for row in examples.examples]
        assert [tokenizer.decode(ids) for ids in labels] == ["3<|im_end|>", "hi<|im_end|>"]


def test_nulls_of_a_table_are_absent(tmp_path):
    """A column of structs has the keys of all rows; a template must not see those of others."""
    call = {"function": {"name": "look", "arguments": {"at": "it"}}}
    other = {"function": {"name": "go", "arguments": {"to": "x"}}}
    user = {"role": "user", "content": "hi"}
    messages = [
        [user, {"role": "assistant", "content": None, "tool_calls": [one]}] for one in (call, other)
    ]
    pq.write_table(pa.table({"messages": messages}), tmp_path / "d.parquet")
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.tool_calls %}{% generation %}{{ m.tool_calls | tojson }}"
        "{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
    )
    found = texts(load(tmp_path / "d.parquet", RowOptions(200, 264), tokenizer))
    assert [json.loads(text[2:]) for text in found] == [[call], [other]]


def test_case_96_tools_reach_the_template(tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{{ tools | map(attribute='name') | join(',') }}" + (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}</s>{% endfor %}"
    )
    user, said = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
    tools = [{"name": "look"}, {"name": "go"}]
    rows = [
        {"messages": [user, said], "tools": given} for given in (tools, json.dumps(tools[:1]), None)
    ]
    examples = load(write(tmp_path / "d.jsonl", rows), tokenizer=tokenizer)
    assert [text.partition("[")[0] for text in texts(examples)] == ["look,go", "look", ""]
    for row in examples.examples:
        assert tokenizer.decode([x for x in row["labels"] if x != IGNORED]) == "b</s>"
    assert examples.stats.columns == ("messages", "tools")


def test_case_96_whole_rows_are_trained_when_asked(tmp_path):
    path = write(tmp_path / "d.jsonl", ROWS[:2])
    row = load(path, RowOptions(64, 264, completion_only=False)).examples[1]
    assert row["labels"] == [IGNORED, *row["input_ids"][1:]]
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    path = write(tmp_path / "m.jsonl", [{"messages": messages}])
    row = load(path, RowOptions(64, 264, assistant_only=False)).examples[0]
    assert row["labels"] == [IGNORED, *row["input_ids"][1:]]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("d.csv", b"prompt,completion\na\n", "d.csv:2: 1 fields, but the header names 2"),
        ("d.csv", b"a,b\n1,2\n", "d.csv:2: found the columns a, b; wanted text; or prompt"),
        ("d.csv", b"", "d.csv holds no rows"),
        ("d.csv", b'text\n"a', "d.csv:.: not CSV: unexpected end of data"),
        ("d.csv", b"text\n\xff\n", "d.csv:.: not UTF-8"),
        ("d.parquet", b"PAR1", "d.parquet: not Parquet"),
        ("d.txt", b"a\n\xff", "d.txt:2: not UTF-8"),
    ],
)
def test_case_100_refused_files(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        load(tmp_path / name)


def test_parquet_without_a_known_column(tmp_path):
    pq.write_table(pa.table({"question": ["a"], "answer": ["b"]}), tmp_path / "d.parquet")
    with pytest.raises(DataError, match=r"d.parquet:1: found the columns question, answer; wanted"):
        load(tmp_path / "d.parquet")
    pq.write_table(pa.table({"text": [b"a"]}), tmp_path / "d.parquet")
    with pytest.raises(DataError, match=r"d.parquet:1: text must be a string, found a bytes"):
        load(tmp_path / "d.parquet")


def test_saved_datasets_that_cannot_be_used(tmp_path):
    one = datasets.Dataset.from_list(ROWS)
    datasets.DatasetDict({"train": one}).save_to_disk(tmp_path / "dict")
    with pytest.raises(DataError, match="has the splits train; wanted validation or test"):
        load(tmp_path / "dict", split="eval")
    for file in (tmp_path / "dict" / "train").glob("*.arrow"):
        file.write_bytes(b"not arrow")
    with pytest.raises(DataError, match="cannot be read as a saved dataset"):
        load(tmp_path / "dict")


def test_hub_names(monkeypatch, liger):
    monkeypatch.setattr(hub, "_is_reachable", lambda: False)
    with pytest.raises(
        EnvironmentProblem, match=r"some/data: there is no such file, .* hub cannot"
    ):
        load("some/data")
    done = liger("train", "--model", "qwen3", "--dataset", "some/data", "--use-cpu")
    assert done.code == 3
    monkeypatch.setattr(hub, "_is_reachable", lambda: True)
    asked = []

    def load_dataset(*words, split, streaming):
        asked.append((*words, split, streaming))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda *words: ["train", "validation"])
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert load("some/data:en").stats.rows == 9
    assert load("some/data", split="eval").stats.rows == 9
    assert asked == [("some/data", "en", "train", False), ("some/data", None, "validation", False)]


# Mixtures.


def test_names_and_weights(tmp_path):
    assert split_names("a.jsonl:0.7, b.parquet") == [("a.jsonl", 0.7), ("b.parquet", None)]
    assert split_names("org/data:en") == [("org/data:en", None)]
    odd = write(tmp_path / "a,b:2")
    assert split_names(str(odd)) == [(str(odd), None)]
    for text in ("a.jsonl:0,b", "a:-1", "a,,b", "a:nan"):
        with pytest.raises(ConfigError, match="a weight above 0"):
            split_names(text)


def test_config_takes_a_list_of_datasets(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("model: m\ndataset: [{path: a.jsonl, weight: 0.7}, b.parquet]\n")
    config = load_config(file)
    assert config.dataset == "a.jsonl:0.7,b.parquet"
    (tmp_path / "again.yaml").write_text(config.to_yaml())
    assert load_config(tmp_path / "again.yaml") == config
    for bad in ("[{path: a, weigth: 1}]", "[{weight: 1}]", "[{path: a, weight: 0}]"):
        file.write_text(f"model: m\ndataset: {bad}\n")
        with pytest.raises(
            ConfigError, match=r"c.yaml:2.*(a dataset of a list|mean weight|weight should)"
        ):
            load_config(file)


def test_weights_are_shares_and_no_row_is_left_out():
    assert row_counts([10, 30], [None, None]) == [10, 30]
    assert row_counts([10, 30], [1, None]) == [30, 30]
    assert row_counts([10, 30], [0.25, 0.75]) == [10, 30]
    assert row_counts([10, 30], [3, 1]) == [90, 30]
    taken = [0, 0]
    for number in range(1, 101):
        taken[next_source(taken, [0.7, 0.3])] += 1
        assert abs(taken[0] - 0.7 * number) <= 1


def test_mixture(tmp_path):
    first = write(tmp_path / "a.jsonl", [{"text": f"a{i}"} for i in range(4)])
    second = write(tmp_path / "b.jsonl", ROWS[:3])
    plain = load(f"{first},{second}")
    assert texts(plain) == texts(load(first)) + texts(load(second))
    assert plain.stats.columns == ("text", "prompt", "completion")
    mixed = load(f"{first}:1,{second}:2")
    assert Counter(texts(mixed)) == Counter(texts(load(first))) + Counter(2 * texts(plain)[4:]) + (
        Counter(texts(plain)[4:6])
    )
    assert len(mixed) == 12
    assert mixed.stats.rows == 7
    assert mixed.notes[1] == f"{second}: 8 of its 3 rows an epoch"


def test_train_on_a_mixture(train, data, tmp_path):
    other = write(tmp_path / "other.jsonl", [{"text": "hello"}] * 4)
    done = train("--dataset", f"{data}:1,{other}:1")
    assert done.code == 0, done.err
    assert "23 of its 4 rows an epoch" in done.err
    words = ("--eval-fraction", 0.1, "--output-dir", tmp_path / "other")
    done = train("--dataset", f"{data}:1,{other}:1", *words)
    assert done.code == 2
    assert "set eval_dataset" in done.err


# The cache.


@pytest.fixture
def kept(monkeypatch, tmp_path):
    """A cache of its own, in which small data are kept too; lists what was tokenised."""
    monkeypatch.setattr(cache, "MIN_BYTES", 0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    made = []
    make = data_module.RowMaker.__call__

    def noted(self, records):
        made.append(len(records))
        return make(self, records)

    monkeypatch.setattr(data_module.RowMaker, "__call__", noted)
    return made


def test_cache_is_found_by_content(tmp_path, kept):
    path = write(tmp_path / "d.jsonl")
    first = load(path)
    assert kept == [11]
    again = load(shutil.copy(path, tmp_path / "other.jsonl"))
    assert kept == [11]
    assert again.examples[:] == first.examples[:]
    assert again.stats == first.stats
    tokenizer = byte_tokenizer()
    tokenizer.chat_template += " "
    added = byte_tokenizer()
    added.add_tokens(["say"])
    for options, other in (
        (RowOptions(63, 264), None),
        (RowOptions(64, 264, completion_only=False), None),
        (OPTIONS, tokenizer),
        (RowOptions(64, 300), added),
    ):
        load(path, options, other)
    assert kept == [11] * 5
    write(path, ROWS[:-1])
    load(path)
    assert kept == [11] * 5 + [10]


@pytest.mark.parametrize("file", ["rows.arrow", "counts.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "gone"])
def test_damaged_cache_is_made_anew_and_said(tmp_path, kept, file, damage):
    path = write(tmp_path / "d.jsonl")
    first = load(path)
    (entry,) = (tmp_path / "cache" / "liger" / "data").glob(f"*/{file}")
    content = entry.read_bytes()
    middle = len(content) // 2
    entry.unlink()
    if damage != "gone":
        tail = bytes([content[middle] ^ 1]) + content[middle + 1 :] if damage == "flip" else b""
        entry.write_bytes(content[:middle] + tail)
    told = []
    again = load(path, notify=told.append)
    assert kept == [11, 11]
    assert len(told) == 1
    assert "damaged and are tokenized again" in told[0]
    assert again.examples[:] == first.examples[:]
    told.clear()
    load(path, notify=told.append)
    assert not told


def test_cache_that_cannot_be_written(tmp_path, kept, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    told = []
    assert load(write(tmp_path / "d.jsonl"), notify=told.append).stats.rows == 9
    assert "rows stay in memory" in told[0]


def test_small_data_are_not_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    load(write(tmp_path / "d.jsonl"))
    assert not (tmp_path / "cache").exists()


# Processes.


def test_number_of_processes_changes_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(data_module, "BATCH", 7)
    path = write(tmp_path / "d.jsonl", ROWS * 9)
    one, two = (load(path, num_proc=number) for number in (1, 2))
    assert one.examples[:] == two.examples[:]
    assert one.stats == two.stats
    write(path, [*ROWS * 5, {"prompt": "a"}, *ROWS])
    with pytest.raises(DataError, match=r"d.jsonl:56: the column completion is missing"):
        load(path, num_proc=2)


# Streams.


def stream_of(name, *, buffer_size=5, seed=1, packing=None, max_length=64):
    options = RowOptions(max_length, 264)
    examples = open_stream(
        str(name), byte_tokenizer(), options, buffer_size=buffer_size, seed=seed, packing=packing
    )
    return examples


def windows(examples, first, last, *, state=None, rows_per_step=4, rank=0, processes=1):
    plan = BatchPlan(0, rows_per_step // processes, 1, 0, rank, processes)
    feed = make_feed(examples.examples, plan, Collator())
    if state is not None:
        feed.load_state_dict(state)
    for window in feed.windows(first, last):
        # As a checkpoint has it.
        yield window, json.loads(json.dumps(feed.state_dict()))


def said(window) -> list[str]:
    tokenizer = byte_tokenizer()
    return [
        tokenizer.decode(ids[:length])
        for batch in window
        for ids, length in zip(batch["input_ids"], batch["attention_mask"].sum(1), strict=True)
        if (batch["labels"] != IGNORED).any()
    ]


def test_stream_gives_every_row_once_an_epoch(tmp_path):
    path = write(tmp_path / "d.jsonl")
    wanted = texts(load(path))
    examples = stream_of(path)
    found = [said(window) for window, _ in windows(examples, 1, 6)]
    # 9 rows of 11 records: windows of 4, 4 and 1, twice.
    assert [len(window) for window in found] == [4, 4, 1] * 2
    for epoch in (found[:3], found[3:]):
        assert sorted(sum(epoch, [])) == sorted(wanted)
    assert found[:3] != found[3:]
    assert found == [said(window) for window, _ in windows(stream_of(path), 1, 6)]
    assert found != [said(window) for window, _ in windows(stream_of(path, seed=2), 1, 6)]


@pytest.mark.parametrize("packing", [None, "bfd"])
@pytest.mark.parametrize("name", ["{0}", "{0},{1}", "{0}:1,{1}:2.5"], ids=["one", "two", "weights"])
def test_case_93_stream_resumes_at_any_window(tmp_path, name, packing):
    first = write(tmp_path / "a.jsonl")
    second = write(tmp_path / "b.jsonl", [{"text": f"b{i}" * i} for i in range(1, 8)])
    name = name.format(first, second)
    unbroken = list(windows(stream_of(name, packing=packing), 1, 12))
    for step in range(12):
        examples = stream_of(name, packing=packing)
        state = unbroken[step - 1][1] if step else None
        rest = list(windows(examples, step + 1, 12, state=state))
        for (window, after), (wanted, wanted_after) in zip(rest, unbroken[step:], strict=True):
            assert after == wanted_after
            for batch, other in zip(window, wanted, strict=True):
                assert {k: v.tolist() for k, v in batch.items()} == {
                    k: v.tolist() for k, v in other.items()
                }


def test_stream_mixes_by_weight(tmp_path):
    first = write(tmp_path / "a.jsonl", [{"text": f"a{i}"} for i in range(40)])
    second = write(tmp_path / "b.jsonl", [{"text": f"b{i}"} for i in range(10)])
    examples = stream_of(f"{first}:1,{second}:1", buffer_size=10)
    found = [text for window, _ in windows(examples, 1, 5) for text in said(window)]
    assert sum(text.startswith("b") for text in found) == 10
    examples = stream_of(f"{first},{second}", buffer_size=10)
    found = [text for window, _ in windows(examples, 1, 13) for text in said(window)]
    assert sorted(found) == sorted(texts(load(first)) + texts(load(second)))


def test_stream_is_shared_among_processes(tmp_path):
    path = write(tmp_path / "d.jsonl")
    whole = [said(window) for window, _ in windows(stream_of(path), 1, 3)]
    parts = [
        [said(window) for window, _ in windows(stream_of(path), 1, 3, rank=rank, processes=2)]
        for rank in (0, 1)
    ]
    for window, left, right in zip(whole, *parts, strict=True):
        assert (left, right) == (window[::2], window[1::2])


def test_stream_refuses(tmp_path):
    path = write(tmp_path / "d.jsonl", [*ROWS, {"prompt": "a"}])
    with pytest.raises(DataError, match=r"d.jsonl:12: the column completion is missing"):
        list(windows(stream_of(path), 1, 9))
    path = write(tmp_path / "e.jsonl", [{"prompt": "a", "completion": ""}] * 3)
    with pytest.raises(DataError, match="none of the 3 rows of .*e.jsonl has a token to train on"):
        list(windows(stream_of(path), 1, 1))
    with pytest.raises(ConfigError, match="synthetic data are made"):
        stream_of("synthetic")


def test_sources_skip_what_was_read(tmp_path):
    source = find_source(str(write(tmp_path / "d.jsonl")))
    assert list(source.read(4)) == list(source.read())[4:]
    assert list(source.read(99)) == []


def metrics(run_dir: Path) -> list[tuple]:
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    keys = ("step", "loss", "grad_norm", "tokens", "trained_tokens")
    return [tuple(json.loads(line)[key] for key in keys) for line in lines]


@pytest.mark.parametrize("packing", [(), ("--packing",)], ids=["rows", "packed"])
def test_case_93_streamed_run_resumes_exactly(train, run_dir, tmp_path, packing):
    words = ("--streaming", "--shuffle-buffer-size", 9, *packing, "--save-steps", 2)
    words += ("--max-steps", 9, "--learning-rate", 1e-3, "--gradient-accumulation-steps", 2)
    words += ("--per-device-train-batch-size", 2)
    done = train(*words, "--json")
    assert done.code == 0, done.err
    report = done.json()
    # More than one epoch was read, and counted.
    assert report["data"]["rows"] > 23
    stopped = tmp_path / "stopped"
    shutil.copytree(run_dir, stopped)
    for step in (6, 8, 9):
        shutil.rmtree(stopped / f"checkpoint-{step}")
    (stopped / "report.json").unlink()
    done = train(*words, "--output-dir", stopped, "--resume", "auto", "--json")
    assert done.code == 0, done.err
    assert metrics(stopped) == metrics(run_dir)
    assert done.json()["data"] == report["data"]


def test_streaming_needs_steps(liger, data):
    done = liger("train", "--model", "qwen3", "--dataset", data, "--streaming")
    assert done.code == 2
    assert "streaming needs max_steps" in done.err
