"""The compiled kernel gives what the eager one does, whatever number of rows the last chunk has."""

import shutil

import pytest
import torch
from torch._dynamo.utils import counters

from abkd_megatron import AlphaBeta, ToDi, config, kernels, vocab_parallel_divergence
from abkd_megatron.errors import ConfigError
from abkd_megatron.vocab_parallel import VocabShard, vocab_parallel_distillation

needs_compiler = pytest.mark.skipif(
    not (shutil.which("g++") or shutil.which("c++")), reason="torch.compile needs a C++ compiler on the CPU"
)


@pytest.fixture(autouse=True)
def restored():
    chosen = kernels.current().name
    yield
    kernels.use(chosen)


def results(name, student, teacher, divergence, labels, shard, temperature):
    kernels.use(name)
    student = student.clone().requires_grad_()
    terms = vocab_parallel_distillation(student, teacher, divergence, labels, shard, temperature)
    (terms.divergence * 0.7 + terms.cross_entropy * 0.3).sum().backward()
    return terms.divergence.detach(), terms.cross_entropy.detach(), student.grad, *terms.metrics.values()


@needs_compiler
@pytest.mark.parametrize(
    ("divergence", "dtype", "temperature"),
    [(AlphaBeta(0.2, 0.7), torch.float32, 1.0), (ToDi(), torch.bfloat16, 2.0)],
    ids=str,
)
def test_compiled_equals_eager(divergence, dtype, temperature, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    width, size = 256, 250
    student, teacher = (2 * torch.randn(2, 43, width, generator=generator)).to(dtype)
    teacher[3, 5:9] = student[3, 5:9] = -torch.inf
    labels = torch.randint(0, size, (43,), generator=generator)
    labels[7] = -1
    shard = VocabShard.megatron(width, vocab_size=size)
    kernels.use("compiled")
    monkeypatch.setattr(kernels.current(), "chunk_elements", 8 * size)

    compiled_before = counters["stats"]["unique_graphs"]
    for rows in (43, 40, 25):  # 43 and 25 leave a rest of 3 and 1
        inputs = (student[:rows], teacher[:rows], divergence, labels[:rows], shard, temperature)
        for got, wanted in zip(results("compiled", *inputs), results("eager", *inputs), strict=True):
            scale = wanted.float().abs().amax().item()
            tolerance = 2**-8 if wanted.dtype == torch.bfloat16 else 1e-5
            assert (got.float() - wanted.float()).abs().amax().item() <= tolerance * scale
    # One graph for the record, one for the gradient, and for ToDi's second round none.
    assert counters["stats"]["unique_graphs"] - compiled_before == 2


@needs_compiler
@pytest.mark.parametrize("divergence", [AlphaBeta(0.2, 0.7), AlphaBeta(1, 0)], ids=str)
def test_compiled_keeps_its_digits_near_convergence(divergence):
    generator = torch.Generator().manual_seed(0)
    teacher = 2 * torch.randn(8, 4096, generator=generator)
    # Numbers of few bits, whose differences fp32 holds exactly: what is left is the arithmetic's own error.
    student, teacher = (
        (teacher + 1e-3 * torch.randn(8, 4096, generator=generator)).bfloat16().float(),
        teacher.bfloat16().float(),
    )
    kernels.use("compiled")
    fast = student.clone().requires_grad_()
    value = vocab_parallel_divergence(fast, teacher, divergence)
    value.sum().backward()
    exact = student.double().requires_grad_()
    expected = vocab_parallel_divergence(exact, teacher.double(), divergence)
    expected.sum().backward()
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=0)
    error = (fast.grad.double() - exact.grad).abs().amax(-1) / exact.grad.abs().amax(-1)
    assert error.max() < 1e-5


def test_chunks_cover_every_row_once_or_more():
    kernel = kernels.Kernel("any", print, print, chunk_elements=40, fixed_shape=True)
    assert kernel.chunks(9, 10) == [slice(0, 4), slice(4, 8), slice(5, 9)]
    assert kernel.chunks(8, 10) == [slice(0, 4), slice(4, 8)]
    assert kernel.chunks(3, 10) == [slice(0, 3)]
    assert kernel.chunks(0, 10) == []
    kernel.fixed_shape = False
    assert kernel.chunks(9, 10) == [slice(0, 4), slice(4, 8), slice(8, 9)]
    assert kernel.chunks(2, 0) == [slice(0, 2)]


def test_the_configuration_knows_the_same_kernels():
    assert kernels.NAMES == config.KERNELS


def test_an_unknown_kernel_is_refused():
    with pytest.raises(ConfigError, match=r"eager, compiled, triton.*'fast'"):
        kernels.use("fast")
