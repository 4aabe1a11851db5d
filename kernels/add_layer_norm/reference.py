"""What add_layer_norm means."""

import torch


def reference(
    x: torch.Tensor,
    residual: torch.Tensor,
    gamma: torch.Tensor,
    beta: torch.Tensor,
    eps: float,
    compute: torch.dtype = torch.float32,
) -> tuple[torch.Tensor, torch.Tensor]:
    """h = x + residual, rounded; y = (h - mean(h)) * rsqrt(var(h) + eps) * gamma + beta, var divided by D.

    Args:
        x: [..., D].
        residual: [..., D].
        gamma: [D].
        beta: [D].
        eps: Added to the variance.
        compute: Dtype of the arithmetic and, when it is float64, of y.

    Returns:
        y and h, both [..., D].
    """
    h = (x.to(compute) + residual.to(compute)).to(x.dtype)
    wide = h.to(compute)
    centred = wide - wide.mean(-1, keepdim=True)
    y = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps) * gamma.to(compute) + beta.to(compute)
    return (y if compute == torch.float64 else y.to(x.dtype)), h
