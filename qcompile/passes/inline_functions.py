"""Replace the calls of fused operators that a target has no kernel for by their definitions in standard operators."""

from __future__ import annotations

import onnx_ir.passes.common as ir_passes

from qcompile.functions import DOMAIN
from qcompile.passes.base import Pass, PassContext, PassResult
from qcompile.passes.change import finish_rewrites


class InlineFunctions(Pass):
    """Fused operators without a kernel."""

    name = "inline-functions"
    summary = "fused operators without a kernel -> their definitions"

    def call(self, context: PassContext, result: PassResult) -> None:
        """Inline every call of domain `qcompile`."""
        calls = sum(n.domain == DOMAIN for n in context.model.graph)
        result.matches = result.rewrites = calls
        if calls:
            ir_passes.InlinePass()(context.model)
            context.forget_analysis()
            finish_rewrites(context)
