"""Files in the .om layout, like those a compiler would make of a decode graph, and mutations of them."""

from __future__ import annotations

import random
from pathlib import Path

from qcompile.ascend.om_layout import SO_BINS, TBE_KERNELS
from qcompile.ascend.om_reader import OmPort
from qcompile.ascend.om_writer import OmGraph, OmOp, write_om


def port(name: str, dtype: str, *shape: int, layout: str = "ND") -> OmPort:
    return OmPort(name, dtype, shape, layout)


def decode_graph(layers: int = 2) -> OmGraph:
    x = port("x", "f16", 4, 1, 64)
    ops = [
        OmOp("Data", "past", outputs=(port("", "f16", 4, 16, 64),), attributes={"index": 1}),
        OmOp("Data", "input_ids", outputs=(port("", "i64", 4, 1),), attributes={"index": 0}),
        OmOp("Const", "weights", outputs=(port("", "f16", 64, 64),)),
        OmOp("RmsNorm", "layers.0.norm", ("past:0",), (x,), (x,)),
    ]
    for layer in range(layers):
        source = ops[-1].name
        names = {"_datadump_original_op_names": [f"layers.{layer}.add", f"layers.{layer}.norm"]}
        ops.append(OmOp("MatMulV3", f"layers.{layer}.mm", (f"{source}:0", "weights:0"), (x, x), (x,)))
        ops.append(OmOp("AddRmsNorm", f"layers.{layer}.norm2", (f"layers.{layer}.mm:0",), (x,), (x,), names))
    last = ops[-1].name
    out = (port("", "f32", 4, 1, 100), port("", "f16", 4, 1, 64))
    ops.append(OmOp("NetOutput", "Node_Output", (f"{last}:0", "past:0"), out))
    return OmGraph("decode", tuple(ops))


def decode_om(directory: Path, name: str = "decode.om", weights: bytes = b"\1" * 8192) -> Path:
    path = directory / name
    outputs = ["/lm_head/MatMul:0:logits", "layers.1.new:0:present"]
    write_om(
        path,
        "decode",
        [decode_graph()],
        platform_version="test writer",
        soc_version="Ascend910B4",
        attributes={"attr_model_out_nodes_name": outputs, "atc_version": "8.1.RC1"},
        weights=weights,
        partitions=[(TBE_KERNELS, b"kernels" * 10), (SO_BINS, b"so")],
    )
    return path


def gear_om(directory: Path) -> Path:
    selector = OmOp("Data", "ascend_mbatch_shape_data", outputs=(port("", "i32", 2),), attributes={"index": 1})
    ids = OmOp("Data", "input_ids", outputs=(port("", "i64", -1, -1),), attributes={"index": 0})
    case = OmOp("Case", "case", ("ascend_mbatch_shape_data:0", "input_ids:0"), subgraphs=("gear_0", "gear_1"))
    end = OmOp("NetOutput", "Node_Output", ("case:0",), (port("", "f32", -1, 100),))
    graphs = [OmGraph("main", (ids, selector, OmOp("MapIndex", "map"), case, end))]
    for index, length in enumerate((128, 512)):
        data = OmOp("Data", f"ids_{index}", outputs=(port("", "i64", 1, length),), attributes={"index": 0})
        graphs.append(OmGraph(f"gear_{index}", (data, OmOp("SoftmaxV2", "softmax"), OmOp("TransData", "trans"))))
    path = directory / "gears.om"
    write_om(path, "gears", graphs, platform_version="test writer")
    return path


def mutated(original: bytes, rng: random.Random) -> bytes:
    """One of: flipped bytes, a cut, a grown or repeated piece, a structure field overwritten with an odd number."""
    data = bytearray(original)
    kind = rng.randrange(6)
    if kind == 0:
        for _ in range(rng.choice([1, 4, 64])):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif kind == 1:
        del data[rng.randrange(len(data)) :]
    elif kind == 2:
        at, size = rng.randrange(len(data)), rng.randrange(1, 512)
        data[at:at] = rng.randbytes(size)
    elif kind == 3:
        at, size = rng.randrange(len(data)), rng.randrange(1, 512)
        data[at:at] = data[at : at + size] * rng.choice([1, 3, 50])
    elif kind == 4:
        at = rng.choice([76, 80, 82, 152, 156, 184, 193, 256, 264, 272, 280, 288, 296, 304])
        number = rng.choice([0, 1, 2, 63, 65, 2**31 - 1, 2**32 - 1, 2**63 - 1, 2**64 - 1, len(data)])
        data[at : at + 8] = number.to_bytes(8, "little")
    else:
        at = rng.randrange(256, len(data))
        data[at : at + rng.randrange(1, 10)] = b"\xff" * rng.randrange(1, 10)
    return bytes(data)
