"""`acl.mdl`, part three: data sets, and running models with them. Names, arguments and results are pyACL's."""

from __future__ import annotations

from typing import Any

from qcompile.ascend.om_reader import OmPort
from qcompile.ascend.sim.copies import Copier
from qcompile.ascend.sim.datasets import DataBuffer, Dataset
from qcompile.ascend.sim.execution import port_bytes, run_once
from qcompile.ascend.sim.gears import SELECTOR, Variant, chosen_by_batch
from qcompile.ascend.sim.loaded import LoadedModel, LoadedModels
from qcompile.ascend.sim.machine import (
    GE_DIMS,
    GE_GEAR,
    GE_MODEL_ID,
    GE_PARAM,
    INPUT_MISMATCH,
    INVALID_PARAM,
    KERNEL_FAILED,
    NOT_DYNAMIC,
    OUTPUT_MISMATCH,
    Machine,
)
from qcompile.ascend.sim.streams import Task
from qcompile.errors import GraphError


class RunCalls:
    """The functions."""

    def __init__(self, machine: Machine, loaded: LoadedModels) -> None:
        self._machine, self._loaded = machine, loaded
        self._copier = Copier(machine)

    def create_dataset(self) -> int:
        return self._machine.handles.add(Dataset())

    def add_dataset_buffer(self, handle: int, buffer: int) -> tuple[int, int]:
        dataset = self._machine.handles.get(handle, Dataset)
        if dataset is None or self._machine.handles.get(buffer, DataBuffer) is None:
            return handle, self._machine.misuse(
                "unknown-dataset", "add_dataset_buffer", INVALID_PARAM, "no such handle"
            )
        dataset.buffers.append(buffer)
        return handle, 0

    def get_dataset_num_buffers(self, handle: int) -> int:
        dataset = self._machine.handles.get(handle, Dataset)
        return 0 if dataset is None else len(dataset.buffers)

    def get_dataset_buffer(self, handle: int, index: int) -> int:
        dataset = self._machine.handles.get(handle, Dataset)
        return 0 if dataset is None or not 0 <= index < len(dataset.buffers) else int(dataset.buffers[index])

    def destroy_dataset(self, handle: int) -> int:
        return self._machine.destroy(handle, Dataset, "destroy_dataset")

    def execute(self, number: int, inputs: int, outputs: int) -> int:
        """Run and wait."""
        code, run, _ = self._checked("execute", number, inputs, outputs)
        return code or run()

    def execute_async(self, number: int, inputs: int, outputs: int, stream_handle: int) -> int:
        """Put a run on a stream."""
        call = "execute_async"
        stream, code = self._machine.stream(stream_handle, call)
        if stream is None:
            return code
        code, run, ranges = self._checked(call, number, inputs, outputs)
        if code:
            return code
        other = self._loaded.stream_of.get(number)
        if other is not None and other is not stream and other.tasks:
            return self._machine.misuse("two-streams", call, GE_PARAM, f"model {number} runs on another stream")
        self._loaded.stream_of[number] = stream
        stream.put(Task(f"model {number}", run, ranges))
        return 0

    def set_dynamic_batch_size(self, number: int, dataset: int, index: int, batch: int) -> int:
        call = "set_dynamic_batch_size"
        model, code = self._geared(call, number, dataset, index)
        if model is None:
            return code
        if not isinstance(batch, int) or batch <= 0:
            return self._machine.misuse("wrong-gear", call, GE_GEAR, f"batch {batch!r}")
        gear = chosen_by_batch(model.variants, [port.shape for port in model.file.model.inputs], batch)
        return self._choose(call, model, dataset, gear, f"batch {batch}")

    def set_input_dynamic_dims(self, number: int, dataset: int, index: int, dims: dict[str, Any]) -> int:
        call = "set_input_dynamic_dims"
        model, code = self._geared(call, number, dataset, index)
        if model is None:
            return code
        wanted = list(dims.get("dims", []))
        if dims.get("dimCount") != len(wanted) or len(wanted) != len(model.variants[0].dims):
            message = f"{len(wanted)} dimensions, all inputs together have {len(model.variants[0].dims)}"
            return self._machine.misuse("wrong-gear", call, GE_DIMS, message)
        gear = next((i for i, variant in enumerate(model.variants) if variant.dims == wanted), None)
        return self._choose(call, model, dataset, gear, f"dimensions {wanted}")

    def _geared(self, call: str, number: int, dataset: int, index: int) -> tuple[LoadedModel | None, int]:
        machine, model = self._machine, self._loaded.models.get(number)
        if model is None:
            return None, machine.misuse("unknown-model", call, GE_MODEL_ID, f"model {number!r}")
        if not model.has_gears:
            return None, machine.misuse("wrong-gear", call, NOT_DYNAMIC, "the model has one shape, no gears")
        if machine.handles.get(dataset, Dataset) is None:
            return None, machine.misuse("unknown-dataset", call, INVALID_PARAM, "no data set, or a destroyed one")
        if index != len(model.inputs) - 1:
            message = f"index {index!r} is not that of {SELECTOR}"
            return None, machine.misuse("wrong-gear-input", call, GE_PARAM, message)
        return model, 0

    def _choose(self, call: str, model: LoadedModel, dataset: int, gear: int | None, what: str) -> int:
        if gear is None:
            return self._machine.misuse("wrong-gear", call, GE_GEAR, f"no gear has {what}")
        self._machine.handles.get(dataset, Dataset).gear = gear
        model.current = gear
        return 0

    def _checked(self, call: str, number: int, inputs: int, outputs: int) -> tuple[int, Any, list[tuple[int, int]]]:
        """Check a run; returns code, what runs it, and the bytes it touches."""
        machine = self._machine
        code = machine.require_context(call)
        model = self._loaded.models.get(number)
        if not code and model is None:
            kind = "execute-after-unload" if number in self._loaded.unloaded else "unknown-model"
            code = machine.misuse(kind, call, GE_MODEL_ID, f"model {number!r}")
        if code or model is None:
            return code, None, []
        given, code = self._buffers(call, inputs, model.inputs, INPUT_MISMATCH)
        made: list[DataBuffer] = []
        if not code:
            made, code = self._buffers(call, outputs, model.outputs, OUTPUT_MISMATCH)
        if not code:
            code = self._overlap(call, model, given, made)
        if code:
            return code, None, []
        # addresses as they are now: what update_data_buffer changes later is for the next run
        places = [[(b.address, b.size_bytes) for b in group] for group in (given, made)]
        ranges = [(address, address + size) for group in places for address, size in group]
        gear = machine.handles.get(inputs, Dataset).gear
        variant = model.variants[gear if gear >= 0 else model.largest]
        return 0, lambda: self._run(call, model, variant, *places), ranges

    def _buffers(
        self, call: str, handle: int, ports: tuple[OmPort, ...], mismatch: int
    ) -> tuple[list[DataBuffer], int]:
        machine = self._machine
        dataset = machine.handles.get(handle, Dataset)
        if dataset is None:
            return [], machine.misuse("unknown-dataset", call, INVALID_PARAM, "no data set, or a destroyed one")
        buffers = [machine.handles.get(buffer, DataBuffer) for buffer in dataset.buffers]
        if None in buffers:
            return [], machine.misuse("destroyed-buffer", call, INVALID_PARAM, "a data buffer of it was destroyed")
        if len(buffers) != len(ports):
            message = f"{len(buffers)} buffers, the model has {len(ports)}"
            return [], machine.misuse("wrong-number-of-buffers", call, mismatch, message)
        for buffer, port in zip(buffers, ports, strict=True):
            if buffer.size_bytes < port_bytes(port):
                message = f"'{port.name}' has {buffer.size_bytes} bytes, {port_bytes(port)} are wanted"
                return [], machine.misuse("buffer-too-small", call, GE_PARAM, message)
            code = self._copier.check_device(call, buffer.address, port_bytes(port))
            if not code and buffer.address % 64:
                code = machine.misuse("unaligned", call, 200003, f"'{port.name}' at {buffer.address:#x}")
            if code:
                return [], code
        return buffers, 0

    def _overlap(self, call: str, model: LoadedModel, given: list[DataBuffer], made: list[DataBuffer]) -> int:
        """No output may lie on an input, another output or the work space."""
        spans = [(b.address, b.address + b.size_bytes) for b in made]
        others = [(b.address, b.address + b.size_bytes) for b in given] + [(model.work[0], sum(model.work))]
        for index, (start, end) in enumerate(spans):
            if any(start < stop and begin < end for begin, stop in others + spans[:index]):
                name = model.outputs[index].name
                return self._machine.misuse("output-overlaps", call, GE_PARAM, f"'{name}' overlaps another buffer")
        return 0

    def _run(
        self,
        call: str,
        model: LoadedModel,
        variant: Variant,
        given: list[tuple[int, int]],
        made: list[tuple[int, int]],
    ) -> int:
        for address, size in (*given, *made):
            code = self._copier.check_device(call, address, size)
            if code:
                return KERNEL_FAILED
        inputs = {
            port.name: self._copier.bytes_at(address, port_bytes(port), "device")
            for port, (address, _) in zip(variant.inputs, given, strict=False)  # the selector is not the graph's
        }
        try:
            outputs = run_once(model.session, model.file.path, variant, inputs)
        except GraphError as error:
            return self._machine.error(KERNEL_FAILED, str(error))
        address, size = model.work
        self._copier.bytes_at(address, size, "device")[:] = 0xFF  # whoever keeps something there loses it
        for output, (address, _) in zip(outputs, made, strict=True):
            self._copier.bytes_at(address, output.size, "device")[:] = output
        self._machine.traffic["executions"] += 1
        self._machine.runs[model.file.path.name] += 1
        return 0
