"""Check the arguments of sampler, choose tiles, launch."""

from typing import Any

import torch

from qcompile.kernels import arguments as check
from qcompile.kernels.placement import (
    Launch,
    compiled_in,
    from_table,
    gpu_processors,
    grid,
    is_hopper,
    on_its_device,
    power_of_two,
    walks,
)

NAME = "sampler"
MAX_K = 64
_BLOCK_VOCAB = 4096
_MAX_CANDIDATES = 4096
_GREEDY_BLOCK = 1024
_PARTS = 37  # of a row, at least: four blocks of Qwen's vocabulary each
_SEGMENT_BLOCK = 1024
_SEGMENTS = 2048  # of a row, at most: the more, the fewer logits are in the top_k segments that are looked at again
_SEGMENT_PARTS = (6, 64)  # of a row, at least and at most
_SEGMENT_WARPS = 4


def validate(logits: torch.Tensor, top_k: int, temperature: float, uniform: torch.Tensor | None) -> None:
    """Require logits [B, V] of a float dtype, 1 <= top_k <= min(64, V), temperature > 0, uniform float32 [B].

    Raises:
        KernelError: Naming the argument, what it is and what is wanted. Values of uniform are seen on the CPU only.
    """
    check.one_device(NAME, {"logits": logits} | ({} if uniform is None else {"uniform": uniform}))
    check.dtype_of(NAME, {"logits": logits})
    check.not_empty(NAME, {"logits": logits})
    if logits.dim() != 2:
        raise check.fail(NAME, f"logits is {list(logits.shape)}, wanted [B, V]")
    check.as_rows(NAME, "logits", logits)
    if not 1 <= top_k <= min(MAX_K, logits.shape[1]):
        raise check.fail(NAME, f"top_k is {top_k}; this operator takes 1 ... {min(MAX_K, logits.shape[1])}")
    if not temperature > 0:
        raise check.fail(NAME, f"temperature is {temperature}, wanted above 0 (greedy is top_k = 1)")
    chunks = -(-logits.shape[1] // _BLOCK_VOCAB)
    if chunks * top_k > _MAX_CANDIDATES:
        raise check.fail(
            NAME, f"a vocabulary of {logits.shape[1]} with top_k {top_k} has more than {_MAX_CANDIDATES} candidates"
        )
    if uniform is not None:
        check.shape_of(NAME, "uniform", uniform, logits.shape[:1], "B")
        check.dtype_of(NAME, {"uniform": uniform}, (torch.float32,))
        check.contiguous(NAME, {"uniform": uniform})
        check.within(NAME, "uniform", uniform, 0, 1)


@on_its_device
def launch(
    logits: torch.Tensor,
    top_k: int = 1,
    temperature: float = 1.0,
    uniform: torch.Tensor | None = None,
    tiles: tuple[Launch, Launch] | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Values, ids and token as in reference.py, computed by two kernels: one over chunks, one over their candidates.

    Args:
        logits: [B, V] float16, bfloat16 or float32; rows may lie apart.
        top_k: 1 is greedy.
        temperature: Above 0.
        uniform: float32 [B] in [0, 1); None draws the largest.
        tiles: Instead of the ones chosen for the device.

    Raises:
        KernelError: Arguments that the kernels do not take.
    """
    validate(logits, top_k, temperature, uniform)
    check.launchable(NAME, logits)
    if top_k == 1 and tiles is None and logits.device.type != "npu" and not walks(len(logits)):
        return greedy(logits, *choose_greedy(logits))
    if tiles is None and logits.device.type != "npu" and not walks(len(logits)):
        return by_segments(logits, top_k, temperature, uniform, *choose_segments(logits))
    return by_chunks(logits, top_k, temperature, uniform, *(tiles or choose(logits, top_k)))


def by_chunks(
    logits: torch.Tensor, top_k: int, temperature: float, uniform: torch.Tensor | None, chunk: Launch, merge: Launch
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The same on any device: the top_k of every chunk, then the top_k of those."""
    from qcompile.kernels.sampler.kernel import sampler_chunk_kernel, sampler_merge_kernel

    batch, vocab = logits.shape
    chunks = -(-vocab // chunk.constants["BLOCK_VOCAB"])
    values, ids = _pairs(logits, chunks, top_k)
    sampler_chunk_kernel[grid(logits, batch * chunks)](
        logits, values, ids, batch, vocab, chunks, logits.stride(0), top_k, **chunk.arguments(logits)
    )
    if uniform is None:
        uniform = torch.zeros(batch, dtype=torch.float32, device=logits.device)
    top_values, top_ids = _pairs(logits, top_k)
    token = torch.empty((batch,), dtype=torch.int32, device=logits.device)
    sampler_merge_kernel[grid(logits, batch)](
        values,
        ids,
        uniform,
        top_values,
        top_ids,
        token,
        batch,
        chunks * top_k,
        top_k,
        1.0 / temperature,
        **merge.arguments(logits),
    )
    return top_values, top_ids, token


def greedy(logits: torch.Tensor, parts: int, part: Launch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The same for top_k = 1 on a GPU, for rows that its second axis holds: each in so many parts, then the largest of them."""
    from qcompile.kernels.sampler.greedy import sampler_largest_kernel, sampler_part_kernel

    batch = len(logits)
    is_dependent = is_hopper(logits)
    values, ids = _pairs(logits, parts)
    sampler_part_kernel[parts, batch](
        logits, values, ids, *part_sizes(logits, parts), **part.replace(PDL=int(is_dependent)).arguments(logits)
    )
    value, chosen = _pairs(logits, 1)
    token = torch.empty((batch,), dtype=torch.int32, device=logits.device)
    largest = _second({"BLOCK_PARTS": power_of_two(parts)}, 1, is_dependent)
    sampler_largest_kernel[batch,](values, ids, value, chosen, token, parts, **largest.arguments(logits))
    return value, chosen, token


def by_segments(
    logits: torch.Tensor, top_k: int, temperature: float, uniform: torch.Tensor | None, parts: int, segment: Launch
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The same for any top_k on a GPU: the best of every segment, then the top_k of the logits of the top_k segments."""
    from qcompile.kernels.sampler.top_k import sampler_candidates_kernel, sampler_segment_kernel

    batch, vocab = logits.shape
    is_dependent = is_hopper(logits)
    block, segments = segment.constants["BLOCK_VOCAB"], segment.constants["SEGMENTS"]
    values, ids = _pairs(logits, parts * segments)
    sizes = part_sizes(logits, parts)
    sampler_segment_kernel[parts, batch](
        logits, values, ids, *sizes, **segment.replace(PDL=int(is_dependent)).arguments(logits)
    )
    blocks = -(-vocab // block)
    members = -(-blocks // parts) * (block // segments)
    constants = {"BLOCK_VOCAB": block, "SEGMENTS": segments, "BLOCK_SEGMENTS": power_of_two(parts * segments)}
    constants |= {"BLOCK_CANDIDATES": power_of_two(top_k * members), "BLOCK_K": power_of_two(top_k)}
    constants["HAS_UNIFORM"] = int(uniform is not None)
    top_values, top_ids = _pairs(logits, top_k)
    token = torch.empty((batch,), dtype=torch.int32, device=logits.device)
    sampler_candidates_kernel[batch,](
        logits,
        values,
        ids,
        logits if uniform is None else uniform,
        top_values,
        top_ids,
        token,
        *sizes,
        top_k,
        1.0 / temperature,
        **_second(constants, _SEGMENT_WARPS, is_dependent).arguments(logits),
    )
    return top_values, top_ids, token


def _pairs(logits: torch.Tensor, *shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Room for values and ids of every row."""
    size, device = (len(logits), *shape), logits.device
    return torch.empty(size, dtype=torch.float32, device=device), torch.empty(size, dtype=torch.int32, device=device)


def _second(constants: dict[str, int], num_warps: int, is_dependent: bool) -> Launch:
    """The tile of a kernel that goes on with what the one before wrote, perhaps launched while that one runs (PDL)."""
    options = {"num_warps": num_warps} | ({"launch_pdl": True} if is_dependent else {})
    return Launch(constants | {"PDL": int(is_dependent)}, options)


def part_sizes(logits: torch.Tensor, parts: int) -> tuple[Any, ...]:
    """V, parts and row stride; rows that lie apart do so by the length of a prompt, for which nothing is compiled anew."""
    batch, vocab = logits.shape
    stride = logits.stride(0) if batch > 1 else vocab
    return (*compiled_in(logits, vocab, parts), *(compiled_in(logits, vocab) if stride == vocab else (stride,)))


def choose_greedy(logits: torch.Tensor) -> tuple[int, Launch]:
    """Parts of a row, and the tile of the first kernel: blocks enough to fill a GPU, several to a program if there are."""
    batch, vocab = logits.shape
    blocks = -(-vocab // _GREEDY_BLOCK)
    parts = min(blocks, max(_PARTS, 2 * gpu_processors(logits) // batch))
    return parts, Launch({"BLOCK_VOCAB": _GREEDY_BLOCK, "STAGES": 3}, {"num_warps": 4})


def choose_segments(logits: torch.Tensor) -> tuple[int, Launch]:
    """Parts of a row, and the tile of the first kernel: the more parts, the fewer segments each."""
    batch, vocab = logits.shape
    least, most = _SEGMENT_PARTS
    filling = power_of_two(4 * gpu_processors(logits) // batch + 1) // 2  # programs for each multiprocessor: four
    parts = min(-(-vocab // _SEGMENT_BLOCK), max(least, min(filling, most)))
    segments = min(_SEGMENTS // power_of_two(parts), _SEGMENT_BLOCK // 4)
    return parts, Launch({"BLOCK_VOCAB": _SEGMENT_BLOCK, "SEGMENTS": segments, "STAGES": 4}, {"num_warps": 4})


def choose(logits: torch.Tensor, top_k: int) -> tuple[Launch, Launch]:
    """The tiles of both kernels for the device of logits."""
    candidates = -(-logits.shape[1] // _BLOCK_VOCAB) * top_k
    if logits.device.type == "npu":
        return (
            from_table(NAME, "sampler_chunk_kernel", logits.dtype),
            from_table(NAME, "sampler_merge_kernel", torch.float32, BLOCK_CANDIDATES=candidates, BLOCK_K=top_k),
        )
    block = min(_BLOCK_VOCAB, power_of_two(logits.shape[1]))
    return (
        Launch({"BLOCK_VOCAB": block}, {"num_warps": 8}),
        Launch({"BLOCK_CANDIDATES": power_of_two(candidates), "BLOCK_K": power_of_two(top_k)}, {"num_warps": 4}),
    )
