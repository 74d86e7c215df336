"""The fused head gives what logits that exist give, on 1, 2 and 4 gloo ranks: losses, terms and all gradients.

One launch a world size runs all cases; the tests then read its results.
"""

from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist
from harness import run_distributed
from torch import Tensor

from abkd_megatron import AlphaBeta, ToDi
from abkd_megatron.errors import ConfigError
from abkd_megatron.losses import Divergence
from abkd_megatron.vocab_parallel import VocabShard, vocab_parallel_distillation, vocab_parallel_distillation_head
from abkd_megatron.vocab_parallel.fused_head import automatic_chunk_tokens, bytes_per_token
from abkd_megatron.vocab_parallel.head_gradients import TokenWeightCheck, add_product

WORLDS = [1, 2, 4]
TOKENS = (5, 3)
VOCAB, PADDED, HIDDEN, TEACHER_HIDDEN = 123, 128, 8, 12


@dataclass(frozen=True)
class Case:
    divergence: Divergence
    dtype: torch.dtype = torch.float64
    in_forward: bool = True
    chunk_tokens: int = 4
    temperature: float = 1.0
    scales: tuple[float, float] = (1.0, 1.0)
    others: bool = False
    """Every second token of a sequence has another teacher, wider and of another scale."""

    def __str__(self) -> str:
        how = "in forward" if self.in_forward else "in backward"
        dtype = str(self.dtype).removeprefix("torch.")
        others = "-others" * self.others
        return f"{self.divergence}-{dtype}-{how}-{self.chunk_tokens}-T{self.temperature}-{self.scales}{others}"


CASES = [
    Case(divergence, dtype, in_forward)
    for divergence in (AlphaBeta(0.2, 0.7), AlphaBeta(1, 0), ToDi(), ToDi(2.0, detach=False))
    for dtype in (torch.float64, torch.float32, torch.bfloat16)
    for in_forward in (True, False)
]
CASES += [
    Case(AlphaBeta(0.2, 0.7), torch.float64, in_forward, chunk_tokens, temperature, scales)
    for in_forward in (True, False)
    for chunk_tokens, temperature, scales in [
        (1, 1.0, (1.0, 1.0)),
        (15, 2.0, (1.0, 1.0)),
        (7, 2.0, (0.5, 0.25)),
        (100, 1.0, (0.5, 1.0)),
    ]
]
CASES += [
    Case(AlphaBeta(0.2, 0.7), dtype, in_forward, 7, 2.0, (0.5, 0.25), others=True)
    for dtype, in_forward in ((torch.float64, True), (torch.float64, False), (torch.bfloat16, True))
]


def run_case(case: Case, rank: int, world_size: int, group: dist.ProcessGroup | None) -> dict:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    width = PADDED // world_size
    mine = slice(rank * width, (rank + 1) * width)
    student_hidden, teacher_hidden = random(*TOKENS, HIDDEN), random(*TOKENS, TEACHER_HIDDEN)
    student_weight, teacher_weight = random(PADDED, HIDDEN)[mine], random(PADDED, TEACHER_HIDDEN)[mine]
    hidden, weight, teacher_hidden, teacher_weight = (
        x.to(case.dtype) for x in (student_hidden, student_weight, teacher_hidden, teacher_weight)
    )
    hidden.requires_grad_()
    weight.requires_grad_()
    labels = torch.randint(VOCAB, TOKENS, generator=generator)
    labels[1, 1] = -1
    mask = torch.randint(2, TOKENS, generator=generator).double()
    mask[0] = 0.0
    factor = 0.37
    shard = VocabShard.megatron(width, group, VOCAB)

    student = (hidden @ weight.t()) * case.scales[0]
    teacher = (teacher_hidden @ teacher_weight.t()) * case.scales[1]
    more = []
    if case.others:
        is_other = (torch.arange(TOKENS[0]) % 2 == 1)[:, None, None]
        other, other_weight = random(*TOKENS, 20).to(case.dtype), random(PADDED, 20)[mine].to(case.dtype)
        teacher = torch.where(is_other, (other @ other_weight.t()) * 0.7, teacher)
        teacher_hidden, other = (
            torch.where(here, of, 0.0) for here, of in ((~is_other, teacher_hidden), (is_other, other))
        )
        more = [(other, other_weight, 0.7)]
    wanted = vocab_parallel_distillation(student, teacher, case.divergence, labels, shard, case.temperature)
    wanted_loss = 0.8 * wanted.divergence + 0.3 * wanted.cross_entropy
    wanted_gradients = torch.autograd.grad((factor * mask * wanted_loss).sum(), (hidden, weight))

    loss, terms = vocab_parallel_distillation_head(
        hidden,
        weight,
        teacher_hidden,
        teacher_weight,
        case.divergence,
        labels,
        shard,
        kd_weight=0.8,
        lm_weight=0.3,
        temperature=case.temperature,
        token_weights=mask if case.in_forward else None,
        student_scale=case.scales[0],
        teacher_scale=case.scales[1],
        more_teachers=more,
        chunk_tokens=case.chunk_tokens,
    )
    gradients = torch.autograd.grad((factor * mask * loss).sum(), (hidden, weight))
    got = {"loss": loss, "divergence": terms.divergence, "cross entropy": terms.cross_entropy, **terms.metrics}
    expected = {
        "loss": wanted_loss,
        "divergence": wanted.divergence,
        "cross entropy": wanted.cross_entropy,
        **wanted.metrics,
    }
    for name in ("divergence", "cross entropy", *terms.metrics):
        assert not got[name].requires_grad
    got |= {"of hidden": gradients[0], "of weight": gradients[1]}
    expected |= {"of hidden": wanted_gradients[0], "of weight": wanted_gradients[1]}
    # Sums over tokens or the vocabulary in another order, in the arithmetic of the dtype.
    relative = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 2e-2}[case.dtype]

    def error(name: str) -> float:
        of, scale = expected[name].detach().double(), expected[name].detach().abs().amax().item() or 1.0
        return (got[name].detach().double() - of).abs().amax().item() / scale / relative

    return {name: error(name) for name in expected}


def run_cases(rank: int, world_size: int) -> list[dict]:
    group = dist.group.WORLD if world_size > 1 else None
    return [run_case(case, rank, world_size, group) for case in CASES]


@pytest.fixture(scope="module", params=WORLDS, ids=lambda world_size: f"ranks{world_size}")
def ranks(request) -> list[list[dict]]:
    return [run_cases(0, 1)] if request.param == 1 else run_distributed(run_cases, request.param)


@pytest.mark.parametrize("index", range(len(CASES)), ids=[str(case) for case in CASES])
def test_equals_logits_that_exist(ranks, index):
    for results in ranks:
        assert all(error <= 1.0 for error in results[index].values()), results[index]


def head(**changes):
    arguments = {
        "student_hidden": torch.ones(6, 4, requires_grad=True),
        "student_weight": torch.ones(10, 4),
        "teacher_hidden": torch.ones(6, 5),
        "teacher_weight": torch.ones(10, 5),
        "divergence": AlphaBeta(0.2, 0.7),
        "labels": torch.zeros(6, dtype=torch.int64),
        "shard": VocabShard.megatron(10),
        **changes,
    }
    return vocab_parallel_distillation_head(**arguments)[0]


def test_other_weights_than_were_said_raise_in_backward():
    with pytest.raises(RuntimeError, match="token weight"):
        head(token_weights=torch.ones(6)).mul(torch.arange(6)).sum().backward()
    with pytest.raises(RuntimeError, match="token weight"):
        head(token_weights=torch.zeros(6)).sum().backward()
    head(token_weights=torch.zeros(6)).mul(0.0).sum().backward()
    head().mul(torch.arange(6)).sum().backward()


def hidden_states_and_weights(dtype: torch.dtype, tokens: int, width: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = (tokens, HIDDEN), (width, HIDDEN), (tokens, TEACHER_HIDDEN), (width, TEACHER_HIDDEN)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


@pytest.mark.parametrize("loss_scale", [2.0**16, 2.0**24])
def test_fp16_gradients_are_rounded_after_the_loss_scale(loss_scale):
    """As those of logits that exist are: what is 0 in fp16 without the scale is a number with it."""
    of_hidden, weight, teacher_hidden, teacher_weight = hidden_states_and_weights(torch.float16, 64, 32)
    labels, shard, mask = torch.arange(64) % 32, VocabShard.megatron(32), torch.ones(64)
    leaves = of_hidden.requires_grad_(), weight.requires_grad_()
    weight_of_loss = 1e-8  # of which fp16 knows nothing
    terms = vocab_parallel_distillation(
        leaves[0] @ leaves[1].t(), teacher_hidden @ teacher_weight.t(), ToDi(), labels, shard
    )
    wanted_loss = weight_of_loss * (terms.divergence + terms.cross_entropy)
    wanted = torch.autograd.grad((wanted_loss * mask).sum() * loss_scale, leaves)
    loss, _ = vocab_parallel_distillation_head(
        *(*leaves, teacher_hidden, teacher_weight, ToDi(), labels, shard),
        kd_weight=weight_of_loss,
        lm_weight=weight_of_loss,
        token_weights=mask,
        chunk_tokens=16,
    )
    got = torch.autograd.grad((loss * mask).sum() * loss_scale, leaves)
    for one, other in zip(got, wanted, strict=True):
        assert other.isfinite().all() and (other != 0).any(dim=-1).all()
        torch.testing.assert_close(one, other, rtol=2**-8, atol=other.abs().amax().item() * 2**-10)


@pytest.mark.parametrize("token_weights", [torch.ones(256), None], ids=["in forward", "in backward"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_weights_gradient_is_summed_in_fp32_however_many_chunks(dtype, token_weights):
    of_hidden, weight, teacher_hidden, teacher_weight = hidden_states_and_weights(dtype, 256, 32)
    labels, shard = torch.arange(256) % 32, VocabShard.megatron(32)

    def of_weight(chunk_tokens: int) -> Tensor:
        parameter = weight.clone().requires_grad_()
        parameter.main_grad = torch.zeros(parameter.shape)
        loss, _ = vocab_parallel_distillation_head(
            *(of_hidden, parameter, teacher_hidden, teacher_weight, ToDi(), labels, shard),
            token_weights=token_weights,
            chunk_tokens=chunk_tokens,
            into_main_grad=True,
        )
        loss.sum().backward()
        return parameter.main_grad

    whole = of_weight(256)
    for chunk_tokens in (128, 16, 1):
        off = (of_weight(chunk_tokens) - whole).abs().amax() / whole.abs().amax()
        assert off < 1e-6, chunk_tokens


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_product_of_halves_is_exact_to_fp32(dtype):
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(shape, generator=generator).to(dtype) for shape in ((24, 4096), (4096, 16)))
    total = torch.zeros(24, 16)
    for chunk in range(0, 4096, 64):
        add_product(total, left[:, chunk : chunk + 64], right[chunk : chunk + 64])
    exact, magnitude = left.double() @ right.double(), left.double().abs() @ right.double().abs()
    assert ((total - exact).abs() <= 2**-22 * magnitude).all()


@pytest.mark.parametrize("token_weights", [torch.ones(64), None], ids=["in forward", "in backward"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_changes_nothing(dtype, token_weights):
    of_hidden, weight, teacher_hidden, teacher_weight = hidden_states_and_weights(dtype, 64, 32)
    leaves = of_hidden.requires_grad_(), weight.requires_grad_()
    labels, shard, found = torch.arange(64) % 32, VocabShard.megatron(32), []
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            loss, _ = vocab_parallel_distillation_head(
                *(*leaves, teacher_hidden, teacher_weight, ToDi(), labels, shard),
                token_weights=token_weights,
                chunk_tokens=16,
            )
            found.append((loss, *torch.autograd.grad(loss.sum(), leaves)))
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


class Event:
    """What a GPU has not come to yet."""

    def __init__(self):
        self.happened, self.waited_for = False, 0

    def query(self):
        return self.happened

    def synchronize(self):
        self.happened, self.waited_for = True, self.waited_for + 1


def test_of_a_gpu_other_weights_are_waited_for_once_and_then_looked_at_when_they_are_known():
    right, wrong = torch.tensor(False), torch.tensor(True)
    first, second, third = Event(), Event(), Event()
    watch = TokenWeightCheck()
    watch.expect(right, first)
    watch.expect(right, second)
    watch.expect(wrong, third)
    assert [event.waited_for for event in (first, second, third)] == [1, 0, 0]
    watch.raise_if_known()
    third.happened = True
    watch.raise_if_known()  # in their order
    second.happened = True
    with pytest.raises(RuntimeError, match="token weight"):
        watch.raise_if_known()
    watch.raise_if_known()
    with pytest.raises(RuntimeError, match="token weight"):
        TokenWeightCheck().expect(wrong, Event())


def test_gradients_of_forward_are_given_once():
    loss = head(token_weights=torch.ones(6)).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="are used up"):
        loss.backward()
    loss = head().sum()
    loss.backward(retain_graph=True)
    loss.backward()


@pytest.mark.parametrize(
    ("of_token", "chunk_tokens"), [(0, 512), (2**10, 512), (2**18, 256), (2**18 + 1, 128), (2**22, 16), (2**40, 16)]
)
def test_chunks_are_sized_to_memory(of_token, chunk_tokens):
    assert automatic_chunk_tokens(torch.device("cpu"), of_token) == chunk_tokens


def test_a_token_takes_the_logits_of_both_models():
    assert bytes_per_token(torch.ones(10, 4, dtype=torch.bfloat16), VocabShard.megatron(10)) == 40


def test_without_gradients_none_are_formed():
    with torch.no_grad():
        assert not head(token_weights=torch.ones(6)).requires_grad
    assert not head(student_hidden=torch.ones(6, 4), token_weights=torch.ones(6)).requires_grad
    frozen = head(token_weights=torch.ones(6)).sum()
    frozen.backward()  # the weight wants no gradient


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"student_weight": torch.ones(10, 3)}, r"student hidden states \[6, h\] and a weight \[10, h\]"),
        ({"teacher_weight": torch.ones(9, 5)}, r"teacher hidden states .* and \[9, 5\]"),
        ({"teacher_hidden": torch.ones(6, 5).bfloat16()}, "of one dtype, got"),
        ({"shard": VocabShard(0, 11, 11)}, "at least 11 columns"),
        ({"labels": torch.zeros(6)}, "labels of dtype torch.int64"),
        ({"token_weights": torch.ones(5)}, r"token weights of the labels' shape \[6\], got \[5\]"),
        ({"chunk_tokens": 0}, "chunk_tokens .* at least 1, got 0"),
    ],
)
def test_bad_input_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        head(**changes)
