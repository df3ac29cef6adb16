"""liger export gguf: a model and its tokenizer as one file for llama.cpp."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from liger_cli.commands.export.gguf_model import (
    ARCHITECTURES,
    Architecture,
    add_sizes,
    context_length,
    find_difference,
    tensors_of,
)
from liger_cli.commands.export.gguf_tokenizer import UnknownTokenizer, add_tokenizer
from liger_cli.common.numbers import format_bytes, format_count
from liger_cli.common.optional_packages import require_package
from liger_cli.common.outputs import check_writable, replacing
from liger_cli.errors import ConfigError
from liger_cli.training.model.classifiers import check_writes_text
from liger_cli.training.model.dtypes import stored_dtype
from liger_cli.training.model.source import (
    ModelSource,
    build_meta_model,
    load_model,
    load_tokenizer,
    resolve_model,
)

__all__ = ["ExportedGguf", "export_gguf"]

_INSTALL = "pip install 'liger-kernels[gguf]'"
# Type of the tensors, and of the file, in gguf.
_TYPES = {
    torch.float32: ("F32", "ALL_F32"),
    torch.bfloat16: ("BF16", "MOSTLY_BF16"),
    torch.float16: ("F16", "MOSTLY_F16"),
}


@dataclass(frozen=True)
class ExportedGguf:
    """A file that was written.

    Attributes:
        path: Of the file.
        model: Where the weights are from.
        architecture: Its name in llama.cpp.
        dtype: Of matrices; vectors are float32.
        num_bytes: Size of the file.
    """

    path: str
    model: str
    architecture: str
    dtype: str
    num_parameters: int
    num_tensors: int
    num_bytes: int

    @property
    def lines(self) -> tuple[str, ...]:
        return (
            f"{self.path}: {self.model} as {self.architecture}, "
            f"{format_count(self.num_parameters)} parameters in {self.dtype}, "
            f"{format_bytes(self.num_bytes)}",
            f"smaller: llama-quantize {self.path} MODEL-Q4_K_M.gguf Q4_K_M",
        )


def export_gguf(
    model: str, output: Path, dtype: str = "auto", notify: Callable[[str], None] | None = None
) -> ExportedGguf:
    """Write the file.

    Args:
        model: As --model of other commands takes it.
        output: The file, which may exist.
        dtype: Of matrices: float32, bfloat16, float16, or auto for that of the model's files.
        notify: Called with notices on the model.

    Raises:
        ConfigError: It is an adapter, or llama.cpp would compute something else.
        EnvironmentProblem: The package gguf is missing, or the file cannot be written.
    """
    gguf = require_package("gguf", "export gguf", _INSTALL)
    check_writable(output, "--output")
    source = resolve_model(model, notify)
    if source.adapter is not None:
        raise ConfigError(
            f"{model} is an adapter",
            hint=f"liger merge {model} --output DIR, then liger export gguf DIR",
        )
    check_writes_text(source, model)
    kind = stored_dtype(source) if dtype == "auto" else getattr(torch, dtype)
    architecture = ARCHITECTURES.get(source.family)
    if architecture is None:
        known = ", ".join(ARCHITECTURES)
        raise _refusal(source, output, f"liger writes the model types {known}")
    config = build_meta_model(source).config
    difference = find_difference(config, architecture)
    if difference is not None:
        raise _refusal(source, output, difference)
    context = context_length(config, architecture)
    if notify is not None and context < config.max_position_embeddings:
        notify(
            f"context_length is {context}, the window of the model's attention: llama.cpp has none "
            "for it, and would attend to more tokens beyond"
        )
    loaded: Any = load_model(source, dtype=kind, notify=notify)
    try:
        with replacing(output) as unfinished:
            num_tensors = _write(gguf, unfinished, source, loaded, architecture, kind)
    except UnknownTokenizer as error:
        raise _refusal(source, output, f"the tokenizer: {error}") from error
    except KeyError as error:
        raise _refusal(source, output, f"GGUF has no place for its weight {error}") from error
    return ExportedGguf(
        path=str(output),
        model=source.name,
        architecture=gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH[architecture.name]],
        dtype=str(kind).removeprefix("torch."),
        num_parameters=loaded.num_parameters(),
        num_tensors=num_tensors,
        num_bytes=output.stat().st_size,
    )


def _refusal(source: ModelSource, output: Path, reason: str) -> ConfigError:
    place = source.path or "DIR"
    return ConfigError(
        f"{source.name} ({source.family}) cannot be written as GGUF here: {reason}",
        hint=f"llama.cpp's own converter may know it: python convert_hf_to_gguf.py {place} "
        f"--outfile {output}",
    )


def _write(
    gguf: Any,
    path: Path,
    source: ModelSource,
    model: Any,
    architecture: Architecture,
    dtype: torch.dtype,
) -> int:
    """Write everything; return the number of tensors. Only one tensor is converted at a time."""
    of_matrices, of_file = _TYPES[dtype]
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH[architecture.name]])
    try:
        writer.add_type(gguf.GGUFType.MODEL)
        writer.add_name(Path(source.name).name)
        writer.add_file_type(gguf.LlamaFileType[of_file])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        add_sizes(writer, model.config, architecture)
        add_tokenizer(writer, load_tokenizer(source), model.get_input_embeddings().num_embeddings)
        tensors = list(tensors_of(model, architecture))
        kinds = []
        for name, shape, _ in tensors:
            # llama.cpp adds and multiplies by vectors in float32 alone.
            kind = gguf.GGMLQuantizationType["F32" if len(shape) == 1 else of_matrices]
            kinds.append(kind)
            num_bytes = shape.numel() * (4 if kind.name == "F32" else 2)
            writer.add_tensor_info(name, tuple(shape), "", num_bytes, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for (_, _, values), kind in zip(tensors, kinds, strict=True):
            writer.write_tensor_data(gguf.quantize(values().float().numpy(), kind))
        return len(tensors)
    finally:
        writer.close()
