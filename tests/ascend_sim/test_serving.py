"""The HTTP server over the ACL session, unchanged, on the simulated device."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from qcompile.ascend.sim.acl_module import simulated_acl
from qcompile.runtime import Engine, SamplingParams
from tests.serve.conftest import NAME, running

PROMPTS = ["The quick brown", "def add(a, b):", "12 + 30 =", "Hello", "Once more", "for i in range(10):"]


def test_answers_are_those_of_the_engine(compiled_om: Path) -> None:
    with simulated_acl() as machine:
        with Engine(compiled_om, threads=1, max_batch_size=1, reuse_prefixes=False) as alone:
            want = [one.text for one in alone.generate(PROMPTS, SamplingParams(max_new_tokens=10))]
        with running(compiled_om, batch=4) as served:

            def ask(prompt: str) -> str:
                return (
                    served.openai.completions.create(model=NAME, prompt=prompt, max_tokens=10, temperature=0)
                    .choices[0]
                    .text
                )

            with ThreadPoolExecutor(6) as pool:
                assert list(pool.map(ask, PROMPTS)) == want
            sampled = {
                "model": NAME,
                "prompt": "Hello",
                "max_tokens": 4,
                "temperature": 0.8,
                "top_k": 5,
                "seed": 1,
                "n": 2,
            }
            assert served.http.post("/v1/completions", json=sampled).status_code == 200
            refused = served.http.post("/v1/completions", json={**sampled, "logprobs": 1})
            assert refused.status_code == 400
            assert "--keep-logits" in refused.json()["error"]["message"]
            refused = served.http.post("/v1/completions", json={**sampled, "top_k": 100})
            assert refused.status_code == 400
            assert refused.json()["error"]["param"] == "top_k"
            assert refused.json()["error"]["message"].startswith("top_k 100: the graphs return their 64 most likely")
            assert served.http.post("/v1/completions", json={**sampled, "top_k": 64}).status_code == 200
    assert machine.reports == []
    assert list(machine.device.live()) == []
