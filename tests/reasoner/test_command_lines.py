"""Wrong options of the training commands: one line, before anything is loaded or written."""

import json
import shutil
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("trl")
pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("ignore")]  # the libraries deprecate each other

from models.reasoner.architectures import WEIGHTS  # noqa: E402
from models.reasoner.data import main as making  # noqa: E402
from models.reasoner.merge import main as merging  # noqa: E402
from models.reasoner.schedule import main as planning  # noqa: E402
from models.reasoner.score import main as scoring  # noqa: E402
from models.reasoner.train import checkpoints  # noqa: E402
from models.reasoner.train import main as training  # noqa: E402


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nope"], "recipes.toml has no recipe 'nope'; it has student-sft"),
        (["qwen-sft", "--set", "model"], "--set 'model': wanted key=value"),
        (["qwen-sft", "--set", "modle=/x"], "unknown setting 'modle'; known are"),
        (["qwen-sft", "--set", "model=gone"], "gone has no config.json; wanted the directory of a model"),
        (["student-sft", "--set", "model=gone"], "gone has no config.json; wanted the directory of a model"),
        *(([f"qwen-{stage}"], "no model to train; give --set model=DIR") for stage in ("sft", "distill", "grpo")),
        (["student-distill"], "no teacher to learn from; give --set teacher=DIR"),
        (["student-distill", "--set", "teacher=teacher"], "teacher has no config.json"),
        (["student-sft", "--set", "rows=gone"], "gone is no directory; wanted rows saved by `corpus.solved`"),
        (["student-sft", "--set", "rows=."], ". has no state.json; wanted rows saved by `corpus.solved`"),
        (["student-sft", "--resume"], "run/trainer has no whole checkpoint; without --resume the run begins anew"),
        (["student-sft", "--set", "steps=abc"], "setting steps is 'abc'; wanted a whole number"),
        (["student-sft", "--set", "learning_rate=x"], "setting learning_rate is 'x'; wanted a number"),
        (["student-sft", "--set", "steps=-5"], "setting steps is '-5'; wanted 1 or more"),
        (["student-sft", "--set", "seed=-1"], "setting seed is '-1'; wanted a finite number, 0 or more"),
        (["student-sft", "--set", "limit_s=nan"], "setting limit_s is 'nan'; wanted a finite number, 0 or more"),
        (["student-sft", "--set", "learning_rate=0"], "setting learning_rate is '0'; wanted a finite number above 0"),
        (["student-sft", "--set", "bf16_on_cpu=maybe"], "setting bf16_on_cpu is 'maybe'; wanted true or false"),
        (["student-sft", "--set", "hard_share=7"], "setting hard_share is '7'; wanted a share from 0 to 1"),
        (["student-sft", "--set", "average=1"], "setting average is '1'; wanted 0 or more and below 1"),
        (["student-grpo", "--set", "group=1"], "setting group is 1; wanted 2 or more that divide the 4096 completions"),
        (["student-grpo", "--set", "group=3"], "setting group is 3; wanted 2 or more that divide the 4096 completions"),
        (
            ["student-grpo", "--set", "lora_rank=8"],
            "setting lora_rank is 8; rollout=fast and validate want whole weights",
        ),
        (["qwen-grpo", "--set", "validate=9"], "setting lora_rank is 32; rollout=fast and validate want whole weights"),
        (
            ["student-grpo", "--set", "kl_beta=0.1", "--set", "model=micro"],
            "setting kl_beta is 0.1; micro is a new model, which is not worth staying near: give --set model=DIR",
        ),
        (["student-sft", "--set", "rollout=slow"], "setting rollout is 'slow'; wanted fast or trl"),
    ],
)
def test_wrong_options_are_said_in_one_line_before_anything_is_written(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        training([*arguments, "--out", "run"])
    assert end.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "run").exists()


def test_a_teacher_of_another_vocabulary_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("config.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(WEIGHTS / name, tmp_path / name)
    (tmp_path / "model.safetensors").touch()
    tokenizer = json.loads((WEIGHTS / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    with pytest.raises(SystemExit):
        training(["student-distill", "--set", f"teacher={tmp_path}", "--set", "model=student", "--out", "run"])
    assert f"{tmp_path} has another vocabulary than student" in capsys.readouterr().err


def test_an_earlier_run_is_not_mixed_with_a_new_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for step in (20, 100):
        (tmp_path / "trainer" / f"checkpoint-{step}").mkdir(parents=True)
        (tmp_path / "trainer" / f"checkpoint-{step}" / "trainer_state.json").touch()
    (tmp_path / "trainer" / "checkpoint-120").mkdir()  # a crash while it was written
    (tmp_path / "steps.jsonl").write_text("kept\n")
    with pytest.raises(SystemExit) as end:
        training(["student-sft", "--out", str(tmp_path)])
    assert end.value.code == 2
    assert (
        "checkpoint-100 is of an earlier run; --resume goes on from it, or give another --out"
        in capsys.readouterr().err
    )
    assert (tmp_path / "steps.jsonl").read_text() == "kept\n"
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-20", "checkpoint-100"]


def test_a_checkpoint_without_the_best_weights_is_not_gone_on_from(tmp_path: Path, capsys) -> None:
    (tmp_path / "trainer" / "checkpoint-20").mkdir(parents=True)
    (tmp_path / "trainer" / "checkpoint-20" / "trainer_state.json").touch()
    with pytest.raises(SystemExit) as end:
        training(["student-grpo", "--set", "validate=8", "--set", "model=micro", "--out", str(tmp_path), "--resume"])
    assert end.value.code == 2
    assert "checkpoint-20 has no validated.safetensors, the best weights so far" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["merge", "train"])
@pytest.mark.parametrize("out", ["file", "file/below"])
def test_a_file_is_no_place_to_write_a_model(command: str, out: str, tmp_path, capsys) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as end:
        (merging if command == "merge" else training)([str(WEIGHTS), "--out", str(tmp_path / out)])
    assert end.value.code == 2
    assert f"{tmp_path / 'file'} is a file; wanted a directory" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--out", "gone/scores.json"], "gone/scores.json cannot be written; wanted a file in a directory that exists"),
        (["--out", "."], ". cannot be written; wanted a file"),
        (["--validate", "-5"], "'-5'; wanted a whole number, 0 or more"),
    ],
)
def test_scoring_says_what_is_wrong_before_it_asks_anything(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch
) -> None:
    monkeypatch.setattr("models.reasoner.score.load_model", None)
    with pytest.raises(SystemExit) as end:
        scoring([str(WEIGHTS), *options])
    assert end.value.code == 2
    assert message in capsys.readouterr().err


def test_test_sets_are_written_into_a_directory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        making(["test", "--out", str(tmp_path / "gone")])
    assert f"--out {tmp_path / 'gone'}: is no directory; make it first" in capsys.readouterr().err


@pytest.mark.parametrize("missing", ["weights", "tokenizer"])
def test_a_config_alone_is_no_model(missing: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text("{}")
    if missing == "tokenizer":
        (tmp_path / "model.safetensors").touch()
    for command in (
        lambda: scoring([str(tmp_path)]),
        lambda: training(["qwen-sft", "--set", f"model={tmp_path}", "--out", str(tmp_path / "run")]),
        lambda: planning(["grpo", "--source", str(tmp_path), "--work", str(tmp_path / "run")]),
    ):
        with pytest.raises(SystemExit) as end:
            command()
        assert end.value.code == 2
        assert f"{tmp_path} has no {missing} (" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["grpo", "--set", "bogus=1"], "unknown setting 'bogus'; known are"),
        (["short", "--recipe", "bogus"], "recipes.toml has no recipe 'bogus'"),
        (["short", "--recipe", "student-sft"], "--recipe student-sft: wanted one of the stage grpo"),
        (["teach", "--set", "steps=1"], "--set is for grpo and short; teach has its own settings"),
        (["grpo"], "grpo wants --source DIR"),
    ],
)
def test_a_schedule_begins_with_what_it_can_do(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        planning([*arguments, "--work", str(tmp_path / "run")])
    assert end.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("content", "message"), [(None, "is no file; wanted the steps"), ("7\n{\n", "has no step to")])
def test_curves_of_no_run(content: str | None, message: str, tmp_path: Path, capsys) -> None:
    pytest.importorskip("matplotlib")
    from models.reasoner.curves import main as drawing

    if content is not None:
        (tmp_path / "steps.jsonl").write_text(content)
    with pytest.raises(SystemExit) as end:
        drawing([str(tmp_path / "steps.jsonl")])
    assert end.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
