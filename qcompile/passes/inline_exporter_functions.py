"""Inline the functions that an exporter left in a model, so that fusions see operators.

torch.onnx.export may leave calls such as `pkg.torch.onnxscript.torch_lib::aten_silu` with their definitions beside the
graph. Functions of domain `qcompile` stay: they are fused operators.
"""

from __future__ import annotations

import onnx_ir as ir
import onnx_ir.passes.common as ir_passes

from qcompile.functions import DOMAIN
from qcompile.passes.base import Pass, PassContext, PassResult, Rejection
from qcompile.passes.change import finish_rewrites


class InlineExporterFunctions(Pass):
    """Functions of other domains than our own."""

    name = "inline-exporter-functions"
    summary = "functions an exporter left in the model -> their operators"

    def call(self, context: PassContext, result: PassResult) -> None:
        """Inline all calls, or none when the definitions are cyclic or of another opset than the graph."""
        model = context.model
        foreign = {identifier for identifier in model.functions if identifier[0] != DOMAIN}
        calls = sum(n.op_identifier() in foreign for n in model.graph.all_nodes())
        if not foreign or not calls:
            return
        try:
            ir_passes.InlinePass(criteria=lambda f: f.domain != DOMAIN)(model)
        except (ir.passes.PreconditionError, ir.passes.PassError, ValueError) as error:
            first_line = str(error.__cause__ or error).strip().splitlines()[0]
            result.rejected.append(Rejection("graph", self.name, f"functions stay: {first_line}"))
            return
        result.matches = result.rewrites = calls
        context.forget_analysis()
        finish_rewrites(context)
