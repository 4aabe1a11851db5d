"""What gemv_int8 means, and how its weights are made."""

import torch

from qcompile.errors import KernelError


def quantize_weight(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Symmetric int8 a row: weight [N, K] ~ q int8 [N, K] * scale float32 [N].

    Raises:
        KernelError: The weight is no matrix.
    """
    if weight.dim() != 2 or weight.numel() == 0:
        raise KernelError(f"gemv_int8: weight is {list(weight.shape)}, wanted [N, K], not empty")
    wide = weight.float()
    scale = wide.abs().amax(-1).clamp_min(1e-30) / 127.0
    return torch.round(wide / scale[:, None]).to(torch.int8), scale


def reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    compute: torch.dtype = torch.float32,
) -> torch.Tensor:
    """out = x @ (scale * weight).T + bias.

    Args:
        x: [..., K].
        weight: int8 [N, K].
        scale: float32 [N].
        bias: [N] or None.
        compute: Dtype of the arithmetic and, when it is float64, of out.

    Returns:
        out, [..., N].
    """
    out = x.to(compute) @ weight.to(compute).T * scale.to(compute)
    if bias is not None:
        out = out + bias.to(compute)
    return out if compute == torch.float64 else out.to(x.dtype)
