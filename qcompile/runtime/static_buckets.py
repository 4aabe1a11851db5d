"""Which of a directory's static graphs serves a step: the smallest that has room for it."""

from typing import Iterator, List, Tuple

from .errors import SessionError
from .manifest import GraphEntry, Manifest


class StaticBuckets:
    """The graphs of fixed shapes that a manifest lists.

    Args:
        manifest: Every graph in it has a bucket; see `GraphEntry`.

    Raises:
        SessionError: A graph has none, or there is no decode or no prefill graph.
    """

    def __init__(self, manifest: Manifest) -> None:
        self._decode = _sorted(manifest, "decode")
        self._prefill = _sorted(manifest, "prefill")
        self.max_chunk = max(_sizes(entry)[1] for entry in self._prefill)
        self.max_batch = max(_sizes(entry)[0] for entry in self._decode)

    def choose(self, num_rows: int, num_tokens: int, past: int) -> GraphEntry:
        """Return the smallest graph for that many rows, new tokens of each and cached entries.

        Raises:
            SessionError: None is large enough.
        """
        for entry in self._decode if num_tokens == 1 else self._prefill:
            batch, query_len, kv_len = _sizes(entry)
            if batch >= num_rows and query_len >= num_tokens and kv_len >= past:
                return entry
        largest = [_sizes(entry) for entry in (self._decode if num_tokens == 1 else self._prefill)]
        raise SessionError(
            f"no graph for {num_rows} rows of {num_tokens} tokens behind {past}; compiled are (rows, tokens, cache) "
            f"{', '.join(map(str, largest))}: compile larger buckets (--batch, --prefill-len, --kv-len)"
        )

    def capacity(self, wanted: int) -> int:
        """Return the smallest cache length that holds `wanted` entries: every bucket of it must be complete.

        Raises:
            SessionError: None does.
        """
        lengths = sorted({_sizes(entry)[2] for entry in self._decode} & {_sizes(entry)[2] for entry in self._prefill})
        for length in lengths:
            if length >= wanted:
                return length
        raise SessionError(
            f"a KV cache of {wanted} tokens is wanted; the largest compiled is {lengths[-1] if lengths else 0}: "
            "lower max_model_len or compile with a larger --kv-len"
        )

    def groups(self, num_rows: int) -> Iterator[Tuple[int, int]]:
        """Cut rows into (start, stop) that the largest decode graph takes."""
        for start in range(0, num_rows, self.max_batch):
            yield start, min(start + self.max_batch, num_rows)


def _sorted(manifest: Manifest, role: str) -> List[GraphEntry]:
    entries = [entry for entry in manifest.graphs if entry.role == role]
    if not entries or any(entry.bucket is None for entry in entries):
        raise SessionError(f"the manifest lists no {role} graph of fixed shapes; compile for an Ascend target again")
    return sorted(entries, key=_sizes)


def _sizes(entry: GraphEntry) -> Tuple[int, int, int]:
    assert entry.bucket is not None
    return entry.bucket
