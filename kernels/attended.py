"""Which slots of the KV cache every token goes to and attends to, from what transformers passes to a model."""

from dataclasses import dataclass
from typing import Any

import torch

from qcompile.errors import KernelError


@dataclass(frozen=True)
class Attended:
    """Where the tokens of one forward call stand.

    Attributes:
        positions: int32 [B * S], rows of the rotary table.
        slots: int32 [B * S], columns of the cache.
        starts: int32 [B], first slot of each sequence; None unless S is 1 and the slots are one range.
        lengths: int32 [B], one past the last; None as starts.
        mask: [B | 1, 1, S, T] bool (True: attend) or float (added); None: causal, or given by starts and lengths.
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
        mask: None; [B, T] with 1 for tokens and 0 for padding; [B, 1, S, T] bool or float; or a dict of those by layer type.
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
    allowed = mask if mask.dim() == 2 else mask[:, 0, 0]
    allowed = (allowed >= 0) if allowed.is_floating_point() and mask.dim() == 4 else allowed.bool()
    allowed = allowed.expand(batch, -1).to(torch.int32)
    starts = allowed.argmax(-1).to(torch.int32)
    lengths = (allowed.shape[1] - allowed.flip(-1).argmax(-1)).to(torch.int32)
    if bool((allowed.sum(-1) != lengths - starts).any()):  # holes: no range
        return Attended(positions, slots, None, None, allowed.bool()[:, None, None, :])
    return Attended(positions, slots, starts, lengths, None)


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
