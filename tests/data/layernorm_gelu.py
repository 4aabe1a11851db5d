"""A toy with LayerNorm, Add + LayerNorm and three spellings of GELU; export by both torch exporters."""

from pathlib import Path
from typing import Any

import torch
from torch import nn


class HandLayerNorm(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(size)), nn.Parameter(torch.zeros(size))

    def forward(self, x: Any) -> Any:
        centred = x - x.mean(-1, keepdim=True)
        variance = centred.pow(2).mean(-1, keepdim=True)
        return centred / torch.sqrt(variance + 1e-5) * self.weight + self.bias


class NewGelu(nn.Module):  # GPT-2's, as transformers spells it
    def forward(self, x: Any) -> Any:
        return 0.5 * x * (1.0 + torch.tanh(0.7978845608028654 * (x + 0.044715 * torch.pow(x, 3.0))))


class Block(nn.Module):
    def __init__(self, norm: Any, activation: Any, *, pre_norm: bool) -> None:
        super().__init__()
        self.norm, self.activation, self.pre_norm = norm, activation, pre_norm
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x: Any) -> Any:
        if self.pre_norm:
            return x + self.down(self.activation(self.up(self.norm(x))))
        return self.norm(x + self.down(self.activation(self.up(x))))


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            [
                Block(nn.LayerNorm(32), nn.GELU(), pre_norm=True),
                Block(nn.LayerNorm(32), nn.GELU(approximate="tanh"), pre_norm=True),
                Block(nn.LayerNorm(32), NewGelu(), pre_norm=False),
                Block(HandLayerNorm(32), nn.GELU(), pre_norm=False),
            ]
        )
        self.norm = nn.LayerNorm(32)

    def forward(self, hidden_states: Any) -> Any:
        for block in self.blocks:
            hidden_states = block(hidden_states)
        return self.norm(hidden_states)


def make_toy(seed: int) -> nn.Module:
    """The toy with seeded random weights; norms differ from the identity."""
    torch.manual_seed(seed)
    toy = Toy().eval()
    for name, parameter in toy.named_parameters():
        if "norm" in name:
            parameter.data += 0.2 * torch.randn_like(parameter)
    return toy


def export_toy(path: Path, seed: int, opset: int, *, is_dynamo: bool) -> None:
    """Write the toy: `hidden_states` [batch_size, sequence_length, 32] -> `output`."""
    x = torch.zeros(2, 5, 32)
    names: dict[str, Any] = {"input_names": ["hidden_states"], "output_names": ["output"]}
    dims = {0: "batch_size", 1: "sequence_length"}
    shapes = {"dynamic_shapes": (dims,)} if is_dynamo else {"dynamic_axes": {"hidden_states": dims, "output": dims}}
    torch.onnx.export(
        make_toy(seed),
        (x,),
        path,
        dynamo=is_dynamo,
        opset_version=opset,
        external_data=False,
        **names,
        **shapes,
    )
