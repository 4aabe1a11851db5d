"""Rules about NPUPromptFlashAttention: inputs by count, masks, grouped heads, and what the 310P leaves out."""

from __future__ import annotations

from collections.abc import Iterator

from qcompile.ascend.legality.finding import Finding
from qcompile.ascend.legality.rule import WRONG, Context, NodeRule, about, shape_text
from qcompile.ascend.legality.view import Node, Shape

_MASK_TYPES = {"910B": frozenset({"bool", "i8", "u8"}), "310P": frozenset({"bool"})}
_FULL_TOKENS = 2147483647
_MAX_HEAD, _MAX_HIDDEN, _COMPRESSED_MASK = 512, 65535, 2048
_LENGTH_AXES = {"BSH": 1, "BSND": 1, "BNSD": 2, "BNSD_BSND": 2}
_HEAD_AXES = {"BSND": 2, "BNSD": 1, "BNSD_BSND": 1}


def prompt_flash_attention(context: Context, node: Node) -> Iterator[Finding]:
    """NPUPromptFlashAttention: inputs by count, full masks, GQA, and what the 310P leaves out."""
    if node.op != "NPUPromptFlashAttention":
        return
    count = len(node.inputs)
    pse, mask = node.input(3), node.input(4)
    if count == 4 or (count >= 5 and pse is None and context.chip.family == "910B"):
        yield _attention_finding(
            node,
            "attention-inputs",
            "E11010",
            f"{count} inputs{', pse_shift left empty' if count >= 5 else ''}",
            "3 inputs, or at least 5 with a real pse_shift tensor",
            'give pse_shift a constant of zeros (1,N,Qs,KVs): "" still counts as an input',
        )
    if count >= 10 and count != 12:
        yield _attention_finding(
            node, "attention-inputs", "E11010", f"{count} inputs", "3, 5, 7, 9 or 12", "connect all of a group"
        )
    if mask is not None and mask.dtype is not None and mask.dtype not in _MASK_TYPES.get(context.chip.family, ()):
        wanted = ", ".join(sorted(_MASK_TYPES.get(context.chip.family, ())))
        yield _attention_finding(
            node, "attention-mask", "EZ3002", f"a mask of {mask.dtype}", f"{wanted}, True is masked", "cast the mask"
        )
    yield from _attention_attributes(context, node)
    yield from _attention_310p(context, node)
    yield from _attention_tensors(node)


def _attention_attributes(context: Context, node: Node) -> Iterator[Finding]:
    given = node.attributes
    heads, kv_heads = given.get("num_heads"), given.get("num_key_value_heads", 0)
    if isinstance(heads, int) and isinstance(kv_heads, int) and kv_heads and heads % kv_heads:
        seen, wanted = f"{heads} heads over {kv_heads} key/value heads", "a divisor"
        yield _attention_finding(node, "attention-heads", "EZ9999", seen, wanted, "correct num_key_value_heads")
    for name in ("pre_tokens", "next_tokens"):
        if node.input(4) is not None and given.get(name, 0) != _FULL_TOKENS and given.get("sparse_mode", 0) == 0:
            seen = f"{name} {given.get(name, 'absent, which is 0')}"
            yield about(
                node,
                "attention-window",
                "",
                effect=WRONG,
                seen=seen,
                wanted=str(_FULL_TOKENS),
                cure="set it: 0 would mask everything but the diagonal's side",
            )
    yield from _attention_sizes(node, given.get("input_layout"))


def _attention_sizes(node: Node, layout: object) -> Iterator[Finding]:
    query = node.input(0)
    shape = query.shape if query is not None else None
    wanted_rank = 3 if layout == "BSH" else 4
    if shape is None or not isinstance(layout, str):
        return
    if len(shape) != wanted_rank:
        seen = f"query {shape_text(shape)} in layout {layout}"
        yield _attention_finding(node, "attention-shape", "EZ9999", seen, f"{wanted_rank} dimensions", "reshape")
        return
    head = shape[-1] if wanted_rank == 4 else None
    if head is not None and head > _MAX_HEAD:
        seen, wanted = f"head size {head}", f"at most {_MAX_HEAD}"
        yield _attention_finding(node, "attention-shape", "EZ9999", seen, wanted, "use MatMul + Softmax + MatMul")
    hidden = {"BSH": shape[-1], "BSND": (shape[-1] or 0) * (shape[-2] or 0)}.get(layout)
    if hidden is not None and hidden >= _MAX_HIDDEN:
        seen = f"{hidden} values per token in {layout}"
        yield _attention_finding(node, "attention-shape", "EZ9999", seen, f"fewer than {_MAX_HIDDEN}", "use BNSD")


def _attention_310p(context: Context, node: Node) -> Iterator[Finding]:
    if context.chip.family != "310P":
        return
    if node.attributes.get("num_key_value_heads", 0):
        seen = f"num_key_value_heads {node.attributes['num_key_value_heads']}"
        yield _attention_finding(node, "attention-310p", "EZ9999", seen, "0 on 310P", "repeat keys and values")
    if node.input(3) is not None:
        yield _attention_finding(node, "attention-310p", "EZ9999", "pse_shift", "none on 310P", "leave it out")
    query, key = node.input(0), node.input(1)
    lengths = [v.shape[2] for v in (query, key) if v is not None and v.shape is not None and len(v.shape) == 4]
    aligned = len(lengths) == 2 and lengths[0] == lengths[1] and (lengths[0] or 1) % 128 == 0
    if node.input(4) is not None and len(lengths) == 2 and not aligned:
        seen = f"a mask with lengths {lengths[0]} and {lengths[1]}"
        wanted = "equal lengths, multiples of 128, on 310P"
        yield _attention_finding(node, "attention-310p", "EZ9999", seen, wanted, "use MatMul + Softmax + MatMul")


def _attention_finding(node: Node, rule: str, code: str, seen: str, wanted: str, cure: str) -> Finding:
    return about(node, rule, code, seen=seen, wanted=wanted, cure=cure)


def _attention_tensors(node: Node) -> Iterator[Finding]:
    """Shapes of mask, pse_shift and of K and V against num_key_value_heads."""
    layout = node.attributes.get("input_layout")
    query, key, mask = node.input(0), node.input(1), node.input(4)
    if query is None or key is None or not query.is_static or not key.is_static or layout not in _LENGTH_AXES:
        return
    axis = _LENGTH_AXES[layout]
    assert query.shape is not None
    assert key.shape is not None
    if len(query.shape) <= axis or len(key.shape) != len(query.shape):
        return
    batch, new, total = query.shape[0], query.shape[axis], key.shape[axis]
    if mask is not None and mask.is_static:
        yield from _mask_shape(node, mask.shape or (), (batch, new, total))
    heads = node.attributes.get("num_key_value_heads") or node.attributes.get("num_heads")
    if layout in _HEAD_AXES and key.shape[_HEAD_AXES[layout]] != heads:
        seen = f"keys {shape_text(key.shape)} in {layout}, {heads} key/value heads"
        yield _attention_finding(
            node, "attention-heads", "EZ9999", seen, "as many as the heads axis", "set num_key_value_heads"
        )
    pse, num_heads = node.input(3), node.attributes.get("num_heads")
    wanted = {(1, num_heads, new, total), (batch, num_heads, new, total)}
    if pse is not None and pse.is_static and pse.shape not in wanted:
        seen = f"pse_shift {shape_text(pse.shape)}"
        yield _attention_finding(node, "attention-pse", "EZ9999", seen, "(1,N,Qs,KVs) or (B,N,Qs,KVs)", "reshape it")
    if len(node.inputs) > 5 and any(value is not None for value in node.inputs[5:7]):
        yield about(
            node,
            "attention-lengths",
            "EZ9999",
            certain=False,
            seen="actual_seq_lengths, whose values the kernel must know at compile time",
            wanted="a mask",
            cure="mask what is not filled, or compile with --tiling_schedule_optimize=1",
        )


def _mask_shape(node: Node, shape: Shape, sizes: tuple[int | None, int | None, int | None]) -> Iterator[Finding]:
    batch, new, total = sizes
    mode = node.attributes.get("sparse_mode", 0)
    if mode in {2, 3, 4}:
        if shape[-2:] != (_COMPRESSED_MASK, _COMPRESSED_MASK):
            seen = f"mask {shape_text(shape)} with sparse_mode {mode}"
            yield _attention_finding(
                node, "attention-mask", "EZ9999", seen, "a mask of 2048 x 2048", "or sparse_mode 0"
            )
        return
    allowed = {(new, total), (1, new, total), (batch, new, total), (1, 1, new, total), (batch, 1, new, total)}
    if shape not in allowed:
        wanted = f"(B,1,Qs,KVs) = {shape_text((batch, 1, new, total))}, without B or with 1 instead"
        yield _attention_finding(
            node, "attention-mask", "EZ9999", f"mask {shape_text(shape)}", wanted, "one mask for all heads"
        )


def is_unmasked(node: Node) -> bool:
    """Whether every query sees every key: right for an encoder or a full cache, seldom for a decoder's prompt."""
    if node.op != "NPUPromptFlashAttention":
        return False
    return node.input(4) is None and node.integer("sparse_mode", 0) == 0


ATTENTION_RULES: tuple[NodeRule, ...] = (prompt_flash_attention,)
