"""Training settings: defaults, named recipes from recipes.toml, and `--set key=value` on top."""

import math
import os
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import tomllib

RECIPES = Path(__file__).with_name("recipes.toml")
_WORDS = {"stage": ("sft", "distill", "grpo"), "rollout": ("fast", "trl")}
_SWITCH = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}
_POSITIVE = ("learning_rate", "temperature", "kd_temperature")
_COUNTS = ("steps", "batch_size", "accumulate", "group", "minibatches", "max_new_tokens")
_SHARES = ("hard_share", "min_lr_share", "kd_alpha", "demonstrate")
_DECAYS = ("average", "adam_beta2")


@dataclass(frozen=True)
class Settings:
    """What a training stage needs to know.

    Attributes:
        stage: sft, distill or grpo.
        model: A directory in Hugging Face form, or student, teacher, micro for a new model; empty where --set has to name one.
        teacher: distill: the teacher's directory.
        num_rows: Rows to train on, again and again; 0 makes a new row for every use.
        rows: A dataset saved earlier by `corpus.solved`; empty makes the rows first.
        steps: Optimizer steps; the learning rate follows them, or the time limit when that comes first.
        batch_size: Sequences per device and forward pass.
        accumulate: Forward passes per step; for GRPO the completions of a step are batch_size * accumulate, and those of
            a rollout `minibatches` times as many.
        hard_share: Share of hard problems in the training data.
        lora_rank: 0 trains every weight; else LoRA through peft, for models of real size.
        kd_alpha: distill: weight of the divergence from the teacher; the rest is the usual loss.
        answers: distill: how many of the teacher's own checked answers join the data.
        group: grpo: completions per prompt.
        minibatches: grpo: optimizer steps per rollout, each on its part of the completions.
        average: grpo: validate and keep not the weights of one step but their running mean, with this decay; 0 has none.
        kl_beta: grpo: weight of the divergence from the model it started from.
        probe: grpo: problems asked beforehand, to weight the families by how often they are solved; 0 takes all alike.
        demonstrate: grpo: the made solution takes the place of one completion where at most this share of a group is
            right; 0 never shows one. With rollout fast only.
        validate: grpo: validation problems, all hard, asked greedily; the best weights by them are kept; 0 keeps the last.
        validate_every: grpo: seconds between two validations.
        rollout: grpo: fast (`generate.py`) or trl (transformers' generate, or vLLM through TRL's options).
        limit_s: Stop after this many seconds and save; 0 has no limit.
        compile_layers: torch.compile each decoder layer.
        bf16_on_cpu: compute in bfloat16 on a CPU too; twice as fast where it has instructions for it.
    """

    stage: str = "sft"
    model: str = "student"
    teacher: str = ""
    num_rows: int = 0
    rows: str = ""
    steps: int = 100
    batch_size: int = 512
    accumulate: int = 1
    learning_rate: float = 2e-3
    min_lr_share: float = 0.02
    warmup: int = 50
    weight_decay: float = 0.05
    adam_beta2: float = 0.98
    hard_share: float = 0.1
    seed: int = 1
    lora_rank: int = 0
    kd_alpha: float = 0.7
    kd_temperature: float = 1.0
    answers: int = 0
    group: int = 16
    minibatches: int = 1
    probe: int = 0
    demonstrate: float = 0.0
    validate: int = 0
    validate_every: float = 60.0
    max_new_tokens: int = 272
    temperature: float = 1.0
    rollout: str = "fast"
    epsilon_high: float = 0.28
    format_weight: float = 0.2
    average: float = 0.0
    kl_beta: float = 0.0
    save_every: int = 0
    limit_s: float = 0.0
    compile_layers: bool = False
    bf16_on_cpu: bool = False
    workers: int = 4

    @classmethod
    def load(cls, recipe: str, overrides: list[str], path: Path = RECIPES) -> "Settings":
        """The recipe's table with `key=value` overrides.

        Raises:
            ValueError: An unknown recipe or key, a value of the wrong kind or out of its range, or values that do not fit
                each other.
        """
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
        if recipe not in tables:
            raise ValueError(f"{path.name} has no recipe {recipe!r}; it has {', '.join(tables)}")
        settings = _updated(cls(), tables[recipe])
        settings = _updated(settings, dict(_split(text) for text in overrides))
        if settings.stage == "grpo":
            _check_grpo(settings)
        return settings


def _check_grpo(settings: Settings) -> None:
    """Say what TRL would say only after the data is made.

    Raises:
        ValueError: A rollout is not whole groups, or whole weights are asked of a model that trains adapters.
    """
    at_once = settings.batch_size * settings.accumulate * settings.minibatches * int(os.environ.get("WORLD_SIZE", "1"))
    if settings.group < 2 or at_once % settings.group:
        raise ValueError(
            f"setting group is {settings.group}; wanted 2 or more that divide the {at_once} completions of a rollout "
            "(batch_size * accumulate * minibatches * devices)"
        )
    if settings.lora_rank and (settings.rollout == "fast" or settings.validate):
        raise ValueError(
            f"setting lora_rank is {settings.lora_rank}; rollout=fast and validate want whole weights: give "
            "--set rollout=trl --set validate=0, or --set lora_rank=0"
        )


def _split(text: str) -> tuple[str, str]:
    key, separator, value = text.partition("=")
    if not separator:
        raise ValueError(f"--set {text!r}: wanted key=value")
    return key.strip(), value.strip()


def _updated(settings: Settings, values: dict[str, Any]) -> Settings:
    kinds = {entry.name: type(getattr(settings, entry.name)) for entry in fields(settings)}
    typed: dict[str, Any] = {}
    for key, value in values.items():
        if key not in kinds:
            raise ValueError(f"unknown setting {key!r}; known are {', '.join(kinds)}")
        typed[key] = _value(key, value, kinds[key])
    return replace(settings, **typed)


def _value(key: str, value: Any, kind: type) -> Any:
    try:
        made = _SWITCH[str(value).lower()] if kind is bool else kind(value)
    except (KeyError, ValueError):
        wanted = {bool: "true or false", int: "a whole number", float: "a number"}[kind]
        raise ValueError(f"setting {key} is {value!r}; wanted {wanted}") from None
    if wanted := _out_of_range(key, made):
        raise ValueError(f"setting {key} is {value!r}; wanted {wanted}")
    return made


def _out_of_range(key: str, value: Any) -> str:
    """What the value of a setting should be; empty when it is that."""
    if key in _WORDS:
        return "" if value in _WORDS[key] else " or ".join(_WORDS[key])
    if isinstance(value, (bool, str)):
        return ""
    if key in _COUNTS:
        return "" if value >= 1 else "1 or more"
    if key in _SHARES:
        return "" if 0 <= value <= 1 else "a share from 0 to 1"
    if key in _DECAYS:
        return "" if 0 <= value < 1 else "0 or more and below 1"
    if key in _POSITIVE:
        return "" if 0 < value < math.inf else "a finite number above 0"
    return "" if 0 <= value < math.inf else "a finite number, 0 or more"
