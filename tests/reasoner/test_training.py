"""Every training stage, tiny, on a two-layer Qwen2 and on the micro Qwen3: steps, logs, curves, LoRA, resuming."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("trl")
pytest.importorskip("peft")
pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("ignore")]  # the libraries deprecate each other

from models.reasoner import corpus, supervised  # noqa: E402
from models.reasoner.architectures import load_model, load_tokenizer, new_model, save_model  # noqa: E402
from models.reasoner.callbacks import FiniteGuard, StepLog  # noqa: E402
from models.reasoner.merge import main as merging  # noqa: E402
from models.reasoner.merge import merge  # noqa: E402
from models.reasoner.problem import normalised_prompt, split_of  # noqa: E402
from models.reasoner.reinforced import PackedGRPOTrainer, pack_left  # noqa: E402
from models.reasoner.score import main as scoring  # noqa: E402
from models.reasoner.settings import Settings  # noqa: E402
from models.reasoner.train import sound_attention, train  # noqa: E402
from models.reasoner.trainers import grpo_trainer  # noqa: E402
from models.reasoner.validation import KeepBest, Validation  # noqa: E402

TINY = Settings(batch_size=4, steps=3, warmup=1, learning_rate=1e-3, max_new_tokens=12, group=4, seed=5)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def qwen2(tmp_path_factory) -> Path:
    """A directory as a user's Qwen2 would be: two layers, random weights, the bundled tokenizer."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    tokenizer = load_tokenizer("student")
    config = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=512, tie_word_embeddings=True, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    directory = tmp_path_factory.mktemp("qwen2")
    Qwen2ForCausalLM(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def steps_of(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "steps.jsonl").read_text().splitlines()]


def state_of(directory: Path) -> dict[str, "torch.Tensor"]:
    return dict(load_model(directory).state_dict())


def test_sft_logs_every_step_and_learns(qwen2, tmp_path) -> None:
    model = train(replace(TINY, model=str(qwen2), steps=25, learning_rate=1e-2, num_rows=40), tmp_path)
    lines = [line for line in steps_of(tmp_path) if "cross_entropy" in line]
    assert [line["step"] for line in lines] == list(range(1, 26))
    assert lines[-1]["loss"] < lines[0]["loss"] - 1
    assert {path.name for path in model.iterdir()} >= {"model.safetensors", "config.json", "tokenizer.json"}


def test_sft_with_lora_resumes_where_it_stopped(qwen2, tmp_path) -> None:
    settings = replace(TINY, model=str(qwen2), steps=4, lora_rank=2, save_every=2)
    straight = state_of(train(settings, tmp_path))
    shutil.rmtree(tmp_path / "trainer" / "checkpoint-4")
    resumed = state_of(train(settings, tmp_path, resume=True))
    assert [line["step"] for line in steps_of(tmp_path) if "cross_entropy" in line] == [1, 2, 3, 4]
    start = state_of(qwen2)
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)
    changed = {name for name in straight if not torch.equal(straight[name], start[name].bfloat16().float())}
    assert changed
    assert all("_proj.weight" in name for name in changed)


def test_a_run_stops_at_its_time_limit(tmp_path) -> None:
    log, control = StepLog(tmp_path / "steps.jsonl", 3600.0), SimpleNamespace(should_training_stop=False)
    assert not log.on_step_end(None, SimpleNamespace(global_step=1), control).should_training_stop
    log = StepLog(tmp_path / "steps.jsonl", 1e-9)
    assert log.on_step_end(None, SimpleNamespace(global_step=1), control).should_training_stop


def test_a_teacher_may_have_a_longer_table_of_logits(qwen2, tmp_path) -> None:
    """Qwen2.5 of 7 B and more has 152,064 of them, the smaller ones 151,936, for the same tokenizer."""
    shutil.copytree(qwen2, tmp_path / "teacher")
    wide = load_model(qwen2)
    wide.resize_token_embeddings(wide.config.vocab_size + 64)
    wide.save_pretrained(tmp_path / "teacher")
    settings = replace(TINY, stage="distill", model=str(qwen2), num_rows=12, kd_alpha=1.0)
    ends = [
        state_of(train(replace(settings, teacher=str(teacher)), tmp_path / teacher.name))
        for teacher in (qwen2, tmp_path / "teacher")
    ]
    assert all(torch.allclose(ends[0][name], ends[1][name], atol=1e-2) for name in ends[0])


def test_distillation_reports_the_divergence_and_lowers_it(qwen2, tmp_path) -> None:
    teacher = train(replace(TINY, model=str(qwen2), steps=10, learning_rate=1e-2, num_rows=40), tmp_path / "teacher")
    settings = replace(
        TINY,
        stage="distill",
        model=str(qwen2),
        teacher=str(teacher),
        steps=12,
        learning_rate=1e-2,
        answers=4,
        num_rows=40,
    )
    train(settings, tmp_path / "student")
    lines = [line for line in steps_of(tmp_path / "student") if "kl" in line]
    assert len(lines) == 12
    assert lines[-1]["kl"] < lines[0]["kl"]
    mixed = settings.kd_alpha * lines[0]["kl"] + (1 - settings.kd_alpha) * lines[0]["cross_entropy"]
    assert lines[0]["loss"] == pytest.approx(mixed, rel=1e-4)


@pytest.mark.parametrize(("rollout", "lora_rank"), [("fast", 0), ("trl", 2)])
def test_grpo_reports_reward_format_accuracy_and_length(rollout, lora_rank, qwen2, tmp_path) -> None:
    settings = replace(
        TINY, stage="grpo", model=str(qwen2), steps=2, accumulate=2, rollout=rollout, lora_rank=lora_rank, probe=2
    )
    assert train(settings, tmp_path).is_dir()
    lines = [line for line in steps_of(tmp_path) if "reward" in line]
    assert [line["step"] for line in lines] == [1, 2]
    for key in ("rewards/format_reward/mean", "rewards/accuracy_reward/mean", "completions/mean_length"):
        assert all(math.isfinite(line[key]) for line in lines)
    found = json.loads((tmp_path / "probe.json").read_text())
    assert found["problems"] == 2
    assert 0 <= found["pass_1"] <= found["pass_k"] <= 1


def test_grpo_takes_several_steps_from_one_rollout_and_validates(tmp_path) -> None:
    settings = replace(TINY, stage="grpo", model="micro", steps=4, minibatches=2, validate=4, validate_every=3600)
    train(settings, tmp_path)
    lines = [line for line in steps_of(tmp_path) if "loss" in line]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert [line["step"] for line in lines if "rollout_time" in line] == [1, 3]
    measured = [json.loads(line) for line in (tmp_path / "validation.jsonl").read_text().splitlines()]
    assert [(line["step"], line["share"]) for line in measured] == [(0, 1), (4, 1), (4, 0.75), (4, 0.5), (4, 0.25)]
    assert sum(asked for _, asked in measured[0]["families"].values()) == 4
    assert (tmp_path / "end" / "model.safetensors").is_file()  # whatever it is worth


def test_validation_asks_hard_problems_of_its_own_split(tmp_path) -> None:
    tokenizer = load_tokenizer("micro")
    validation = Validation(replace(TINY, validate=6), tokenizer, "cpu", torch.float32)
    assert len(validation._problems) == 6
    for problem in validation._problems:
        assert problem.is_hard
        assert split_of("prompt " + normalised_prompt(problem.prompt, problem.choices)) == "valid"


@pytest.mark.parametrize(("best", "value"), [(0.0, 0.0), (1.0, 1.0), (4.0, 4.0), (3.1, 3.0)])
def test_the_best_weights_are_kept(best: float, value: float, tmp_path) -> None:
    """A weight goes from 0 over 1 to 4; the closer to `best`, the better."""
    model = torch.nn.Linear(1, 1, bias=False)

    def be(weight: float) -> None:
        torch.nn.init.constant_(model.weight, weight)

    measure = SimpleNamespace(measure=lambda model: {"accuracy": 1 - abs(model.weight.item() - best) / 10})
    keep = KeepBest(measure, tmp_path / "validation.jsonl", 0.0)
    be(0.0)
    keep.on_train_begin(None, SimpleNamespace(global_step=0), None, model=model)
    be(1.0)
    keep.on_step_end(None, SimpleNamespace(global_step=1), None, model=model)
    be(4.0)
    keep.on_step_end(None, SimpleNamespace(global_step=2), None, model=model)
    keep.on_train_end(None, SimpleNamespace(global_step=2), None, model=model)
    assert model.weight.item() == value


def test_a_running_mean_is_what_is_validated_and_kept(tmp_path) -> None:
    model = torch.nn.Linear(1, 1, bias=False)
    seen: list[float] = []

    def measure(model) -> dict[str, float]:
        seen.append(model.weight.item())
        return {"accuracy": len(seen) / 10}

    keep = KeepBest(SimpleNamespace(measure=measure), tmp_path / "validation.jsonl", 0.0, average=0.5)
    torch.nn.init.constant_(model.weight, 0.0)
    keep.on_train_begin(None, SimpleNamespace(global_step=0), None, model=model)
    torch.nn.init.constant_(model.weight, 4.0)
    keep.on_step_end(None, SimpleNamespace(global_step=1), None, model=model)
    assert model.weight.item() == 4.0  # training goes on from where it was
    keep.on_train_end(None, SimpleNamespace(global_step=1), None, model=model)
    assert seen == [0.0, 2.0, 2.0, 1.5, 1.0, 0.5]
    assert model.weight.item() == 0.5  # the last measured was the best


def test_the_mean_of_two_models(tmp_path) -> None:
    models = [new_model("micro", seed=seed) for seed in (1, 2)]
    for index, model in enumerate(models):
        save_model(model, "micro", tmp_path / str(index))
    load = lambda name: load_model(tmp_path / name).state_dict()  # noqa: E731
    merge([tmp_path / "0", tmp_path / "1"], tmp_path / "mean")
    first, second, mean = load("0"), load("1"), load("mean")
    for name, tensor in mean.items():
        assert torch.equal(tensor, ((first[name] + second[name]) / 2).bfloat16().float())
    save_model(new_model("student", seed=1), "student", tmp_path / "other")
    with pytest.raises(ValueError, match="other: weights of other names or shapes"):
        merge([tmp_path / "0", tmp_path / "other"], tmp_path / "mean")


def test_what_is_no_model_is_said_in_one_line(tmp_path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in (merging, scoring):
        with pytest.raises(SystemExit) as end:
            command([str(tmp_path / "gone"), *(["--out", str(tmp_path / "mean")] if command is merging else [])])
        assert end.value.code == 2
        assert "gone has no config.json; wanted the directory of a model" in capsys.readouterr().err


def test_curves_are_drawn(tmp_path) -> None:
    pytest.importorskip("matplotlib")
    from models.reasoner.curves import draw

    steps = tmp_path / "steps.jsonl"
    steps.write_text('{"step": 1, "loss": 2.0, "reward": 0.1}\n{"step": 2, "loss": 1.0, "reward": 0.2}\n{"torn')
    picture = draw(steps, tmp_path)
    assert picture.read_bytes().startswith(b"\x89PNG")
    steps.write_text("")
    assert draw(steps, tmp_path) is None


def grpo(tmp_path, **changes):
    settings = replace(TINY, stage="grpo", model="micro", **changes)
    rows = corpus.asked(4, seed=1, hard_share=0.0, tokenizer_from="micro")
    return grpo_trainer(settings, new_model("micro", seed=1), load_tokenizer("micro"), rows, tmp_path)


def ragged(rows: list[tuple[int, int]], prompt: int, completion: int):
    """Random ids and a mask: for each row the padding before the prompt and after the completion."""
    torch.manual_seed(0)
    ids = torch.randint(100, 4000, (len(rows), prompt + completion))
    mask = torch.ones_like(ids)
    for row, (before, after) in enumerate(rows):
        mask[row, :before] = 0
        mask[row, prompt + completion - after :] = 0
    return ids, mask


def test_moving_rows_to_the_left_gives_the_log_probabilities_that_trl_gives(tmp_path) -> None:
    trainer = grpo(tmp_path)
    ids, mask = ragged([(0, 0), (5, 3), (30, 20), (36, 0), (10, 10), (1, 19)], prompt=37, completion=21)
    call = (trainer, trainer.model, ids, mask, 21, 4, True)
    packed = PackedGRPOTrainer._get_per_token_logps_and_entropies(*call)
    padded = PackedGRPOTrainer.__mro__[1]._get_per_token_logps_and_entropies(*call)
    is_token = mask[:, -21:] != 0
    for ours, theirs in zip(packed[:2], padded[:2], strict=True):
        torch.testing.assert_close(ours[is_token], theirs[is_token], atol=1e-5, rtol=1e-5)
        assert not ours[~is_token].any()


def test_pack_left_by_hand() -> None:
    ids = torch.tensor([[0, 0, 11, 12, 13, 0], [21, 22, 23, 24, 25, 26]])
    mask = torch.tensor([[0, 0, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1]])
    rows, labels, where = pack_left(ids, mask, 3)
    assert rows[0, :3].tolist() == [11, 12, 13]
    assert labels[0].tolist()[:4] == [-100, 12, 13, -100]
    assert labels[1].tolist() == [-100, -100, -100, 24, 25, 26]
    assert where[0, :2].tolist() == [0, 1]
    assert where[1].tolist() == [2, 3, 4]


def test_leaving_out_rows_without_advantage_changes_neither_loss_nor_gradient(tmp_path) -> None:
    trainer = grpo(tmp_path)
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    ids, mask = ragged([(0, 0), (3, 2), (1, 4), (2, 1)], prompt=8, completion=6)
    inputs = {
        "prompt_ids": ids[:, :8], "prompt_mask": mask[:, :8], "completion_ids": ids[:, 8:],
        "completion_mask": mask[:, 8:], "advantages": torch.tensor([0.0, 1.5, 0.0, -0.5]),
        "num_items_in_batch": mask[:, 8:].sum(),
    }  # fmt: skip
    results = []
    for kind in (PackedGRPOTrainer, PackedGRPOTrainer.__mro__[1]):
        trainer.model.zero_grad()
        loss = kind._compute_loss(trainer, trainer.model, inputs)
        loss.backward()
        results.append((loss.detach(), trainer.model.model.embed_tokens.weight.grad.clone()))
    torch.testing.assert_close(results[0][0], results[1][0])
    torch.testing.assert_close(results[0][1], results[1][1], atol=1e-7, rtol=1e-4)
    assert results[0][1].abs().sum() > 0


def test_a_group_without_difference_gives_a_finite_zero(tmp_path) -> None:
    trainer = grpo(tmp_path)
    trainer.current_gradient_accumulation_steps = 1
    ids, mask = ragged([(0, 5), (3, 5)], prompt=8, completion=6)  # one token each: the end, at once
    inputs = {
        "prompt_ids": ids[:, :8], "prompt_mask": mask[:, :8], "completion_ids": ids[:, 8:],
        "completion_mask": mask[:, 8:], "advantages": torch.zeros(2), "num_items_in_batch": mask[:, 8:].sum(),
    }  # fmt: skip
    loss = trainer._compute_loss(trainer.model, inputs)
    loss.backward()
    assert loss.item() == 0
    assert all(p.grad is None or not p.grad.any() for p in trainer.model.parameters())


def test_attention_is_kept_off_cudnn() -> None:
    torch.backends.cuda.enable_cudnn_sdp(True)
    sound_attention()
    assert not torch.backends.cuda.cudnn_sdp_enabled()


def test_an_update_from_a_nan_gradient_is_dropped_and_three_in_a_row_end_the_run() -> None:
    model = torch.nn.Linear(2, 2)
    guard, state = FiniteGuard(), SimpleNamespace(global_step=0)

    def update(value: float) -> None:
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, value)
        guard.on_pre_optimizer_step(None, state, None, model=model)

    update(1.0)
    assert model.weight.grad.eq(1).all()
    update(math.nan)
    assert model.weight.grad.eq(0).all()
    update(1.0)
    update(math.inf)
    update(math.nan)
    logs: dict[str, float] = {}
    guard.on_log(None, state, None, logs=logs)
    assert logs == {"dropped_updates": 3}
    with pytest.raises(FloatingPointError, match="3 times in a row"):
        update(math.nan)


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path) -> None:
    log, state = StepLog(tmp_path / "steps.jsonl", 0.0), SimpleNamespace(global_step=7)
    log.keep(loss=torch.tensor(math.nan))
    log.on_step_end(None, state, SimpleNamespace())
    with pytest.raises(FloatingPointError, match="step 7: the loss is nan"):
        log.on_log(None, state, None, logs={})


def test_collate_points_at_the_tokens_to_learn() -> None:
    rows = [{"input_ids": [1, 2, 3, 4], "labels": [-100, -100, 3, 4]}, {"input_ids": [5, 6], "labels": [-100, 6]}]
    batch = supervised.collate(rows, 0)
    width = batch["input_ids"].shape[1]
    assert width == 32
    assert batch["kept"].tolist() == [1, 2, width]
    assert batch["targets"].tolist() == [3, 4, 6]


@pytest.mark.parametrize("wrong", ["steps", "stepps=3", "steps=many"])
def test_a_wrong_setting_is_refused(wrong: str) -> None:
    with pytest.raises(ValueError, match=r"step|many"):
        Settings.load("qwen-sft", [wrong])
    with pytest.raises(ValueError, match="no recipe"):
        Settings.load("qwen", [])


def test_grpo_learns_from_what_it_is_shown(tmp_path) -> None:
    settings = replace(TINY, stage="grpo", model="micro", steps=2, demonstrate=0.25, max_new_tokens=120)
    train(settings, tmp_path)
    lines = [line for line in steps_of(tmp_path) if "reward" in line]
    for line in lines:  # a new model solves nothing: one of every group is the solution
        assert line["demonstrated"] == 1.0
        assert line["rewards/accuracy_reward/mean"] == 1 / settings.group
        assert line["loss"] != 0


def test_a_cpu_computes_in_bfloat16_if_asked(tmp_path) -> None:
    for asked in (False, True):
        trainer = grpo(tmp_path, bf16_on_cpu=asked)
        ids = torch.tensor([trainer.processing_class("Hello")["input_ids"]])
        with trainer.accelerator.autocast():
            dtype = trainer.accelerator.unwrap_model(trainer.model)(ids).logits.dtype
        assert (dtype == torch.bfloat16) == asked
