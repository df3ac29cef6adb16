"""The presets of configs/models: each loads, and has the shape it says it has."""

from __future__ import annotations

import pytest
import yaml

from liger_cli.training.model.presets import configs_directory, preset_names
from liger_cli.training.model.source import build_meta_model, list_presets, resolve_model
from liger_cli.training.model.tokenizers import byte_tokenizer

# As published with the weights, tied parameters counted once.
PUBLISHED = {
    "llama": 134_515_008,
    "llama-1b": 1_235_814_400,
    "llama-3b": 3_212_749_824,
    "llama-8b": 8_030_261_248,
    "llama-70b": 70_553_706_496,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-7b": 7_615_616_512,
    "mistral-7b": 7_248_023_552,
    "mixtral-8x7b": 46_702_792_704,
    "qwen3-30b-a3b": 30_532_122_624,
    "olmoe-1b-7b": 6_919_161_856,
    "gpt-oss-20b": 20_914_757_184,
    "gemma2-2b": 2_614_341_888,
    "gemma2-9b": 9_241_705_984,
    "gemma3-1b": 999_885_952,
    "phi3-mini": 3_821_079_552,
}
SMALL = sorted(set(preset_names()) - set(PUBLISHED))


@pytest.mark.parametrize("name", preset_names())
def test_shape(name):
    source = resolve_model(name)
    model = build_meta_model(source)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    assert num_parameters == source.num_parameters == PUBLISHED.get(name, num_parameters)
    assert model.config.model_type == source.family
    # A misspelt key is kept by the configuration and read by nobody.
    defaults = type(model.config)()
    # Spelt as transformers 4 reads it; 5 keeps it inside of rope_parameters.
    undeclared = {"rope_theta", "rope_scaling", "rope_local_base_freq", "partial_rotary_factor"}
    # Some attention reads it although its configuration does not declare it.
    undeclared.add("head_dim")
    unknown = {key for key in source.config if not hasattr(defaults, key)} - undeclared
    assert not unknown


@pytest.mark.parametrize("name", preset_names())
def test_file(name):
    text = (configs_directory() / "models" / f"{name}.yaml").read_text()
    content = yaml.safe_load(text)
    assert set(content) <= {"description", "num_parameters", "package", "config"}
    # YAML reads 1e-5 as a string; it wants 1.0e-5.
    numbers = {k: v for k, v in content["config"].items() if k.endswith(("eps", "theta"))}
    assert all(isinstance(value, float) for value in numbers.values()), numbers
    assert ("random weights" in content["description"]) == ("package" not in content)


@pytest.mark.parametrize("name", SMALL)
def test_small_preset_fits_the_byte_tokenizer(name):
    config = resolve_model(name).config
    config = config.get("text_config", config)
    tokenizer = byte_tokenizer()
    assert config["vocab_size"] == len(tokenizer) == 264
    assert config["pad_token_id"] == tokenizer.pad_token_id != tokenizer.eos_token_id
    assert config["eos_token_id"] == tokenizer.eos_token_id


def test_rope_scaling_reaches_the_model():
    config = build_meta_model(resolve_model("llama-1b")).config.to_dict()
    rope = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    assert rope["rope_type"] == "llama3"
    assert rope["factor"] == 32.0
    assert rope.get("rope_theta", config.get("rope_theta")) == 500000.0


def test_list_presets():
    sources = list_presets()
    assert [source.name for source in sources] == preset_names()
    assert [source.name for source in sources if source.kind == "package"] == ["llama"]
    assert {"mistral", "qwen2", "qwen3", "gemma2", "mixtral"} <= set(SMALL)


def test_configs_inside_the_wheel_go_first(monkeypatch, tmp_path):
    import liger_cli

    (tmp_path / "liger_cli" / "configs").mkdir(parents=True)
    monkeypatch.setattr(liger_cli, "__file__", str(tmp_path / "liger_cli" / "__init__.py"))
    assert configs_directory() == tmp_path / "liger_cli" / "configs"
