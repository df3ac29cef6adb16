"""Sixty data files in the shapes that people bring, right and wrong, each with what becomes of it.

A row that is trained is written as its rendered text, with what is trained in double brackets. A
file that is refused has the whole error, in which FILE is its path.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

U, A, E = "<|im_start|>user\n", "<|im_start|>assistant\n", "<|im_end|>"
Q = f"{U}q{E}\n"
QA = f"{Q}{A}[[a{E}]]\n"
CALL = '<call>look{"at": "sky"}</call>'


@dataclass(frozen=True)
class DataFile:
    """A file and its outcome.

    Args:
        name: Of the file; its ending says how it is read.
        content: Rows of JSON lines, a JSON value where the file is a .json, or text or bytes.
        rows: What is trained, in order.
        error: What is said, where the file is refused.
        entry: Keys of its entry in `dataset`.
        options: Of the rows: which parts are trained.
        unused: The columns and fields that are named as not used.
    """

    name: str
    content: Any
    rows: tuple[str, ...] = ()
    error: str = ""
    entry: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    unused: tuple[str, ...] = ()

    def write(self, path) -> None:
        content = self.content
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif isinstance(content, str):
            path.write_text(content, encoding="utf-8")
        elif path.suffix == ".json":
            path.write_text(json.dumps(content))
        else:
            path.write_text("".join(json.dumps(row) + "\n" for row in content))


def said(*turns: tuple[str, str], role="role", content="content") -> list[dict[str, str]]:
    return [{role: who, content: text} for who, text in turns]


def spoken(*turns: tuple[str, str]) -> list[dict[str, str]]:
    return said(*turns, role="from", content="value")


ASKED = (("user", "q"), ("assistant", "a"))
SPOKEN = (("human", "q"), ("gpt", "a"))
TWICE = (*ASKED, ("user", "p"), ("assistant", "b"))
FUNCTION = {"name": "look", "arguments": '{"at": "sky"}'}
TOOL = {"name": "look", "parameters": {}}
TREE = [
    {"message_id": "1", "parent_id": None, "text": "q", "role": "prompter", "lang": "en"},
    {"message_id": "2", "parent_id": "1", "text": "a", "role": "assistant", "lang": "en"},
    {"message_id": "3", "parent_id": "2", "text": "p", "role": "prompter", "lang": "en"},
    {"message_id": "4", "parent_id": "3", "text": "b", "role": "assistant", "lang": "en"},
    {"message_id": "5", "parent_id": "3", "text": "c", "role": "assistant", "lang": "en"},
    {"message_id": "6", "parent_id": "4", "text": "?", "role": "prompter", "lang": "en"},
]
OTHER = f"{U}p{E}\n{A}"
CALLED = f"{Q}{A}[[{CALL}{E}]]\n<|im_start|>tool\nblue{E}\n{A}[[a{E}]]\n"

SHAPES = {
    # ShareGPT.
    "sharegpt": DataFile("d.jsonl", [{"conversations": spoken(*SPOKEN)}], (QA,)),
    "sharegpt with role and content": DataFile("d.jsonl", [{"conversations": said(*ASKED)}], (QA,)),
    "messages with from and value": DataFile("d.jsonl", [{"messages": spoken(*SPOKEN)}], (QA,)),
    "sharegpt that calls": DataFile(
        "d.jsonl",
        [
            {
                "conversations": spoken(
                    ("human", "q"),
                    ("function_call", json.dumps(FUNCTION)),
                    ("observation", "blue"),
                    ("gpt", "a"),
                )
            }
        ],
        (CALLED,),
    ),
    "sharegpt, a call that is no JSON": DataFile(
        "d.jsonl",
        [{"conversations": spoken(("human", "q"), ("function_call", "look up"), ("gpt", "a"))}],
        error="FILE:1: conversations[1].value is not JSON: Expecting value: '[look up]'",
    ),
    "sharegpt, an unknown speaker": DataFile(
        "d.jsonl",
        [{"conversations": spoken(("human", "q"), ("bot", "a"))}],
        error="FILE:1: conversations[1].from is 'bot'; allowed are human, user, gpt, assistant, "
        "system, tool, observation, function_call",
    ),
    "sharegpt, an unknown speaker in roles": DataFile(
        "d.jsonl",
        [{"conversations": spoken(("human", "q"), ("bot", "a"))}],
        (QA,),
        entry={"roles": {"assistant": ["bot"]}},
    ),
    "sharegpt, a turn without a value": DataFile(
        "d.jsonl",
        [{"conversations": [{"from": "human", "text": "q"}]}],
        error="FILE:1: conversations[0] must have from and value, found from, text",
    ),
    "sharegpt, fields that are not used": DataFile(
        "d.jsonl",
        [{"conversations": [{**turn, "at": 3} for turn in spoken(*SPOKEN)], "id": "x"}],
        (QA,),
        unused=("id", "conversations.at"),
    ),
    # OpenAI.
    "openai": DataFile("d.jsonl", [{"messages": said(*ASKED)}], (QA,)),
    "openai, tool_calls": DataFile(
        "d.jsonl",
        [
            {
                "messages": [
                    {"role": "user", "content": "q"},
                    {"role": "assistant", "tool_calls": [{"function": FUNCTION}]},
                    {"role": "tool", "content": "blue"},
                    {"role": "assistant", "content": "a"},
                ]
            }
        ],
        (CALLED,),
    ),
    "openai, function_call": DataFile(
        "d.jsonl",
        [
            {
                "messages": [
                    {"role": "user", "content": "q"},
                    {"role": "assistant", "content": None, "function_call": FUNCTION},
                    {"role": "function", "name": "look", "content": "blue"},
                    {"role": "assistant", "content": "a"},
                ],
                "functions": [TOOL],
            }
        ],
        (f"<tools>look</tools>\n{CALLED}",),
        unused=("messages.name",),
    ),
    "openai, a template without calls": DataFile(
        "plain.jsonl",
        [
            {
                "messages": [
                    {"role": "user", "content": "q"},
                    {"role": "assistant", "function_call": FUNCTION},
                ]
            }
        ],
        error="FILE:1: the chat template does not show tool_calls",
    ),
    "openai, function_call that is text": DataFile(
        "d.jsonl",
        [{"messages": [{"role": "assistant", "function_call": "look"}]}],
        error="FILE:1: messages[0].function_call must be an object of name and arguments, found "
        "a string",
    ),
    "openai, both forms of a call": DataFile(
        "d.jsonl",
        [
            {
                "messages": [
                    {
                        "role": "assistant",
                        "function_call": FUNCTION,
                        "tool_calls": [{"function": FUNCTION}],
                    }
                ]
            }
        ],
        error="FILE:1: messages[0] has function_call and tool_calls; keep one of them",
    ),
    "openai, a role in capitals": DataFile(
        "d.jsonl",
        [{"messages": said(("user", "q"), ("Assistant", "a"))}],
        error="FILE:1: messages[1].role is 'Assistant'; write 'assistant'",
    ),
    "openai, weights": DataFile(
        "d.jsonl",
        [{"messages": [dict(m, weight=0) if m["content"] == "a" else m for m in said(*TWICE)]}],
        (f"{Q}{A}a{E}\n{OTHER}[[b{E}]]\n",),
    ),
    # TRL.
    "prompt and completion": DataFile(
        "d.jsonl", [{"prompt": "q ", "completion": "a"}], (f"q [[a{E}]]",)
    ),
    "conversational prompt and completion": DataFile(
        "d.jsonl",
        [{"prompt": said(*ASKED, ("user", "p")), "completion": said(("assistant", "b"))}],
        (f"{Q}{A}a{E}\n{OTHER}[[b{E}]]\n",),
    ),
    "conversational, prompts too": DataFile(
        "d.jsonl",
        [{"prompt": said(*ASKED, ("user", "p")), "completion": said(("assistant", "b"))}],
        (f"{QA}{OTHER}[[b{E}]]\n",),
        options={"completion_only": False},
    ),
    "conversational, the whole completion": DataFile(
        "d.jsonl",
        [
            {
                "prompt": said(*ASKED, ("user", "p")),
                "completion": said(("assistant", "b"), ("user", "r"), ("assistant", "c")),
            }
        ],
        (f"{Q}{A}a{E}\n{OTHER}[[b{E}\n{U}r{E}\n{A}c{E}\n]]",),
        options={"assistant_only": False},
    ),
    "conversational with a text": DataFile(
        "d.jsonl",
        [{"prompt": said(("user", "q")), "completion": "a"}],
        error="FILE:1: prompt and completion are both text or both lists of messages; completion "
        "is a string",
    ),
    "conversational, the user completes": DataFile(
        "d.jsonl",
        [{"prompt": said(("user", "q")), "completion": said(("user", "a"))}],
        error="FILE:1: completion[0].role is 'user'; a completion begins with a message of the "
        "assistant",
    ),
    "preferences": DataFile(
        "d.jsonl",
        [{"prompt": "q", "chosen": "a", "rejected": "b"}],
        error="FILE:1: found the columns prompt, chosen, rejected; wanted text; or prompt and "
        "completion; or instruction, output and perhaps input, system and history; or messages (a "
        "list of role and content); or conversations (a list of from and value); or input_ids and "
        "perhaps labels or loss_mask",
    ),
    # Alpaca, Dolly, input and output.
    "alpaca": DataFile(
        "d.json",
        [{"instruction": "do", "input": "it", "output": "a"}],
        (f"{U}do\n\nit{E}\n{A}[[a{E}]]\n",),
    ),
    "dolly": DataFile(
        "d.jsonl",
        [
            {"instruction": "q", "context": "", "response": "a", "category": "open_qa"},
            {"instruction": "do", "context": "it", "response": "a", "category": "closed_qa"},
        ],
        (QA, f"{U}do\n\nit{E}\n{A}[[a{E}]]\n"),
        unused=("category",),
    ),
    "dolly, a number": DataFile(
        "d.jsonl",
        [{"instruction": "q", "context": "", "response": 3}],
        error="FILE:1: output must be a string, found a number",
    ),
    "input and output": DataFile("d.jsonl", [{"input": "q", "output": "a"}], (QA,)),
    "input and output, a row without": DataFile(
        "d.jsonl",
        [{"input": "q", "output": "a"}, {"input": "q"}],
        error="FILE:2: the column output is missing; found input, wanted instruction and output as "
        "in FILE:1",
    ),
    # OASST.
    "oasst": DataFile(
        "d.jsonl",
        TREE,
        (f"{QA}{OTHER}[[b{E}]]\n", f"{Q}{A}a{E}\n{OTHER}[[c{E}]]\n"),
        unused=("lang",),
    ),
    "oasst, no answer": DataFile(
        "d.jsonl",
        [TREE[0], {**TREE[0], "message_id": "9"}, *[{**TREE[1], "parent_id": "9"}]],
        (QA,),
        unused=("lang",),
    ),
    "oasst, a parent that is not there": DataFile(
        "d.jsonl",
        TREE[1:],
        error="FILE:1: parent_id '1' is the message_id of no row",
    ),
    "oasst, a role": DataFile(
        "d.jsonl",
        [{**TREE[0], "role": "user"}],
        error="FILE:1: role is 'user'; allowed are prompter, assistant",
    ),
    "oasst, twice": DataFile(
        "d.jsonl",
        [TREE[0], TREE[0]],
        error="FILE:2: the message_id '1' is there twice, first at FILE:1",
    ),
    "oasst, a circle": DataFile(
        "d.jsonl",
        [{**TREE[0], "parent_id": "2"}, TREE[1]],
        error="FILE:1: the message '1' answers itself, by way of others",
    ),
    "oasst, another row": DataFile(
        "d.jsonl",
        [TREE[0], {"text": "a"}],
        error="FILE:2: the data start with messages of OASST, and this row has not all of "
        "message_id, parent_id, text, role",
    ),
}

MAPPED = {
    "columns": DataFile(
        "d.csv",
        "question,answer,id\nq ,a,1\n",
        (f"q [[a{E}]]",),
        entry={"columns": {"prompt": "question", "completion": "answer"}},
        unused=("id",),
    ),
    "columns that change places": DataFile(
        "d.jsonl",
        [{"prompt": "a", "completion": "q "}],
        (f"q [[a{E}]]",),
        entry={"columns": {"prompt": "completion", "completion": "prompt"}},
    ),
    "columns over one of ours": DataFile(
        "d.jsonl",
        [{"prompt": "x", "question": "q ", "completion": "a"}],
        (f"q [[a{E}]]",),
        entry={"columns": {"prompt": "question"}},
        unused=("prompt",),
    ),
    "columns choose the format": DataFile(
        "d.jsonl",
        [{"instruction": "q", "output": "a", "text": "t"}],
        (f"[[t{E}]]",),
        entry={"columns": {"text": "text"}},
        unused=("instruction", "output"),
    ),
    "columns, one that is not there": DataFile(
        "d.csv",
        "question,answer\nq,a\n",
        error="FILE:2: columns: prompt is quest, and there is no such column; found question, "
        "answer",
        entry={"columns": {"prompt": "quest", "completion": "answer"}},
    ),
    "columns, an optional one in no row": DataFile(
        "d.jsonl",
        [{"messages": said(*ASKED)}],
        error="FILE: columns: system is persona, and no row of messages has a value of it that is "
        "used",
        entry={"columns": {"system": "persona"}},
    ),
    "columns, two formats": DataFile(
        "d.jsonl",
        [{"t": "x", "m": said(*ASKED), "c": "a"}],
        error="FILE:1: columns: no format uses text, history together; the rows are text, which "
        "does not use history",
        entry={"columns": {"text": "t", "history": "c"}},
    ),
    "columns and a wrong value": DataFile(
        "d.jsonl",
        [{"question": "q", "answer": 3}],
        error="FILE:1: completion must be a string, found a number",
        entry={"columns": {"prompt": "question", "completion": "answer"}},
    ),
    "message_fields and roles": DataFile(
        "d.jsonl",
        [{"dialog": said(("customer", "q"), ("agent", "a"), role="who", content="says")}],
        (QA,),
        entry={
            "columns": {"messages": "dialog"},
            "message_fields": {"role": "who", "content": "says"},
            "roles": {"user": ["customer"], "assistant": ["agent", "bot"]},
        },
    ),
    "message_fields, one that is not there": DataFile(
        "d.jsonl",
        [{"messages": said(*ASKED)}],
        error="FILE:1: messages[0] must have speaker and content, found role, content",
        entry={"message_fields": {"role": "speaker"}},
    ),
    "roles, one without a name": DataFile(
        "d.jsonl",
        [{"messages": said(("customer", "q"), ("narrator", "x"), ("agent", "a"))}],
        error="FILE:1: messages[1].role is 'narrator'; allowed are customer, agent, system, user, "
        "assistant, tool, function_call",
        entry={"roles": {"user": ["customer"], "assistant": ["agent"]}},
    ),
    "a mark with another name": DataFile(
        "d.jsonl",
        [{"messages": [{**m, "use": m["content"] != "a"} for m in said(*TWICE)]}],
        error="FILE:1: message 0 of user is marked to be trained; only answers are",
        entry={"message_fields": {"train": "use"}},
    ),
    "max_samples": DataFile(
        "d.jsonl",
        [{"text": "a"}, {"text": "b"}, {"text": 3}],
        (f"[[a{E}]]", f"[[b{E}]]"),
        entry={"max_samples": 2},
    ),
    "min_length": DataFile(
        "d.jsonl",
        [{"text": "a"}, {"text": "long enough"}],
        (f"[[long enough{E}]]",),
        entry={"min_length": 5},
    ),
    "delimiter": DataFile(
        "d.csv",
        "prompt;completion\nq ;a\n",
        (f"q [[a{E}]]",),
        entry={"delimiter": ";"},
    ),
    "delimiter of the wrong file": DataFile(
        "d.jsonl",
        [{"text": "a"}],
        error="delimiter is for .csv, .tsv, and FILE is none of them",
        entry={"delimiter": ";"},
    ),
    "encoding": DataFile(
        "d.csv",
        "prompt,completion\nq ,w\u00f6rd\n".encode("cp1252"),
        (f"q [[w\u00f6rd{E}]]",),
        entry={"encoding": "cp1252"},
    ),
    "encoding, the wrong one": DataFile(
        "d.jsonl",
        '{"text": "a"}\n{"text": "w\u00f6rd"}\n'.encode("cp1252"),
        error="FILE:2: not ascii: ordinal not in range(128)",
        entry={"encoding": "ascii"},
    ),
    "data_key": DataFile(
        "d.json",
        {"version": 1, "data": {"train": [{"text": "a"}]}},
        (f"[[a{E}]]",),
        entry={"data_key": "data.train"},
    ),
    "data_key, one that is not there": DataFile(
        "d.json",
        {"data": []},
        error="FILE: data_key rows: there is no 'rows'; found data",
        entry={"data_key": "rows"},
    ),
}

MASKED = {
    "a mask of messages": DataFile(
        "d.jsonl",
        [{"messages": said(*TWICE), "loss_mask": [0, 0, 0, 1]}],
        (f"{Q}{A}a{E}\n{OTHER}[[b{E}]]\n",),
    ),
    "a mask with another name": DataFile(
        "d.jsonl",
        [{"messages": said(*TWICE), "use": [0, 1, 0, 0]}],
        (f"{QA}{OTHER}b{E}\n",),
        entry={"columns": {"mask": "use"}},
    ),
    "a mask that is too short": DataFile(
        "d.jsonl",
        [{"messages": said(*TWICE), "mask": [1, 0]}],
        error="FILE:1: mask has 2 marks for 4 messages",
    ),
    "a mask of text": DataFile(
        "d.jsonl",
        [{"text": "a", "mask": [1]}],
        error="FILE:1: mask marks what is trained in a way that is not read here",
    ),
    "token ids": DataFile("d.jsonl", [{"input_ids": [67, 68, 69]}], ("a[[bc]]",)),
    "token ids with labels": DataFile(
        "d.jsonl",
        [{"input_ids": [67, 68, 69], "labels": [-100, -100, 69], "attention_mask": [1, 1, 1]}],
        ("ab[[c]]",),
        unused=("attention_mask",),
    ),
    "token ids with a mask": DataFile(
        "d.jsonl", [{"input_ids": [67, 68, 69], "loss_mask": [0, 1, 0]}], ("a[[b]]c",)
    ),
    "token ids, shifted labels": DataFile(
        "d.jsonl",
        [{"input_ids": [67, 68, 69], "labels": [68, 69, -100]}],
        error="FILE:1: labels[0] is 68; allowed are -100 and the token at its place, 67",
    ),
}

FILES = {**SHAPES, **MAPPED, **MASKED}
