"""The options of `optimize` for Ascend targets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import click

from qcompile.ascend.buckets import lengths
from qcompile.ascend.lowering.lower import ATTENTIONS, MAX_TOP_K, AscendOptions
from qcompile.ascend.plugins import PLUGINS, parse_plugins
from qcompile.errors import UnsupportedOpError

_BUCKETS = {"batch": "batches", "kv_len": "kv_lens", "prefill_len": "prefill_lens"}
_FIELDS = {"ascend_dtype": "dtype", "top_k": "top_k", "keep_logits": "keep_logits", "attention": "attention"}


def plugin_names(context: click.Context, parameter: click.Parameter, text: str | None) -> frozenset[str] | None:
    """Read the names of --plugins; a wrong one is an error of usage."""
    del context, parameter
    try:
        return None if text is None else parse_plugins(text)
    except UnsupportedOpError as error:
        raise click.BadParameter(str(error).removeprefix("--plugins ")) from None


def ascend_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options to a command; it gets them as keyword arguments for `take_ascend_options`."""
    defaults = AscendOptions()
    shapes = defaults.buckets
    for option in (
        click.option("--keep-logits", is_flag=True, default=None, help="Ascend: return the logits too."),
        click.option(
            "--top-k",
            type=click.IntRange(0, MAX_TOP_K),
            help=f"Ascend: logits returned for sampling, 0 for greedy only.  [default: {defaults.top_k}]",
        ),
        click.option(
            "--attention",
            type=click.Choice(ATTENTIONS),
            help="Ascend: matmul + softmax + matmul, or NPUPromptFlashAttention.  [default: matmul]",
        ),
        click.option(
            "--plugins",
            metavar="NAME,...",
            callback=plugin_names,
            help=f"Ascend: use kernels/plugins: all, {', '.join(PLUGINS)}.  [default: none]",
        ),
        click.option(
            "--ascend-dtype", type=click.Choice(["fp16", "bf16"]), help="Ascend: type of the graphs.  [default: fp16]"
        ),
        click.option("--prefill-len", metavar="S,...", help=_shown("chunk lengths", shapes.prefill_lens)),
        click.option("--kv-len", metavar="T,...", help=_shown("KV cache lengths", shapes.kv_lens)),
        click.option("--batch", metavar="B,...", help=_shown("slots of decode graphs", shapes.batches)),
    ):
        command = option(command)
    return command


def names_ascend_options(given: dict[str, Any]) -> bool:
    """Whether one of the options of this module was given, be it at its default."""
    return any(given[name] is not None for name in (*_BUCKETS, *_FIELDS, "plugins"))


def take_ascend_options(given: dict[str, Any], base: AscendOptions) -> AscendOptions:
    """Take the options of this module out of `given` and return `base` changed by them."""
    shapes = {
        field: lengths(f"--{name.replace('_', '-')}", text)
        for name, field in _BUCKETS.items()
        if (text := given.pop(name)) is not None
    }
    rest = {field: value for name, field in _FIELDS.items() if (value := given.pop(name)) is not None}
    if (plugins := given.pop("plugins")) is not None:
        rest["plugins"] = plugins
    return replace(base, buckets=replace(base.buckets, **shapes), **rest)


def _shown(what: str, default: tuple[int, ...]) -> str:
    return f"Ascend: {what}.  [default: {','.join(map(str, default))}]"
