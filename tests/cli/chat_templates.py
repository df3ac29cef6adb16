"""Chat templates with the structures that models have, written for the tests, and a tokenizer.

Each shows at least one thing that makes the answers hard to find: see the line above it.
"""

from __future__ import annotations

from functools import cache

SPECIAL = [
    *("<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|begin_of_text|>", "<|eot_id|>"),
    *("<|start_header_id|>", "<|end_header_id|>", "<|user|>", "<|assistant|>", "<|system|>"),
    *("<|end|>", "<start_of_turn>", "<end_of_turn>", "<|User|>", "<|Assistant|>", "<|eos|>"),
    *("<|start|>", "<|message|>", "<|channel|>", "<|return|>", "<|call|>", "[INST]", "[/INST]"),
    *("[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[AVAILABLE_TOOLS]"),
    *("[/AVAILABLE_TOOLS]", "<|tool_begin|>", "<|tool_end|>"),
]

# No generation prompt; a space before an answer and one before its end; the system message is in
# the first message of the user.
LLAMA2 = """\
{%- if messages[0].role == 'system' -%}\
{%- set system = '<<SYS>>\\n' + messages[0].content + '\\n<</SYS>>\\n\\n' -%}\
{%- set turns = messages[1:] -%}\
{%- else -%}{%- set system = '' -%}{%- set turns = messages -%}{%- endif -%}\
{%- for message in turns -%}\
{%- if (message.role == 'user') != (loop.index0 % 2 == 0) -%}\
{{- raise_exception('roles must alternate') -}}{%- endif -%}\
{%- if message.role == 'user' -%}\
{{- '<s>[INST] ' + (system if loop.first else '') + message.content.strip() + ' [/INST]' -}}\
{%- else -%}{{- ' ' + message.content.strip() + ' </s>' -}}{%- endif -%}{%- endfor -%}"""

# Trims; a message with calls shows the call alone.
LLAMA3 = """\
{{- '<|begin_of_text|>' -}}{%- for message in messages -%}\
{%- if message.role == 'tool' -%}\
{{- '<|start_header_id|>ipython<|end_header_id|>\\n\\n' + message.content | tojson -}}\
{{- '<|eot_id|>' -}}\
{%- elif message.tool_calls -%}\
{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}\
{{- '{"name": "' + message.tool_calls[0].function.name + '", "parameters": ' -}}\
{{- message.tool_calls[0].function.arguments | tojson + '}<|eot_id|>' -}}\
{%- else -%}\
{{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' -}}\
{{- message.content | trim + '<|eot_id|>' -}}\
{%- endif -%}{%- endfor -%}\
{%- if add_generation_prompt -%}\
{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}{%- endif -%}"""

# No generation prompt; tools and the system message come before the last message of the user, so
# no rendering of the first messages is the beginning of the rendering of all.
MISTRAL = """\
{%- if messages[0].role == 'system' -%}{%- set system = messages[0].content + '\\n\\n' -%}\
{%- set turns = messages[1:] -%}\
{%- else -%}{%- set system = '' -%}{%- set turns = messages -%}{%- endif -%}\
{%- set last = (turns | selectattr('role', 'equalto', 'user') | list)[-1] -%}\
{{- '<s>' -}}{%- for message in turns -%}\
{%- if message.role == 'user' -%}\
{%- if tools and message == last -%}\
{{- '[AVAILABLE_TOOLS] ' + tools | tojson + '[/AVAILABLE_TOOLS]' -}}{%- endif -%}\
{{- '[INST] ' + (system if message == last else '') + message.content + '[/INST]' -}}\
{%- elif message.role == 'tool' -%}\
{{- '[TOOL_RESULTS] {"content": ' + message.content | tojson + '}[/TOOL_RESULTS]' -}}\
{%- elif message.tool_calls -%}\
{{- '[TOOL_CALLS] [' -}}{%- for call in message.tool_calls -%}\
{{- call.function | tojson + (', ' if not loop.last else '') -}}{%- endfor -%}{{- ']</s>' -}}\
{%- else -%}{{- ' ' + message.content.strip() + '</s>' -}}{%- endif -%}{%- endfor -%}"""

# Calls stand behind the content, results of tools in a turn of the user.
QWEN25 = """\
{%- if messages[0].role != 'system' -%}{{- '<|im_start|>system\\nBe kind<|im_end|>\\n' -}}\
{%- endif -%}\
{%- for message in messages -%}\
{%- if message.role == 'tool' -%}\
{{- '<|im_start|>user\\n<tool_response>\\n' + message.content -}}\
{{- '\\n</tool_response><|im_end|>\\n' -}}\
{%- else -%}{{- '<|im_start|>' + message.role -}}\
{%- if message.content or not message.tool_calls -%}{{- '\\n' + message.content -}}{%- endif -%}\
{%- for call in message.tool_calls or [] -%}\
{{- '\\n<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' -}}\
{{- call.function.arguments | tojson + '}\\n</tool_call>' -}}{%- endfor -%}\
{{- '<|im_end|>\\n' -}}{%- endif -%}{%- endfor -%}\
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"""

# Lays out thoughts, of the turns after the last message of the user alone.
QWEN3 = """\
{%- set ns = namespace(last=-1) -%}\
{%- for message in messages -%}{%- if message.role == 'user' -%}\
{%- set ns.last = loop.index0 -%}{%- endif -%}{%- endfor -%}\
{%- for message in messages -%}\
{%- if message.role == 'tool' -%}\
{{- '<|im_start|>user\\n<tool_response>\\n' + message.content -}}\
{{- '\\n</tool_response><|im_end|>\\n' -}}\
{%- elif message.role == 'assistant' -%}\
{%- set content = message.content -%}{%- set thought = '' -%}\
{%- if message.reasoning_content is string -%}{%- set thought = message.reasoning_content -%}\
{%- elif '</think>' in content -%}\
{%- set thought = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1] -%}\
{%- set content = content.split('</think>')[-1].lstrip('\\n') -%}{%- endif -%}\
{{- '<|im_start|>assistant\\n' -}}\
{%- if loop.index0 > ns.last and (loop.last or thought) -%}\
{{- '<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') -}}\
{%- else -%}{{- content -}}{%- endif -%}\
{%- for call in message.tool_calls or [] -%}\
{%- if content or not loop.first -%}{{- '\\n' -}}{%- endif -%}\
{{- '<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' -}}\
{%- if call.function.arguments is string -%}{{- call.function.arguments -}}\
{%- else -%}{{- call.function.arguments | tojson -}}{%- endif -%}{{- '}\\n</tool_call>' -}}\
{%- endfor -%}{{- '<|im_end|>\\n' -}}\
{%- else -%}{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' -}}\
{%- endif -%}{%- endfor -%}\
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"""

# Another name for the assistant; refuses a system message.
GEMMA = """\
{{- '<s>' -}}{%- if messages[0].role == 'system' -%}\
{{- raise_exception('System role not supported') -}}{%- endif -%}\
{%- for message in messages -%}\
{%- if (message.role == 'user') != (loop.index0 % 2 == 0) -%}\
{{- raise_exception('roles must alternate') -}}{%- endif -%}\
{{- '<start_of_turn>' + ('model' if message.role == 'assistant' else message.role) + '\\n' -}}\
{{- message.content | trim + '<end_of_turn>\\n' -}}{%- endfor -%}\
{%- if add_generation_prompt -%}{{- '<start_of_turn>model\\n' -}}{%- endif -%}"""

# Knows two roles, and closes the last turn with one more mark.
PHI = """\
{%- for message in messages -%}{%- if message.role in ('user', 'assistant') -%}\
{{- '<|' + message.role + '|>\\n' + message.content + '<|end|>\\n' -}}{%- endif -%}{%- endfor -%}\
{%- if add_generation_prompt -%}{{- '<|assistant|>\\n' -}}{%- else -%}{{- '</s>' -}}{%- endif -%}"""

# Drops all thoughts; the generation prompt opens one that the text does not have; arguments of
# calls are written as they are.
DEEPSEEK_R1 = """\
{{- '<s>' -}}{%- for message in messages -%}\
{%- if message.role == 'system' -%}{{- message.content -}}\
{%- elif message.role == 'user' -%}{{- '<|User|>' + message.content -}}\
{%- elif message.role == 'tool' -%}\
{{- '<|tool_begin|>' + message.content + '<|tool_end|>' -}}\
{%- elif message.tool_calls -%}{{- '<|Assistant|>' + message.content -}}\
{%- for call in message.tool_calls -%}\
{{- '<|tool_begin|>' + call.function.name + '\\n```json\\n' + call.function.arguments -}}\
{{- '\\n```<|tool_end|>' -}}{%- endfor -%}{{- '<|eos|>' -}}\
{%- else -%}{{- '<|Assistant|>' + message.content.split('</think>')[-1] + '<|eos|>' -}}\
{%- endif -%}{%- endfor -%}\
{%- if add_generation_prompt -%}{{- '<|Assistant|><think>\\n' -}}{%- endif -%}"""

# Channels; the mark that ends the last turn is another, and so is that of a call.
HARMONY = """\
{%- for message in messages -%}\
{%- if message.role == 'system' -%}\
{{- '<|start|>developer<|message|># Instructions\\n\\n' + message.content + '<|end|>' -}}\
{%- elif message.role == 'tool' -%}\
{{- '<|start|>functions to=assistant<|channel|>commentary<|message|>' -}}\
{{- message.content | tojson + '<|end|>' -}}\
{%- elif message.tool_calls -%}\
{%- if message.thinking -%}\
{{- '<|start|>assistant<|channel|>analysis<|message|>' + message.thinking + '<|end|>' -}}\
{%- endif -%}\
{{- '<|start|>assistant to=functions.' + message.tool_calls[0].function.name -}}\
{{- '<|channel|>commentary json<|message|>' -}}\
{{- message.tool_calls[0].function.arguments | tojson + '<|call|>' -}}\
{%- elif message.role == 'assistant' -%}\
{%- if message.thinking and loop.last -%}\
{{- '<|start|>assistant<|channel|>analysis<|message|>' + message.thinking + '<|end|>' -}}\
{%- endif -%}\
{{- '<|start|>assistant<|channel|>final<|message|>' + message.content -}}\
{{- '<|return|>' if loop.last else '<|end|>' -}}\
{%- else -%}{{- '<|start|>user<|message|>' + message.content + '<|end|>' -}}{%- endif -%}\
{%- endfor -%}{%- if add_generation_prompt -%}{{- '<|start|>assistant' -}}{%- endif -%}"""

# Any role is shown, and the content as it is.
CHATML = """\
{%- for message in messages -%}\
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' -}}{%- endfor -%}\
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"""

# The headers are ordinary text to the tokenizer, but for the angle brackets of one.
ZEPHYR = """\
{%- for message in messages -%}\
{{- '<|' + message.role + '|>\\n' + message.content + '</s>\\n' -}}{%- endfor -%}\
{%- if add_generation_prompt -%}{{- '<|assistant|>\\n' -}}{%- endif -%}"""

# No generation prompt, a header of the assistant, and all marks are ordinary text.
NO_PROMPT = """\
{%- for message in messages -%}\
{{- '### ' + message.role + ': ' + message.content + '\\n[end]\\n' -}}{%- endfor -%}"""

TEMPLATES = {
    "llama2": LLAMA2,
    "llama3": LLAMA3,
    "mistral": MISTRAL,
    "qwen25": QWEN25,
    "qwen3": QWEN3,
    "gemma": GEMMA,
    "phi": PHI,
    "deepseek_r1": DEEPSEEK_R1,
    "harmony": HARMONY,
    "chatml": CHATML,
    "zephyr": ZEPHYR,
    "no_prompt": NO_PROMPT,
}

_CORPUS = (
    "\n\n hello there, the answer is yes. What is it? assistant:\n\nuser\n[end]\n### look\n </s> "
    'naïve 你好 👋🏽 done <think>\n</think>\n\n {"name": "look", "arguments": {"at": "it"}}\n  '
)


@cache
def _backend(trim_offsets: bool, metaspace: bool) -> str:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
    from tokenizers.trainers import BpeTrainer

    tokenizer = Tokenizer(
        models.BPE(byte_fallback=metaspace, unk_token="<s>" if metaspace else None)
    )
    if metaspace:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    special = [AddedToken(word, normalized=False, special=True) for word in SPECIAL]
    alphabet = [] if metaspace else pre_tokenizers.ByteLevel.alphabet()
    trainer = BpeTrainer(
        vocab_size=700, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([_CORPUS] * 9, trainer)
    return tokenizer.to_str()


def chat_tokenizer(template: str, *, trim_offsets: bool = False, metaspace: bool = False):
    """Returns a small fast tokenizer with real merges, which cross the borders of answers.

    Args:
        template: Its chat template.
        trim_offsets: Offsets leave out the spaces of a token, as with GPT-2 and Llama 3.
        metaspace: Words have the space before them, as with SentencePiece; bytes otherwise.
    """
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_backend(trim_offsets, metaspace)),
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
        chat_template=template,
        clean_up_tokenization_spaces=False,
    )
