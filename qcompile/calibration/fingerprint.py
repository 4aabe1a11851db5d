"""A hash of a model's structure and weights, so that a calibration is found again for the same model only."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import onnx_ir as ir

from qcompile.tensors import pieces_of


def model_fingerprint(model: ir.Model) -> str:
    """Return a hash of the nodes, names, attributes and the bytes of every initializer.

    Weights are read piece by piece and never held: about a second per GB.
    """
    digest = hashlib.blake2b(digest_size=16)
    for value in (*model.graph.inputs, *model.graph.outputs):
        _add(digest, "io", value.name, value.dtype, value.shape)
    for node in model.graph:
        names = [None if v is None else v.name for v in node.inputs]
        _add(digest, "node", node.domain, node.op_type, names, [v.name for v in node.outputs])
        for name, attribute in sorted(node.attributes.items()):
            _add(digest, "attribute", name)
            digest.update(ir.to_proto(attribute).SerializeToString(deterministic=True))
    for name, value in sorted(model.graph.initializers.items()):
        tensor = value.const_value
        if tensor is None:
            continue
        _add(digest, "weight", name, tensor.dtype, tensor.shape)
        for _, piece in pieces_of(tensor):
            digest.update(np.ascontiguousarray(piece()).view(np.uint8).reshape(-1).data)
    return digest.hexdigest()


def _add(digest: Any, *parts: object) -> None:
    digest.update(repr([str(part) for part in parts]).encode())
