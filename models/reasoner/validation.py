"""Greedy accuracy on validation problems while GRPO trains, and the weights that were best by it.

Reward is measured on samples; what is wanted is the answer without sampling. The two part: a model that samples
better may decode no better (the card in `weights/` tells of such a run), so greedy decoding is what chooses.
"""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import TrainerCallback

from models.reasoner import corpus
from models.reasoner.callbacks import is_first_process, take_back
from models.reasoner.generate import ROWS, Generator
from models.reasoner.problem import TYPES
from models.reasoner.rewards import is_well_formed, judge, problem_of
from models.reasoner.settings import Settings

KEPT = "validated.safetensors"  # in a checkpoint: what `KeepBest` would forget
_SEED = 77  # far from those of `probe`, which asks problems of the same split
_SHARES = (0.75, 0.5, 0.25)


class Validation:
    """`settings.validate` hard problems of the validation split, asked greedily.

    Args:
        settings: Of the stage.
        tokenizer: The model's.
        device: Where to generate.
        dtype: To generate in.
        seed: Of the problems. Weights that were chosen by some problems look better on them than they are, so what goes
            on from them should be asked others.
    """

    def __init__(self, settings: Settings, tokenizer: Any, device: Any, dtype: torch.dtype, seed: int = _SEED) -> None:
        self._settings, self._tokenizer, self._device, self._dtype = settings, tokenizer, device, dtype
        rows = corpus.asked(settings.validate, seed=seed, hard_share=1.0, split="valid", tokenizer_from=settings.model)
        self._sources = list(rows["problem"])
        self._problems = [problem_of(source) for source in self._sources]
        self._prompts = tokenizer(list(rows["prompt"]), add_special_tokens=False)["input_ids"]
        self._generator: Generator | None = None

    def measure(self, model: Any) -> dict[str, Any]:
        """Shares of right and well formed answers, those right of each type, and of each family [right, asked]."""
        if self._generator is None:
            stop = {self._tokenizer.eos_token_id}
            self._generator = Generator(model, stop, device=self._device, dtype=self._dtype)
        self._generator.update(model)
        answers = self._generator.generate(self._prompts, max_new_tokens=self._settings.max_new_tokens, rows=ROWS)
        texts = self._tokenizer.batch_decode(answers, skip_special_tokens=True)
        pairs = list(zip(self._sources, texts, strict=True))
        verdicts = judge(pairs)
        right = [verdicts[pair] for pair in pairs]
        formed = [is_well_formed(problem, text) for problem, text in zip(self._problems, texts, strict=True)]
        families: dict[str, list[int]] = {}
        for problem, is_right in zip(self._problems, right, strict=True):
            entry = families.setdefault(problem.family, [0, 0])
            entry[0] += is_right
            entry[1] += 1
        judged = list(zip(self._problems, right, strict=True))
        by_type = {kind: [ok for problem, ok in judged if problem.type == kind] for kind in TYPES}
        return {
            "accuracy": sum(right) / len(right),
            "format": sum(formed) / len(formed),
            **{kind: round(sum(oks) / max(1, len(oks)), 4) for kind, oks in by_type.items()},
            "families": dict(sorted(families.items())),
        }


class KeepBest(TrainerCallback):  # type: ignore[misc]
    """Validates before, during and after a run, writes a JSON line each time, and ends with the best weights.

    The weights it started from count too: a run that only loses changes nothing. So do, at the end, points between
    start and end (`share` of the way). Near the start, what was learned falls with the share and the harm of noise with
    its square.

    `save_end` is given the model as it ends, whatever it is worth: ends of several runs can be averaged (`merge.py`), which
    takes more noise away than any of the points that are judged here.

    With an `average` between 0 and 1, what is judged and kept is the running mean of the weights with that decay a step:
    much of the noise of single steps is gone from it (Polyak and Juditsky, 1992).

    Every checkpoint holds start, best and mean (`KEPT`), and a resumed run goes on with those of its checkpoint.
    """

    def __init__(
        self,
        validation: Any,
        path: Path,
        every_s: float,
        average: float = 0.0,
        save_end: Callable[[Any], object] = lambda _: None,
    ) -> None:
        self._validation, self._path, self._every_s, self._average = validation, path, every_s, average
        self._save_end = save_end
        self._begin = self._last = time.monotonic()
        self._best, self._writes = -1.0, True
        self._start: dict[str, Tensor] = {}
        self._state: dict[str, Tensor] = {}
        self._mean: dict[str, Tensor] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """The start, or the checkpoint that the run goes on from."""
        self._begin = self._last = time.monotonic()
        self._writes = is_first_process(state)
        if state.global_step and args is not None and _kept_in(args, state).is_file():
            self._restore(_kept_in(args, state), state.global_step, model)
            return
        self._start = _copied(model)
        if self._average:
            self._mean = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
        self._measure(model, state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Follow the mean; every so many seconds, validate it."""
        present = model.state_dict()
        for name, mean in self._mean.items():
            mean.lerp_(present[name].detach(), 1 - self._average)
        if time.monotonic() - self._last >= self._every_s:
            kept = _copied(model) if self._mean else {}
            self._measure_mean(model, state.global_step)
            if kept:
                model.load_state_dict(kept)

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Put start, best and mean beside the checkpoint."""
        if not self._writes:
            return
        parts = {"start": self._start, "best": self._state, "mean": self._mean}
        tensors = {
            f"{part}.{name}": tensor.to("cpu", copy=True)  # tied ones would share memory, which the format refuses
            for part, held in parts.items()
            for name, tensor in held.items()
        }
        target = _kept_in(args, state)
        temporary = target.with_name(f"{KEPT}.tmp")
        save_file(tensors, temporary, metadata={"best": repr(self._best)})
        temporary.replace(target)

    def _restore(self, path: Path, step: int, model: Any) -> None:
        present = model.state_dict()
        with safe_open(path, framework="pt") as file:
            self._best = float(file.metadata()["best"])
            held: dict[str, dict[str, Tensor]] = {"start": {}, "best": {}, "mean": {}}
            for key in file.keys():  # noqa: SIM118 - no mapping
                part, _, name = key.partition(".")
                held[part][name] = file.get_tensor(key)
        self._start, self._state = held["start"], held["best"]
        if self._average:
            mean = held["mean"] or present
            self._mean = {name: mean[name].to(tensor.device, copy=True) for name, tensor in present.items()}
        if self._writes and self._path.exists():
            take_back(self._path, step)

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """The end, and points before it; then put the best weights into the model."""
        self._measure_mean(model, state.global_step)
        if self._writes:
            self._save_end(model)
        end = _copied(model)
        for share in _SHARES:
            model.load_state_dict({name: torch.lerp(self._start[name], end[name], share) for name in end})
            self._measure(model, state.global_step, share)
        model.load_state_dict(self._state)

    def _measure_mean(self, model: Any, step: int) -> None:
        """Put the mean, where there is one, into the model and measure that."""
        if self._mean:
            model.load_state_dict(self._mean)
        self._measure(model, step)

    def _measure(self, model: Any, step: int, share: float = 1.0) -> None:
        found = self._validation.measure(model)
        self._last = time.monotonic()
        line = {"step": step, "share": share, "seconds": round(self._last - self._begin, 1), **found}
        if self._writes:
            with self._path.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(line) + "\n")
        shown = {name: value for name, value in line.items() if name != "families"}
        print(f"validation: {shown}", flush=True)
        if found["accuracy"] > self._best:
            self._best = found["accuracy"]
            self._state = _copied(model)


def _kept_in(args: Any, state: Any) -> Path:
    return Path(args.output_dir) / f"checkpoint-{state.global_step}" / KEPT


def _copied(model: Any) -> dict[str, Tensor]:
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in model.state_dict().items()}
