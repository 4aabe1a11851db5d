"""What only a CUDA device can show; run by hand on one: pytest tests/reasoner/test_cuda.py."""

import pytest

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def query_gradient(length: int, padding: int) -> "torch.Tensor":
    """The gradient of masked attention by the query, rows padded on the left."""
    generator = torch.Generator("cuda").manual_seed(length)

    def states(shift: float) -> "torch.Tensor":
        drawn = torch.randn(8, 6, length, 64, device="cuda", dtype=torch.bfloat16, generator=generator)
        return (drawn + shift).requires_grad_()

    query, key, value = states(-4.0), states(4.0), states(0.0)
    mask = torch.ones(length, length, device="cuda").tril().bool()
    mask = mask & (torch.arange(length, device="cuda") >= padding)
    out = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask[None, None])
    (out[:, :, padding:].float() ** 2).sum().backward()
    return query.grad[:, :, padding:]


@pytest.mark.parametrize("length", [128, 192, 256, 320, 352])
def test_no_nan_in_the_gradient_of_masked_attention(length: int) -> None:
    from models.reasoner.train import sound_attention

    sound_attention()
    assert query_gradient(length, 20).isfinite().all()
