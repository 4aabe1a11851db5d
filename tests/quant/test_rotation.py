import numpy as np
import pytest

from qcompile.errors import QuantError
from qcompile.quant import WeightScheme, quantize_weight
from qcompile.quant.hadamard import hadamard_rotation, has_paley, paley, random_orthogonal
from qcompile.quant.rotation import fold_norm, rotate_inputs, rotate_outputs, rotate_value_heads, rotated_norm

D, F, H, KV, HEAD, V, L = 24, 40, 4, 2, 6, 30, 2


@pytest.mark.parametrize("size", [1, 2, 7, 12, 14, 28, 64, 76, 140, 896])
def test_a_rotation_is_orthogonal_and_its_fast_form_is_its_matrix(size):
    rotation = hadamard_rotation(size, seed=3)
    matrix = rotation.matrix().astype(np.float64)
    assert np.allclose(matrix @ matrix.T, np.eye(size), atol=2e-6)
    x = np.random.default_rng(0).standard_normal((2, 3, size)).astype(np.float32)
    assert np.allclose(rotation.apply(x), x @ matrix, atol=1e-5)
    assert np.allclose(rotation.undo(rotation.apply(x)), x, atol=1e-5)


@pytest.mark.parametrize("size", [64, 896, 1536, 4864])
def test_every_entry_has_the_same_size_where_a_hadamard_matrix_is_known(size):
    rotation = hadamard_rotation(size)
    row = rotation.apply(np.eye(1, size, k=5, dtype=np.float32))
    assert np.allclose(np.abs(row), size**-0.5, rtol=1e-4)


@pytest.mark.parametrize("order", [4, 12, 20, 28, 76, 108, 140])
def test_paleys_matrix_is_hadamard(order):
    matrix = paley(order).astype(np.int64)
    assert np.array_equal(matrix @ matrix.T, order * np.eye(order, dtype=np.int64))
    assert set(np.unique(matrix)) == {-1, 1}


def test_orders_without_a_known_matrix_take_a_random_block_or_are_refused():
    assert not has_paley(92)
    with pytest.raises(QuantError, match="order 92"):
        paley(92)
    block = random_orthogonal(9, np.random.default_rng(1))
    assert np.allclose(block @ block.T, np.eye(9), atol=1e-5)
    with pytest.raises(QuantError, match=r"2062 channels = 1031 \* 2"):
        hadamard_rotation(2062)
    with pytest.raises(QuantError, match="24 channels cannot be applied"):
        hadamard_rotation(24).apply(np.ones((2, 23)))


def test_seeds_decide():
    assert np.array_equal(hadamard_rotation(28, 1).matrix(), hadamard_rotation(28, 1).matrix())
    assert not np.array_equal(hadamard_rotation(28, 1).matrix(), hadamard_rotation(28, 2).matrix())


def rms_norm(x, gamma):
    return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + 1e-6) * gamma


def decoder(weights, tokens):
    """A decoder with grouped heads, biases and a tied head; every layer as Qwen2 has it, less the rotary embedding."""
    h = weights["embedding"][tokens]
    for w in weights["layers"]:
        x = rms_norm(h, w["norm1"])
        q = (x @ w["q"].T).reshape(len(tokens), H, HEAD)
        k = np.repeat((x @ w["k"].T).reshape(len(tokens), KV, HEAD), H // KV, axis=1)
        v = np.repeat((x @ w["v"].T + w["v_bias"]).reshape(len(tokens), KV, HEAD), H // KV, axis=1)
        scores = np.exp(np.einsum("shd,thd->hst", q, k)) * np.tril(np.ones((len(tokens), len(tokens))))
        mixed = np.einsum("hst,thd->shd", scores / scores.sum(axis=-1, keepdims=True), v)
        h = h + mixed.reshape(len(tokens), -1) @ w["o"].T + w["o_bias"]
        x = rms_norm(h, w["norm2"])
        gate = x @ w["gate"].T
        h = h + (gate / (1 + np.exp(-gate)) * (x @ w["up"].T)) @ w["down"].T
    x = rms_norm(h, weights["norm"])
    return x @ weights.get("before_head", np.eye(D)) @ weights["embedding"].T


def random_decoder(seed=0):
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return rng.standard_normal(shape) * 0.3

    shapes = {"q": (H * HEAD, D), "k": (KV * HEAD, D), "v": (KV * HEAD, D), "o": (D, H * HEAD)}
    shapes |= {"gate": (F, D), "up": (F, D), "down": (D, F), "v_bias": (KV * HEAD,), "o_bias": (D,)}
    layers = [
        {name: normal(*shape) for name, shape in shapes.items()}
        | {"norm1": rng.uniform(0.5, 2, D), "norm2": rng.uniform(0.5, 2, D)}
        for _ in range(L)
    ]
    return {"embedding": normal(V, D) * 3, "layers": layers, "norm": rng.uniform(0.5, 2, D)}


def rotated_decoder(weights, residual, heads):
    layers = []
    for w in weights["layers"]:
        new = {name: rotate_inputs(fold_norm(w["norm1"], w[name]), residual) for name in ("q", "k", "v")}
        new |= {name: rotate_inputs(fold_norm(w["norm2"], w[name]), residual) for name in ("gate", "up")}
        new["v"], new["v_bias"], o = rotate_value_heads((new["v"], w["v_bias"]), w["o"], heads, H)
        new["o"], new["o_bias"] = rotate_outputs(o, w["o_bias"], residual)
        new["down"], _ = rotate_outputs(w["down"], None, residual)
        layers.append(new | {"norm1": np.ones(D), "norm2": np.ones(D)})
    return {
        "embedding": rotate_inputs(weights["embedding"], residual),
        "layers": layers,
        "norm": np.ones(D),
        "before_head": rotated_norm(weights["norm"], residual),
    }


def test_a_rotated_decoder_with_a_tied_head_computes_the_same():
    weights = random_decoder()
    tokens = np.array([3, 1, 4, 1, 5, 9, 2, 6])
    rotated = rotated_decoder(weights, hadamard_rotation(D, 1), hadamard_rotation(HEAD, 2))
    wanted = decoder(weights, tokens)
    assert np.allclose(decoder(rotated, tokens), wanted, atol=1e-4 * np.abs(wanted).max())
    del rotated["before_head"]
    assert not np.allclose(decoder(rotated, tokens), wanted, atol=1e-2)


def test_an_outlier_channel_costs_less_after_the_rotation():
    rng = np.random.default_rng(0)
    matrix = rng.standard_normal((64, 128)).astype(np.float32)
    matrix[:, 7] *= 40
    rotation = hadamard_rotation(128)
    turned = rotate_inputs(matrix, rotation)
    plain, spread = (quantize_weight(w, WeightScheme(4, 32)).dequantize() for w in (matrix, turned))
    assert ((rotation.undo(spread) - matrix) ** 2).sum() < 0.5 * ((plain - matrix) ** 2).sum()


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(QuantError, match="does not feed"):
        fold_norm(np.ones(4), np.ones((3, 5)))
    with pytest.raises(QuantError, match="heads of 4 channels"):
        rotate_value_heads((np.ones((6, 8)), None), np.ones((8, 12)), hadamard_rotation(4), 3)
