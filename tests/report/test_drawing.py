"""qcompile.report.drawing, layered and layout: boxes, arrows, blocks and their coordinates."""

import itertools

import onnx_ir as ir
import pytest

from qcompile.report.drawing import Box, Drawing, draw_section, leaf_name, tensor_text
from qcompile.report.layered import draw_layered
from qcompile.report.layers import Place, split_sections
from qcompile.report.layout import arrange, box_size
from qcompile.report.links import Links
from qcompile.report.roles import Role, assign_roles
from tests.report.fused_graphs import EXPORTED, exported, fused


def _drawings(model):
    roles = assign_roles(model.graph)
    links = Links(model.graph)
    return {s.place: draw_section(s, roles, links) for s in split_sections(Links(model.graph), roles)}


def _titles(drawing, kind):
    return [box.title for box in drawing.boxes if box.kind == kind]


@pytest.mark.parametrize("name", EXPORTED)
def test_a_layer_is_drawn_whole(name):
    model = exported(name)
    roles = assign_roles(model.graph)
    section = next(s for s in split_sections(Links(model.graph), roles) if s.place is Place.LAYER)
    drawing = _drawings(model)[Place.LAYER]
    drawn = [box.node for box in drawing.boxes if box.node is not None]
    assert sorted(drawn) == list(range(len(section.nodes[0])))
    entering = set(_titles(drawing, "in"))
    assert {"hidden states", "past key", "past value"} <= entering
    assert entering - {"hidden states", "past key", "past value"} <= {"cos", "sin", "mask", "angles"}
    assert sorted(_titles(drawing, "out")) == ["hidden states", "present key", "present value"]
    assert all(a < b or drawing.boxes[b].kind == "out" for a, b in drawing.arrows)


@pytest.mark.parametrize("name", EXPORTED)
def test_blocks_have_one_role_and_an_order(name):
    for drawing in _drawings(exported(name)).values():
        for block in drawing.blocks():
            assert len({drawing.boxes[i].role for i in block}) == 1
        place = {block: lane for lane, block in enumerate(drawing.lane_order())}
        assert all(place[a] < place[b] for a, b in drawing.block_arrows())


def test_the_stages_of_a_layer_read_from_top_to_bottom():
    drawing = _drawings(exported("qwen2-dynamo-sdpa"))[Place.LAYER]
    roles = [drawing.boxes[drawing.blocks()[block][0]].role.value for block in drawing.lane_order()]
    assert roles == [
        *("residual", "norm", "qkv", "rotary", "cache", "attention", "output", "residual"),
        *("norm", "mlp", "residual", "residual"),
    ]


def test_the_fused_layer_names_its_two_streams():
    model = fused("qwen2-builder")
    roles = assign_roles(model.graph)
    links = Links(model.graph)
    first, second = [s for s in split_sections(Links(model.graph), roles) if s.place is Place.LAYER]
    drawn = draw_section(first, roles, links)
    assert {"hidden states", "feed-forward output"} <= set(_titles(drawn, "out"))
    drawn = draw_section(second, roles, links)
    assert {"hidden states", "feed-forward output"} <= set(_titles(drawn, "in"))
    assert {"AddRmsNorm", "Attention", "SwiGlu"} <= set(_titles(drawn, "fused"))
    streams = [i for i, box in enumerate(drawn.boxes) if box.kind == "in" and box.role is Role.RESIDUAL]
    assert len({drawn.block_of[i] for i in streams}) == 1


def test_boxes_carry_their_weights():
    drawing = _drawings(exported("qwen2-dynamo-sdpa"))[Place.LAYER]
    subtitles = [box.subtitle for box in drawing.boxes]
    for wanted in ("q_proj 64×64", "v_proj 64×32", "down_proj 128×64", "64", "32"):
        assert wanted in subtitles
    assert next(box for box in drawing.boxes if box.title == "Softmax").subtitle == ""
    assert next(box for box in drawing.boxes if box.title == "Reshape").subtitle == ""


def test_a_quantized_projection_shows_its_logical_shape():
    model = ir.from_onnx_text("""
        <ir_version: 10, opset_import: ["" : 18, "com.microsoft" : 1]>
        g (float[1, 64] x) => (float[1, 32] y)
        <uint8[32, 2, 16] packed = {0}, float[64] scales = {1.0}, int8[64, 32] w8 = {0}>
        {
          y = com.microsoft.MatMulNBits <K = 64, N = 32, bits = 4, block_size = 32> (x, packed, scales)
          z = com.microsoft.Other (x, w8)
        }
    """)
    model.graph[0].name = "layers.0.attn.qkv_proj"
    (drawing,) = _drawings(model).values()
    assert [box.subtitle for box in drawing.boxes if box.kind == "fused"] == [
        "qkv_proj 64×32 int4",
        "64×32 int8",
    ]


@pytest.mark.parametrize(
    ("name", "leaf"),
    [
        ("/model/layers.0/self_attn/q_proj/MatMul", "q_proj"),
        ("layers.3.mlp.down_proj", "down_proj"),
        ("layers.3.mlp.up_proj.matmul", "up_proj"),
        ("node_MatMul_101", ""),
        ("/model/layers.0/MatMul", ""),
        ("", ""),
    ],
)
def test_leaf_names(name, leaf):
    assert leaf_name(ir.Node("", "MatMul", [], name=name)) == leaf


def test_unknown_shapes_and_types_are_question_marks():
    assert tensor_text(ir.Value(name="v")) == "unknown"
    value = ir.Value(shape=ir.Shape(["B", "unk__3", 4]), type=ir.TensorType(ir.DataType.FLOAT16))
    assert tensor_text(value) == "float16 [B, ?, 4]"


def test_a_block_is_not_joined_when_that_would_make_a_cycle():
    boxes = [
        Box(t, "", r, i, "op")
        for i, (t, r) in enumerate([("a", Role.MLP), ("b", Role.NORM), ("c", Role.MLP), ("d", Role.MLP)])
    ]
    from qcompile.report.drawing import _blocks

    # a -> c directly and through b; d stands alone
    assert _blocks(boxes, [(0, 1), (1, 2), (0, 2)]) == [0, 1, 2, 0]


def _rows_do_not_overlap(drawing, widths):
    for row in drawing.rows:
        for left, right in itertools.pairwise(row):
            half = (widths.get(left, 10.0) + widths.get(right, 10.0)) / 2
            assert drawing.x[right] - drawing.x[left] >= half - 1e-6


def test_layered_ranks_bends_and_straight_chains():
    keys = [("box", i) for i in range(5)]
    widths = dict.fromkeys(keys, 40.0)
    edges = [
        (keys[0], keys[1]),
        (keys[1], keys[2]),
        (keys[2], keys[3]),
        (keys[0], keys[3]),
        (keys[4], keys[3]),
    ]
    drawing = draw_layered(widths, edges)
    assert [drawing.rank[k] for k in keys] == [0, 1, 2, 3, 2]  # the lone source moves down to its target
    route = drawing.routes[keys[0], keys[3]]
    assert [k[0] for k in route] == ["box", "bend", "bend", "box"]
    assert abs(drawing.x[route[1]] - drawing.x[route[2]]) < 1.0
    _rows_do_not_overlap(drawing, widths)


def test_layered_keeps_first_and_last_ranks_to_their_items():
    a, b, entry, leave = ("box", 0), ("box", 1), ("in", 7), ("out", 1)
    drawing = draw_layered(
        dict.fromkeys((entry, a, b, leave), 10.0),
        [(entry, b), (a, b), (b, leave)],
        first=[entry],
        last=[leave],
    )
    assert drawing.rows[0] == [entry]
    assert drawing.rows[-1] == [leave]
    assert drawing.rank[a] == drawing.rank[b] - 1 == 1


def test_layered_finds_the_order_without_crossings():
    tops, bottoms = [("box", i) for i in range(4)], [("box", 4 + i) for i in range(4)]
    edges = [(tops[i], bottoms[3 - i]) for i in range(4)]
    drawing = draw_layered(dict.fromkeys(tops + bottoms, 20.0), edges)
    where = {key: i for row in drawing.rows for i, key in enumerate(row)}
    assert all(where[a] == where[b] for a, b in edges)
    assert all(abs(drawing.x[a] - drawing.x[b]) < 1e-6 for a, b in edges)


def test_an_empty_drawing():
    assert draw_layered({}, []).rows == []
    assert arrange(Drawing()).boxes == []


@pytest.mark.parametrize("name", ["qwen2-dynamo-sdpa", "qwen3-optimum", "qwen2-dynamo-opset23"])
def test_boxes_stay_in_their_lanes_and_do_not_overlap(name):
    for drawing in _drawings(exported(name)).values():
        picture = arrange(drawing)
        assert len(picture.lines) == len(drawing.arrows)
        lane_of = {i: lane for lane, block in enumerate(drawing.lane_order()) for i in drawing.blocks()[block]}
        for i, area in enumerate(picture.boxes):
            lane = picture.lanes[lane_of[i]].area
            assert lane.x <= area.x
            assert area.x + area.width <= lane.x + lane.width
            assert lane.y <= area.y
            assert area.y + area.height <= lane.y + lane.height
            assert (area.width, area.height) == box_size(drawing.boxes[i])
        for a, b in itertools.combinations(picture.boxes, 2):
            apart_x = a.x + a.width <= b.x + 1e-6 or b.x + b.width <= a.x + 1e-6
            assert apart_x or a.y + a.height <= b.y + 1e-6 or b.y + b.height <= a.y + 1e-6
        for above, below in itertools.pairwise(picture.lanes):
            assert above.area.y + above.area.height < below.area.y
        assert picture.lanes[-1].area.y + picture.lanes[-1].area.height <= picture.height


def test_lines_end_at_their_boxes_and_skip_lanes_through_the_gutter():
    drawing = _drawings(exported("qwen2-dynamo-sdpa"))[Place.LAYER]
    picture = arrange(drawing)
    lane_of = {i: lane for lane, block in enumerate(drawing.lane_order()) for i in drawing.blocks()[block]}
    skipped = 0
    for line in picture.lines:
        source, target = picture.boxes[line.source], picture.boxes[line.target]
        assert line.start == (source.x + source.width / 2, source.y + source.height)
        assert line.steps[-1][1:] == pytest.approx((target.x + target.width / 2, target.y))
        ys = [line.start[1], *(y for _, _, y in line.steps)]
        assert ys == sorted(ys)
        is_skip = lane_of[line.target] > lane_of[line.source] + 1
        assert any(kind == "R" for kind, _, _ in line.steps) == is_skip
        skipped += is_skip
        right_most = max(x for _, x, _ in line.steps)
        assert right_most <= picture.width
    assert skipped >= 3  # the residual stream twice, V around the rotary embedding


def test_a_picture_can_be_made_wider():
    drawing = _drawings(exported("qwen2-builder"))[Place.AFTER]
    assert arrange(drawing, 900.0).width == 900.0
    assert (
        box_size(Box("注意力", "", Role.ATTENTION, 0, "op"))[0] > box_size(Box("abc", "", Role.ATTENTION, 0, "op"))[0]
    )


def test_what_a_subgraph_captures_is_an_input_of_its_node():
    model = ir.from_onnx_text("""
        <ir_version: 10, opset_import: ["" : 18]>
        g (float[N] x, bool b) => (float[N] y) {
          n = Neg (x)
          a = Abs (x)
          y = If (b) <
            then_branch = t () => (float[N] p) {
              p = If (b) < then_branch = tt () => (float[N] q) { q = Exp (n) },
                           else_branch = te () => (float[N] r) { r = Identity (x) } >
            },
            else_branch = e () => (float[N] s) { s = Identity (a) } >
        }
    """)
    links = Links(model.graph)
    neg, absolute, branch = links.nodes
    assert links.readers(neg) == [branch]
    assert set(links.producers(branch)) == {neg, absolute}
    (drawing,) = _drawings(model).values()
    titles = [box.title for box in drawing.boxes]
    arrows = {(titles[a], titles[b]) for a, b in drawing.arrows}
    assert {("Neg", "If"), ("Abs", "If"), ("If", "y")} <= arrows
