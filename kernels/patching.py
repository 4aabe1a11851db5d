"""Swap the fused operators into a transformers Qwen2 or Qwen3, and out again."""

from typing import Any, TypeVar

from qcompile.errors import KernelError
from qcompile.kernels.packed_layers import require_supported
from qcompile.kernels.patched_decoder import PatchedDecoder

Model = TypeVar("Model")
_MARK = "_qcompile_before_patch"


def patch(model: Model, *, graph: bool = True) -> Model:
    """Make a Qwen2ForCausalLM or Qwen3ForCausalLM compute with the fused operators; generate() and all else stay as they are.

    QKV and gate/up are packed (parameters become views into the packed weights). On CUDA and NPU the kernels run; on the CPU
    their references. With a ``StaticCache`` (``generate(..., cache_implementation="static")``) keys and values are written in
    place and, on CUDA, the decode step is captured in a graph. For inference only: the operators have no derivatives. Move or
    cast a model first, then patch it.

    Args:
        model: The model, in one dtype on one device; changed in place.
        graph: Capture decode steps on CUDA.

    Returns:
        The same model.

    Raises:
        KernelError: A model that the kernels do not compute, or one that is patched already.
    """
    if hasattr(model, _MARK):
        raise KernelError("patch: the model is patched already")
    require_supported(model)
    target: Any = model
    decoder = PatchedDecoder(target, graph)
    generation = getattr(target, "generation_config", None)
    setattr(target, _MARK, (vars(target.model).get("forward"), getattr(generation, "disable_compile", None)))
    if generation is not None:
        generation.disable_compile = True  # generate() would compile the step over a StaticCache a second time
    target.model.forward = decoder.forward
    return model


def unpatch(model: Model) -> Model:
    """Undo ``patch``.

    Raises:
        KernelError: The model is not patched.
    """
    target: Any = model
    if not hasattr(target, _MARK):
        raise KernelError("unpatch: the model is not patched")
    forward, disable_compile = getattr(target, _MARK)
    delattr(target, _MARK)
    if getattr(target, "generation_config", None) is not None:
        target.generation_config.disable_compile = disable_compile
    del target.model.forward
    if forward is not None:  # a hook of accelerate's, say
        target.model.forward = forward
    return model
