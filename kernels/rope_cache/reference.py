"""What rope_cache means."""

import torch


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, compute: torch.dtype) -> torch.Tensor:
    """x [B, S, heads, d] turned by cos and sin [B, S, 1, d / 2]; the halves of a head are its pairs (Su et al. 2021)."""
    low, high = x.to(compute).chunk(2, -1)
    return torch.cat([low * cos - high * sin, high * cos + low * sin], -1)


def reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
    slots: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    compute: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Rotate q and k; write k and v of token (b, s) to slot slots[b * S + s] of row b of the caches, in place.

    Args:
        q: [B, S, H, d].
        k: [B, S, K, d].
        v: [B, S, K, d].
        cos: [P, d / 2], a row for every position.
        sin: [P, d / 2].
        positions: int32 [B * S], rows of cos and sin.
        slots: int32 [B * S]; below 0: nothing is written.
        k_cache: [B, K, T, d].
        v_cache: [B, K, T, d].
        compute: Dtype of the arithmetic and, when it is float64, of the result.

    Returns:
        q rotated, [B, S, H, d].
    """
    batch, length = q.shape[:2]
    index = positions.long()
    c = cos.to(compute)[index].view(batch, length, 1, -1)
    s = sin.to(compute)[index].view(batch, length, 1, -1)
    rotated = rotate(k, c, s, compute).to(k_cache.dtype)
    rows, columns = torch.nonzero(slots.view(batch, length) >= 0, as_tuple=True)
    where = slots.view(batch, length)[rows, columns].long()
    k_cache[rows, :, where] = rotated[rows, columns]
    v_cache[rows, :, where] = v[rows, columns]
    out = rotate(q, c, s, compute)
    return out if compute == torch.float64 else out.to(q.dtype)
