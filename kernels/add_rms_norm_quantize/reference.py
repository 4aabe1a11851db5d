"""What add_rms_norm_quantize means."""

import torch

from qcompile.kernels.add_rms_norm.reference import reference as add_rms_norm
from qcompile.kernels.quantize_per_token.reference import reference as quantize_per_token


def reference(
    x: torch.Tensor, residual: torch.Tensor, gamma: torch.Tensor, eps: float, compute: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """add_rms_norm, then quantize_per_token of its y, which is not rounded in between.

    Args:
        x: [..., D].
        residual: [..., D].
        gamma: [D].
        eps: Added to the mean square.
        compute: Dtype of the arithmetic and, when it is float64, of scale.

    Returns:
        q int8 [..., D], scale float32 [...] and h [..., D].
    """
    y, h = add_rms_norm(x, residual, gamma, eps, torch.float64)
    q, scale = quantize_per_token(y.to(compute), compute)
    return q, scale, h
