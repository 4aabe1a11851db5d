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


@pytest.mark.parametrize("average", [0.0, 0.5])
def test_a_resumed_run_knows_the_best_weights_and_the_start(average: float, tmp_path) -> None:
    """A weight goes from 0 over 8, the best, to 2, where the run is cut off, and on to 4."""
    model, path = torch.nn.Linear(1, 1, bias=False), tmp_path / "validation.jsonl"
    seen: list[float] = []

    def measure(model) -> dict[str, float]:
        seen.append(model.weight.item())
        return {"accuracy": 1 - abs(model.weight.item() - 8) / 10}

    def begin(step: int) -> KeepBest:
        keep = KeepBest(SimpleNamespace(measure=measure), path, 0.0, average=average)
        keep.on_train_begin(args, SimpleNamespace(global_step=step), None, model=model)
        return keep

    def be(keep: KeepBest, step: int, weight: float) -> None:
        torch.nn.init.constant_(model.weight, weight)
        keep.on_step_end(args, SimpleNamespace(global_step=step), None, model=model)

    args = SimpleNamespace(output_dir=tmp_path)
    torch.nn.init.constant_(model.weight, 0.0)
    killed = begin(0)
    be(killed, 1, 8.0)
    (tmp_path / "checkpoint-2").mkdir()
    be(killed, 2, 2.0)
    killed.on_save(args, SimpleNamespace(global_step=2), None)
    be(killed, 3, 7.0)
    torch.nn.init.constant_(model.weight, 2.0)
    resumed = begin(2)
    assert steps_in(path) == [0, 1, 2]
    seen.clear()
    be(resumed, 3, 4.0)
    resumed.on_train_end(args, SimpleNamespace(global_step=3), None, model=model)
    end = 3.5 if average else 4.0  # of the mean: 0, 4, 3, 3.5
    assert seen == [end, end, end * 0.75, end * 0.5, end * 0.25]  # points from 0, not from 2
    assert model.weight.item() == (4.0 if average else 8.0)
