"""`qcompile atc --simulate`, then the runtime's own ACL code: same tokens as on ONNX Runtime, nothing left, nothing misused."""

import json
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from qcompile.ascend.sim.acl_module import simulated_acl
from qcompile.ascend.sim.machine import Machine
from qcompile.cli.main import cli
from qcompile.runtime import Engine, SamplingParams
from qcompile.runtime.errors import RequestError, SessionError
from tests.ascend_sim.simulated import compile_simulated, copied
from tests.runtime.prompts import PROMPTS

GREEDY = SamplingParams(max_new_tokens=20, ignore_eos=True)
PROMPT_IDS = [[5, 80, 31], list(range(40, 61)), [7] * 17, [300], [9, 8], list(range(100, 140))]
Pair = Callable[[str], tuple[Path, Path]]


def tokens_of(
    directory: Path, prompts: list[list[int]], params: SamplingParams = GREEDY, slots: int = 4
) -> list[list[int]]:
    with Engine(directory, threads=1, max_batch_size=slots) as engine:
        return [completion.token_ids for completion in engine.generate(prompts, params)]


def assert_clean(machine: Machine) -> None:
    assert machine.reports == []
    assert list(machine.device.live()) == []
    assert machine.host.pinned() == []


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3"])
@pytest.mark.parametrize("cann", ["8.1", "9.1"])
def test_same_tokens_as_the_ort_session_with_slots_of_different_lengths(
    compiled_pair: Pair, model_type: str, cann: str
) -> None:
    fused, compiled = compiled_pair(model_type)
    wanted = tokens_of(fused, PROMPT_IDS)
    with simulated_acl(cann=cann) as machine:
        got = tokens_of(compiled, PROMPT_IDS)
    assert got == wanted
    assert_clean(machine)


def test_a_greedy_decode_step_moves_less_than_a_kilobyte(compiled_om: Path) -> None:
    """4 slots: one copy to the device, one back; the cache is appended by 2 rows of heads for each slot."""
    with simulated_acl(cann="9.1") as machine, Engine(compiled_om, max_batch_size=4) as engine:
        requests = [engine.add_request(ids, GREEDY) for ids in PROMPT_IDS[:4]]
        while len(engine._scheduler.decoding) < 4:
            engine.step()
        before = machine.traffic.copy()
        engine.step()
        moved = machine.traffic - before
        assert len(requests) == 4
        assert moved["executions"] == 1
        assert moved["host_to_device_copies"] == moved["device_to_host_copies"] == 1
        assert moved["host_to_device_bytes"] + moved["device_to_host_bytes"] <= 1024
        assert moved["device_to_device_copies"] == 4 * 2  # slots x kv heads, all layers at once
        assert moved["device_to_device_bytes"] == 4 * 2 * 2 * 2 * 16 * 2  # slots, heads, k and v, layers, d, fp16
    assert_clean(machine)


def test_sampling_draws_from_the_candidates(compiled_pair: Pair) -> None:
    """top_k within the graph's 64 candidates is as exact as whole rows."""
    fused, compiled = compiled_pair("qwen2")
    params = SamplingParams(max_new_tokens=12, temperature=0.8, top_k=5, seed=3, ignore_eos=True)
    with simulated_acl() as machine:
        got = tokens_of(compiled, PROMPT_IDS[:3], params)
    assert got == tokens_of(fused, PROMPT_IDS[:3], params)
    assert_clean(machine)


def test_a_top_k_beyond_the_candidates_is_refused_and_advice_is_not(compiled_om: Path) -> None:
    """Asked for by name it is an error before anything runs; what the model's makers advise goes as far as it can."""
    with simulated_acl() as machine, Engine(compiled_om) as engine:
        assert engine.num_candidates == 64
        for params in (SamplingParams(temperature=1.0, top_k=65), engine.sampling_params(top_k=65)):
            with pytest.raises(
                RequestError, match=r"top_k 65: the graphs return their 64 .* with a larger --top-k, or with --keep"
            ):
                engine.generate([[5, 6]], params)
        engine.generate([[5, 6]], SamplingParams(top_k=100, max_new_tokens=1))  # greedy
        engine.generation_config["top_k"] = 100
        advised = engine.sampling_params(max_new_tokens=2, seed=1)
        assert advised.top_k == 64
        assert engine.generate([[5, 6]], advised)[0].error is None
    assert_clean(machine)


def test_logprobs_need_the_scores_of_all_tokens(compiled_om: Path) -> None:
    with (
        simulated_acl(),
        Engine(compiled_om) as engine,
        pytest.raises(SessionError, match="returns its best 64: compile with --keep-logits"),
    ):
        engine.generate([[5, 6]], SamplingParams(max_new_tokens=2, logprobs=1))


def test_a_conversation_reuses_the_cache_and_slots_move(compiled_pair: Pair) -> None:
    fused, compiled = compiled_pair("qwen2")
    long = PROMPT_IDS[5]
    mixed = [SamplingParams(max_new_tokens=n, ignore_eos=True) for n in (2, 9, 4, 12, 3, 5)]
    results = []
    for directory in (fused, compiled):
        with simulated_acl() as machine, Engine(directory, threads=1, max_batch_size=3) as engine:
            first = engine.generate(PROMPT_IDS, mixed)
            second = engine.generate([[*long, 1, 2, 3], [*long, 4]], GREEDY)
            results.append([completion.token_ids for completion in (*first, *second)])
            assert max(completion.num_reused_tokens for completion in second) >= len(long) - 1
        assert_clean(machine)
    assert results[0] == results[1]


def test_another_thread_may_step(compiled_om: Path) -> None:
    with simulated_acl() as machine, Engine(compiled_om) as engine:
        found: list[list[int]] = []
        thread = threading.Thread(target=lambda: found.append(engine.generate([PROMPT_IDS[0]], GREEDY)[0].token_ids))
        thread.start()
        thread.join()
        assert found == [engine.generate([PROMPT_IDS[0]], GREEDY)[0].token_ids]
    assert_clean(machine)


def test_two_engines_in_one_process(compiled_om: Path) -> None:
    with simulated_acl() as machine:
        with Engine(compiled_om) as one, Engine(compiled_om) as two:
            assert one.generate([[5]], GREEDY)[0].token_ids == two.generate([[5]], GREEDY)[0].token_ids
        with Engine(compiled_om) as third:
            assert len(third.generate([[5]], GREEDY)[0].token_ids) == 20
    assert_clean(machine)


def test_the_context_ends_with_the_largest_bucket(compiled_om: Path) -> None:
    with simulated_acl() as machine, Engine(compiled_om) as engine:
        assert engine.max_model_len == 128
        completion = engine.generate([[5] * 120], SamplingParams(max_new_tokens=50, ignore_eos=True))[0]
        assert (len(completion.token_ids), completion.finish_reason) == (8, "length")
        with pytest.raises(RequestError, match="129 is beyond the 128 tokens the graphs were compiled for"):
            Engine(compiled_om, max_model_len=129)
    assert_clean(machine)


def test_a_device_without_memory(compiled_om: Path) -> None:
    with simulated_acl(memory_bytes=100_000) as machine, pytest.raises(SessionError, match="no device memory"):
        Engine(compiled_om)
    assert_clean(machine)
    with simulated_acl(memory_bytes=1_200_000) as machine, Engine(compiled_om, max_batch_size=64) as engine:
        completions = engine.generate([[5]] * 64, GREEDY, raise_errors=False)
        errors = [completion.error for completion in completions if completion.error]
        assert "no memory for a KV cache of" in str(errors[0])
        assert "lower max_batch_size" in str(errors[0])
        assert engine.generate([[5]], GREEDY)[0].finish_reason == "length"
    assert_clean(machine)


def test_an_om_for_another_chip_is_refused_with_both_names(compiled_om: Path) -> None:
    with simulated_acl("Ascend310P3") as machine, pytest.raises(SessionError, match=r"Ascend910B4.*Ascend310P3"):
        Engine(compiled_om)
    assert_clean(machine)


def test_nothing_is_simulated_silently(compiled_pair: Pair, tmp_path: Path) -> None:
    _, compiled = compiled_pair("qwen2")
    with pytest.raises(SessionError, match=r"was compiled with `qcompile atc --simulate`, which no device can run"):
        Engine(compiled)
    real = copied(compiled, tmp_path / "real")
    manifest = json.loads((real / "qcompile.json").read_text())
    del manifest["build"]["simulated"]
    (real / "qcompile.json").write_text(json.dumps(manifest))
    with simulated_acl(), pytest.raises(SessionError, match="was compiled for a device"):
        Engine(real)
    with pytest.raises(SessionError, match=r"the Python module `acl` cannot be imported"):
        Engine(real)


@pytest.mark.parametrize(
    ("name", "words"),
    [("decode_b4_t128.om", "missing; copy the whole directory"), ("weight", "missing; copy the whole directory")],
)
def test_missing_files_are_one_line(compiled_om: Path, tmp_path: Path, name: str, words: str) -> None:
    broken = copied(compiled_om, tmp_path / "broken")
    victim = broken / name if name.endswith(".om") else next((broken / name).iterdir())
    victim.unlink()
    result = CliRunner().invoke(cli, ["generate", str(broken), "hello"])
    assert result.exit_code == 1
    assert words in result.stderr
    assert len([line for line in result.stderr.splitlines() if line.startswith("Error")]) == 1


def test_graphs_that_are_not_compiled_say_so(compiled_pair: Pair, tmp_path: Path) -> None:
    _, compiled = compiled_pair("qwen2")
    lowered = copied(compiled, tmp_path / "lowered")
    manifest = json.loads((lowered / "qcompile.json").read_text())
    for graph in manifest["graphs"]:
        graph["file"], graph["data"] = graph.pop("onnx"), []
    manifest["build"] = {}
    (lowered / "qcompile.json").write_text(json.dumps(manifest))
    with pytest.raises(SessionError, match=r"decode_b4_t128.onnx is not compiled for the device; run `qcompile atc"):
        Engine(lowered)


# the command line


def test_generate_says_that_it_is_simulated_and_shows_no_times(compiled_om: Path) -> None:
    arguments = ["generate", str(compiled_om), PROMPTS[0], "--raw", "--max-new-tokens", "4"]
    result = CliRunner().invoke(cli, arguments)
    assert result.exit_code == 0, result.stderr
    assert "note: simulated Ascend910B4 with CANN 8.1: it proves function, not speed" in result.stderr
    assert "tokens/s" not in result.stderr
    assert " ms" not in result.stderr
    record = json.loads(CliRunner().invoke(cli, [*arguments, "--json"]).stdout)
    assert record["simulated"]["soc_version"] == "Ascend910B4"
    assert record["simulated"]["leaked_device_bytes"] == 0
    assert record["simulated"]["misuse"] == []
    assert record["stats"]["tokens_per_s"] is record["completions"][0]["ttft_s"] is None


def test_chat(compiled_om: Path) -> None:
    result = CliRunner().invoke(cli, ["chat", str(compiled_om), "--max-new-tokens", "3", "--json"], input="hi\n")
    assert result.exit_code == 0, result.stderr
    record = json.loads(result.stdout.splitlines()[-1])
    assert record["simulated"] is True
    assert record["tokens_per_s"] is None


def test_eval(compiled_om: Path, tmp_path: Path) -> None:
    cases = tmp_path / "cases.jsonl"
    cases.write_text(json.dumps({"id": "1", "type": "math", "prompt": "1+1", "answer": "2"}) + "\n")
    arguments = [
        "eval",
        str(compiled_om),
        str(cases),
        "-o",
        str(tmp_path / "out.json"),
        "--raw",
        "--max-new-tokens",
        "4",
    ]
    result = CliRunner().invoke(cli, [*arguments, "--json"])
    assert result.exit_code == 0, result.stderr
    record = json.loads(result.stdout)
    assert record["simulated"] is True
    assert "answered by a simulated device" in record["notes"][0]
    assert "tokens_per_s" not in record["speed"]


def test_bench_times_no_simulation(compiled_om: Path) -> None:
    result = CliRunner().invoke(cli, ["bench", str(compiled_om)])
    assert result.exit_code == 1
    assert "only ort and portable models run here" in result.stderr


def test_inspect_shows_what_it_is(compiled_om: Path) -> None:
    result = CliRunner().invoke(cli, ["inspect", str(compiled_om / "decode_b4_t128.om")])
    assert result.exit_code == 0, result.stderr
    assert "simulated: no device can run this file" in result.output
    assert "past_key_values.1.value" in result.output


def test_verify_compares_what_the_device_computes(tmp_path: Path) -> None:
    """With --keep-logits the whole rows come back, through the device's own memory."""
    fused, compiled = compile_simulated(tmp_path, keep_logits=True)
    result = CliRunner().invoke(cli, ["verify", str(fused), str(compiled), "--tokens", "8", "--json"])
    assert result.exit_code == 0, result.output
    assert "note: simulated Ascend910B4" in result.stderr
    assert json.loads(result.stdout)["same_tokens"] >= 23
    result = CliRunner().invoke(cli, ["quality", str(fused), str(compiled)])
    assert result.exit_code == 1
    assert "give the directory they were lowered from" in result.stderr


def test_verify_without_logits_says_what_to_do(compiled_pair: Pair) -> None:
    result = CliRunner().invoke(cli, ["verify", *map(str, compiled_pair("qwen2"))])
    assert result.exit_code == 1
    assert "lower the model with --keep-logits" in result.stderr
