"""Which of a directory's static graphs serves a step: the smallest that has room for it."""

from typing import Iterator, List, Optional, Tuple

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
        self.max_capacity = max(self._lengths(), default=0)

    def choose(self, num_rows: int, num_tokens: int, past: int, exact_kv_len: Optional[int] = None) -> GraphEntry:
        """Return the smallest graph for that many rows, new tokens of each and cached entries.

        Args:
            num_rows: Slots.
            num_tokens: New tokens of each.
            past: Cached entries of the longest.
            exact_kv_len: The graph's cache length must be this: its slots lie that far apart in memory.

        Raises:
            SessionError: None is large enough.
        """
        for entry in self._decode if num_tokens == 1 else self._prefill:
            batch, query_len, kv_len = _sizes(entry)
            fits = kv_len >= past if exact_kv_len is None else kv_len == exact_kv_len
            if batch >= num_rows and query_len >= num_tokens and fits:
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
        lengths = self._lengths()
        for length in lengths:
            if length >= wanted:
                return length
        raise SessionError(
            f"a KV cache of {wanted} tokens is wanted; the largest compiled is {lengths[-1] if lengths else 0}: "
            "lower max_model_len or compile with a larger --kv-len"
        )

    def groups(self, num_rows: int, exact_kv_len: Optional[int] = None) -> Iterator[Tuple[int, int]]:
        """Cut rows into (start, stop) that the largest decode graph (of that cache length) takes."""
        largest = max(self._batches(exact_kv_len), default=self.max_batch)
        for start in range(0, num_rows, largest):
            yield start, min(start + largest, num_rows)

    def batch_for(self, num_rows: int, exact_kv_len: int) -> int:
        """Return the largest batch of the graphs that serve groups of so many rows."""
        batches = sorted(self._batches(exact_kv_len))
        return next((batch for batch in batches if batch >= num_rows), batches[-1])

    def _batches(self, kv_len: Optional[int]) -> List[int]:
        sizes = [_sizes(entry) for entry in self._decode]
        return [batch for batch, _, length in sizes if kv_len is None or length == kv_len]

    def _lengths(self) -> List[int]:
        return sorted({_sizes(entry)[2] for entry in self._decode} & {_sizes(entry)[2] for entry in self._prefill})


def _sorted(manifest: Manifest, role: str) -> List[GraphEntry]:
    entries = [entry for entry in manifest.graphs if entry.role == role]
    if not entries or any(entry.bucket is None for entry in entries):
        raise SessionError(f"the manifest lists no {role} graph of fixed shapes; compile for an Ascend target again")
    return sorted(entries, key=_sizes)


def _sizes(entry: GraphEntry) -> Tuple[int, int, int]:
    assert entry.bucket is not None
    return entry.bucket
