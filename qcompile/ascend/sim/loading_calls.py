"""`acl.mdl`, part one: loading models. Names, arguments and results are pyACL's."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from qcompile.ascend.om_layout import HEADER_BYTES, read_header
from qcompile.ascend.sim.copies import Copier
from qcompile.ascend.sim.execution import Workshop, variants_of
from qcompile.ascend.sim.loaded import LoadedModel, LoadedModels
from qcompile.ascend.sim.machine import (
    GE_DATA_SIZE,
    GE_LOAD,
    GE_MODEL_ID,
    GE_PARAM,
    GE_PATH,
    INVALID_PARAM,
    OUT_OF_MEMORY,
    Machine,
)
from qcompile.ascend.sim.model_file import SimulatedFile, open_simulated
from qcompile.errors import GraphError
from qcompile.tensors import DataFile

_LOAD_TYPE, _PATH, _WORK_ADDRESS, _WORK_SIZE, _WEIGHT_ADDRESS, _WEIGHT_SIZE = 1, 2, 7, 8, 5, 6
_FROM_FILE, _FROM_FILE_WITH_MEM = 1, 2
_KNOWN_OPTIONS = frozenset(range(15))


@dataclass
class Config:
    """How a model is to be loaded."""

    options: dict[int, Any] = field(default_factory=dict)
    weights: dict[str, tuple[int, int]] = field(default_factory=dict)


class LoadingCalls:
    """The functions."""

    def __init__(self, machine: Machine, loaded: LoadedModels, workshop: Workshop) -> None:
        self._machine, self._loaded, self._workshop = machine, loaded, workshop
        self._copier = Copier(machine)

    def query_size(self, path: str) -> tuple[int, int, int]:
        file, code = self._opened(path, "query_size")
        return (file.work_bytes, file.inside_bytes, 0) if file is not None else (0, 0, code)

    def load_from_file(self, path: str) -> tuple[int, int]:
        return self._load(path, Config())

    def load_from_file_with_mem(
        self, path: str, work_ptr: int, work_size: int, weight_ptr: int, weight_size: int
    ) -> tuple[int, int]:
        given = {_WORK_ADDRESS: work_ptr, _WORK_SIZE: work_size, _WEIGHT_ADDRESS: weight_ptr, _WEIGHT_SIZE: weight_size}
        return self._load(path, Config({key: value for key, value in given.items() if value}))

    def create_config_handle(self) -> int:
        return self._machine.handles.add(Config())

    def set_config_opt(self, handle: int, attribute: int, value: Any) -> int:
        config = self._machine.handles.get(handle, Config)
        if config is None or attribute not in _KNOWN_OPTIONS:
            what = "no config handle" if config is None else f"attribute {attribute!r}"
            return self._machine.misuse("bad-load-option", "set_config_opt", INVALID_PARAM, what)
        config.options[attribute] = value
        return 0

    def set_external_weight_address(self, handle: int, name: str, address: int, size: int) -> int:
        config, machine = self._machine.handles.get(handle, Config), self._machine
        if config is None:
            return machine.misuse("bad-load-option", "set_external_weight_address", INVALID_PARAM, "no config handle")
        if size % 32:
            return machine.misuse("bad-load-option", "set_external_weight_address", INVALID_PARAM, f"size {size}")
        code = self._copier.check_device("set_external_weight_address", address, size)
        if not code:
            config.weights[name] = (address, size)
        return code

    def load_with_config(self, handle: int) -> tuple[int, int]:
        config, machine = self._machine.handles.get(handle, Config), self._machine
        if config is None:
            return 0, machine.misuse("bad-load-option", "load_with_config", INVALID_PARAM, "no config handle")
        if config.options.get(_LOAD_TYPE) not in {_FROM_FILE, _FROM_FILE_WITH_MEM} or _PATH not in config.options:
            code = machine.misuse("bad-load-option", "load_with_config", INVALID_PARAM, "load type or path is not set")
            return 0, code
        return self._load(config.options[_PATH], config)

    def destroy_config_handle(self, handle: int) -> int:
        return self._machine.destroy(handle, Config, "destroy_config_handle")

    def unload(self, number: int) -> int:
        code = self._machine.require_context("unload")
        model = self._loaded.models.get(number)
        if code:
            return code
        if model is None:
            kind = "unload-twice" if number in self._loaded.unloaded else "unknown-model"
            return self._machine.misuse(kind, "unload", GE_MODEL_ID, f"model {number!r}")
        if number in self._loaded.stream_of and self._loaded.stream_of[number].tasks:
            self._machine.misuse("unload-in-use", "unload", 0, f"model {number} has work that was not waited for")
        for address in model.owned:
            allocation = self._machine.device.find(address)
            if allocation is not None:
                self._machine.device.release(allocation)
        del self._loaded.models[number]
        self._loaded.unloaded.add(number)
        return 0

    def _opened(self, path: str, call: str) -> tuple[SimulatedFile | None, int]:
        machine = self._machine
        code = machine.require_context(call)
        if code:
            return None, code
        if not Path(path).is_file():
            return None, machine.error(GE_PATH, f"{path}: no such file")
        try:
            file = open_simulated(Path(path))
        except GraphError as error:
            return None, machine.error(GE_DATA_SIZE if _is_cut(Path(path)) else GE_LOAD, str(error))
        soc_version = file.model.soc_version
        if soc_version.lower().split("-")[0] != machine.soc_name.lower().split("-")[0]:
            return None, machine.error(GE_LOAD, f"{path} was built for {soc_version}, this is {machine.soc_name}")
        return file, 0

    def _load(self, path: str, config: Config) -> tuple[int, int]:
        file, code = self._opened(path, "load")
        if file is None:
            return 0, code
        owned: list[int] = []
        work, code = self._work_space(file, config, owned)
        code = code or self._weights(file, config, owned)
        if not code:
            try:
                session = self._workshop.prepare(file)
                model = LoadedModel(file, session, variants_of(session, file), work, owned)
            except (GraphError, OSError) as error:
                code = self._machine.error(GE_LOAD, str(error))
        if code:
            for address in owned:
                allocation = self._machine.device.find(address)
                assert allocation is not None
                self._machine.device.release(allocation)
            return 0, code
        return self._loaded.add(model), 0

    def _work_space(self, file: SimulatedFile, config: Config, owned: list[int]) -> tuple[tuple[int, int], int]:
        if _WORK_ADDRESS not in config.options:
            code = self._own(file.work_bytes, owned)
            return (owned[-1] if owned else 0, file.work_bytes), code
        address, size = config.options[_WORK_ADDRESS], config.options.get(_WORK_SIZE, 0)
        code = self._copier.check_device("load", address, size)
        if not code and size < file.work_bytes:
            message = f"work space of {size} bytes, {file.work_bytes} are wanted"
            code = self._machine.misuse("work-space-too-small", "load", GE_PARAM, message)
        return (address, file.work_bytes), code

    def _weights(self, file: SimulatedFile, config: Config, owned: list[int]) -> int:
        """Place the weights; those the program placed must hold what the files hold."""
        for name, path in file.weights.items():
            if name not in config.weights:
                code = self._own(path.stat().st_size, owned)
                if code:
                    return code
                continue
            address, _ = config.weights[name]
            content = np.memmap(path, np.uint8, "r")
            if not np.array_equal(self._copier.bytes_at(address, content.size, "device"), content):
                return self._machine.misuse("weights-not-copied", "load", GE_LOAD, f"{name} is not what its file holds")
        return self._own(file.inside_bytes, owned) if file.inside_bytes and _WEIGHT_ADDRESS not in config.options else 0

    def _own(self, size_bytes: int, owned: list[int]) -> int:
        address = self._machine.device.allocate(max(size_bytes, 1), "model")
        if address is None:
            return self._machine.error(OUT_OF_MEMORY, f"no {size_bytes} bytes for the model")
        owned.append(address)
        return 0


def _is_cut(path: Path) -> bool:
    """Whether a file has fewer bytes than its header says."""
    try:
        file = DataFile(path)
        return file.size_bytes < HEADER_BYTES + read_header(file).length
    except (GraphError, OSError):
        return False
