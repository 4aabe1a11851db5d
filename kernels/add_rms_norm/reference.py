"""What add_rms_norm means."""

import torch


def reference(
    x: torch.Tensor, residual: torch.Tensor, gamma: torch.Tensor, eps: float, compute: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor]:
    """h = x + residual, rounded to its dtype; y = h * rsqrt(mean(h * h, -1) + eps) * gamma.

    Args:
        x: [..., D].
        residual: [..., D].
        gamma: [D].
        eps: Added to the mean square.
        compute: Dtype of the arithmetic and, when it is float64, of y.

    Returns:
        y and h, both [..., D].
    """
    h = (x.to(compute) + residual.to(compute)).to(x.dtype)
    wide = h.to(compute)
    y = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * gamma.to(compute)
    return (y if compute == torch.float64 else y.to(x.dtype)), h
