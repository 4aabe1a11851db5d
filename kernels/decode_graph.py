"""A decode step captured once and replayed: a CUDA graph over buffers that stay where they are."""

from collections.abc import Callable, Mapping

import torch

Step = Callable[[Mapping[str, torch.Tensor]], torch.Tensor]
Capture = Callable[[Callable[[], torch.Tensor]], tuple[Callable[[], None], torch.Tensor]]
_WARM_UP_RUNS = 3


def capture_cuda(run: Callable[[], torch.Tensor]) -> tuple[Callable[[], None], torch.Tensor]:
    """Run a few times on a side stream, so that kernels are compiled and workspaces allocated, then capture.

    Returns:
        What replays, and the tensor that holds the result after each replay.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(_WARM_UP_RUNS):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run()
    return graph.replay, result


class DecodeGraph:
    """Replays a step on copies of its inputs.

    The step must do the same on the device whatever the values of its inputs; running it twice on the same inputs must leave
    what running it once leaves (a decode step writes the same keys to the same slot).
    """

    def __init__(self, step: Step, inputs: Mapping[str, torch.Tensor], capture: Capture = capture_cuda) -> None:
        self._inputs = {name: tensor.clone() for name, tensor in inputs.items()}
        self._replay, self._result = capture(lambda: step(self._inputs))

    def run(self, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The step's result on these inputs, in memory of its own."""
        for name, buffer in self._inputs.items():
            buffer.copy_(inputs[name])
        self._replay()
        return self._result.clone()
