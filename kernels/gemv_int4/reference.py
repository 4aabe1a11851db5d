"""What gemv_int4 means, and how its weights are made."""

import torch

from qcompile.errors import KernelError

GROUPS = (32, 64, 128)


def quantize_weight(weight: torch.Tensor, group: int = 128) -> tuple[torch.Tensor, torch.Tensor]:
    """Symmetric int4 a group: weight [N, K] ~ q [N, K / group, group] * scale [N, K / group]; q int8 in -8 ... 7.

    Raises:
        KernelError: K is no multiple of the group, or the group is not one of 32, 64, 128.
    """
    if group not in GROUPS or weight.dim() != 2 or weight.shape[1] % group:
        raise KernelError(
            f"gemv_int4: weight {list(weight.shape)} in groups of {group}; wanted [N, K], groups of 32, 64 or 128 that divide K"
        )
    wide = weight.float().view(weight.shape[0], -1, group)
    scale = (wide.abs().amax(-1).clamp_min(1e-6) / 7.0).to(weight.dtype)
    return torch.round(wide / scale.float()[..., None]).clamp(-8, 7).to(torch.int8), scale


def pack(q: torch.Tensor) -> torch.Tensor:
    """q int8 [N, K / G, G] in -8 ... 7 to words int32 [N, K / 8].

    Word i of a group holds weight j * G / 8 + i, plus 8, in bits 4j ... 4j + 3.
    """
    planes = (q.to(torch.int64) + 8).view(*q.shape[:2], 8, -1)
    words = (planes << (4 * torch.arange(8, device=q.device)).view(8, 1)).sum(2)
    return (((words + (1 << 31)) % (1 << 32)) - (1 << 31)).to(torch.int32).reshape(q.shape[0], -1)


def unpack(words: torch.Tensor, group: int) -> torch.Tensor:
    """The inverse of pack: int8 [N, K / G, G]."""
    grouped = words.to(torch.int64).view(words.shape[0], -1, 1, group // 8)
    planes = (grouped >> (4 * torch.arange(8, device=words.device)).view(8, 1)) & 15
    return (planes - 8).to(torch.int8).flatten(-2)


def reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    compute: torch.dtype = torch.float32,
) -> torch.Tensor:
    """out = x @ (scale * unpack(weight)).T + bias.

    Args:
        x: [..., K].
        weight: int32 [N, K / 8], packed by ``pack``.
        scale: [N, K / G], dtype of x; its shape says how large a group is.
        bias: [N] or None.
        compute: Dtype of the arithmetic and, when it is float64, of out.

    Returns:
        out, [..., N].
    """
    q = unpack(weight, x.shape[-1] // scale.shape[1]).to(compute)
    out = x.to(compute) @ (q * scale.to(compute).unsqueeze(-1)).flatten(1).T
    if bias is not None:
        out = out + bias.to(compute)
    return out if compute == torch.float64 else out.to(x.dtype)
