"""Layered drawing of a small directed graph: ranks by longest path, few crossings, straight lines.

After Sugiyama, Tagawa & Toda 1981. Edges that span several ranks run through bends, shared by all edges of
one source; the x coordinates of a rank are the least-squares fit to its neighbours that keeps order and
distance.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

Key = tuple[str, int]
Edge = tuple[Key, Key]

_SWEEPS = 8
_ALIGNMENTS = 24
_BEND_WIDTH = 10.0


@dataclass
class Layered:
    """A finished drawing.

    Attributes:
        x: Centre of every item and bend.
        rank: Rank of every item and bend, from 0.
        rows: Items and bends of every rank, left to right.
        routes: Per edge the items and bends it runs through, both ends included.
    """

    x: dict[Key, float] = field(default_factory=dict)
    rank: dict[Key, int] = field(default_factory=dict)
    rows: list[list[Key]] = field(default_factory=list)
    routes: dict[Edge, list[Key]] = field(default_factory=dict)


def draw_layered(
    widths: Mapping[Key, float],
    edges: Sequence[Edge],
    *,
    first: Sequence[Key] = (),
    last: Sequence[Key] = (),
    gap: float = 12.0,
) -> Layered:
    """Place items in ranks.

    Args:
        widths: Width of every item, in an order in which sources come before their targets.
        edges: Pairs of items, without cycles.
        first: Items that share the first rank, with nothing else.
        last: Items that share the last rank, with nothing else.
        gap: Least distance between neighbours of a rank.
    """
    drawing = Layered()
    drawing.rank = _ranks(list(widths), edges, set(first), set(last))
    links = _route(drawing, edges)
    depth = max(drawing.rank.values(), default=-1) + 1
    drawing.rows = [[] for _ in range(depth)]
    for key in _by_first_edge(drawing, edges):
        drawing.rows[drawing.rank[key]].append(key)
    above, below = _neighbours(links)
    _order(drawing, above, below)
    _align(drawing, widths, above, below, gap)
    return drawing


def _ranks(items: list[Key], edges: Sequence[Edge], first: set[Key], last: set[Key]) -> dict[Key, int]:
    above, below = _neighbours(edges)
    lowest = 1 if first else 0
    rank = {key: 0 if key in first else lowest for key in items}
    for key in items:
        for source in above.get(key, ()):
            rank[key] = max(rank[key], rank[source] + 1)
    for key in reversed(items):
        if not above.get(key) and below.get(key) and key not in first:
            rank[key] = min(rank[target] for target in below[key]) - 1
    bottom = max((r for key, r in rank.items() if key not in last), default=-1) + 1
    return {key: bottom if key in last else r for key, r in rank.items()}


def _route(drawing: Layered, edges: Sequence[Edge]) -> list[Edge]:
    """Cut edges into links between neighbouring ranks, through bends."""
    bends: dict[tuple[Key, int], Key] = {}
    links: dict[Edge, None] = {}
    for source, target in edges:
        route = [source]
        for rank in range(drawing.rank[source] + 1, drawing.rank[target]):
            bend = bends.setdefault((source, rank), ("bend", len(bends)))
            drawing.rank[bend] = rank
            route.append(bend)
        route.append(target)
        drawing.routes[source, target] = route
        links.update(dict.fromkeys(itertools.pairwise(route)))
    return list(links)


def _by_first_edge(drawing: Layered, edges: Sequence[Edge]) -> list[Key]:
    """Return items and bends by the first edge that leaves them: inputs of one target keep their order."""
    first: dict[Key, int] = {}
    for number, edge in enumerate(edges):
        for key in drawing.routes[edge][:-1]:
            first.setdefault(key, number)
    for number, (_, target) in enumerate(edges):
        first.setdefault(target, number)
    return sorted(drawing.rank, key=lambda key: first.get(key, len(edges)))


def _neighbours(links: Sequence[Edge]) -> tuple[dict[Key, list[Key]], dict[Key, list[Key]]]:
    above: dict[Key, list[Key]] = {}
    below: dict[Key, list[Key]] = {}
    for source, target in links:
        above.setdefault(target, []).append(source)
        below.setdefault(source, []).append(target)
    return above, below


def _order(drawing: Layered, above: dict[Key, list[Key]], below: dict[Key, list[Key]]) -> None:
    """Reduce crossings by barycentres, downwards and upwards in turn; keep the best order seen."""
    best = [list(row) for row in drawing.rows]
    fewest = _crossings(drawing.rows, below)
    for sweep in range(_SWEEPS):
        downwards = sweep % 2 == 0
        rows = drawing.rows if downwards else drawing.rows[::-1]
        neighbours = above if downwards else below
        for fixed, row in itertools.pairwise(rows):
            place = {key: index for index, key in enumerate(fixed)}
            centre = {key: _mean([place[n] for n in neighbours.get(key, ())], index) for index, key in enumerate(row)}
            row.sort(key=centre.__getitem__)
        crossings = _crossings(drawing.rows, below)
        if crossings < fewest:
            fewest, best = crossings, [list(row) for row in drawing.rows]
    drawing.rows = best


def _crossings(rows: Sequence[Sequence[Key]], below: dict[Key, list[Key]]) -> int:
    total = 0
    for row, following in itertools.pairwise(rows):
        place = {key: index for index, key in enumerate(following)}
        ends = [sorted(place[n] for n in below.get(key, ()) if n in place) for key in row]
        flat = [end for part in ends for end in part]
        total += sum(flat[i] > flat[j] for i in range(len(flat)) for j in range(i + 1, len(flat)))
    return total


def _align(
    drawing: Layered,
    widths: Mapping[Key, float],
    above: dict[Key, list[Key]],
    below: dict[Key, list[Key]],
    gap: float,
) -> None:
    """Move items towards the mean of their neighbours, downwards and upwards in turn."""
    x = drawing.x
    offsets = {}
    for row in drawing.rows:
        edge = 0.0
        for key in row:
            width = widths.get(key, _BEND_WIDTH)
            offsets[key] = edge + width / 2
            edge += width + gap
        for key in row:
            x[key] = offsets[key] - (edge - gap) / 2
    for turn in range(_ALIGNMENTS):
        both = turn >= _ALIGNMENTS - 4
        for row in drawing.rows if turn % 2 == 0 else drawing.rows[::-1]:
            wanted = []
            for key in row:
                up, down = above.get(key, []), below.get(key, [])
                near = up if turn % 2 == 0 else down
                near = up + down if both or not near else near
                pulls = [(x[n], _stiffness(key, n, above, below)) for n in near] or [(x[key], 1.0)]
                weight = sum(stiffness for _, stiffness in pulls)
                wanted.append((sum(at * s for at, s in pulls) / weight - offsets[key], weight))
            for key, fitted in zip(row, _isotonic(wanted), strict=True):
                x[key] = fitted + offsets[key]


def _stiffness(a: Key, b: Key, above: dict[Key, list[Key]], below: dict[Key, list[Key]]) -> float:
    """Return how straight a link should be: most between bends, and where neither end has another one."""
    if a[0] == b[0] == "bend":
        return 8.0
    upper, lower = (a, b) if b in below.get(a, ()) else (b, a)
    return 4.0 if len(below[upper]) == 1 and len(above[lower]) == 1 else 1.0


def _isotonic(values: Sequence[tuple[float, float]]) -> list[float]:
    """Return the non-decreasing sequence nearest to (value, weight) pairs in least squares.

    Pool adjacent violators: neighbours in the wrong order are replaced by their mean until none is left.
    """
    pools: list[tuple[float, float, int]] = []
    for value, weight in values:
        total, mass, count = value * weight, weight, 1
        while pools and pools[-1][0] / pools[-1][1] > total / mass:
            before, before_mass, size = pools.pop()
            total, mass, count = total + before, mass + before_mass, count + size
        pools.append((total, mass, count))
    return [total / mass for total, mass, count in pools for _ in range(count)]


def _mean(values: Sequence[float], default: float) -> float:
    return sum(values) / len(values) if values else default
