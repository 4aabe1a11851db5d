"""The type of every option that is a number with a fraction."""

from __future__ import annotations

import math
from typing import Any

import click

DAY_S = 86_400.0
WEEK_S = 7 * DAY_S


class FiniteRange(click.FloatRange):
    """A range without NaN, which click's compares with no bound, and without infinity: no timeout or temperature takes them."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Return the number, or fail as click does."""
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number.", param, ctx)
        return number
