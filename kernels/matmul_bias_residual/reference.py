"""What matmul_bias_residual means."""

import torch


def reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    compute: torch.dtype = torch.float32,
) -> torch.Tensor:
    """out = x @ weight.T + bias + residual, rounded once.

    Args:
        x: [..., K].
        weight: [N, K], as torch.nn.Linear has it.
        bias: [N] or None.
        residual: [..., N] or None.
        compute: Dtype of the arithmetic and, when it is float64, of out.

    Returns:
        out, [..., N].
    """
    out = x.to(compute) @ weight.to(compute).T
    if bias is not None:
        out = out + bias.to(compute)
    if residual is not None:
        out = out + residual.to(compute)
    return out if compute == torch.float64 else out.to(x.dtype)
