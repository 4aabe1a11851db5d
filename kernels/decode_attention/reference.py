"""What decode_attention means."""

import torch


def reference(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    starts: torch.Tensor,
    lengths: torch.Tensor,
    scale: float,
    compute: torch.dtype = torch.float32,
) -> torch.Tensor:
    """out = softmax(scale * q @ k.T) @ v over slots starts[b] ... lengths[b] - 1; query head h has key head h * K // H.

    A sequence without slots gives zeros. What lies in other slots, NaN included, has no influence.

    Args:
        q: [B, H, d], one token a sequence.
        k_cache: [B, K, T, d].
        v_cache: [B, K, T, d].
        starts: int32 [B], the first slot (left padding lies before it).
        lengths: int32 [B], one past the last slot.
        scale: Factor of the scores.
        compute: Dtype of the arithmetic and, when it is float64, of out.

    Returns:
        out, [B, H, d].
    """
    group = q.shape[1] // k_cache.shape[1]
    slots = torch.arange(k_cache.shape[2], device=q.device)
    live = (slots >= starts[:, None]) & (slots < lengths[:, None])  # [B, T]
    k = k_cache.to(compute).masked_fill(~live[:, None, :, None], 0.0).repeat_interleave(group, 1)
    v = v_cache.to(compute).masked_fill(~live[:, None, :, None], 0.0).repeat_interleave(group, 1)
    scores = torch.einsum("bhd,bhtd->bht", q.to(compute), k) * scale
    weights = torch.softmax(scores.masked_fill(~live[:, None, :], float("-inf")), -1)
    weights = weights.masked_fill(~live[:, None, :], 0.0)
    out = torch.einsum("bht,bhtd->bhd", weights, v)
    return out if compute == torch.float64 else out.to(q.dtype)
