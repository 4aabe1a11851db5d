"""How large the values of a fused model become on real text, and what float16, which ends at 65504, means for them.

Residual sums grow from layer to layer, and some channels of Qwen models carry thousands; what a projection or the product of
a feed-forward makes can be as large. Sums near the end of float16 are lowered in float32 (with their norms); a product has no
such way out, so it is named, and bfloat16 is the cure.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir

from qcompile.calibration.calibrate import CalibrationSettings
from qcompile.calibration.runner import Array, BlockRunner
from qcompile.calibration.text import TokenRows
from qcompile.calibration.text_source import TextSource
from qcompile.functions import DOMAIN

FLOAT16_MAX = 65504.0
# Half of it: other text than the profile's may reach twice as far.
TOO_LARGE = FLOAT16_MAX / 2
_LARGEST = float(np.finfo(np.float32).max)
_PRODUCTS = {"MatMul", "Linear", "SwiGlu"}
_SETTINGS = CalibrationSettings(num_tokens=384, row_length=128, with_hessians=False)


@dataclass(frozen=True)
class ValueRanges:
    """Largest magnitudes seen.

    Attributes:
        sums: Residual sum (the second output of its AddRmsNorm) -> magnitude.
        products: Result of a projection or a feed-forward's product -> magnitude.
        num_tokens: Tokens of text.
    """

    sums: Mapping[str, float] = field(default_factory=dict)
    products: Mapping[str, float] = field(default_factory=dict)
    num_tokens: int = 0

    def wide_sums(self) -> frozenset[str]:
        """Return the sums that float16 may not hold."""
        return frozenset(name for name, largest in self.sums.items() if not largest <= TOO_LARGE)

    def warnings(self) -> list[str]:
        """Say what float16 cannot hold, by the layers' names."""
        wide = self.wide_sums()
        found = []
        if wide:
            first = next(name for name in self.sums if name in wide)
            found.append(
                f"the residual stream reaches {max(self.sums.values()):.4g} on text, first at '{first}' "
                f"({self.sums[first]:.4g}); float16 ends at {FLOAT16_MAX:.0f}, so {len(wide)} of {len(self.sums)} sums "
                "and their norms are in float32; --ascend-dtype bf16 needs none of that"
            )
        found += [
            f"'{name}' reaches {largest:.4g} on text; float16 ends at {FLOAT16_MAX:.0f}: lower with --ascend-dtype bf16"
            for name, largest in self.products.items()
            if not largest <= TOO_LARGE
        ]
        return found

    def record(self) -> dict[str, Any]:
        """Return it JSON-ready."""
        return {
            "num_tokens": self.num_tokens,
            "residual_sums": {name: round(largest, 2) for name, largest in self.sums.items()},
            "largest_product": round(max(self.products.values(), default=0.0), 2),
            "float32_sums": sorted(self.wide_sums()),
        }


def profile(model: ir.Model, text: TextSource, say: Callable[[str, int, int], None]) -> ValueRanges:
    """Run a fused float model on a little text.

    Args:
        model: The model; it is left as it is.
        text: Where text comes from.
        say: Called with (what, done, total).

    Raises:
        QuantError: There is no tokenizer, or the model cannot be run.
    """
    sums, products = _watched(model.graph)
    if not sums:
        return ValueRanges()
    rows: TokenRows = text.rows(_SETTINGS, say)
    largest = dict.fromkeys([*sums, *products], 0.0)

    def visit(row: int, value: ir.Value, array: Array) -> None:
        del row
        seen = float(np.abs(array).max(initial=0.0))
        largest[value] = max(largest[value], seen if np.isfinite(seen) else _LARGEST)  # JSON has no infinity

    def watch(what: str, done: int, total: int) -> None:
        say("measuring ranges", done, total)

    BlockRunner(model, list(largest)).run(rows.rows, visit, lambda index: None, watch)
    return ValueRanges(
        {value.name or "": largest[value] for value in sums},
        {value.name or "": largest[value] for value in products},
        rows.num_tokens,
    )


def _watched(graph: ir.Graph) -> tuple[list[ir.Value], list[ir.Value]]:
    """Return the residual sums and the products of a fused graph, but for its outputs."""
    sums = [n.outputs[1] for n in graph if (n.domain, n.op_type) == (DOMAIN, "AddRmsNorm")]
    products = [n.outputs[0] for n in graph if n.op_type in _PRODUCTS and not n.outputs[0].is_graph_output()]
    return sums, products
