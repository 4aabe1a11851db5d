"""The options of `optimize` that change what the quantization passes do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

from qcompile.quant.algorithms import ALGORITHMS
from qcompile.quantize_options import (
    ACTIVATIONS,
    GROUP_SIZES,
    QuantizeOptions,
    override,
    parse_group_size,
    parse_layer,
)

Command = TypeVar("Command", bound=Callable[..., Any])

_OPTIONS = (
    click.option("--bits", type=click.Choice(["4", "8"]), help="Bits of a weight."),
    click.option(
        "--group-size", metavar="|".join([*map(str, GROUP_SIZES), "channel"]), help="Weights that share a scale."
    ),
    click.option("--symmetric/--asymmetric", default=None, help="Scales alone, or scales and zero points (4 bits)."),
    click.option(
        "--activations",
        type=click.Choice(ACTIVATIONS),
        help="What the inputs of projections become; norm: int8 by one known step behind rotated norms.",
    ),
    click.option("--algorithm", type=click.Choice(ALGORITHMS), help="How the codes of a weight are chosen."),
    click.option("--keep-float", multiple=True, metavar="PATTERN", help="Layers that stay float (repeatable)."),
    click.option(
        "--layer",
        "layers",
        multiple=True,
        metavar="PATTERN:KEY=VALUE,…",
        help="Other values for some layers, such as '*down_proj*:activations=float' (repeatable; the last one wins); "
        "lm_head, embed_tokens, o_proj and down_proj are names of places.",
    ),
    click.option(
        "--calibration",
        metavar="FILE|builtin|self",
        help="Text to calibrate on: UTF-8 text or .jsonl, or what the model itself writes  [default: builtin]",
    ),
    click.option(
        "--quality", type=float, metavar="KL", help="Choose bits per layer for this mean KL per token, such as 0.01."
    ),
    click.option("--size", type=float, metavar="MB", help="Choose bits per layer for this size of all weights."),
)


def quantization_options(command: Command) -> Command:
    """Add the options to a command function; it gets them as keyword arguments."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def quantize_options(given: dict[str, Any], base: QuantizeOptions) -> QuantizeOptions:
    """Return the options of a recipe, changed by what the command line gives.

    Raises:
        QuantError: A value is not of its form.
    """
    given = dict(given)
    bits, group_size = given.pop("bits"), given.pop("group_size")
    layers = tuple(parse_layer(text) for text in given.pop("layers"))
    return override(
        base,
        bits=int(bits) if bits else None,
        group_size=None if group_size is None else parse_group_size(group_size),
        layers=(*base.layers, *layers),
        **given,
    )
