"""Which passes run, and when: the one place that turns names into a sequence.

    clean -> canonicalize (twice) -> fuse -> quantize -> lower -> clean

Canonicalize runs twice because one spelling uncovers another. After fuse-attention what reshaped rows into heads around
it cancels out, so shapes are tidied once more. Nothing that is skipped runs, wherever it would stand.
"""

from __future__ import annotations

from collections.abc import Iterable

from qcompile.passes import registry
from qcompile.passes.base import Pass
from qcompile.passes.canonicalize_shapes import CanonicalizeShapes
from qcompile.passes.clean import EliminateIdentities, LiftConstants
from qcompile.passes.fuse_attention import FuseAttention


def schedule(passes: Iterable[str], skip: Iterable[str] = (), lowering: Iterable[str] = ()) -> list[type[Pass]]:
    """Return the passes in running order, with what surrounds them.

    Args:
        passes: Names of passes and groups that are asked for; their order does not matter.
        skip: Names of passes and groups that must not run.
        lowering: Names of the passes that lower to the target.

    Raises:
        PassError: A name is unknown; the message suggests the nearest.
    """
    chosen = {*registry.expand(passes), *lowering}
    skipped = set(registry.expand(skip))
    plan: list[type[Pass]] = [*registry.CLEAN]
    if any(p.name in chosen - skipped for p in (*registry.CANONICALIZE, *registry.FUSE)):
        plan += 2 * (*registry.CANONICALIZE, *registry.CLEAN)
    for step in (*registry.FUSE, *registry.QUANTIZE, *registry.LOWER):
        if step.name in chosen:
            plan.append(step)
        if step is FuseAttention and step.name in chosen - skipped:
            plan += (CanonicalizeShapes, EliminateIdentities)
    # The definitions that inlining brings back keep their Constant nodes.
    plan += (step for step in registry.CLEAN if step is not LiftConstants)
    return [step for step in plan if step.name not in skipped]


def schedule_up_to(name: str) -> list[type[Pass]]:
    """Return what runs before a pass (or the last pass of a group) and it itself, all fusions included.

    Raises:
        PassError: The name is unknown.
    """
    wanted = set(registry.expand([name]))
    plan = schedule(["fuse", name])
    last = max(index for index, step in enumerate(plan) if step.name in wanted)
    return plan[: last + 1]
