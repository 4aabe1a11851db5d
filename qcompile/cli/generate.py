"""`qcompile generate`: answer prompts with a compiled model."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qcompile.cli.given_path import GivenPath
from qcompile.cli.prompt_source import Conversation, PromptText, read_prompts
from qcompile.cli.runtime_notes import runtime_notes
from qcompile.cli.sampling_options import sampling_options, sampling_params, template_variables
from qcompile.cli.simulated_device import device_for, without_times
from qcompile.runtime.errors import RequestError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from qcompile.runtime import Completion, Engine, SamplingParams


@click.command("generate")
@click.argument("directory", metavar="DIR", type=GivenPath())
@click.argument("prompts", metavar="[PROMPT]...", nargs=-1)
@click.option(
    "--prompt-file",
    "prompt_files",
    multiple=True,
    type=GivenPath(),
    help="A text file as one prompt, or .jsonl with one prompt per line (repeatable).",
)
@click.option("--system", help="System message before every prompt.")
@click.option("--raw", is_flag=True, help="Use prompts as they are, without the chat template.")
@click.option("--sample", is_flag=True, help="Sample as the model's generation_config.json says.")
@sampling_options
@click.option("--max-batch-size", type=click.IntRange(1), default=8, show_default=True, help="Prompts at once.")
@click.option("--no-stream", is_flag=True, help="Print the text when it is complete.")
@click.option("--json", "as_json", is_flag=True, help="Print texts, token ids and timings as JSON.")
def command(
    directory: Path,
    prompts: tuple[str, ...],
    prompt_files: tuple[Path, ...],
    *,
    as_json: bool,
    no_stream: bool,
    max_batch_size: int,
    **options: Any,
) -> None:
    """Generate text for one or more PROMPTs (`-` is stdin) with the compiled model in DIR.

    Several prompts are computed together. Generation is greedy unless --sample or one of --temperature,
    --top-k, --top-p, --min-p, --seed is given; what is then not given comes from the model's
    generation_config.json. Prompts go through the model's chat template if it has one; --raw turns that off.
    """
    if options["raw"] and options["system"] is not None:
        raise click.UsageError("--system needs the chat template that --raw turns off")
    variables = template_variables(options["template_args"])
    texts = read_prompts(prompts, prompt_files)
    from qcompile.runtime import Engine

    started = time.perf_counter()
    with (
        runtime_notes(),
        device_for(directory, options["threads"]) as simulated,
        Engine(directory, options["threads"], max_batch_size, options["max_model_len"]) as engine,
    ):
        load_s = time.perf_counter() - started
        params = sampling_params(engine, options, sample=options["sample"])
        ids = _encode(engine, texts, options["system"], raw=options["raw"], variables=variables)
        started = time.perf_counter()
        completions = _generate(engine, ids, params, streams=not as_json and not no_stream, shows=not as_json)
        stats = _stats(completions, load_s, time.perf_counter() - started)
    if as_json:
        record: dict[str, Any] = {"completions": [c.as_dict() for c in completions], "stats": stats}
        if simulated is not None:
            answers = [without_times(answer) for answer in record["completions"]]
            record = {"completions": answers, "stats": without_times(stats), "simulated": simulated}
        click.echo(json.dumps(record, indent=2, ensure_ascii=False))
    elif simulated is not None:
        click.echo(f"{stats['num_prompt_tokens']} prompt tokens, {stats['num_new_tokens']} new, simulated", err=True)
    else:
        click.echo(_stats_line(completions, stats), err=True)


def _encode(
    engine: Engine,
    prompts: list[PromptText],
    system: str | None,
    *,
    raw: bool,
    variables: dict[str, Any],
) -> list[list[int]]:
    """Return the token ids of every prompt, through the chat template where there is one."""
    is_chat = engine.tokenizer.has_chat_template and not raw
    if not is_chat:
        if system is not None:
            raise RequestError("--system: the model has no chat template (a base model)")
        if not raw:
            click.echo("note: no chat template (a base model): prompts are used as they are", err=True)
    return [
        _encode_one(engine, prompt, system, f"prompt {i + 1}", is_chat, variables) for i, prompt in enumerate(prompts)
    ]


def _encode_one(
    engine: Engine,
    prompt: PromptText,
    system: str | None,
    where: str,
    is_chat: bool,
    variables: dict[str, Any],
) -> list[int]:
    if isinstance(prompt, str) and not prompt.strip():
        raise RequestError(f"{where} is empty")
    if not is_chat:
        if not isinstance(prompt, str):
            raise RequestError(f"{where} is a list of messages: that needs a chat template")
        return engine.tokenizer.encode(prompt)
    messages: Conversation = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if system is not None:
        messages = [{"role": "system", "content": system}, *messages]
    return engine.encode_chat(messages, **variables)


def _generate(
    engine: Engine, prompts: Sequence[list[int]], params: SamplingParams, *, streams: bool, shows: bool
) -> list[Completion]:
    """Generate; show a single text as it grows, each of several when it and those before are complete."""
    is_single = len(prompts) == 1
    finished: dict[int, Completion] = {}
    num_shown = 0
    for delta in engine.stream(list(prompts), params):
        if streams and is_single:
            click.echo(delta.text, nl=False)
        if delta.completion is not None:
            finished[delta.index] = delta.completion
        while shows and num_shown in finished:
            if not (streams and is_single):
                if not is_single:
                    click.secho(f"--- {num_shown + 1}", dim=True)
                click.echo(finished[num_shown].text, nl=False)
            click.echo()
            num_shown += 1
    return [finished[index] for index in range(len(prompts))]


def _stats(completions: list[Completion], load_s: float, total_s: float) -> dict[str, Any]:
    new_tokens = sum(len(c.token_ids) for c in completions)
    first_s = min(c.ttft_s for c in completions)
    return {
        "num_prompts": len(completions),
        "num_prompt_tokens": sum(c.num_prompt_tokens for c in completions),
        "num_new_tokens": new_tokens,
        "load_s": round(load_s, 4),
        "total_s": round(total_s, 4),
        "ttft_s": round(first_s, 4),
        "tokens_per_s": round(new_tokens / total_s, 2) if total_s > 0 else 0.0,
        "decode_tokens_per_s": round(completions[0].tokens_per_s, 2) if len(completions) == 1 else None,
    }


def _stats_line(completions: list[Completion], stats: dict[str, Any]) -> str:
    decode = stats["decode_tokens_per_s"]
    speed = f"decode {decode:.1f} tokens/s" if decode else f"{stats['tokens_per_s']:.1f} tokens/s together"
    cut = sum(c.finish_reason == "length" for c in completions)
    note = f"; {cut} cut off by --max-new-tokens or the context" if cut else ""
    return (
        f"{stats['num_prompt_tokens']} prompt tokens, {stats['num_new_tokens']} new "
        f"in {stats['total_s']:.2f} s; "
        f"TTFT {stats['ttft_s'] * 1e3:.0f} ms, {speed}; loaded in {stats['load_s']:.2f} s{note}"
    )
