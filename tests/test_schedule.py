import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcompile.errors import PassError
from qcompile.passes.registry import CANONICALIZE, CLEAN, FUSE, GROUPS, LOWER, PASSES, QUANTIZE
from qcompile.passes.schedule import schedule, schedule_up_to
from qcompile.target import TARGETS

NAMES = st.sets(st.sampled_from([*PASSES, *GROUPS]), max_size=6)
TIDY = [step.name for step in (*CANONICALIZE, *CLEAN)]


def names(*arguments, **options):
    return [step.name for step in schedule(*arguments, **options)]


def test_fuse_is_surrounded_by_clean_and_canonicalize():
    plan = names(["fuse"])
    clean = [step.name for step in CLEAN]
    assert plan[: len(clean) + 2 * len(TIDY)] == [*clean, *TIDY, *TIDY]
    assert plan[-len(clean) + 1 :] == [name for name in clean if name != "lift-constants"]
    fused = [name for name in plan if name in GROUPS["fuse"]]
    assert fused == [step.name for step in FUSE]


def test_shapes_are_tidied_again_after_fuse_attention():
    plan = names(["fuse"])
    after = plan[plan.index("fuse-attention") + 1 :]
    assert after[:3] == ["canonicalize-shapes", "eliminate-identities", "fuse-qkv"]
    assert names(["fuse-rms-norm"]).count("canonicalize-shapes") == 2


@pytest.mark.parametrize("skipped", ["canonicalize-shapes", "eliminate-identities", "canonicalize", "clean"])
def test_skip_holds_after_fuse_attention_too(skipped):
    plan = names(["fuse"], [skipped])
    assert not set(plan) & set(GROUPS.get(skipped, (skipped,)))
    assert "fuse-attention" in plan


def test_without_fuse_attention_nothing_is_tidied_for_it():
    plan = names(["fuse"], ["fuse-attention"])
    assert plan[plan.index("fuse-rotary-embedding") + 1] == "fuse-qkv"


def test_quantizing_alone_canonicalizes_nothing():
    plan = names(["int8"])
    assert not set(plan) & {step.name for step in CANONICALIZE}
    assert "int8-norm" in plan


@pytest.mark.parametrize("target", TARGETS)
def test_lowering_comes_last_and_only_for_its_target(target):
    plan = names(["fuse", "int8"], lowering=TARGETS[target].lowering)
    lowered = [name for name in plan if name in {step.name for step in LOWER}]
    assert set(lowered) == set(TARGETS[target].lowering)
    assert all(plan.index("int8-norm") < plan.index(name) for name in lowered)


def test_a_lowering_pass_can_be_skipped():
    assert "select-last-token" not in names(["fuse"], ["select-last-token"], TARGETS["ort"].lowering)


@given(passes=NAMES, skip=NAMES, target=st.sampled_from(sorted(TARGETS)))
def test_every_schedule_keeps_the_order_and_honours_skip(passes, skip, target):
    lowering = TARGETS[target].lowering
    plan = names(passes, skip, lowering)
    skipped = set(itertools.chain.from_iterable(GROUPS.get(name, (name,)) for name in skip))
    asked = set(itertools.chain.from_iterable(GROUPS.get(name, (name,)) for name in passes))
    assert not skipped & set(plan)
    assert (asked | set(lowering)) - skipped <= set(plan)
    assert plan == names(sorted(passes, reverse=True), skip, lowering)
    main = [name for name in plan if name in {step.name for step in (*FUSE, *QUANTIZE, *LOWER)}]
    assert main == sorted(set(main), key=list(PASSES).index)
    assert set(main) <= asked | set(lowering)


@pytest.mark.parametrize("name", sorted({*PASSES, *GROUPS}))
def test_up_to_a_pass_ends_with_it(name):
    plan = [step.name for step in schedule_up_to(name)]
    assert plan[-1] in GROUPS.get(name, (name,))


def test_up_to_a_lowering_pass_runs_all_fusions_and_no_other_lowering():
    plan = [step.name for step in schedule_up_to("lower-attention-to-ort")]
    assert set(GROUPS["fuse"]) <= set(plan)
    assert not {"lower-to-ort", "select-last-token", "int8-norm"} & set(plan)


@pytest.mark.parametrize("arguments", [(["fues"],), (["fuse"], ["fues"])])
def test_unknown_names_are_refused_in_passes_and_skip(arguments):
    with pytest.raises(PassError, match="unknown pass 'fues'; did you mean 'fuse'"):
        schedule(*arguments)
