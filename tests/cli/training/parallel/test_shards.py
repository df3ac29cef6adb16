"""Shards in a directory: written by some ranks, read by others, and put together without any."""

from __future__ import annotations

import json
import os
import pickle
import shutil

import pytest
import torch
import zoo
from peft import get_peft_model_state_dict, load_peft_weights, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from shard_ranks import CASES, build, load_whole, read, run_ranks, state_of, train, write
from transformers import AutoModelForCausalLM

from liger_cli.errors import ConfigError, DataError
from liger_cli.training.checkpoints.sharded_state import read_shards, shards_of, write_shards
from liger_cli.training.checkpoints.shards import ShardReader
from liger_cli.training.checkpoints.tensor_files import Shape, write_safetensors
from liger_cli.training.model.source import load_model, resolve_model
from liger_cli.training.parallel.checkpoint import consolidate

# What its fixtures run is run once, on one worker.
pytestmark = pytest.mark.xdist_group("shards")


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Every case as two ranks have written it."""
    out = tmp_path_factory.mktemp("shards")
    run_ranks(write, (1, 2), out)
    return out


def assert_equal(found, wanted):
    (some, rest), (others, other_rest) = found, wanted
    assert some.keys() == others.keys()
    for name, value in others.items():
        assert torch.equal(some[name], value), name
        assert some[name].dtype == value.dtype, name
    assert rest == other_rest


def kept(directory, kind):
    return torch.load(directory / f"{kind}.pt", weights_only=True)


@pytest.mark.parametrize("sizes", [(1, 3), (2, 2)], ids=["3", "2x2"])
def test_other_ranks_read_what_two_have_written(written, sizes):
    run_ranks(read, sizes, written)
    for name in CASES:
        assert_equal(kept(written / name, "found"), kept(written / name, "wanted"))


@pytest.mark.parametrize("name", CASES)
def test_one_process_reads_what_two_have_written(written, name):
    model, optimizer = build(name)
    before, _ = state_of(model, optimizer)
    read_shards(written / name, model, optimizer)
    wanted = kept(written / name, "wanted")
    assert_equal(state_of(model, optimizer), wanted)
    assert any(not torch.equal(before[key], wanted[0][key]) for key in before)


def test_two_ranks_read_what_one_process_has_saved(tmp_path):
    wanted = {}
    for name in CASES:
        (tmp_path / name).mkdir()
        model, optimizer = build(name)
        train(model, optimizer)
        torch.save(optimizer.state_dict(), tmp_path / name / "whole.pt")
        wanted[name] = state_of(model, optimizer)
    run_ranks(load_whole, (1, 2), tmp_path)
    for name in CASES:
        (found, rest), (whole, whole_rest) = kept(tmp_path / name, "found"), wanted[name]
        for key in (key for key in whole if not key.startswith("model.")):
            assert torch.equal(found[key], whole[key]), key
        assert rest == whole_rest


@pytest.mark.parametrize("name", [name for name in CASES if "lora" not in name])
def test_whole_files_are_those_of_save_pretrained(written, tmp_path, name):
    tensors = kept(written / name, "wanted")[0]
    out, usual = tmp_path / "out", tmp_path / "usual"
    out.mkdir()
    # Of several files the second process writes every other one.
    parts = [consolidate(written / name, out, part=(i, 2), max_file_bytes=20_000) for i in (1, 0)]
    written_files = [file for part in parts for file in part.files]
    assert sorted(written_files) == sorted(path.name for path in out.iterdir())
    assert "model.safetensors.index.json" in written_files
    shutil.copyfile(written / name / "config.json", out / "config.json")
    model, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True, dtype="auto")
    assert not any(info.values())
    for key, value in model.state_dict().items():
        if f"model.{key}" in tensors:
            assert torch.equal(value, tensors[f"model.{key}"]), key
    model.save_pretrained(usual)
    ours = [load_file(path) for path in out.glob("*.safetensors")]
    theirs = load_file(usual / "model.safetensors")
    assert sorted(key for file in ours for key in file) == sorted(theirs)
    for file in ours:
        assert all(torch.equal(value, theirs[key]) for key, value in file.items())
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert sorted(index["weight_map"]) == sorted(theirs)
    assert parts[0].num_parameters == model.num_parameters()
    # And so does the shards' reader.
    direct = load_model(resolve_model(str(written / name)), dtype=model.dtype)
    for key, value in direct.state_dict().items():
        assert torch.equal(value, model.state_dict()[key]), key


@pytest.mark.parametrize("name", ["lora", "lora-head"])
def test_case_85_adapter_is_written_whole(written, name):
    """accelerate #4206: peers write 1/N of it."""
    model, _ = build(name)
    found = load_peft_weights(str(written / name), device="cpu")
    assert found.keys() == get_peft_model_state_dict(model).keys()
    set_peft_model_state_dict(model, found)
    trained, _ = kept(written / name, "wanted")
    assert any(bool(value.any()) for name, value in found.items() if "lora_B" in name)
    for name, value in model.named_parameters():
        if value.requires_grad:
            assert torch.equal(value, trained[f"model.{name}"]), name
    assert all("lora_" in name or "modules_to_save" in name for name in trained)


def test_one_tensor_is_in_memory_at_a_time(written, tmp_path, monkeypatch):
    sizes = []
    read_all = ShardReader.read

    def measured(self, tensors, **options):
        sizes.append(sum(value.nbytes for value in tensors.values()))
        read_all(self, tensors, **options)

    monkeypatch.setattr(ShardReader, "read", measured)
    consolidate(written / "adamw", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    assert max(sizes) == max(value.nbytes for value in tensors.values())
    assert sum(sizes) == sum(value.nbytes for value in tensors.values())


def test_dtype_of_whole_files(written, tmp_path):
    found = consolidate(written / "adamw", tmp_path, dtype=torch.bfloat16)
    assert found.dtype == "bfloat16"
    wanted = kept(written / "adamw", "wanted")[0]
    for name, value in load_file(tmp_path / "model.safetensors").items():
        assert torch.equal(value, wanted[f"model.{name}"].to(torch.bfloat16))


def test_one_process_writes_shards_too(tmp_path):
    model, optimizer = build("adamw")
    train(model, optimizer)
    write_shards(tmp_path, shards_of(model, optimizer))
    other, its_optimizer = build("adamw")
    read_shards(tmp_path, other, its_optimizer)
    assert_equal(state_of(other, its_optimizer), state_of(model, optimizer))


def test_optimizer_of_other_parameters_is_refused(written):
    model, optimizer = build("adamw")
    optimizer.param_groups[0]["params"].pop()
    with pytest.raises(DataError, match="holds the optimizer of other parameters"):
        read_shards(written / "adamw", model, optimizer)


def test_model_of_another_shape_is_refused(written):
    model = zoo.build("llama", vocab_size=200)
    with pytest.raises(DataError, match=r"Size mismatch .* for model\."):
        read_shards(written / "adamw", model)


def test_quantisation_of_shards_names_the_way(written):
    source = resolve_model(str(written / "adamw"))
    with pytest.raises(
        ConfigError, match="sharded checkpoint, whose weights cannot be quantised"
    ) as caught:
        load_model(source, quantization_config=object())
    assert f"liger merge {written / 'adamw'} -o DIR" in caught.value.hint


class Harmful:
    """A pickle that makes a file when it is read."""

    def __init__(self, path):
        self._path = path

    def __reduce__(self):
        return os.mkdir, (str(self._path),)


@pytest.mark.parametrize("content", ["harmful", "cut", "text", "bytes"])
def test_index_of_shards_runs_no_code(written, tmp_path, content):
    checkpoint = shutil.copytree(written / "adamw", tmp_path / "checkpoint")
    index = checkpoint / "dcp" / ".metadata"
    good = index.read_bytes()
    if content == "bytes":
        from torch.distributed.checkpoint.metadata import BytesStorageMetadata

        values = pickle.loads(good)
        values.state_dict_metadata["model.model.norm.weight"] = BytesStorageMetadata()
        bad = pickle.dumps(values)
    else:
        harmful = pickle.dumps(Harmful(tmp_path / "made"))
        bad = {"harmful": harmful, "cut": good[: len(good) // 2], "text": b"{}"}[content]
    index.write_bytes(bad)
    with pytest.raises(DataError, match=rf"{index} cannot be read: "):
        ShardReader(checkpoint / "dcp")
    assert not (tmp_path / "made").exists()


DTYPES = [torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64]
DTYPES += [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def test_file_of_tensors_is_as_safetensors_writes_it(tmp_path):
    """Of every dtype, with odd sizes between them, in an order that is not that of the file."""
    tensors = {}
    for i, dtype in enumerate(DTYPES):
        for shape in ((), (0, 3), (3,), (2, 3, 5)):
            tensors[f"{i}-{len(shape)}-{shape}"] = torch.arange(30)[: 30 if shape else 1].to(dtype)
            size = torch.Size(shape).numel()
            tensors[f"{i}-{len(shape)}-{shape}"] = torch.arange(size).to(dtype).reshape(shape)
    tensors["transposed"] = torch.arange(6.0).reshape(2, 3).T
    shapes = {name: Shape(tuple(value.shape), value.dtype) for name, value in tensors.items()}
    ours, theirs = tmp_path / "ours.safetensors", tmp_path / "theirs.safetensors"
    write_safetensors(ours, shapes, reversed(tensors.items()))
    save_file({name: value.contiguous() for name, value in tensors.items()}, theirs)
    found, wanted = load_file(ours), load_file(theirs)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name], value), name
    assert ours.stat().st_size <= theirs.stat().st_size + 64


@pytest.mark.parametrize("kind", ["missing", "unknown", "shape"])
def test_file_of_other_tensors_than_announced_is_refused(tmp_path, kind):
    value = torch.zeros(2)
    given = {"missing": [], "unknown": [("a", value), ("b", value)], "shape": [("a", value[:1])]}
    with pytest.raises(ValueError, match=r"lacks a|b of shape|a of shape"):
        write_safetensors(tmp_path / "file", {"a": Shape((2,), torch.float32)}, given[kind])
