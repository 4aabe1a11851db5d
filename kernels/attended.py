"""Which slots of the KV cache every token goes to and attends to, from what transformers passes to a model."""

from dataclasses import dataclass
from typing import Any

import torch

from qcompile.errors import KernelError

_FORBIDDEN = torch.finfo(torch.float16).min  # and below: beside scores that nothing is added to, no weight is left


@dataclass(frozen=True)
class Attended:
    """Where the tokens of one forward call stand.

    Attributes:
        positions: int32 [B * S], by which the rotary embedding turns.
        slots: int32 [B * S], columns of the cache.
        starts: int32 [B], first slot of each sequence; None unless S is 1 and the slots are one range.
        lengths: int32 [B], one past the last; None as starts.
        mask: [B | 1, H | 1, S, T] bool (True: attend) or float (added); None: causal, or given by starts and lengths.
    """

    positions: torch.Tensor
    slots: torch.Tensor
    starts: torch.Tensor | None
    lengths: torch.Tensor | None
    mask: torch.Tensor | None


def attended(
    batch: int,
    length: int,
    seen: int | torch.Tensor,
    mask: Any,
    position_ids: torch.Tensor | None,
    device: torch.device,
) -> Attended:
    """Work out slots and masks.

    Args:
        batch: B.
        length: S, tokens a sequence in this call.
        seen: Tokens already in the cache, the same for every sequence; a tensor where asking would stop the device.
        mask: None; [B, T] with 1 for tokens and 0 for padding; [B | 1, H | 1, S, T] bool or float; or a dict of those by
            layer type.
        position_ids: int [B | 1, S] or None.
        device: Of the result.

    Raises:
        KernelError: A mask of another form.
    """
    columns = torch.arange(length, device=device) + seen
    slots = columns.to(torch.int32).repeat(batch)
    positions = columns[None] if position_ids is None else position_ids
    positions = positions.expand(batch, length).reshape(-1).to(torch.int32)
    if isinstance(mask, dict):
        mask = mask.get("full_attention")
    if mask is not None and mask.dim() not in (2, 4):
        raise KernelError(f"patched model: attention_mask is {list(mask.shape)}; wanted [B, T] or [B, 1, S, T]")
    if length == 1:
        return _one_token(batch, columns, mask, positions, slots)
    if mask is None or mask.dim() == 2:
        mask = _causal(mask, columns, int(seen), length)
    return Attended(positions, slots, None, None, mask)


def _one_token(
    batch: int, columns: torch.Tensor, mask: torch.Tensor | None, positions: torch.Tensor, slots: torch.Tensor
) -> Attended:
    if mask is None:
        starts = torch.zeros(batch, dtype=torch.int32, device=columns.device)
        lengths = (columns + 1).to(torch.int32).expand(batch).contiguous()
        return Attended(positions, slots, starts, lengths, None)
    is_added = mask.dim() == 4 and mask.is_floating_point()
    mask = mask[:, None, None] if mask.dim() == 2 else mask
    allowed = mask == 0 if is_added else mask.bool()
    by_mask = Attended(positions, slots, None, None, mask if is_added else allowed)
    if mask.shape[1] > 1:  # one for each head
        return by_mask
    row = allowed[:, 0, 0].expand(batch, -1).to(torch.int32)
    starts = row.argmax(-1).to(torch.int32)
    lengths = (row.shape[1] - row.flip(-1).argmax(-1)).to(torch.int32)
    is_range = (row.sum(-1) == lengths - starts).all()
    if is_added:
        is_range &= (allowed | (mask <= _FORBIDDEN)).all()
    # holes, or numbers to add, are no range; asked once, because the answer stops a device
    return Attended(positions, slots, starts, lengths, None) if bool(is_range) else by_mask


def _causal(mask: torch.Tensor | None, columns: torch.Tensor, seen: int, length: int) -> torch.Tensor | None:
    """The mask [B, 1, S, T] of a call with several tokens; None where it is the triangle that kernels know by themselves."""
    if seen == 0 and (mask is None or bool(mask.all())):
        return None
    keys = torch.arange(seen + length, device=columns.device)
    causal = keys <= columns[:, None]  # [S, T]
    if mask is None:
        return causal[None, None]
    itself = keys == columns[:, None]  # a padding token attends to itself: an empty softmax would be NaN
    return ((mask[:, None, : seen + length].bool() & causal) | itself)[:, None]
