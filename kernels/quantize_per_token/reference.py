"""What quantize_per_token means."""

import torch

TINY = 1e-30


def reference(x: torch.Tensor, compute: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """scale = max|x| / 127; q = round(x / scale), ties to even; per row of the last axis.

    max|x| is taken as at least 1e-30, so a row of zeros has q = 0 and a scale above 0. A row with NaN has scale NaN, one with
    inf has scale inf; its NaN and inf (inf / inf) have q = 0, so the dequantized row is NaN wherever it could mislead.

    Args:
        x: [..., D].
        compute: Dtype of the arithmetic and, when it is float64, of scale.

    Returns:
        q int8 [..., D] and scale float32 [...].
    """
    wide = x.to(compute)
    amax = wide.abs().amax(-1).clamp_min(TINY)
    rounded = torch.round(wide * (127.0 / amax).unsqueeze(-1))
    scale = amax / 127.0
    return torch.nan_to_num(rounded, nan=0.0).to(torch.int8), (scale if compute == torch.float64 else scale.float())
