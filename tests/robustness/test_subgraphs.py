"""Graphs with If, Loop and Scan: what a subgraph reads is kept, the rest is fused."""

import numpy as np
import onnx
import pytest

from tests.robustness.edits import FUSED, NORM, PROJECTION, WEIGHT, append, assert_unharmed, counts, fuse, in_front

CONDITION = (
    "top = ReduceMax <keepdims = 0> (input_ids) small = Constant <value_int = 400> () is_low = Less (top, small) "
)
BRANCHES = CONDITION + (
    "chosen = If (is_low) <then_branch = t () => (float[a, b, c] t) { t = Relu (VALUE) },"
    " else_branch = e () => (float[a, b, c] e) { e = Neg (VALUE) }>"
)
LOOP = (
    "trip = Constant <value_int = 3> () on = Constant <value = bool {1}> () start = Constant <value_float = 0.5> () "
    "summed = Loop (trip, on, start) <body = b (int64 i, bool c, float s) => (bool d, float r) "
    "{ m = ReduceMean <keepdims = 0> (VALUE) r = Add (s, m) d = Identity (c) }>"
)
SCAN = (
    "flat = Transpose <perm = [1, 0, 2]> (VALUE) first = ReduceSum <keepdims = 0> (flat, zero_axis) "
    "last, running = Scan <num_scan_inputs = 1, body = b (float[n, m] s, float[n, m] x) => (float[n, m] r, float[n, m] y) "
    "{ r = Add (s, x) y = Mul (r, s) }> (first, flat)"
)


class TestSubgraphs:
    @pytest.mark.parametrize(
        ("value", "lost"),
        [(NORM, {"fuse-rms-norm": 4}), (PROJECTION, {"fuse-qkv": 1}), (WEIGHT, {})],
        ids=["inside a norm", "before a bias", "a weight"],
    )
    @pytest.mark.parametrize("text", [BRANCHES, LOOP], ids=["If", "Loop"])
    def test_what_a_subgraph_reads_is_kept_and_the_rest_fused(self, edited, text, value, lost):
        shown = "chosen" if text is BRANCHES else "summed"
        path = edited(append(text, shown, VALUE=value))
        assert counts(fuse(path)) == FUSED | lost
        assert_unharmed(path)

    def test_scan(self, edited):
        def edit(proto: onnx.ModelProto) -> None:
            axis = onnx.numpy_helper.from_array(np.array([0]), "zero_axis")
            proto.graph.initializer.append(axis)
            append(SCAN, "running", VALUE=PROJECTION)(proto)

        path = edited(edit)
        assert counts(fuse(path))["fuse-attention"] == 2
        assert_unharmed(path)

    def test_a_branch_on_the_way_is_kept_and_said(self, edited):
        report = fuse(path := edited(in_front(BRANCHES, "layers.0.mlp.residual", "chosen")))
        assert report.count("fuse-attention") >= 1
        assert any("could not be inferred" in r.reason for result in report.results for r in result.rejected)
        assert_unharmed(path)
