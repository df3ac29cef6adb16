"""Files by folders, patterns and lists: each once, whatever links lead to it."""

from __future__ import annotations

import glob
import json
import os
import random
from pathlib import Path

import pytest

from liger_cli.data.examples import RowOptions, load_examples
from liger_cli.data.places import files_below, matching_files
from liger_cli.data.sources import find_source, find_sources
from liger_cli.data.stream import open_stream
from liger_cli.errors import ConfigError
from liger_cli.training.model.tokenizers import byte_tokenizer

OPTIONS = RowOptions(64, 264)


def write(path: Path, text: str = "a", rows: int = 1) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": f"{text}{i}"}) + "\n" for i in range(rows)))
    return path


@pytest.fixture
def tree(tmp_path):
    """Two files, links back to the root from two folders, and a second name for a file."""
    for name in ("x.jsonl", "one/y.jsonl", "one/two/z.jsonl"):
        write(tmp_path / "in" / name, name)
    (tmp_path / "in" / "one" / "back").symlink_to(tmp_path / "in")
    (tmp_path / "in" / "one" / "two" / "back").symlink_to("..")
    (tmp_path / "in" / "again.jsonl").symlink_to(tmp_path / "in" / "x.jsonl")
    return tmp_path / "in"


@pytest.mark.parametrize("pattern", ["", "**/*.jsonl", "**", "**/**/*.jsonl", "*/../**/*.jsonl"])
def test_case_237_each_file_once(tree, pattern):
    source = find_source(str(tree / pattern))
    names = sorted(path.resolve().name for path in source.files)
    assert names == ["x.jsonl", "y.jsonl", "z.jsonl"]
    assert load_examples(str(tree / pattern), byte_tokenizer(), OPTIONS).stats.rows == 3


def test_case_237_many_links_back_take_no_time(tree):
    for i in range(12):
        (tree / "one" / f"link{i}").symlink_to(tree)
    assert len(matching_files(str(tree / "**" / "*.jsonl"))) == 3
    assert len(files_below(tree)) == 3


def test_case_237_what_a_link_leads_to_is_read(tmp_path):
    write(tmp_path / "far" / "a.jsonl")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "link").symlink_to(tmp_path / "far")
    (tmp_path / "in" / "broken.jsonl").symlink_to(tmp_path / "nowhere")
    for name in ("in", "in/**/*.jsonl", "in/*/*.jsonl", "in/link/*.jsonl"):
        assert len(find_source(str(tmp_path / name)).files) == 1, name


@pytest.mark.parametrize("seed", range(6))
def test_case_237_patterns_without_links_match_as_in_glob(tmp_path, seed):
    generator = random.Random(seed)
    for i in range(30):
        depth = generator.randint(0, 3)
        folders = [generator.choice(["a", "b", ".h", "a.b", "[x]"]) for _ in range(depth)]
        write(tmp_path.joinpath(*folders, generator.choice([f"{i}.jsonl", f".{i}.jsonl", f"{i}x"])))
    for pattern in (
        "**/*.jsonl",
        "*/*.jsonl",
        "a/**/*.jsonl",
        "**/b/*",
        "**/a/**/*",
        "**",
        "[[]x]/**/*",
    ):
        wanted = [
            Path(match)
            for match in glob.glob(str(tmp_path / pattern), recursive=True)
            if os.path.isfile(match)
        ]
        assert matching_files(str(tmp_path / pattern)) == sorted(set(wanted)), pattern


def test_case_237_patterns_of_the_current_folder(tmp_path, monkeypatch):
    write(tmp_path / "a" / "b.jsonl")
    monkeypatch.chdir(tmp_path)
    assert matching_files("**/*.jsonl") == [Path("a/b.jsonl")]
    assert matching_files("*/*.jsonl") == [Path("a/b.jsonl")]


@pytest.mark.parametrize("streaming", [False, True])
def test_case_237_a_file_that_is_named_twice_is_refused(tmp_path, streaming):
    one, two = write(tmp_path / "a.jsonl"), write(tmp_path / "b.jsonl")
    link = tmp_path / "c.jsonl"
    link.symlink_to(one)

    def load(*names: object) -> int:
        text = ",".join(map(str, names))
        if streaming:
            open_stream(text, byte_tokenizer(), OPTIONS, buffer_size=4, seed=0)
            return len(find_sources(text))
        return len(load_examples(text, byte_tokenizer(), OPTIONS))

    assert load(one, two) == 2
    for names in ((one, one), (one, link), (two, tmp_path), (f"{one}:0.5", f"{one}:0.5")):
        with pytest.raises(ConfigError, match=r"names .*/[ab].jsonl twice, in .* and in "):
            load(*names)
