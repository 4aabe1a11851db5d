"""What swiglu means."""

import torch


def reference(gate_up: torch.Tensor, compute: torch.dtype = torch.float32) -> torch.Tensor:
    """out = gate * sigmoid(gate) * up, where gate_up [..., 2F] holds F gates, then F ups.

    Args:
        gate_up: [..., 2F].
        compute: Dtype of the arithmetic and, when it is float64, of out.

    Returns:
        out, [..., F].
    """
    gate, up = gate_up.to(compute).chunk(2, -1)
    out = gate * torch.sigmoid(gate) * up
    return out if compute == torch.float64 else out.to(gate_up.dtype)
