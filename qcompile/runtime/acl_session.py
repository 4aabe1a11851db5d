"""Run the .om files of a directory on an Ascend NPU through ACL: a `Session` with its KV cache on the device.

A step copies a few bytes to the device (token ids and lengths, packed into one copy), runs one graph, appends the new rows
of the cache by copies within the device, copies the chosen tokens back (one copy), and waits once. Nothing else is moved;
`docs/ascend.md` has the layout.
"""

import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Callable, List, Optional, Sequence

import numpy as np

from .acl_cache import DeviceCache, parts_of
from .acl_device import AclDevice
from .acl_loader import ModelLoader
from .acl_steps import Candidates, ModelStep, StepBuffers
from .errors import SessionError
from .manifest import Manifest, check_file
from .session import Scores
from .static_buckets import StaticBuckets


def open_acl_session(directory: Path, manifest: Manifest, check_hash: bool = True) -> "AclSession":
    """Load every .om that a manifest lists.

    Args:
        directory: The compiled-model directory.
        manifest: What `qcompile.json` in it says.
        check_hash: Compare the sha256 of the files with the manifest first.

    Raises:
        ManifestError: A file is missing or was changed.
        SessionError: There is no device, it is of another kind, or the files cannot be loaded; nothing is left on it.
    """
    unbuilt = [entry.file.name for entry in manifest.graphs if not entry.file.name.endswith(".om")]
    if unbuilt:
        raise SessionError(
            f"{directory}: {unbuilt[0]} is not compiled for the device; run `qcompile atc {directory}` where CANN is "
            "(--simulate tries it without)"
        )
    if any(entry.io.kv_cache != "appended" or entry.io.logits != "chosen" for entry in manifest.graphs):
        raise SessionError(f"{directory}: the graphs have another interface than this runtime knows; update qcompile")
    _refuse_simulated(directory, manifest)
    for file in {file.name: file for entry in manifest.graphs for file in (entry.file, *entry.data)}.values():
        check_file(directory, file, check_hash=check_hash)
    device = AclDevice()
    try:
        _require_device(directory, manifest, device)
        return AclSession(directory, manifest, device)
    except BaseException:
        device.close()
        raise


class AclSession:
    """See `qcompile.runtime.session.Session`; `open_acl_session` makes one.

    Args:
        directory: The compiled-model directory.
        manifest: Its manifest.
        device: The device, which the session closes.

    Raises:
        SessionError: A model is refused, or memory is short; what was loaded is unloaded.
    """

    def __init__(self, directory: Path, manifest: Manifest, device: AclDevice) -> None:
        self.device, self.buckets = device, StaticBuckets(manifest)
        self.vocab_size = manifest.model.vocab_size
        self.can_extend = True
        self.max_chunk, self.max_capacity = self.buckets.max_chunk, self.buckets.max_capacity
        self.num_slots = self.capacity = 0
        self._num_heads = manifest.model.num_key_value_heads
        self._cache: Optional[DeviceCache] = None
        self._used: List[int] = []
        self._is_open = True
        self._open = ExitStack()
        self._open.callback(device.close)
        try:
            self._load(directory, manifest)
        except BaseException:
            self._open.close()
            raise
        self._open.callback(self._free_cache)

    def _load(self, directory: Path, manifest: Manifest) -> None:
        loader = ModelLoader(self.device, directory)
        self._open.callback(loader.close)
        models = loader.load(list(manifest.graphs))
        for model in models:
            self._open.callback(model.close)
        self._steps = {model.entry.file.name: ModelStep(model) for model in models}
        steps = list(self._steps.values())
        self.num_candidates = min(step.num_candidates for step in steps)
        self._parts = len(parts_of(manifest.graphs[0].io.inputs)[0])
        self._entry_bytes = steps[0].entry_bytes(self._num_heads)
        input_bytes, output_bytes = (max(getattr(s, name) for s in steps) for name in ("input_bytes", "output_bytes"))
        inputs = self.device.malloc(input_bytes, "the inputs")
        self._open.callback(self.device.free, inputs)
        outputs = self.device.malloc(output_bytes, "the outputs")
        self._open.callback(self.device.free, outputs)
        to_device = self.device.malloc_host(input_bytes)
        self._open.callback(self.device.free_host, to_device)
        to_host = self.device.malloc_host(max(step.host_bytes for step in steps))
        self._open.callback(self.device.free_host, to_host)
        self._buffers = StepBuffers(inputs, outputs, to_device, to_host)

    def reserve(self, num_slots: int, capacity: int) -> None:
        """See Session; the capacity becomes that of the smallest bucket that holds it."""
        num_slots = max(num_slots, self.num_slots)
        capacity = self.buckets.capacity(max(capacity, self.capacity))
        if (num_slots, capacity) == (self.num_slots, self.capacity):
            return
        self._require_open()
        rows = max(num_slots, self.buckets.batch_for(num_slots, capacity))  # a graph reads its whole batch
        cache = DeviceCache(self.device, self._parts, rows, self._num_heads, capacity, self._entry_bytes)
        try:
            self._guarded(lambda: self._copy_all(cache))
        except BaseException:
            cache.free()
            raise
        self._free_cache()
        self._cache = cache
        self._used += [0] * (num_slots - self.num_slots)
        self.num_slots, self.capacity = num_slots, capacity

    def forward(
        self,
        first_slot: int,
        input_ids: np.ndarray,
        past: Sequence[int],
        need_scores: bool = True,
        greedy_only: bool = False,
    ) -> Optional[Scores]:
        """See Session; scores are the graph's candidates, or whole rows where it returns its logits."""
        n, s = input_ids.shape
        self._require_open()
        longest = max(past) + s
        if longest > self.capacity or first_slot + n > self.num_slots:
            raise SessionError(
                f"{longest} entries in {first_slot + n} slots, reserved {self.capacity}, {self.num_slots}"
            )
        found = []
        for start, stop in self.buckets.groups(n, self.capacity) if s == 1 else [(0, 1)]:
            slots = range(first_slot + start, first_slot + stop)
            found.append(self._run(slots, input_ids[start:stop], past[start:stop], need_scores, greedy_only))
        parts = [part for part in found if part is not None]
        if not parts:
            return None
        ids = [part_ids for _, part_ids in parts if part_ids is not None]
        return Scores(np.concatenate([values for values, _ in parts]), np.concatenate(ids) if ids else None)

    def _run(
        self, slots: range, input_ids: np.ndarray, past: Sequence[int], need_scores: bool, greedy_only: bool
    ) -> Optional[Candidates]:
        assert self._cache is not None
        n, s = input_ids.shape
        step = self._steps[self.buckets.choose(n, s, max(past), self.capacity).file.name]
        wanted = step.outputs_for(greedy_only) if need_scores else ()
        found = step.run(slots, input_ids, past, self._cache, self._buffers, wanted)
        for slot, length in zip(slots, past):
            self._used[slot] = max(self._used[slot], length + s)
        return found

    def copy_slot(self, source: int, target: int, length: int) -> None:
        """See Session."""
        cache = self._require_open()
        assert cache is not None
        self._guarded(lambda: cache.copy_slot(source, target, length, cache))
        self._used[target] = max(self._used[target], length)

    def swap_slots(self, first: int, second: int, length: int) -> None:
        """See Session."""
        cache = self._require_open()
        assert cache is not None
        cache.swap_slots(first, second, length)
        self._used[first] = self._used[second] = max(self._used[first], self._used[second], length)

    def close(self) -> None:
        """See Session."""
        if self._is_open:
            self._is_open = False
            self.num_slots = self.capacity = 0
            with self._open:
                self.device.reenter()

    def _require_open(self) -> Optional[DeviceCache]:
        if not self._is_open:
            raise SessionError("the session is closed")
        self.device.enter()
        return self._cache

    def _guarded(self, enqueue: Callable[[], None]) -> None:
        """Put copies on the stream and wait for them, also when putting them there failed."""
        try:
            enqueue()
            self.device.synchronize()
        except BaseException:
            self.device.drain()
            raise

    def _copy_all(self, cache: DeviceCache) -> None:
        if self._cache is not None:
            for slot, length in enumerate(self._used):
                if length:
                    self._cache.copy_slot(slot, slot, length, cache)

    def _free_cache(self) -> None:
        if self._cache is not None:
            self._cache.free()
            self._cache = None


def _refuse_simulated(directory: Path, manifest: Manifest) -> None:
    """Simulated files run on the simulated device, others do not; nothing chooses it silently."""
    is_simulated = bool(getattr(sys.modules.get("acl"), "IS_SIMULATED", False))
    if manifest.build.get("simulated") and not is_simulated:
        raise SessionError(
            f"{directory}: was compiled with `qcompile atc --simulate`, which no device can run; `qcompile generate` "
            "runs it on the simulated one, `qcompile atc` without --simulate compiles it for a device"
        )
    if is_simulated and not manifest.build.get("simulated"):
        raise SessionError(
            f"{directory}: was compiled for a device; the simulated one runs `qcompile atc --simulate` only"
        )


def _require_device(directory: Path, manifest: Manifest, device: AclDevice) -> None:
    """Refuse files built for another chip."""
    built_for = str(manifest.build.get("soc_version", ""))
    # 910B4-1 is a 910B4 with more memory
    if built_for and built_for.lower().split("-")[0] != device.soc_name.lower().split("-")[0]:
        raise SessionError(
            f"{directory}: was compiled for {built_for}, this device is {device.soc_name or 'unknown'}; compile it for this "
            f"chip: qcompile atc {directory} --soc-version {device.soc_name or 'NAME'}"
        )
