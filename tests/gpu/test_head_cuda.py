"""On a GPU: sums of 16-bit products in fp32, no wait of the host, and an error that leaves the context alive."""

import pytest
import torch

from abkd_megatron import ToDi
from abkd_megatron.vocab_parallel import VocabShard, fused_head, head_gradients, vocab_parallel_distillation_head

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_product_of_halves_is_summed_in_fp32(dtype):
    left, right = (torch.randn(shape, device="cuda").to(dtype) for shape in ((24, 4096), (4096, 16)))
    total = torch.zeros(24, 16, device="cuda")
    for chunk in range(0, 4096, 64):
        head_gradients.add_product(total, left[:, chunk : chunk + 64], right[chunk : chunk + 64])
    exact, magnitude = left.double() @ right.double(), left.double().abs() @ right.double().abs()
    assert ((total - exact).abs() <= 2**-20 * magnitude).all()


def loss_of(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    labels = torch.arange(64, device="cuda") % 32
    return vocab_parallel_distillation_head(
        *(hidden, weight, hidden.detach(), weight.detach(), ToDi(), labels, VocabShard.megatron(32)),
        token_weights=torch.ones(64, device="cuda"),
        chunk_tokens=16,
    )[0]


def test_the_host_does_not_wait_and_other_weights_are_told(monkeypatch):
    check = head_gradients.TokenWeightCheck()
    for module in (fused_head, head_gradients):
        monkeypatch.setattr(module, "token_weight_check", check)
    hidden = torch.randn(64, 8, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(32, 8, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    loss_of(hidden, weight).sum().backward()  # the first is waited for
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss_of(hidden, weight).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    hidden.grad = None
    others = torch.arange(64, device="cuda")
    with pytest.raises(RuntimeError, match="not multiplied by its token weight"):
        (loss_of(hidden, weight) * others).sum().backward()
        torch.cuda.synchronize()
        loss_of(hidden, weight)
    assert torch.ones(3, device="cuda").sum().item() == 3
