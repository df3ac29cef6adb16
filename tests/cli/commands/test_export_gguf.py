"""liger export gguf: the file read back by gguf's reader, and by transformers, is the model."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.trainers import BpeTrainer
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from liger_cli.app import main
from liger_cli.commands.export.gguf_file import export_gguf
from liger_cli.commands.export.gguf_tokenizer import _SPLITS
from liger_cli.errors import ConfigError, EnvironmentProblem

gguf = pytest.importorskip("gguf")

TEXTS = [
    "The quick brown fox jumps over the lazy dog, and the dog doesn't mind: it's 12345 o'clock.",
    "Numbers such as 1, 22, 333 and 4444 stand   between words.\n\n\tTabs and lines too!",
    "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich — “voilà”.",
] * 3
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"
QWEN2 = next(pattern for (pattern, _), name in _SPLITS.items() if name == "qwen2")


def byte_level(*steps: Any, ignore_merges: bool = False) -> PreTrainedTokenizerFast:
    """A tokenizer that splits text by some steps, and then merges bytes."""
    backend = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    backend.pre_tokenizer = pre_tokenizers.Sequence(list(steps)) if len(steps) > 1 else steps[0]
    backend.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=380,
        special_tokens=["<pad>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(TEXTS, trainer)
    backend.add_tokens([AddedToken("<think>", special=False, normalized=False)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<pad>",
        chat_template=TEMPLATE,
    )


def qwen_like() -> PreTrainedTokenizerFast:
    return byte_level(
        pre_tokenizers.Split(Regex(QWEN2), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    )


def pieces(*, puts_space: bool) -> PreTrainedTokenizerFast:
    """A tokenizer as converted from SentencePiece: a piece is merged from any two pieces."""
    vocab = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    words = sorted({word for text in TEXTS for word in text.split()})
    vocab += sorted({c for word in words for c in word if c.isascii()} | {"\u2581"})
    for length in (2, 3, 4, 6):
        starts = {("\u2581" + w)[:length] for w in words if w.isascii()}
        vocab += sorted(starts - set(vocab))
    known = set(vocab)
    merges = [
        (piece[:i], piece[i:])
        for piece in vocab[259:]
        for i in range(1, len(piece))
        if piece[:i] in known and piece[i:] in known
    ]
    ids = {piece: i for i, piece in enumerate(vocab)}
    backend = Tokenizer(
        models.BPE(ids, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    replace = normalizers.Replace(" ", "\u2581")
    first = [normalizers.Prepend("\u2581")] if puts_space else []
    backend.normalizer = normalizers.Sequence([*first, replace])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


IS_V5 = int(transformers.__version__.split(".")[0]) >= 5
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 2e-5,
}


def rope(theta: float, **more: Any) -> dict[str, Any]:
    """The rotation, in the form of the installed transformers."""
    if IS_V5:
        return {"rope_parameters": {"rope_type": "default", "rope_theta": theta, **more}}
    return {"rope_theta": theta, "rope_scaling": more or None}


# model type: (its configuration beside SIZES, the architecture of llama.cpp)
MODELS: dict[str, tuple[dict[str, Any], str]] = {
    "llama": ({**rope(5e4), "tie_word_embeddings": False}, "llama"),
    "mistral": ({**rope(1e6), "sliding_window": None, "head_dim": 8}, "llama"),
    "qwen2": ({**rope(1e6), "tie_word_embeddings": True}, "qwen2"),
    "gemma": ({"head_dim": 16}, "gemma"),
    # transformers' loader takes the width of a head, or the scale of attention, from its defaults.
    "qwen3": ({**rope(1e6), "head_dim": 128}, "qwen3"),
    "gemma2": ({"head_dim": 256, "query_pre_attn_scalar": 256, "sliding_window": 8}, "gemma2"),
    "gemma3_text": (
        {
            "head_dim": 256,
            "num_hidden_layers": 6,
            "query_pre_attn_scalar": 256,
            "sliding_window": 8,
        },
        "gemma3",
    ),
}


def save(
    path: Path, model_type: str, tokenizer: Callable[[], Any] = qwen_like, **options: Any
) -> Any:
    """Save a model whose every weight differs, and its tokenizer; return the model."""
    words = tokenizer()
    config = {**SIZES, **MODELS[model_type][0], "vocab_size": len(words) + 3, **options}
    config |= {"bos_token_id": words.bos_token_id, "eos_token_id": words.eos_token_id}
    torch.manual_seed(0)
    built = AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(model_type, **config, pad_token_id=0)
    )
    with torch.no_grad():
        for name, weight in built.named_parameters():
            weight.normal_(1.0 if name.endswith("norm.weight") else 0.0, 0.2)
    built.save_pretrained(path)
    words.save_pretrained(path)
    return built.eval()


def read(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Return the values and the tensors of a file."""
    reader = gguf.GGUFReader(path)
    values = {name: field.contents() for name, field in reader.fields.items()}
    tensors = {
        tensor.name: torch.tensor(gguf.dequantize(tensor.data, tensor.tensor_type))
        for tensor in reader.tensors
    }
    return values, tensors


IDS = torch.arange(3, 40)[None]


# transformers has no loader for gemma of the first version.
@pytest.mark.parametrize("model_type", [name for name in MODELS if name != "gemma"])
def test_transformers_loads_the_same_model(model_type, tmp_path):
    model = save(tmp_path, model_type)
    found = export_gguf(str(tmp_path), tmp_path / "model.gguf", "float32")
    assert found.architecture == MODELS[model_type][1]
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="model.gguf", dtype=torch.float32, attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        ours, wanted = loaded(IDS).logits, model(IDS).logits
    torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("model_type", MODELS)
def test_every_tensor_and_size_is_in_the_file(model_type, tmp_path):
    model = save(tmp_path, model_type)
    found = export_gguf(str(tmp_path), tmp_path / "model.gguf", "float32")
    values, tensors = read(tmp_path / "model.gguf")
    config, name = model.config, MODELS[model_type][1]
    assert found.num_tensors == len(tensors) == len(list(model.parameters()))
    assert values["general.architecture"] == name
    head_dim = getattr(config, "head_dim", None) or 8
    for key, value in {
        "block_count": config.num_hidden_layers,
        "embedding_length": 32,
        "feed_forward_length": 48,
        "context_length": 128,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        "attention.key_length": head_dim,
        "rope.dimension_count": head_dim,
        "vocab_size": config.vocab_size,
    }.items():
        assert values[f"{name}.{key}"] == value, key
    assert values[f"{name}.attention.layer_norm_rms_epsilon"] == pytest.approx(2e-5)
    if name == "gemma2":
        assert values["gemma2.attn_logit_softcapping"] == 50.0
        assert values["gemma2.attention.sliding_window"] == 8
    places = gguf.get_tensor_name_map(gguf.MODEL_ARCH[name.upper()], config.num_hidden_layers)
    for theirs, weight in model.named_parameters():
        weight = weight.detach()
        if name.startswith("gemma") and theirs.endswith("norm.weight"):
            weight = weight + 1
        if name == "llama" and theirs.split(".")[-2] in ("q_proj", "k_proj"):
            # Row i of a head's first half, then that of its second.
            heads = weight.view(-1, 2, head_dim // 2, 32)
            weight = torch.stack((heads[:, 0], heads[:, 1]), dim=2).reshape(weight.shape)
        place = places.get_name(theirs, try_suffixes=(".weight", ".bias"))
        assert torch.equal(tensors[place], weight), theirs
    assert ("output.weight" in tensors) is not bool(config.tie_word_embeddings)


def test_the_rotation_is_in_the_file(tmp_path):
    # Spelled out, what llama.cpp has as constants is allowed.
    constants = {"beta_fast": 32, "beta_slow": 1, "attention_factor": 0.1 * math.log(4) + 1}
    save(tmp_path / "yarn", "qwen3", **rope(1e5, **YARN, **constants))
    export_gguf(str(tmp_path / "yarn"), tmp_path / "yarn.gguf")
    values, _ = read(tmp_path / "yarn.gguf")
    assert values["qwen3.rope.freq_base"] == 1e5
    assert values["qwen3.rope.scaling.type"] == "yarn"
    assert values["qwen3.rope.scaling.factor"] == 4.0
    assert values["qwen3.rope.scaling.original_context_length"] == 32
    more = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    model = save(tmp_path / "llama3", "llama", **rope(1e4, **more))
    export_gguf(str(tmp_path / "llama3"), tmp_path / "llama3.gguf")
    values, tensors = read(tmp_path / "llama3.gguf")
    factors = tensors["rope_freqs.weight"]
    assert "llama.rope.scaling.type" not in values
    # High frequencies stay, low ones are divided by the factor, others lie between.
    assert factors[0] == 1.0
    assert factors[-1] == pytest.approx(8.0)
    stock = 1e4 ** -(torch.arange(0, 8, 2) / 8)
    torch.testing.assert_close(stock / factors, model.model.rotary_emb.inv_freq)


def test_a_window_that_llama_cpp_has_not_is_the_end_of_the_context(tmp_path):
    save(tmp_path, "mistral", sliding_window=64)
    lines: list[str] = []
    export_gguf(str(tmp_path), tmp_path / "model.gguf", notify=lines.append)
    values, _ = read(tmp_path / "model.gguf")
    assert values["llama.context_length"] == 64
    assert "context_length is 64" in lines[0]


@pytest.mark.parametrize(("dtype", "kind"), [("bfloat16", "BF16"), ("float16", "F16")])
def test_matrices_have_the_dtype_and_vectors_are_float32(dtype, kind, tmp_path, capsys):
    model = save(tmp_path, "qwen2").to(getattr(torch, dtype))
    model.save_pretrained(tmp_path)
    with pytest.raises(SystemExit) as end:
        main(["export", "gguf", str(tmp_path), "-o", str(tmp_path / "m.gguf"), "--json"])
    assert end.value.code == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["command"], shown["dtype"]) == ("export gguf", dtype)
    assert shown["num_bytes"] == (tmp_path / "m.gguf").stat().st_size
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    kinds = {len(tensor.shape): tensor.tensor_type.name for tensor in reader.tensors}
    assert kinds == {1: "F32", 2: kind}
    _, tensors = read(tmp_path / "m.gguf")
    weight = model.model.layers[0].mlp.up_proj.weight.detach()
    assert torch.equal(tensors["blk.0.ffn_up.weight"], weight.float())


# Tokenizers -------------------------------------------------------------------------------------

SAID = ["It's the 12th dog: don't\n\n  worry!", "  größer — 4444 “x” <think>a", "", "a<|im_end|>b"]
TOKENIZERS: dict[str, tuple[Callable[[], Any], str]] = {
    "qwen2": (qwen_like, "qwen2"),
    "gpt-2": (lambda: byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False)), "gpt-2"),
    "smollm": (
        lambda: byte_level(
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ),
        "smollm",
    ),
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_byte_level_tokenizer_is_in_the_file(name, tmp_path):
    make, pre = TOKENIZERS[name]
    tokenizer = make()
    save(tmp_path, "llama", make)
    export_gguf(str(tmp_path), tmp_path / "model.gguf")
    values, _ = read(tmp_path / "model.gguf")
    of = {key.removeprefix("tokenizer."): value for key, value in values.items()}
    assert of["ggml.model"] == "gpt2"
    assert of["ggml.pre"] == pre
    assert of["ggml.tokens"][: len(tokenizer)] == tokenizer.convert_ids_to_tokens(
        range(len(tokenizer))
    )
    # Rows of the embedding without a token.
    assert of["ggml.tokens"][len(tokenizer)] == f"[PAD{len(tokenizer)}]"
    kinds = [gguf.TokenType(kind).name for kind in of["ggml.token_type"]]
    assert kinds[:4] == ["CONTROL", "CONTROL", "CONTROL", "NORMAL"]
    assert kinds[-4:] == ["USER_DEFINED", "UNUSED", "UNUSED", "UNUSED"]
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    assert of["ggml.merges"] == [" ".join(pair) for pair in merges]
    assert (of["ggml.bos_token_id"], of["ggml.eos_token_id"]) == (1, 2)
    assert of["ggml.padding_token_id"] == 0
    assert of["ggml.add_bos_token"] is False
    assert of["chat_template"] == TEMPLATE
    if name != "smollm":  # whose splitting transformers does not take from a file
        # Alone, so that no other file of the tokenizer is read.
        (tmp_path / "alone").mkdir()
        (tmp_path / "model.gguf").rename(tmp_path / "alone" / "model.gguf")
        loaded = AutoTokenizer.from_pretrained(tmp_path / "alone", gguf_file="model.gguf")
        for text in [*TEXTS, *SAID]:
            assert loaded(text).input_ids == tokenizer(text).input_ids
        assert loaded.chat_template == TEMPLATE


@pytest.mark.parametrize("puts_space", [True, False])
def test_pieces_of_sentencepiece_have_their_order_as_scores(puts_space, tmp_path):
    tokenizer = pieces(puts_space=puts_space)
    save(tmp_path, "llama", lambda: tokenizer)
    export_gguf(str(tmp_path), tmp_path / "model.gguf")
    values, _ = read(tmp_path / "model.gguf")
    of = {key.removeprefix("tokenizer.ggml."): value for key, value in values.items()}
    assert of["model"] == "llama"
    assert of["add_space_prefix"] is puts_space
    kinds = [gguf.TokenType(kind).name for kind in of["token_type"]]
    assert kinds[:4] == ["UNKNOWN", "CONTROL", "CONTROL", "BYTE"]
    # llama.cpp's rule: of all neighbours, those whose piece has the highest score are put together,
    # and a letter that is no piece is its bytes.
    scores = dict(zip(of["tokens"], of["scores"], strict=True))

    def spell(text: str) -> list[str]:
        parts = list(("\u2581" if puts_space else "") + text.replace(" ", "\u2581"))
        while True:
            pairs = [
                (scores[a + b], -i)
                for i, (a, b) in enumerate(zip(parts, parts[1:], strict=False))
                if a + b in scores
            ]
            if not pairs:
                break
            i = -max(pairs)[1]
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        return [
            piece
            for part in parts
            for piece in ([part] if part in scores else [f"<0x{b:02X}>" for b in part.encode()])
        ]

    for text in TEXTS:
        assert spell(text) == tokenizer.tokenize(text)


def unlike_sentencepiece() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    backend.train_from_iterator(
        TEXTS, BpeTrainer(vocab_size=300, special_tokens=["<unk>"], show_progress=False)
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")


def with_space() -> PreTrainedTokenizerFast:
    return byte_level(pre_tokenizers.ByteLevel(add_prefix_space=True))


def odd_split() -> PreTrainedTokenizerFast:
    return byte_level(
        pre_tokenizers.Split(Regex(r"\d+"), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    )


BASE = {"rope_type": "default", "rope_theta": 2e4}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
# name: (model type, what differs, tokenizer, words of the error)
REFUSALS: dict[str, tuple[str, dict[str, Any], Callable[[], Any], str]] = {
    "activation": ("llama", {"hidden_act": "gelu"}, qwen_like, "activation is 'gelu'"),
    "rope": (
        "llama",
        rope(1e4, rope_type="dynamic", factor=2.0),
        qwen_like,
        "rope_type is 'dynamic'",
    ),
    **{
        f"yarn-{name}": (
            "qwen3",
            rope(1e4, **{**YARN, name: value}),
            qwen_like,
            f"the {name} of its rotation is {value}",
        )
        for name, value in (("beta_fast", 64.0), ("attention_factor", 1.5), ("mscale", 0.7))
    },
    "scale": ("gemma2", {"query_pre_attn_scalar": 20}, qwen_like, "scalar is 20.*divides by 256"),
    "layers": (
        "gemma2",
        {"layer_types": ["full_attention", "full_attention"]},
        qwen_like,
        "all tokens in every 2th alone",
    ),
    "base": (
        "gemma3_text",
        {"rope_parameters": dict.fromkeys(("sliding_attention", "full_attention"), BASE)}
        if IS_V5
        else {"rope_local_base_freq": 2e4},
        qwen_like,
        "do not rotate with base 10000",
    ),
    "split": ("llama", {}, odd_split, "no name for its splitting"),
    "space": ("llama", {}, with_space, "puts a space before the text"),
    "pieces": ("llama", {}, unlike_sentencepiece, "as SentencePiece does"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_a_model_that_llama_cpp_computes_otherwise_is_refused(name, tmp_path):
    model_type, options, tokenizer, words = REFUSALS[name]
    save(tmp_path, model_type, tokenizer, **options)
    with pytest.raises(ConfigError, match=words) as error:
        export_gguf(str(tmp_path), tmp_path / "model.gguf")
    assert f"convert_hf_to_gguf.py {tmp_path}" in (error.value.hint or "")
    assert [path.name for path in tmp_path.glob("*.gguf")] == []


def test_other_model_types_and_adapters_name_the_command_that_helps(tmp_path):
    config = {"model_type": "olmo2", "vocab_size": 100, **SIZES}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="olmo2.*llama, mistral, qwen2") as error:
        export_gguf(str(tmp_path / "config.json"), tmp_path / "model.gguf")
    assert "convert_hf_to_gguf.py" in (error.value.hint or "")
    base = tmp_path / "base"
    save(base, "qwen2")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": str(base), "peft_type": "LORA"})
    )
    with pytest.raises(ConfigError, match="is an adapter") as error:
        export_gguf(str(adapter), tmp_path / "model.gguf")
    assert f"liger merge {adapter}" in (error.value.hint or "")


def test_without_the_package_the_command_that_installs_it_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(EnvironmentProblem, match="export gguf needs gguf") as error:
        export_gguf("qwen3", tmp_path / "model.gguf")
    assert "liger-kernels[gguf]" in (error.value.hint or "")


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    save(tmp_path, "qwen2")
    (tmp_path / "model.gguf").write_bytes(b"old")

    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", full)
    with pytest.raises(EnvironmentProblem, match="No space left"):
        export_gguf(str(tmp_path), tmp_path / "model.gguf")
    assert (tmp_path / "model.gguf").read_bytes() == b"old"
