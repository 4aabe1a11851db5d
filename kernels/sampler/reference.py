"""What sampler means."""

import torch


def reference(
    logits: torch.Tensor, top_k: int, temperature: float, uniform: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The top_k largest logits in falling order, and one of them drawn with probability softmax(top / temperature).

    NaN counts as -inf. Of equal logits the one with the smaller id comes first. The token drawn is the first whose cumulated
    probability exceeds uniform; uniform 0 draws the largest.

    Args:
        logits: [B, V].
        top_k: How many; 1 is greedy.
        temperature: Above 0.
        uniform: float32 [B], in [0, 1); None draws the largest.

    Returns:
        values float32 [B, k], ids int32 [B, k] and token int32 [B].
    """
    clean = logits.double().nan_to_num(nan=float("-inf"), posinf=float("inf"), neginf=float("-inf"))
    ids = torch.sort(-clean, dim=-1, stable=True).indices[:, :top_k]
    values = torch.gather(clean, 1, ids)
    weights = torch.exp((values - values[:, :1]) / temperature).nan_to_num(nan=0.0)
    if uniform is None:
        uniform = torch.zeros(len(logits), device=logits.device)
    passed = torch.cumsum(weights, -1) <= (uniform.double() * weights.sum(-1)).unsqueeze(-1)
    drawn = torch.where(weights.sum(-1) > 0, passed.sum(-1), 0).clamp_max(top_k - 1)
    token = torch.gather(ids, 1, drawn[:, None])[:, 0]
    return values.float(), ids.to(torch.int32), token.to(torch.int32)
