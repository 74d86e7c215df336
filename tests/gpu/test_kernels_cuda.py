"""Kernels on a GPU: equal to the eager one on hard rows, and to the fp64 definition at real vocabularies.

Proves: Triton's kernel on the cases that the interpreter and the CPU are held to; losses and gradients
in bf16 at the vocabularies of Llama 3 and Qwen 2.5; offsets beyond 2^31 logits.
"""

import gpu_stages
import pytest
import torch
from kernel_cases import DIVERGENCES, SETTINGS, compare, special, vectors

from abkd_megatron import AlphaBeta, ToDi, kernels
from abkd_megatron.vocab_parallel import VocabShard, vocab_parallel_distillation

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

# Each pair has Triton compile anew: every divergence in two settings, and two divergences in the others.
CASES = [
    (name, setting)
    for name in DIVERGENCES
    for setting in SETTINGS
    if setting in ("plain", "bf16") or name in ("ab(0.2,0.7)", "todi")
]


@pytest.fixture
def use():
    """Chooses a kernel for one test."""
    before = kernels.use("auto")
    yield kernels.use
    kernels.use(before)


@pytest.mark.parametrize(("name", "setting"), CASES)
def test_triton_equals_eager(name, setting):
    from abkd_megatron.kernels import triton

    worst = compare(triton, DIVERGENCES[name], setting, "cuda")
    assert set(worst) >= {"record", "gradient"}
    assert all(number <= 1.0 for number in worst.values()), worst


def test_triton_on_special_rows():
    from abkd_megatron.kernels import triton

    assert special(triton, "cuda") == {"nan and inf logits": True, "no columns": True, "equal models": True}


def test_vectors(use):
    found = vectors("triton", "cuda")
    assert all(number <= 1.0 for of_row in found.values() for number in of_row), found


@pytest.mark.parametrize("vocab", gpu_stages.VOCABULARIES["full"])
@pytest.mark.parametrize("divergence", [AlphaBeta(0.2, 0.7), ToDi(), ToDi(detach=False)], ids=str)
@pytest.mark.parametrize("name", ["triton", "eager"])
def test_equals_fp64_at_real_vocabularies(name, divergence, vocab, use):
    use(name)
    worst = gpu_stages.kernel_errors(divergence, vocab, gpu_stages.ROWS["full"], torch.device("cuda"), None)
    assert all(number <= gpu_stages.LIMIT for number in worst.values()), worst


def test_more_than_two_to_the_31_logits(use):
    rows, columns = 2**31 // 131072 + 64, 131072
    needed = 4 * rows * columns * 2  # both models' in bf16, the gradient, and as much to spare
    if torch.cuda.mem_get_info()[0] < needed:
        pytest.skip(f"needs {needed / 2**30:.0f} GiB of free memory")
    use("triton")
    student, teacher = (torch.empty(rows, columns, dtype=torch.bfloat16, device="cuda").normal_() for _ in range(2))
    labels = torch.arange(rows, device="cuda")
    shard, divergence = VocabShard.megatron(columns), AlphaBeta(0.2, 0.7)

    def of(some):
        logits = student[some].requires_grad_()
        terms = vocab_parallel_distillation(logits, teacher[some], divergence, labels[some], shard)
        loss = terms.divergence + terms.cross_entropy
        return loss.detach(), torch.autograd.grad(loss.sum(), logits)[0]

    last = slice(rows - 32, rows)
    loss, gradient = of(slice(None))
    wanted_loss, wanted_gradient = of(last)
    assert torch.equal(loss[last], wanted_loss) and torch.equal(gradient[last], wanted_gradient)
