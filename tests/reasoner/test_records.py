"""What a training run writes down: every step once, resumed or on several devices."""

import json
from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("trl")
pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("ignore")]  # the libraries deprecate each other

from models.reasoner.callbacks import StepLog  # noqa: E402
from models.reasoner.validation import KeepBest  # noqa: E402


def steps_in(path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_a_resumed_run_has_every_step_once(tmp_path) -> None:
    path = tmp_path / "steps.jsonl"

    def step(log: StepLog, number: int) -> SimpleNamespace:
        state = SimpleNamespace(global_step=number)
        log.keep(loss=torch.tensor(1.0))
        log.on_step_end(None, state, SimpleNamespace())
        return state

    killed = StepLog(path, 0.0)
    step(killed, 1)
    killed.on_save(None, step(killed, 2), None)  # before the trainer logs
    killed.on_log(None, step(killed, 3), None, logs={})
    with path.open("a") as stream:
        stream.write('{"step": 4, "lo')
    resumed = StepLog(path, 0.0)
    resumed.on_train_begin(None, SimpleNamespace(global_step=2), None)
    resumed.on_log(None, step(resumed, 3), None, logs={})
    assert steps_in(tmp_path / "steps.jsonl") == [1, 2, 3]


def test_of_several_processes_the_first_writes(tmp_path) -> None:
    for is_first in (True, False):
        log, state = StepLog(tmp_path / "steps.jsonl", 0.0), SimpleNamespace(global_step=1)
        state.is_world_process_zero = is_first
        log.keep(loss=torch.tensor(1.0))
        log.on_step_end(None, state, SimpleNamespace())
        log.on_log(None, state, None, logs={})
        saved = []
        measure = SimpleNamespace(measure=lambda _: {"accuracy": 1.0})
        keep = KeepBest(measure, tmp_path / "validation.jsonl", 3600.0, save_end=saved.append)
        keep.on_train_begin(None, state, None, model=torch.nn.Linear(1, 1))
        keep.on_train_end(None, state, None, model=torch.nn.Linear(1, 1))
        assert bool(saved) is is_first
        if is_first:
            lines = (tmp_path / "validation.jsonl").read_text()
    assert steps_in(tmp_path / "steps.jsonl") == [1]
    assert (tmp_path / "validation.jsonl").read_text() == lines
