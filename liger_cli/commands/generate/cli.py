"""liger generate: text from a model, a run or an adapter."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from liger_cli.training.model.names import check_model_name

__all__ = ["command"]


def command(
    model: Annotated[
        str, typer.Option("--model", "-m", help="Preset, run, checkpoint, directory or hub id.")
    ],
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", metavar="TEXT", help="Text to continue.")
    ] = None,
    chat: Annotated[
        bool,
        typer.Option("--chat", help="The prompt, or every line of stdin, is a turn of a chat."),
    ] = False,
    system: Annotated[
        str | None, typer.Option("--system", metavar="TEXT", help="What a chat begins with.")
    ] = None,
    chat_template: Annotated[
        str | None,
        typer.Option(
            "--chat-template", metavar="FILE|NAME", help="Of a chat, instead of the model's."
        ),
    ] = None,
    enable_thinking: Annotated[
        bool | None,
        typer.Option("--enable-thinking/--no-enable-thinking", help="For the template, if given."),
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", min=1, help="Tokens of an answer at most.")
    ] = 128,
    temperature: Annotated[
        float, typer.Option("--temperature", min=0.0, help="0 takes the likeliest token.")
    ] = 0.7,
    top_p: Annotated[
        float, typer.Option("--top-p", min=0.0, max=1.0, help="Draw from this much probability.")
    ] = 0.9,
    seed: Annotated[int, typer.Option("--seed", min=0, max=2**31 - 1, help="Of the drawing.")] = 42,
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"],
        typer.Option("--dtype", help="Parameters; auto is what train takes."),
    ] = "auto",
    use_cpu: Annotated[
        bool, typer.Option("--use-cpu", help="Stay on the CPU although there is a GPU.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON document, when all is done.")
    ] = False,
) -> None:
    """Continue a prompt, or chat: one turn with --prompt, else a turn for every line of stdin."""
    # Before torch and transformers are imported.
    check_model_name(model)

    from liger_cli.commands.generate.conversation import Request, generate
    from liger_cli.commands.generate.text import Sampling

    request = Request(prompt, chat, system, chat_template, enable_thinking)
    sampling = Sampling(max_new_tokens, temperature, top_p, seed)
    generate(model, request, sampling, dtype=dtype, use_cpu=use_cpu, as_json=as_json)
