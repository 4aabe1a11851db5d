"""Load the .om files of a directory: one work space for all of them, and one copy of the weights where CANN allows it.

Only one model runs at a time, so they share the largest work space. Weights that ATC put beside the .om files (`weight/`)
are the same files for every bucket: where this CANN has `set_external_weight_address` (8.5 and newer) they are copied to
the device once; an older one reads them for every model.
"""

import logging
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Dict, List, Tuple

import numpy as np

from .acl_device import AclDevice
from .acl_model import AclModel
from .errors import SessionError
from .manifest import GraphEntry

logger = logging.getLogger(__name__)

# acl.mdl.set_config_opt
_LOAD_TYPE, _PATH, _WORK_ADDRESS, _WORK_SIZE = 1, 2, 7, 8
_FROM_FILE_WITH_MEM = 2


class ModelLoader:
    """The memory that loaded models share; `close` after the models are closed.

    Args:
        device: Where.
        directory: The compiled-model directory.
    """

    def __init__(self, device: AclDevice, directory: Path) -> None:
        self.device, self.directory = device, directory
        self._open = ExitStack()
        self._weights: Dict[str, Tuple[int, int]] = {}
        self._work_address = self._work_bytes = 0

    def load(self, entries: List[GraphEntry]) -> List[AclModel]:
        """Load models; all of them, or none and an error.

        Raises:
            SessionError: A file is refused, or there is not enough memory.
        """
        models: List[AclModel] = []
        try:
            for entry in entries:
                self._work_bytes = max(self._work_bytes, self._work_bytes_of(self.directory / entry.file.name))
            if self._work_bytes:
                self._work_address = self.device.malloc(self._work_bytes, "the models' work space")
                self._open.callback(self.device.free, self._work_address)
            if any(entry.data for entry in entries) and not self._shares_weights:
                logger.info("this CANN has no shared weights: they are on the device %d times", len(entries))
            for entry in entries:
                models.append(self._load_one(entry))  # noqa: PERF401 - those before a failure must be closed
        except BaseException:
            for model in models:
                model.close()
            self.close()
            raise
        return models

    def close(self) -> None:
        """Free what the models shared; harmless when repeated."""
        self._open.close()

    @property
    def _shares_weights(self) -> bool:
        return hasattr(self.device.acl.mdl, "set_external_weight_address")

    def _work_bytes_of(self, path: Path) -> int:
        work, _, code = self.device.acl.mdl.query_size(str(path))
        if code != 0:
            raise SessionError(f"{path}: {self.device.failure('acl.mdl.query_size', code)}")
        return int(work)

    def _load_one(self, entry: GraphEntry) -> AclModel:
        path = self.directory / entry.file.name
        weights = self._uploaded(entry)

        def load() -> int:
            mdl: Any = self.device.acl.mdl
            handle = mdl.create_config_handle()
            try:
                options: Dict[int, Any] = {_LOAD_TYPE: _FROM_FILE_WITH_MEM, _PATH: str(path)}
                if self._work_address:
                    options.update({_WORK_ADDRESS: self._work_address, _WORK_SIZE: self._work_bytes})
                for option, value in options.items():
                    self.device.call("acl.mdl.set_config_opt", mdl.set_config_opt(handle, option, value))
                for name, (address, size_bytes) in weights.items():
                    code = mdl.set_external_weight_address(handle, name, address, size_bytes)
                    self.device.call("acl.mdl.set_external_weight_address", code)
                number, code = mdl.load_with_config(handle)
                if code != 0:
                    raise SessionError(f"{path}: {self.device.failure('acl.mdl.load_with_config', code)}")
                return int(number)
            finally:
                mdl.destroy_config_handle(handle)

        return AclModel(self.device, path, entry, load)

    def _uploaded(self, entry: GraphEntry) -> Dict[str, Tuple[int, int]]:
        """Return address and size on the device of a model's external weights; empty where CANN reads them itself."""
        if not self._shares_weights:
            return {}
        found = {}
        for data in entry.data:
            name = Path(data.name).name
            if name not in self._weights:
                self._weights[name] = self._upload(self.directory / data.name)
            found[name] = self._weights[name]
        return found

    def _upload(self, path: Path) -> Tuple[int, int]:
        content = np.memmap(path, np.uint8, "r")
        size_bytes = -(-content.size // 32) * 32
        address = self.device.malloc(size_bytes, f"the weights in {path.name}")
        self._open.callback(self.device.free, address)
        self.device.upload(address, content)
        return address, size_bytes
