"""The tokenizer that goes with a model; for random weights one of bytes, built here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from liger_cli.config import RunConfig
from liger_cli.data.shipped_templates import read_template
from liger_cli.errors import ConfigError, EnvironmentProblem, panics_raised
from liger_cli.training.model.demo_model import converted_model
from liger_cli.training.model.presets import ModelSource

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "Preprocessing",
    "byte_tokenizer",
    "check_same_template",
    "load_processor",
    "load_tokenizer",
]

# The presets with random weights have these as ids 0, 1 and 2, before the 256 bytes.
PAD, TURN_START, TURN_END = "<|pad|>", "<|im_start|>", "<|im_end|>"

# Fills the vocabulary up to a multiple of 8, which is what matrix units want.
NUM_RESERVED = 5

CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{ '<|im_start|>' + message['role'] + '\\n' }}
{%- if message['role'] == 'assistant' -%}
{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}
{%- else -%}
{{ message['content'] + '<|im_end|>' }}
{%- endif -%}
{{ '\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<|im_start|>assistant\\n' }}
{%- endif -%}
"""


def byte_tokenizer() -> PreTrainedTokenizerBase:
    """Return a tokenizer with one token a byte and a ChatML template; 264 tokens in all."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = [PAD, TURN_START, TURN_END]
    reserved = [f"<|reserved_{i}|>" for i in range(NUM_RESERVED)]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {word: number for number, word in enumerate([*special, *letters, *reserved])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(word, normalized=False, special=True) for word in special + reserved]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=TURN_END,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )


def load_tokenizer(source: ModelSource) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a model.

    Random presets get the tokenizer of bytes, and so does a config.json without tokenizer files
    beside it. Nothing is downloaded except for a hub model.

    Raises:
        ConfigError: A directory has no tokenizer that can be read.
        EnvironmentProblem: A demo package is missing, or the hub is out of reach.
    """
    if source.adapter is not None and has_tokenizer(source.adapter):
        return _from_files(str(source.adapter), source)
    if source.kind == "random":
        return byte_tokenizer()
    if source.kind == "package":
        return _from_files(str(converted_model(source)), source)
    if source.kind == "hub":
        return _from_files(str(source.path or source.name), source)
    assert source.path is not None
    directory = source.path if source.kind == "directory" else source.path.parent
    if has_tokenizer(directory):
        return _from_files(str(directory), source)
    if source.kind == "config":
        return byte_tokenizer()
    raise ConfigError(
        f"{directory} holds no tokenizer (tokenizer.json, or tokenizer_config.json and its files)",
        hint="save one there with tokenizer.save_pretrained",
    )


def has_tokenizer(directory: Path) -> bool:
    return any(
        (directory / name).is_file()
        for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
    )


def _from_files(place: str, source: ModelSource) -> Any:
    from transformers import AutoTokenizer

    from liger_cli.common.hub import loading_error

    try:
        with panics_raised():
            return AutoTokenizer.from_pretrained(place, trust_remote_code=False)
    # A tokenizer's files fail in the ways of several libraries; what is wrong is in the message.
    except Exception as error:
        raise loading_error(error, f"the tokenizer of {source.name}", source.is_remote) from error


def load_processor(source: ModelSource) -> Any:
    """Return the processor of an image-text model, or None where its directory has none.

    Raises:
        ConfigError: Its files cannot be read.
        EnvironmentProblem: A package that it needs is missing, or the hub is out of reach.
    """
    takes_images = "vision_config" in (source.config or {})
    files = ("processor_config.json", "preprocessor_config.json")
    if not takes_images or source.kind not in ("directory", "hub"):
        return None
    if source.path is not None and not any((source.path / name).is_file() for name in files):
        return None
    from transformers import AutoProcessor

    from liger_cli.common.hub import loading_error

    place = str(source.path or source.name)
    try:
        with panics_raised():
            return AutoProcessor.from_pretrained(place, trust_remote_code=False)
    except ImportError as error:
        raise EnvironmentProblem(f"the processor of {source.name}: {error}") from error
    except Exception as error:
        raise loading_error(error, f"the processor of {source.name}", source.is_remote) from error


@dataclass(frozen=True)
class Preprocessing:
    """The tokenizer and processor of a model, which are saved with its weights."""

    tokenizer: Any
    # Of an image-text model.
    processor: Any = None

    @classmethod
    def of(cls, source: ModelSource, chat_template: str | None = None) -> Preprocessing:
        """Load both.

        Args:
            chat_template: A file or a name, as read_template takes it, in place of their own.

        Raises:
            ConfigError: As load_tokenizer, load_processor and read_template.
            EnvironmentProblem: As load_tokenizer and load_processor.
        """
        template = None if chat_template is None else read_template(chat_template)
        tokenizer, processor = load_tokenizer(source), load_processor(source)
        if template is not None:
            tokenizer.chat_template = template
            if processor is not None:
                processor.chat_template = template
        return cls(tokenizer, processor)

    def save_pretrained(self, directory: Path) -> None:
        if self.processor is not None:
            self.processor.save_pretrained(directory)
        # After the processor, which brings the tokenizer of the base model.
        self.tokenizer.save_pretrained(directory)


def check_same_template(checkpoint: Path, config: RunConfig, preprocessing: Preprocessing) -> None:
    """Check that the chat template of a resumed run is the one in its checkpoint.

    Raises:
        ConfigError: The file of chat_template has another content than it had.
    """
    if config.chat_template is None:
        return
    from transformers import AutoTokenizer

    saved = AutoTokenizer.from_pretrained(checkpoint, trust_remote_code=False).chat_template
    if saved != preprocessing.tokenizer.chat_template:
        raise ConfigError(
            f"chat_template {config.chat_template} has another content than when {checkpoint} was "
            "written",
            hint="The template as it was is in the checkpoint: "
            f"--chat-template {checkpoint / 'chat_template.jinja'} in a new run, or put it back.",
        )
