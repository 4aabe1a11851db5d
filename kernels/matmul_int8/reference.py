"""What matmul_int8 means."""

import torch


def reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    x_scale: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
    compute: torch.dtype = torch.float32,
) -> torch.Tensor:
    """out = x_scale * weight_scale * (x @ weight.T) + bias, the product exact in integers.

    Args:
        x: int8 [..., K].
        weight: int8 [N, K].
        x_scale: float32 [...], one a row.
        weight_scale: float32 [N], one an output channel.
        bias: [N] of out_dtype or None.
        out_dtype: Dtype of out.
        compute: Dtype of the dequantization and, when it is float64, of out.

    Returns:
        out, [..., N].
    """
    product = x.double() @ weight.double().T  # exact: |sum| < 2**53
    out = product.to(compute) * x_scale.to(compute).unsqueeze(-1) * weight_scale.to(compute)
    if bias is not None:
        out = out + bias.to(compute)
    return out if compute == torch.float64 else out.to(out_dtype)
