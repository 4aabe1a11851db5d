"""Inline the functions that an exporter left in a model, so that fusions see operators.

torch.onnx.export may leave calls such as `pkg.torch.onnxscript.torch_lib::aten_silu` with their definitions beside the
graph. Fused operators stay, as long as they are defined as this version defines them: whoever else writes a function of
domain `qcompile` means what stands in it.
"""

from __future__ import annotations

import onnx_ir as ir
import onnx_ir.passes.common as ir_passes

from qcompile.functions import DOMAIN, FUSED_OPS
from qcompile.passes.base import Pass, PassContext, PassResult, Rejection
from qcompile.passes.change import finish_rewrites


class InlineExporterFunctions(Pass):
    """Functions of other domains than our own."""

    name = "inline-exporter-functions"
    summary = "functions an exporter left in the model -> their operators"

    def call(self, context: PassContext, result: PassResult) -> None:
        """Inline all calls, or none when the definitions are cyclic or of another opset than the graph."""
        model = context.model
        foreign = {identifier for identifier, function in model.functions.items() if not _is_ours(function)}
        calls = sum(n.op_identifier() in foreign for n in model.graph.all_nodes())
        if not foreign or not calls:
            return
        try:
            ir_passes.InlinePass(criteria=lambda f: f.identifier() in foreign)(model)
        except (ir.passes.PreconditionError, ir.passes.PassError, ValueError) as error:
            first_line = str(error.__cause__ or error).strip().splitlines()[0]
            result.rejected.append(Rejection("graph", self.name, f"functions stay: {first_line}"))
            return
        result.matches = result.rewrites = calls
        context.forget_analysis()
        finish_rewrites(context)


def _is_ours(function: ir.Function) -> bool:
    return function.domain == DOMAIN and function.name in FUSED_OPS and FUSED_OPS[function.name].is_defined_by(function)
