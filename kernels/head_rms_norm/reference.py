"""What head_rms_norm means."""

import torch


def reference(x: torch.Tensor, gamma: torch.Tensor, eps: float, compute: torch.dtype = torch.float32) -> torch.Tensor:
    """y = x * rsqrt(mean(x * x, -1) + eps) * gamma.

    Args:
        x: [..., H, d].
        gamma: [d].
        eps: Added to the mean square.
        compute: Dtype of the arithmetic and, when it is float64, of y.

    Returns:
        y, [..., H, d].
    """
    wide = x.to(compute)
    y = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * gamma.to(compute)
    return y if compute == torch.float64 else y.to(x.dtype)
