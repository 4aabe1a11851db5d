"""What watches a run: a JSON line per step, a stop at the time limit, and no update from a broken gradient."""

import json
import logging
import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

_logger = logging.getLogger(__name__)
_DROPPED_IN_A_ROW = 3


def is_first_process(state: Any) -> bool:
    """Whether this process writes the records of a run on several devices."""
    return bool(getattr(state, "is_world_process_zero", True))


def _is_up_to(line: str, step: int) -> bool:
    """Whether a line of the log is of that step or before; one torn by a crash is of none."""
    try:
        return bool(json.loads(line)["step"] <= step)
    except (ValueError, KeyError, TypeError):
        return False


def take_back(path: Path, step: int) -> None:
    """Leave in a log only the lines up to a step."""
    kept = [line for line in path.read_text(encoding="utf-8").splitlines() if _is_up_to(line, step)]
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
    temporary.replace(path)


class StepLog(TrainerCallback):  # type: ignore[misc]
    """One JSON line per step, and a stop when the time is up.

    Of several processes the first one writes. A resumed run takes the lines behind its checkpoint back, for it makes those
    steps again; so the lines up to a checkpoint are written when it is saved.

    `keep` takes tensors without waiting for the device; they are read, and the lines written, when the trainer logs.
    Waiting for every step's loss leaves the device idle while Python prepares the next one: on an H100 that was half
    of the time.

    Raises:
        FloatingPointError: A kept loss is not finite.
    """

    def __init__(self, path: Path, limit_s: float) -> None:
        self._path, self._limit_s, self._start = path, limit_s, time.monotonic()
        self._current: dict[str, list[Tensor]] = {}
        self._lines: list[dict[str, Any]] = []

    def keep(self, **values: Tensor) -> None:
        """Remember values of the step that runs; those of several forward passes are averaged."""
        for name, value in values.items():
            self._current.setdefault(name, []).append(value.detach())

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Take back the lines of steps that will be made again."""
        if is_first_process(state) and self._path.exists():
            take_back(self._path, state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, lr_scheduler: Any = None, **_: Any) -> Any:
        """Close the step's line and ask for a stop at the time limit."""
        spent = time.monotonic() - self._start
        if self._current:
            rate = lr_scheduler.get_last_lr()[0] if lr_scheduler is not None else None
            self._lines.append({"step": state.global_step, "seconds": round(spent, 3), "learning_rate": rate})
            self._lines[-1].update({name: torch.stack(values).mean() for name, values in self._current.items()})
            self._current = {}
        if self._limit_s and spent > self._limit_s:
            control.should_training_stop = True
        return control

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        """Write the steps since the last time; what the trainer itself reports joins the last of them."""
        spent = round(time.monotonic() - self._start, 3)
        self._lines = self._lines or [{"step": state.global_step, "seconds": spent}]
        self._lines[-1] = {**(logs or {}), **self._lines[-1]}
        self._write(state)

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Write the steps up to the checkpoint: a run resumed from it does not make them again."""
        self._write(state)

    def _write(self, state: Any) -> None:
        lines, self._lines = self._lines, []
        for line in lines:
            line |= {key: value.item() for key, value in line.items() if isinstance(value, Tensor)}
        if is_first_process(state):
            with self._path.open("a", encoding="utf-8") as stream:
                stream.writelines(json.dumps(line) + "\n" for line in lines)
        for line in lines:
            if not math.isfinite(line.get("loss", 0.0)):
                raise FloatingPointError(f"step {line['step']}: the loss is {line['loss']}; lower the learning rate")


class FiniteGuard(TrainerCallback):  # type: ignore[misc]
    """Drop an update whose gradients are not finite, say so, and end a run in which that goes on.

    A safety net: the one cause that was met, cuDNN's attention, is turned off (`train.sound_attention`).

    Raises:
        FloatingPointError: Three updates in a row had to be dropped.
    """

    def __init__(self) -> None:
        self.dropped = 0
        self._in_a_row = 0

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Runs after clipping, which has made all gradients NaN when one is."""
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        if not gradients or bool(torch.isfinite(torch.stack(torch._foreach_norm(gradients))).all()):
            self._in_a_row = 0
            return
        self.dropped += 1
        self._in_a_row += 1
        step = state.global_step + 1
        if self._in_a_row == _DROPPED_IN_A_ROW:
            raise FloatingPointError(f"step {step}: the gradient was not finite {self._in_a_row} times in a row")
        _logger.warning("step %d: the gradient is not finite; the update is dropped", step)
        for gradient in gradients:
            gradient.zero_()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        """Report how many updates were dropped so far."""
        if logs is not None and self.dropped:
            logs["dropped_updates"] = self.dropped
