"""The made problems: split, test files, checkers, coverage."""

import json
import random
import subprocess
import sys
from itertools import islice
from pathlib import Path

import pytest

from models.reasoner import data
from models.reasoner.problem import TYPES, Problem, finish, normalised_prompt, parameter_key, split_of
from models.reasoner.prompts import case_of
from qcompile.evaluate import check_answer, read_cases
from qcompile.evaluate.formats import OFFICIAL_GATE, extract_answer

REASONER = Path(data.__file__).parent
NUM_TRAINING = 20_000


def prompt_hash(problem: Problem) -> str:
    return normalised_prompt(problem.prompt, problem.choices)


@pytest.fixture(scope="module")
def training() -> list[tuple[Problem, str]]:
    """Training problems with the key of their template parameters, as `problems` draws them."""
    rng = random.Random(5)
    made: list[tuple[Problem, str]] = []
    while len(made) < NUM_TRAINING:
        family, is_hard, is_chinese = rng.choice(data.FAMILIES), rng.random() < 0.3, rng.random() < 0.5
        state = rng.getstate()
        problem, split = data.make(rng, family, is_hard=is_hard, is_chinese=is_chinese)
        if split != "train":
            continue
        again = random.Random()
        again.setstate(state)
        made.append((problem, parameter_key(family.name, family.draw(again, is_hard))))
    return made


@pytest.fixture(scope="module")
def test_sets() -> dict[str, list[Problem]]:
    return {"test": data.test_set(is_hard=False), "test_hard": data.test_set(is_hard=True)}


@pytest.fixture(scope="module")
def tests(test_sets) -> list[Problem]:
    return [*test_sets["test"], *test_sets["test_hard"]]


def test_no_test_or_validation_problem_is_among_the_training_problems(training, tests) -> None:
    prompts, keys = {prompt_hash(problem) for problem, _ in training}, {key for _, key in training}
    valid = list(islice(data.problems(1, "valid", hard_share=0.3), 100))
    assert not prompts & {prompt_hash(problem) for problem in [*tests, *valid]}
    assert {split_of(key) for key in keys} == {"train"}
    assert {split_of("prompt " + prompt) for prompt in prompts} == {"train"}
    assert {split_of("prompt " + prompt_hash(problem)) for problem in tests} == {"test"}
    assert {split_of("prompt " + prompt_hash(problem)) for problem in valid} == {"valid"}


def test_template_parameters_of_the_tests_are_in_the_test_split() -> None:
    rng, found = random.Random(3), 0
    for family in data.FAMILIES:
        for is_hard in (False, True):
            for _ in range(40):
                state = rng.getstate()
                _, split = data.make(rng, family, is_hard=is_hard, is_chinese=False)
                again = random.Random()
                again.setstate(state)
                key = parameter_key(family.name, family.draw(again, is_hard))
                assert split in ("", split_of(key))
                found += split == "test"
    assert found > 20


def test_another_wording_of_the_same_question_is_the_same_problem() -> None:
    assert normalised_prompt("What is 3 + 4?") == normalised_prompt("what is 3+4 ？")
    assert normalised_prompt("Pick", {"A": "x", "B": "y"}) == normalised_prompt("Pick", {"A": "y", "B": "x"})
    assert normalised_prompt("What is 3 + 4?") != normalised_prompt("What is 3 - 4?")


@pytest.mark.parametrize("name", ["test", "test_hard"])
def test_the_committed_files_come_out_again_byte_for_byte(name: str, test_sets, tmp_path: Path) -> None:
    data.write_cases(tmp_path / f"{name}.jsonl", test_sets[name])
    assert (tmp_path / f"{name}.jsonl").read_bytes() == (REASONER / f"{name}.jsonl").read_bytes()


@pytest.mark.parametrize("name", ["test", "test_hard"])
def test_the_committed_files_are_cases_of_all_types_in_both_languages(name: str) -> None:
    cases, problems = read_cases(REASONER / f"{name}.jsonl")
    assert not problems
    assert len({case.id for case in cases}) == len(cases) == 200
    assert [sum(case.type == kind for case in cases) for kind in TYPES] == [50] * 4
    records = [json.loads(line) for line in (REASONER / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]
    assert sum(record["language"] == "zh" for record in records) == 100
    assert {record["family"] for record in records} == {family.name for family in data.FAMILIES}


def test_every_solution_passes_the_gate_and_its_checker(training, tests) -> None:
    for problem in [*tests, *(problem for problem, _ in training[::10])]:
        assert OFFICIAL_GATE.match(problem.solution), problem
        assert extract_answer(problem.type, problem.solution)[1], problem
        if not problem.tests:
            assert check_answer(case_of(problem), problem.solution).is_correct, problem


def test_programs_pass_their_tests_in_the_sandbox(tests) -> None:
    programs = [problem for problem in tests if problem.tests][::10]
    assert len(programs) == 10
    for problem in programs:
        assert check_answer(case_of(problem), problem.solution).is_correct, problem


def test_a_wrong_answer_is_not_accepted(tests) -> None:
    for problem in tests[::7]:
        if problem.tests:
            continue
        other = {"choice": "ABCD".replace(problem.answer, "")[0], "math": "\\boxed{-12345}"}.get(problem.type, "nobody")
        text = f"<think>\n?\n</think>\n<answer>Answer: {other}</answer>"
        assert not check_answer(case_of(problem), text).is_correct, problem


@pytest.mark.parametrize("family", data.FAMILIES, ids=lambda family: family.name)
def test_a_family_speaks_both_languages_about_one_set_of_parameters(family) -> None:
    rng = random.Random(family.name)
    for is_hard in (False, True):
        parameters = family.draw(rng, is_hard)
        english, chinese = (
            finish(
                family, family.render(parameters, is_chinese, random.Random(0)), is_chinese=is_chinese, is_hard=is_hard
            )
            for is_chinese in (False, True)
        )
        assert english.prompt != chinese.prompt
        assert any("\u4e00" <= letter <= "\u9fff" for letter in chinese.prompt)
        assert not any("\u4e00" <= letter <= "\u9fff" for letter in english.prompt)
        assert english.tests == chinese.tests


def test_all_kinds_of_problem_that_were_asked_for_are_there() -> None:
    names = {family.name for family in data.FAMILIES}
    wanted = {
        *("sum", "product", "precedence", "fraction", "percent", "linear", "base", "divisor", "shopping", "travel"),
        *("sharing", "order", "fractions", "weekday", "options", "sets", "knights", "satisfy", "kinship", "truth"),
        *("letters", "count", "list", "operations", "date", "clock", "set-list", "heights", "pipeline", "text"),
        *("cases", "loop", "kinship-short"),
    }
    assert wanted <= names


def test_weights_choose_the_families() -> None:
    drawn = islice(data.problems(2, "train", weights={("sum", True): 1.0, ("truth", False): 3.0}), 200)
    kinds = [(problem.family, problem.is_hard) for problem in drawn]
    assert set(kinds) == {("sum", True), ("truth", False)}
    assert 110 < kinds.count(("truth", False)) < 190


def test_a_stream_follows_from_its_seed() -> None:
    first, again, other = (list(islice(data.problems(seed, "train", hard_share=0.5), 30)) for seed in (1, 1, 2))
    assert first == again != other


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--count", "-3"), "'-3'; wanted a whole number, 1 or more"),
        (("--count", "0"), "'0'; wanted a whole number, 1 or more"),
        (("--hard", "5"), "'5'; wanted a share from 0 to 1"),
        (("--hard", "nan"), "'nan'; wanted a share from 0 to 1"),
        (("--hard", "x"), "'x'; wanted a share from 0 to 1"),
    ],
)
def test_a_sample_of_nothing_is_refused(
    options: tuple[str, str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        data.main(["sample", *options])
    assert end.value.code == 2
    assert message in capsys.readouterr().err


def test_a_reader_that_has_enough_is_no_error() -> None:
    command = [sys.executable, "-m", "models.reasoner.data", "sample", "--count", "400"]
    root = Path(data.__file__).parents[2]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=root) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith(b"--- ")
        process.stdout.close()
        assert process.stderr is not None
        assert process.stderr.read() == b""
    assert process.returncode == 0
