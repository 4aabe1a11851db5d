"""`acl.mdl`, part two: what a model's inputs and outputs are. Names, arguments and results are pyACL's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from qcompile.ascend.om_reader import OmPort
from qcompile.ascend.sim.execution import port_bytes
from qcompile.ascend.sim.loaded import LoadedModel, LoadedModels
from qcompile.ascend.sim.machine import GE_MODEL_ID, INVALID_PARAM, Machine

# numbers of ACL, which are not those of the graph IR
_ACL_TYPES = {
    "f32": 0, "f16": 1, "i8": 2, "i32": 3, "u8": 4, "i16": 6, "u16": 7, "u32": 8, "i64": 9, "u64": 10, "f64": 11,
    "bool": 12, "bf16": 27,
}  # fmt: skip
_ND = 2


@dataclass
class Description:
    """What create_desc gives; filled by get_desc."""

    model: LoadedModel | None = None


class DescriptionCalls:
    """The functions."""

    def __init__(self, machine: Machine, loaded: LoadedModels) -> None:
        self._machine, self._loaded = machine, loaded

    def create_desc(self) -> int:
        return self._machine.handles.add(Description())

    def get_desc(self, handle: int, number: int) -> int:
        description = self._machine.handles.get(handle, Description)
        if description is None:
            return self._machine.misuse("unknown-description", "get_desc", INVALID_PARAM, "no description")
        if number not in self._loaded.models:
            return self._machine.misuse("unknown-model", "get_desc", GE_MODEL_ID, f"model {number!r}")
        description.model = self._loaded.models[number]
        return 0

    def destroy_desc(self, handle: int) -> int:
        return self._machine.destroy(handle, Description, "destroy_desc")

    def get_num_inputs(self, handle: int) -> int:
        return len(self._ports(handle, "get_num_inputs", inputs=True))

    def get_num_outputs(self, handle: int) -> int:
        return len(self._ports(handle, "get_num_outputs", inputs=False))

    def get_input_size_by_index(self, handle: int, index: int) -> int:
        return port_bytes(self._port(handle, index, "get_input_size_by_index", inputs=True))

    def get_output_size_by_index(self, handle: int, index: int) -> int:
        return port_bytes(self._port(handle, index, "get_output_size_by_index", inputs=False))

    def get_input_name_by_index(self, handle: int, index: int) -> str:
        return self._port(handle, index, "get_input_name_by_index", inputs=True).name

    def get_output_name_by_index(self, handle: int, index: int) -> str:
        return self._port(handle, index, "get_output_name_by_index", inputs=False).name

    def get_input_data_type(self, handle: int, index: int) -> int:
        return _ACL_TYPES.get(self._port(handle, index, "get_input_data_type", inputs=True).dtype, -1)

    def get_output_data_type(self, handle: int, index: int) -> int:
        return _ACL_TYPES.get(self._port(handle, index, "get_output_data_type", inputs=False).dtype, -1)

    def get_input_format(self, handle: int, index: int) -> int:
        del handle, index
        return _ND

    def get_input_dims(self, handle: int, index: int) -> tuple[dict[str, Any], int]:
        return _dims(self._port(handle, index, "get_input_dims", inputs=True)), 0

    def get_output_dims(self, handle: int, index: int) -> tuple[dict[str, Any], int]:
        return _dims(self._port(handle, index, "get_output_dims", inputs=False)), 0

    def get_input_index_by_name(self, handle: int, name: str) -> tuple[int, int]:
        names = [port.name for port in self._ports(handle, "get_input_index_by_name", inputs=True)]
        if name in names:
            return names.index(name), 0
        return 0, self._machine.error(INVALID_PARAM, f"no input '{name}'")

    def get_cur_output_dims(self, handle: int, index: int) -> tuple[dict[str, Any], int]:
        port = self._port(handle, index, "get_cur_output_dims", inputs=False)
        model = self._model(handle)
        if model is not None and model.current >= 0:
            port = model.variants[model.current].outputs[index]
        return _dims(port), 0

    def get_dynamic_batch(self, handle: int) -> tuple[dict[str, Any], int]:
        model = self._model(handle)
        sizes = [] if model is None or not model.has_gears else [v.inputs[0].shape[0] for v in model.variants]
        return {"batchCount": len(sizes), "batch": sizes}, 0

    def get_input_dynamic_gear_count(self, handle: int, index: int) -> tuple[int, int]:
        del index
        model = self._model(handle)
        return (0 if model is None or not model.has_gears else len(model.variants)), 0

    def get_input_dynamic_dims(self, handle: int, index: int, count: int) -> tuple[list[dict[str, Any]], int]:
        del index
        model = self._model(handle)
        if model is None or not model.has_gears or count < len(model.variants):
            return [], self._machine.misuse("wrong-gear", "get_input_dynamic_dims", INVALID_PARAM, f"{count} gears")
        return [{"name": "", "dimCount": len(v.dims), "dims": v.dims} for v in model.variants], 0

    def _model(self, handle: int) -> LoadedModel | None:
        description = self._machine.handles.get(handle, Description)
        return None if description is None else description.model

    def _ports(self, handle: int, call: str, *, inputs: bool) -> tuple[OmPort, ...]:
        description = self._machine.handles.get(handle, Description)
        if description is None or description.model is None:
            self._machine.misuse("unknown-description", call, INVALID_PARAM, "no description, or an empty one")
            return ()
        model: LoadedModel = description.model
        return model.inputs if inputs else model.outputs

    def _port(self, handle: int, index: int, call: str, *, inputs: bool) -> OmPort:
        ports = self._ports(handle, call, inputs=inputs)
        if not 0 <= index < len(ports):
            self._machine.misuse("bad-index", call, INVALID_PARAM, f"index {index!r} of {len(ports)}")
            return OmPort("", "u8", (0,), "")
        return ports[index]


def _dims(port: OmPort) -> dict[str, Any]:
    return {"name": port.name, "dimCount": len(port.shape), "dims": list(port.shape)}
