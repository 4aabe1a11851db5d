"""patch: the same hidden states and greedy tokens as the model before it; on the CPU, so through the references."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

from qcompile.errors import KernelError
from qcompile.export.torch_tracer import cache_argument
from qcompile.kernels import patch, unpatch
from qcompile.kernels.attended import attended
from qcompile.kernels.decode_graph import DecodeGraph
from qcompile.kernels.patched_decoder import PatchedDecoder
from tests.tiny_checkpoints import write_tiny_checkpoint

pytestmark = pytest.mark.torch
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("patched")
    return {kind: write_tiny_checkpoint(root / kind, kind, tokenizer=False) for kind in ("qwen2", "qwen3")}


@pytest.fixture(params=["qwen2", "qwen3"])
def load(request: pytest.FixtureRequest, checkpoints: dict[str, Path]) -> Callable[..., Any]:
    def loader(dtype: torch.dtype = torch.float32) -> Any:
        model = AutoModelForCausalLM.from_pretrained(checkpoints[request.param], dtype=dtype).eval()
        model.generation_config.eos_token_id = None
        return model

    return loader


def tokens(batch: int, length: int) -> torch.Tensor:
    return torch.randint(3, 400, (batch, length))


def left_padded(batch: int, length: int) -> torch.Tensor:
    mask = torch.ones(batch, length, dtype=torch.long)
    for row in range(1, batch):
        mask[row, : row + 1] = 0
    return mask


def assert_same(got: torch.Tensor, want: torch.Tensor, dtype: torch.dtype = torch.float32) -> None:
    assert bool(torch.isfinite(got).all())
    assert (got.double() - want.double()).norm() / want.double().norm() <= TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_logits(load: Callable[..., Any], dtype: torch.dtype) -> None:
    model, ids = load(dtype), tokens(2, 7)
    with torch.no_grad():
        want = model(ids).logits
    assert_same(patch(model)(ids).logits, want, dtype)


def test_logits_of_a_left_padded_batch(load: Callable[..., Any]) -> None:
    model, ids, mask = load(), tokens(3, 9), left_padded(3, 9)
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    with torch.no_grad():
        want = model(ids, attention_mask=mask, position_ids=positions).logits
    got = patch(model)(ids, attention_mask=mask, position_ids=positions).logits
    assert_same(got[mask.bool()], want[mask.bool()])


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("padded", [False, True])
def test_generate_gives_the_same_tokens(load: Callable[..., Any], cache: str, padded: bool) -> None:
    model, ids = load(), tokens(3, 6)
    mask = left_padded(3, 6) if padded else torch.ones(3, 6, dtype=torch.long)
    options = {"attention_mask": mask, "do_sample": False, "max_new_tokens": 12, "cache_implementation": cache}
    model.generation_config.disable_compile = True
    want = model.generate(ids, **options)
    assert torch.equal(patch(model).generate(ids, **options), want)


def test_beam_search_reorders_the_cache(load: Callable[..., Any]) -> None:
    model, ids = load(), tokens(2, 5)
    options = {"num_beams": 3, "do_sample": False, "max_new_tokens": 6}
    want = model.generate(ids, **options)
    assert torch.equal(patch(model).generate(ids, **options), want)


@pytest.mark.parametrize("make_cache", [DynamicCache, lambda config: StaticCache(config=config, max_cache_len=16)])
def test_prefill_in_chunks_and_one_token_steps(load: Callable[..., Any], make_cache: Callable[..., Any]) -> None:
    model, ids = load(), tokens(2, 8)
    with torch.no_grad():
        want = model(ids).logits
    patch(model)
    cache = make_cache(config=model.config)
    got = [
        model(chunk, use_cache=True, **{cache_argument(model): cache}).logits
        for chunk in (ids[:, :3], ids[:, 3:6], ids[:, 6:7], ids[:, 7:])
    ]
    assert_same(torch.cat(got, 1), want)


def test_a_mask_with_a_hole(load: Callable[..., Any]) -> None:
    model, ids = load(), tokens(2, 6)
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[0, 3] = 0
    step = tokens(2, 1)
    outputs = []
    for patched in (False, True):
        if patched:
            patch(model)
        cached = {cache_argument(model): DynamicCache(config=model.config), "use_cache": True}
        with torch.no_grad():
            model(ids, attention_mask=mask[:, :6], **cached)
            positions = torch.full((2, 1), 6)
            outputs.append(model(step, attention_mask=mask, position_ids=positions, **cached).logits)
    assert_same(outputs[1], outputs[0])


@pytest.mark.parametrize("masked", [3.0, -2.0, -1e4, torch.finfo(torch.float32).min])
@pytest.mark.parametrize("heads", [1, 4])
def test_one_token_with_a_mask_that_is_added(load: Callable[..., Any], masked: float, heads: int) -> None:
    model, ids = load(), tokens(2, 7)
    mask = torch.zeros(2, heads, 1, 7)
    mask[0, -1, 0, 2] = masked

    def step() -> torch.Tensor:
        cached = {cache_argument(model): DynamicCache(config=model.config), "use_cache": True}
        with torch.no_grad():
            model(ids[:, :6], **cached)
            return model(ids[:, 6:], attention_mask=mask, **cached).logits

    want = step()
    patch(model)
    assert_same(step(), want)


def test_a_mask_that_is_added_and_only_forbids_is_a_range_of_slots() -> None:
    for forbidden in (float("-inf"), torch.finfo(torch.bfloat16).min, torch.finfo(torch.float16).min):
        mask = torch.zeros(1, 1, 1, 9)
        mask[..., :2] = mask[..., 7:] = forbidden
        where = attended(3, 1, 6, mask, None, mask.device)
        assert where.mask is None
        assert where.starts is not None
        assert where.lengths is not None
        assert (where.starts.tolist(), where.lengths.tolist()) == ([2] * 3, [7] * 3)


def test_the_graph_is_captured_once_and_fed_each_step(load: Callable[..., Any]) -> None:
    """Here the capture is a stand-in that runs the step again on its buffers, which is what a replay does on a GPU."""
    captured = []

    def capture(run: Callable[[], torch.Tensor]) -> tuple[Callable[[], None], torch.Tensor]:
        result = run()
        captured.append(run)
        return (lambda: result.copy_(run())), result

    model, ids = load(), tokens(2, 5)
    options = {"do_sample": False, "max_new_tokens": 8, "cache_implementation": "static"}
    model.generation_config.disable_compile = True
    want = model.generate(ids, **options)
    model.model.forward = PatchedDecoder(model, True, capture).forward
    assert torch.equal(model.generate(ids, **options), want)
    assert len(captured) == 1


def test_a_graph_keeps_results_apart() -> None:
    def capture(run: Callable[[], torch.Tensor]) -> tuple[Callable[[], None], torch.Tensor]:
        result = run()
        return (lambda: result.copy_(run())), result

    graph = DecodeGraph(lambda given: given["x"] * 2, {"x": torch.ones(2)}, capture)
    first = graph.run({"x": torch.tensor([1.0, 2.0])})
    second = graph.run({"x": torch.tensor([3.0, 4.0])})
    assert first.tolist() == [2.0, 4.0]
    assert second.tolist() == [6.0, 8.0]


def test_past_max_position_embeddings_it_goes_on_as_before(load: Callable[..., Any]) -> None:
    model, ids = load(), tokens(1, 5)
    model.config.max_position_embeddings = 8
    model.generation_config.disable_compile = True
    for cache in ("dynamic", "static"):
        options = {"do_sample": False, "max_new_tokens": 10, "cache_implementation": cache}
        want = model.generate(ids, **options)
        assert torch.equal(patch(model).generate(ids, **options), want)
        unpatch(model)


@pytest.mark.parametrize("first", [-3, 60, 99_990])
def test_positions_may_lie_anywhere(load: Callable[..., Any], first: int) -> None:
    model, ids, positions = load(), tokens(2, 7), torch.arange(first, first + 7)[None]
    model.config.max_position_embeddings = 64
    with torch.no_grad():
        want = model(ids, position_ids=positions).logits
    patch(model)
    assert_same(model(ids, position_ids=positions).logits, want)
    cached = {cache_argument(model): StaticCache(config=model.config, max_cache_len=8)}
    model(ids[:, :6], position_ids=positions[:, :6], use_cache=True, **cached)
    assert_same(model(ids[:, 6:], position_ids=positions[:, 6:], use_cache=True, **cached).logits, want[:, 6:])


def test_weights_are_packed_but_stored_once_and_unpatch_undoes_it(load: Callable[..., Any]) -> None:
    model, ids = load(), tokens(1, 4)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        want = model(ids).logits
    patch(model)
    attention = model.model.layers[0].self_attn
    assert attention.q_proj.weight.untyped_storage().data_ptr() == attention.v_proj.weight.untyped_storage().data_ptr()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert "forward" not in vars(unpatch(model).model)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, want)
    patch(model)
    assert_same(model(ids).logits, want)


def _assign(model: Any) -> None:
    model.load_state_dict({name: value + 0.1 for name, value in model.state_dict().items()}, assign=True)


def _set_data(model: Any) -> None:
    weight = model.model.layers[1].mlp.down_proj.weight
    weight.data = weight.data + 0.1


def _exchange_a_linear(model: Any) -> None:
    ffn = model.model.layers[0].mlp
    ffn.up_proj = torch.nn.Linear(ffn.up_proj.in_features, ffn.up_proj.out_features, bias=False)


def _drop_a_layer(model: Any) -> None:
    model.model.layers = model.model.layers[:1]
    model.config.num_hidden_layers = 1


@pytest.mark.parametrize(
    ("replace", "path"),
    [
        (_assign, r"model\.layers\.0\.self_attn\.q_proj\.weight"),
        (_set_data, r"model\.layers\.1\.mlp\.down_proj\.weight"),
        (_exchange_a_linear, r"model\.layers\.0\.mlp\.up_proj"),
        (_drop_a_layer, r"model\.layers"),
    ],
)
def test_weights_replaced_after_patch_are_noticed(
    load: Callable[..., Any], replace: Callable[[Any], None], path: str
) -> None:
    model, ids = patch(load()), tokens(1, 4)
    replace(model)
    with pytest.raises(KernelError, match=rf"{path} was replaced after patch, .* call qcompile\.kernels\.unpatch"):
        model(ids)
    with torch.no_grad():
        want = unpatch(model)(ids).logits
    assert_same(patch(model)(ids).logits, want)


def test_weights_changed_in_place_reach_the_kernels(load: Callable[..., Any]) -> None:
    model, ids = patch(load()), tokens(1, 4)
    model.load_state_dict({name: value * 1.1 for name, value in model.state_dict().items()})
    got = model(ids).logits
    with torch.no_grad():
        assert_same(got, unpatch(model)(ids).logits)


def test_a_patched_model_is_not_copied(load: Callable[..., Any]) -> None:
    model = patch(load())
    with pytest.raises(KernelError, match=r"cannot be copied or pickled; call qcompile\.kernels\.unpatch"):
        copy.deepcopy(model)
    with pytest.raises(KernelError, match="cannot be copied or pickled"):
        pickle.dumps(model)
    assert patch(copy.deepcopy(unpatch(model))).model is not model.model


def test_a_forward_that_somebody_else_put_there_comes_back(load: Callable[..., Any]) -> None:
    model = load()
    hook = model.model.forward
    model.model.forward = hook
    assert unpatch(patch(model)).model.forward is hook


def test_what_it_does_not_take(load: Callable[..., Any]) -> None:
    model = load()
    with pytest.raises(
        KernelError, match="the model is a Linear; the kernels know Qwen2ForCausalLM and Qwen3ForCausalLM"
    ):
        patch(torch.nn.Linear(2, 2))
    with pytest.raises(KernelError, match="not patched"):
        unpatch(model)
    model.model.layers[1].mlp.up_proj = torch.nn.Sequential(model.model.layers[1].mlp.up_proj)
    with pytest.raises(KernelError, match=r"layer 1 has a Sequential where a torch\.nn\.Linear"):
        patch(model)
    mixed = load()
    mixed.model.norm.half()
    with pytest.raises(KernelError, match="several dtypes"):
        patch(mixed)
    with pytest.raises(KernelError, match="float64"):
        patch(load().double())
    other = load()
    other.config.layer_types = ["sliding_attention", "full_attention"]
    with pytest.raises(KernelError, match="sliding-window"):
        patch(other)


def test_what_a_patched_model_does_not_give(load: Callable[..., Any]) -> None:
    model, ids = patch(load()), tokens(1, 4)
    with pytest.raises(KernelError, match="patched already"):
        patch(model)
    with pytest.raises(KernelError, match="output_attentions is not given"):
        model(ids, output_attentions=True)
    with pytest.raises(KernelError, match="exactly one of"):
        model.model(None)
    with pytest.raises(KernelError, match="no tokens"):
        model(ids[:, :0])
    with pytest.raises(KernelError, match=r"attention_mask is \[4\]"):
        model(ids, attention_mask=torch.ones(4))
    small = {cache_argument(model): StaticCache(config=model.config, max_cache_len=4)}
    with pytest.raises(KernelError, match="5 tokens in a StaticCache for 4"):
        model(tokens(1, 5), **small)
    with pytest.raises(
        KernelError, match=r"patched in torch\.float32 on cpu and is given torch\.float16 on cpu; move a model first"
    ):
        model(inputs_embeds=torch.ones(1, 2, model.config.hidden_size, dtype=torch.float16))
    with pytest.raises(KernelError, match=r"no derivatives; call qcompile\.kernels\.unpatch"):
        model(ids).logits.sum().backward()
    model.train()
    with pytest.raises(KernelError, match="training mode"):
        model(ids)
