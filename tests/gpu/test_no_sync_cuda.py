"""Neither the loss nor the fused head has the host wait for the GPU, forward or backward.

Once everything is compiled, which does wait. Megatron's schedule queues a whole micro-batch's work ahead;
a wait within the loss would drain the queue at each of them.
"""

from contextlib import contextmanager

import pytest
import torch

from abkd_megatron import AlphaBeta, ToDi, kernels
from abkd_megatron.vocab_parallel import VocabShard, vocab_parallel_distillation, vocab_parallel_distillation_head

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
ROWS, COLUMNS, REAL = 96, 4096, 4000


@pytest.fixture(params=["triton", "eager"])
def kernel(request):
    before = kernels.use(request.param)
    yield request.param
    kernels.use(before)


@contextmanager
def waiting_is_an_error():
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_waiting_is_seen():
    number = torch.ones((), device="cuda")
    with waiting_is_an_error(), pytest.raises(RuntimeError, match="synchronizing"):
        number.item()


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("divergence", [AlphaBeta(0.2, 0.7), ToDi(), ToDi(detach=False)], ids=str)
def test_the_loss(kernel, divergence, in_place):
    leaf = torch.randn(ROWS, COLUMNS, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    teacher = torch.randn(ROWS, COLUMNS, device="cuda", dtype=torch.bfloat16)
    labels = torch.randint(REAL, (ROWS,), device="cuda")
    shard = VocabShard.megatron(COLUMNS, vocab_size=REAL)

    def run():
        logits = leaf * 1
        terms = vocab_parallel_distillation(logits, teacher, divergence, labels, shard, gradient_in_place=in_place)
        torch.autograd.grad((terms.divergence + terms.cross_entropy).sum(), leaf)

    run()
    with waiting_is_an_error():
        run()


@pytest.mark.parametrize("in_forward", [True, False])
def test_the_fused_head(kernel, in_forward):
    hidden, weight, teacher_hidden, teacher_weight = (
        torch.randn(shape, device="cuda", dtype=torch.bfloat16)
        for shape in ((ROWS, 64), (COLUMNS, 64), (ROWS, 96), (COLUMNS, 96))
    )
    hidden.requires_grad_()
    weight.requires_grad_()
    labels = torch.randint(REAL, (ROWS,), device="cuda")
    mask = (torch.rand(ROWS, device="cuda") < 0.75).float()

    def run():
        loss, _ = vocab_parallel_distillation_head(
            hidden,
            weight,
            teacher_hidden,
            teacher_weight,
            AlphaBeta(0.2, 0.7),
            labels,
            VocabShard.megatron(COLUMNS, vocab_size=REAL),
            token_weights=mask if in_forward else None,
            chunk_tokens=40,  # the last chunk is a smaller one
        )
        torch.autograd.grad((loss * mask).sum(), (hidden, weight))

    run()
    with waiting_is_an_error():
        run()
