"""The C++ kernel gives what the eager one does."""

import itertools
import shutil

import pytest
import torch
from kernel_cases import DIVERGENCES, OTHERS, SETTINGS, compare, hard, special

from abkd_megatron import AlphaBeta, ToDi, kernels, vocab_parallel_divergence
from abkd_megatron.errors import ConfigError
from abkd_megatron.kernels import cpp, tiles
from abkd_megatron.losses import JensenShannon, SkewForwardKL, SkewReverseKL, TotalVariation, WeightedSum
from abkd_megatron.vocab_parallel import VocabShard, vocab_parallel_distillation

FP16 = torch.float16

MIXED = WeightedSum([(1.0, JensenShannon(0.3)), (0.7, SkewForwardKL()), (0.4, SkewReverseKL())])
EVERY = {
    **DIVERGENCES,
    **OTHERS,
    "js 0.9": JensenShannon(0.9),
    "skew 0.9": SkewForwardKL(0.9),
    "skew reverse 0.9": SkewReverseKL(0.9),
    "sum of 8": WeightedSum(
        [
            (1.0, MIXED),
            (0.3, JensenShannon(0.8)),
            (0.5, WeightedSum([(1.0, TotalVariation()), (2.0, ToDi(0.5)), (1.0, AlphaBeta(1, 0))])),
            (0.1, AlphaBeta(0.2, 0.7)),
        ]
    ),
}

needs_compiler = pytest.mark.skipif(not (shutil.which("g++") or shutil.which("c++")), reason="needs a C++ compiler")


@pytest.fixture(autouse=True)
def restored():
    before = kernels.use("auto")
    yield
    kernels.use(before)


def results(name, student, teacher, divergence, labels, shard, temperature):
    kernels.use(name)
    student = student.clone().requires_grad_()
    terms = vocab_parallel_distillation(student, teacher, divergence, labels, shard, temperature)
    (terms.divergence * 0.7 + terms.cross_entropy * 0.3).sum().backward()
    return terms.divergence.detach(), terms.cross_entropy.detach(), student.grad, *terms.metrics.values()


def value_and_gradient(kernel, student, teacher, divergence):
    kernels.use(kernel)
    student = student.clone().requires_grad_()
    value = vocab_parallel_divergence(student, teacher, divergence)
    value.sum().backward()
    return value.detach(), student.grad


@needs_compiler
@pytest.mark.parametrize("setting", [name for name, (*dtypes, _, _, _, _) in SETTINGS.items() if FP16 not in dtypes])
@pytest.mark.parametrize("name", EVERY)
def test_cpp_equals_eager(name, setting):
    worst = compare(cpp, EVERY[name], setting)
    assert set(worst) >= {"record", "gradient"}
    assert all(number <= 1.0 for number in worst.values()), worst


@needs_compiler
def test_cpp_on_special_rows():
    assert special(cpp) == {"nan and inf logits": True, "no columns": True, "equal models": True}


@needs_compiler
@pytest.mark.parametrize("name", [name for name in EVERY if "chi-square" not in name])  # beyond the range of fp32
def test_cpp_on_hard_rows(name):
    for parts, temperature in ((1, 1.0), (4, 2.0)):
        if EVERY[name].num_partial_sums or parts == 1:
            worst = hard(cpp, EVERY[name], temperature, parts=parts)
            assert all(number <= 1.0 for number in worst.values()), (worst, parts)


@needs_compiler
@pytest.mark.parametrize("deviation", [0.02, 1.0])
def test_cpp_over_a_large_vocabulary(deviation):
    generator = torch.Generator().manual_seed(0)
    teacher = 2 * torch.randn(2, 131072, generator=generator)
    student = (teacher + deviation * torch.randn(2, 131072, generator=generator)).bfloat16().float()
    teacher = teacher.bfloat16().float()
    student[1] = teacher[1]
    for name, divergence in EVERY.items():
        # Without powers of q in F, fp32 rounds H by more than the limit where the models are close.
        if deviation < 1.0 and name in ("ab(0,0)", "ab(0.5,-0.5)"):
            continue
        value, gradient = value_and_gradient("cpp", student, teacher, divergence)
        expected, of_expected = value_and_gradient("eager", student.double(), teacher.double(), divergence)
        assert ((value - expected).abs() <= 1e-6 + 1e-5 * expected.abs()).all(), divergence
        assert value[1] == 0.0 and (gradient[1] == 0.0).all()
        largest = of_expected.abs().amax(dim=-1, keepdim=True)
        assert ((gradient - of_expected).abs() <= 1e-5 * largest).all(), divergence


@needs_compiler
@pytest.mark.parametrize("spread", [1.0, 20.0, 60.0])
def test_cpp_equals_eager_however_far_apart_logits_lie(spread):
    generator = torch.Generator().manual_seed(0)
    student, teacher = spread * torch.randn(2, 4, 3001, generator=generator)
    labels = torch.randint(0, 3001, (4,), generator=generator)
    for divergence in (AlphaBeta(0.2, 0.7), AlphaBeta(1.0, 0.0), ToDi(detach=False), MIXED, TotalVariation()):
        inputs = (student, teacher, divergence, labels, VocabShard.megatron(3001, vocab_size=3001), 1.0)
        for got, wanted in zip(results("cpp", *inputs), results("eager", *inputs), strict=True):
            torch.testing.assert_close(got, wanted, rtol=2e-5, atol=1e-6 * wanted.abs().amax().item())


@needs_compiler
def test_cpp_gives_the_same_bits_with_any_number_of_threads():
    generator = torch.Generator().manual_seed(0)
    student, teacher = 2 * torch.randn(2, 37, 501, generator=generator)
    labels = torch.randint(0, 501, (37,), generator=generator)
    inputs = (student, teacher, ToDi(), labels, VocabShard.megatron(501, vocab_size=501), 1.0)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = results("cpp", *inputs)
        torch.set_num_threads(3)
        together = results("cpp", *inputs)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(one, other) for one, other in zip(alone, together, strict=True))


@needs_compiler
def test_cpp_takes_another_divergence_at_each_step(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    student, teacher = 2 * torch.randn(2, 7, 301, generator=generator)
    labels = torch.randint(0, 301, (7,), generator=generator)
    inputs = (labels, VocabShard.megatron(301, vocab_size=301))
    results("cpp", student, teacher, ToDi(), *inputs, 1.0)
    monkeypatch.setattr(cpp.subprocess, "run", lambda *_, **__: pytest.fail("built anew"))
    for step in range(4):
        for divergence in (AlphaBeta(0.2 * step, 0.7), ToDi(0.5 * step), SkewForwardKL(0.1 + 0.2 * step)):
            sides = (results(name, student, teacher, divergence, *inputs, 1.0 + step) for name in ("cpp", "eager"))
            for got, wanted in zip(*sides, strict=True):
                torch.testing.assert_close(got, wanted, rtol=2e-5, atol=1e-6)


@needs_compiler
@pytest.mark.parametrize(
    ("kernel", "divergence"),
    [
        *itertools.product(["eager", "cpp"], [AlphaBeta(0.2, 0.7), AlphaBeta(1, 0), ToDi(), ToDi(2.0, False)]),
        *itertools.product(["eager", "cpp"], [JensenShannon(), SkewForwardKL(), SkewReverseKL(), SkewReverseKL(0.9)]),
        *itertools.product(["cpp"], [JensenShannon(0.9), SkewForwardKL(0.9)]),
        *itertools.product(["eager", "cpp"], [MIXED]),
    ],
    ids=str,
)
def test_digits_are_kept_near_convergence(kernel, divergence):
    generator = torch.Generator().manual_seed(0)
    teacher = 2 * torch.randn(8, 4096, generator=generator)
    # Numbers of few bits, whose differences fp32 holds exactly: what is left is the arithmetic's own error.
    student, teacher = (
        (teacher + 1e-3 * torch.randn(8, 4096, generator=generator)).bfloat16().float(),
        teacher.bfloat16().float(),
    )
    value, gradient = value_and_gradient(kernel, student, teacher, divergence)
    expected, of_expected = value_and_gradient("eager", student.double(), teacher.double(), divergence)
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=0)
    error = (gradient.double() - of_expected).abs().amax(-1) / of_expected.abs().amax(-1)
    assert error.max() < 1e-5


def test_chunks_cover_every_row_once():
    kernel = kernels.Kernel("any", print, print, print, chunk_elements=40)
    cpu = torch.device("cpu")
    assert kernel.chunks(8, 10, cpu) == [slice(0, 4), slice(4, 8)]
    assert kernel.chunks(3, 10, cpu) == [slice(0, 3)]
    assert kernel.chunks(0, 10, cpu) == []
    assert kernel.chunks(9, 10, cpu) == [slice(0, 4), slice(4, 8), slice(8, 9)]
    assert kernel.chunks(2, 0, cpu) == [slice(0, 2)]


@pytest.mark.parametrize(("device", "elements"), [("cpu", 2**18), ("cuda", 2**24)])
def test_chunks_suit_the_device(device, elements):
    everything = kernels.Kernel("any", print, print, print, chunk_elements=2**62)
    own = kernels.get("eager")
    for columns in (1000, 16032, 128256):
        rows = elements // columns
        assert len(everything.chunks(8192, columns, torch.device(device))) == 1
        for chunks in (
            everything.chunks(8192, columns, torch.device(device), copied=True),
            own.chunks(8192, columns, torch.device(device)),
            own.chunks(8192, columns, torch.device(device), copied=True),
        ):
            assert len(chunks) == -(-8192 // max(rows, 1))
            assert chunks[0] == slice(0, min(max(rows, 1), 8192))


class Custom(JensenShannon):
    """A subclass may compute anything."""


@needs_compiler
@pytest.mark.parametrize(
    "divergence",
    [
        Custom(),
        WeightedSum([(1.0, AlphaBeta(1, 1)), (2.0, Custom())]),
        WeightedSum([(1.0, ToDi())] * 9),
        JensenShannon(1e-20),
    ],
    ids=["custom", "with a custom term", "nine terms", "next to nothing of one model"],
)
def test_a_divergence_that_cpp_does_not_know(divergence):
    student, teacher = torch.randn(2, 3, 8)
    assert kernels.select(WeightedSum([(1.0, ToDi())] * 8), student, teacher).name == "cpp"
    assert kernels.select(divergence, student, teacher).name == "eager"
    kernels.use("cpp")
    with pytest.raises(ConfigError):
        vocab_parallel_divergence(student, teacher, divergence)


def test_an_unknown_kernel_is_refused():
    with pytest.raises(ConfigError, match=r"auto, eager, cpp, triton.*'fast'"):
        kernels.use("fast")


@pytest.mark.parametrize(
    ("columns", "wanted"),
    [(100, "small"), (16032, "small"), (16033, "large"), (128256, "large"), (151936, "large")],
)
def test_a_tile_is_the_measured_one_of_the_next_size(columns, wanted, monkeypatch):
    found = {"small": tiles.Tile(1024, 4), "large": tiles.Tile(512, 2)}
    rows = {("record", 91, 2, 16032): found["small"], ("record", 91, 2, 128256): found["large"]}
    monkeypatch.setattr(tiles, "MEASURED", rows)
    assert tiles.tile("record", columns, 1, 91) == tiles.tile("record", columns, 2, 91) == found[wanted]
    for other in (("record", columns, 4, 91), ("record", columns, 2, None), ("gradient", columns, 2, 91)):
        assert tiles.tile(*other) == tiles.PREDICTED[other[0]][other[2]]
