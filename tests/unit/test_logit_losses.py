"""Every logit loss on one rank is what its paper defines, in value and gradient.

Proves: the reference twins and the fast form reproduce 60-digit values (vectors.json); both are equal on random logits
of any scale and on logits that nearly agree, in fp64, fp32 and bf16; what each loss is invariant to and bounded by;
where it is 0, and what the degenerate cases are; -inf columns; that what does not count spreads nothing; that no graph
and no large tensor waits for backward; and that bad input is refused with a message that says the remedy. Not here:
more than one rank (tests/distributed).
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from abkd_megatron.errors import ConfigError
from abkd_megatron.losses import (
    AdaptiveKL,
    ClippedKL,
    Columns,
    LogitCosine,
    LogitLoss,
    LogitMSE,
    LogitPearson,
    Pearson,
    Preference,
    Ranking,
    Sinkhorn,
    reference_logit_loss,
)
from abkd_megatron.losses.registry import LOGIT_LOSSES
from abkd_megatron.vocab_parallel import VocabShard, vocab_parallel_logit_loss

VECTORS = json.loads((Path(__file__).parent / "vectors.json").read_text())
PAIRS = {pair["name"]: (pair["student_logits"], pair["teacher_logits"]) for pair in VECTORS["pairs"]}
NAMES = {
    "akl_official_mu0.5_weights_detached": AdaptiveKL(),
    "pearson_distance_probs": Pearson(),
    "pearson_distance_logits": LogitPearson(),
    "cosine_distance_logits": LogitCosine(),
    "mse_logits_mean": LogitMSE(),
    "mse_logits_centered_mean": LogitMSE(centered=True),
}
ROWS = [(row, NAMES[row["loss_name"]]) for row in VECTORS["other"] if row["loss_name"] in NAMES]
ROW_IDS = [row["loss_name"] for row, _ in ROWS]

LOSSES = [
    AdaptiveKL(),
    AdaptiveKL(0.7, "head"),
    Pearson(),
    LogitPearson(),
    LogitCosine(),
    LogitMSE(),
    LogitMSE(centered=True),
    ClippedKL(top_k=10),
    ClippedKL(mass=0.8),
    Ranking(top_k=5),
    Sinkhorn(group=3),
    Preference(),
]
# Unchanged by a number that is added to all of a token's logits, as softmax is.
SHIFT_INVARIANT = [loss for loss in LOSSES if loss not in (LogitCosine(), LogitMSE())]
DISTANCES = [loss for loss in LOSSES if not isinstance(loss, Ranking | Preference)]


def random_logits(*shape: int, seed: int = 0, scale: float = 2.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = scale * torch.randn(2, *shape, generator=generator, dtype=torch.float64)
    return student, teacher


def fast(student: Tensor, teacher: Tensor, loss: LogitLoss, **how) -> tuple[Tensor, Tensor]:
    """Value and gradient, of the sum over tokens."""
    student = student.detach().clone().requires_grad_()
    vocab_size = how.pop("vocab_size", None) or student.shape[-1]
    value = vocab_parallel_logit_loss(student, teacher, loss, VocabShard(0, vocab_size, vocab_size), **how)
    (gradient,) = torch.autograd.grad(value.sum(), student)
    return value.detach(), gradient


def reference(student: Tensor, teacher: Tensor, loss: LogitLoss, **how) -> tuple[Tensor, Tensor]:
    student = student.detach().double().requires_grad_()
    value = reference_logit_loss(loss, student, teacher, **how)
    (gradient,) = torch.autograd.grad(value.sum(), student)
    return value.detach(), gradient


def assert_close(actual: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], value: float, gradient: float) -> None:
    """Relative errors: of the value, and of the gradient against the largest of its row."""
    (value_a, gradient_a), (value_e, gradient_e) = actual, expected
    assert torch.isfinite(value_a).all() and torch.isfinite(gradient_a).all()
    torch.testing.assert_close(value_a.double(), value_e.double(), rtol=value, atol=0)
    largest = gradient_e.abs().amax(dim=-1, keepdim=True)
    assert ((gradient_a.double() - gradient_e.double()).abs() <= gradient * largest).all()


@pytest.mark.parametrize("compute", [reference, fast])
@pytest.mark.parametrize(("row", "loss"), ROWS, ids=ROW_IDS)
def test_vectors_in_fp64(row, loss, compute):
    student, teacher = (torch.tensor(logits, dtype=torch.float64) for logits in PAIRS[row["pair"]])
    expected = torch.tensor(row["loss"], dtype=torch.float64), torch.tensor(row["grad"], dtype=torch.float64)
    assert_close(compute(student, teacher, loss), expected, 1e-13, 1e-13)


@pytest.mark.parametrize(("row", "loss"), ROWS, ids=ROW_IDS)
def test_vectors_in_fp32(row, loss):
    student, teacher = (torch.tensor(logits, dtype=torch.float32) for logits in PAIRS[row["pair"]])
    expected = torch.tensor(row["loss"], dtype=torch.float64), torch.tensor(row["grad"], dtype=torch.float64)
    value, gradient = fast(student, teacher, loss)
    assert value.dtype == gradient.dtype == torch.float32
    assert_close((value, gradient), expected, 1e-6, 2e-6)


def test_all_vectors_are_used():
    assert {row["loss_name"] for row, _ in ROWS} == set(NAMES)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("loss", LOSSES, ids=str)
def test_equals_the_twin(loss, dtype):
    student, teacher = (logits.to(dtype) for logits in random_logits(2, 7, 301))
    value, gradient = fast(student, teacher, loss, temperature=1.5, vocab_size=297)
    expected = reference(student, teacher, loss, temperature=1.5, vocab_size=297)
    assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert gradient.dtype == dtype
    tolerance = 1e-13 if dtype == torch.float64 else 2e-6
    # bf16 rounds once, when the gradient is written.
    assert_close((value, gradient), expected, tolerance, 2**-8 if dtype == torch.bfloat16 else 2 * tolerance)


@pytest.mark.parametrize("loss", DISTANCES, ids=str)
def test_digits_are_kept_where_the_models_nearly_agree(loss):
    # The last part of 1 - r, or of a sum of p log(p/q), is all there is.
    _, teacher = random_logits(5, 300)
    student, _ = random_logits(5, 300, seed=1, scale=0.01)
    student, teacher = (student + teacher).float(), teacher.float()
    value, gradient = fast(student, teacher, loss)
    # Of the inputs' differences, 1e-2 each, fp32 leaves 1e-5; differences in magnitude of 1e-7 are added up.
    assert_close((value, gradient), reference(student, teacher, loss), 3e-5, 3e-5)


rows = st.integers(0, 2**31).map(lambda seed: random_logits(3, 40, seed=seed, scale=1.0))
scales = st.sampled_from([0.1, 1.0, 4.0])


@pytest.mark.parametrize("loss", LOSSES, ids=str)
@settings(max_examples=15, deadline=None)
@given(logits=rows, scale=scales)
def test_equals_the_twin_at_any_scale(loss, logits, scale):
    student, teacher = (scale * each for each in logits)
    assert_close(fast(student, teacher, loss), reference(student, teacher, loss), 1e-10, 1e-10)


@pytest.mark.parametrize("loss", SHIFT_INVARIANT, ids=str)
@settings(max_examples=10, deadline=None)
@given(logits=rows, by=st.floats(-50, 50))
def test_a_shift_of_logits_changes_nothing_and_gradients_add_up_to_0(loss, logits, by):
    student, teacher = logits
    value, gradient = fast(student, teacher, loss)
    shifted, _ = fast(student + by, teacher - by, loss)
    torch.testing.assert_close(shifted, value, rtol=1e-9, atol=1e-12)
    assert gradient.sum(dim=-1).abs().max() <= 1e-13 * gradient.abs().sum(dim=-1).max()


@pytest.mark.parametrize("loss", [LogitPearson(), LogitCosine()], ids=str)
@settings(max_examples=10, deadline=None)
@given(logits=rows, factor=st.floats(0.01, 100))
def test_a_factor_of_logits_changes_nothing(loss, logits, factor):
    student, teacher = logits
    value, gradient = fast(student, teacher, loss)
    torch.testing.assert_close(fast(factor * student, teacher, loss)[0], value, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close((gradient * student).sum(dim=-1), torch.zeros(3).double(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("loss", DISTANCES, ids=str)
@settings(max_examples=10, deadline=None)
@given(logits=rows)
def test_is_zero_where_the_models_are_equal_and_positive_elsewhere(loss, logits):
    student, teacher = logits
    assert (fast(student, teacher, loss)[0] > 1e-6).all()
    if not isinstance(loss, Sinkhorn):  # whose entropy spreads the plan
        value, gradient = fast(teacher, teacher, loss)
        assert value.abs().max() <= 1e-15
        assert gradient.abs().max() <= 1e-15


@settings(max_examples=20, deadline=None)
@given(logits=rows, mu=st.floats(0.05, 0.95), crossing=st.sampled_from(["tail", "head"]))
def test_adaptive_kl_lies_between_forward_and_reverse(logits, mu, crossing):
    student, teacher = logits
    log_p, log_q = teacher.log_softmax(-1), student.log_softmax(-1)
    forward, reverse = (log_p.exp() * (log_p - log_q)).sum(-1), (log_q.exp() * (log_q - log_p)).sum(-1)
    value, _ = fast(student, teacher, AdaptiveKL(mu, crossing))
    weight = (value - reverse) / (forward - reverse)
    assert ((weight > -1e-9) & (weight < 1 + 1e-9)).all()


@pytest.mark.parametrize(("crossing", "weight"), [("tail", 1 / 6), ("head", 1 / 2)])
def test_the_token_that_crosses_is_in_the_tail_or_in_the_head(crossing, weight):
    p, q = torch.tensor([[[0.4, 0.3, 0.2, 0.1]], [[0.3, 0.1, 0.2, 0.4]]], dtype=torch.float64)
    forward, reverse = (p * (p / q).log()).sum(), (q * (q / p).log()).sum()
    for compute in (fast, reference):
        value, _ = compute(q.log(), p.log(), AdaptiveKL(0.5, crossing))
        assert value.item() == pytest.approx((weight * forward + (1 - weight) * reverse).item(), rel=1e-12)


@pytest.mark.parametrize("loss", [AdaptiveKL(0.5, "head"), ClippedKL(top_k=3), ClippedKL(mass=0.5), Ranking(top_k=3)])
def test_of_equal_probabilities_the_lowest_ids_come_first(loss):
    teacher = torch.zeros(1, 6).double()
    student = torch.tensor([[1.0, -2.0, 0.5, 3.0, -1.0, 0.0]]).double()
    _, gradient = fast(student, teacher, loss)
    assert_close(fast(student, teacher, loss), reference(student, teacher, loss), 1e-12, 1e-12)
    if isinstance(loss, ClippedKL):
        assert (gradient[0, :3] != 0).all() and (gradient[0, 3:] == 0).all()


def test_a_flat_head_is_found_whatever_its_size():
    student, teacher = random_logits(2, 3000)
    teacher *= 1e-3
    for loss in (AdaptiveKL(0.5), AdaptiveKL(0.999, "head"), ClippedKL(mass=0.9)):
        assert_close(fast(student, teacher, loss), reference(student, teacher, loss), 1e-12, 1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("constant", ["student", "teacher", "both"])
@pytest.mark.parametrize("loss", [Pearson(), LogitPearson(), LogitCosine()], ids=str)
def test_without_variance_the_correlation_is_0(loss, constant, dtype):
    student, teacher = (logits.to(dtype) for logits in random_logits(2, 1000))
    number = 0.0 if loss == LogitCosine() else 0.1
    student = torch.full_like(student, number) if constant in ("student", "both") else student
    teacher = torch.full_like(teacher, number) if constant in ("teacher", "both") else teacher
    value, gradient = fast(student, teacher, loss)
    assert torch.equal(value, torch.ones_like(value))
    assert torch.equal(gradient, torch.zeros_like(gradient))


def test_opposed_logits_are_at_distance_2():
    student, _ = random_logits(4, 50)
    for loss in (LogitPearson(), LogitCosine()):
        assert fast(-student, student, loss)[0].tolist() == pytest.approx([2.0] * 4)


@settings(max_examples=10, deadline=None)
@given(logits=rows, epsilon=st.sampled_from([0.05, 0.1, 1.0]))
def test_sinkhorn_is_a_mean_distance_to_the_tokens_of_the_group(logits, epsilon):
    student, teacher = logits
    distances = (teacher.softmax(-1)[:, None] - student.softmax(-1)).abs().sum(-1)
    value, _ = fast(student, teacher, Sinkhorn(group=3, epsilon=epsilon))
    assert (value >= distances.amin(0) - 1e-12).all() and (value <= distances.amax(0) + 1e-12).all()
    alone, _ = fast(student, teacher, Sinkhorn(group=1))
    torch.testing.assert_close(alone, distances.diagonal())


def test_sinkhorn_groups_do_not_reach_into_another_sequence_or_over_a_masked_token():
    student, teacher = random_logits(2, 5, 20)
    counted = torch.tensor([[True, False, True, True, True], [True] * 5])
    loss = Sinkhorn(group=3)
    value, gradient = fast(student, teacher, loss, counted=counted)
    for row in (0, 1):
        own = fast(student[row], teacher[row], loss, counted=counted[row])
        assert torch.equal(value[row], own[0]) and torch.equal(gradient[row], own[1])
    pair, _ = fast(student[0, [0, 2]], teacher[0, [0, 2]], loss)
    torch.testing.assert_close(value[0, [0, 2]], pair)


def test_preference_of_one_token_is_log_2_without_a_gradient():
    student, teacher = random_logits(3, 20)
    student[:, 4] = teacher[:, 4] = 30.0
    student[1, 2] = teacher[1, 7] = 30.0  # ties: 2 for the student, 4 for the teacher
    value, gradient = fast(student, teacher, Preference())
    assert value[[0, 2]].tolist() == pytest.approx([math.log(2.0)] * 2)
    assert (gradient[[0, 2]] == 0).all()
    assert gradient[1].nonzero().flatten().tolist() == [2, 4]


@pytest.mark.parametrize("loss", LOSSES, ids=str)
def test_columns_of_neither_model_are_outside(loss):
    student, teacher = random_logits(4, 60)
    kept = torch.arange(60) % 3 != 1
    alone = fast(student[:, kept], teacher[:, kept], loss)
    student, teacher = (logits.masked_fill(~kept, -math.inf) for logits in (student, teacher))
    value, gradient = fast(student, teacher, loss)
    assert_close((value, gradient[:, kept]), alone, 1e-12, 1e-12)
    assert torch.equal(gradient[:, ~kept], torch.zeros_like(gradient[:, ~kept]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("loss", [loss for loss in LOSSES if not isinstance(loss, AdaptiveKL | Preference)], ids=str)
def test_a_teacher_of_few_columns(loss, dtype):
    student, teacher = (logits.to(dtype) for logits in random_logits(4, 60))
    teacher[:, 7:] = -math.inf
    tolerance = 1e-12 if dtype == torch.float64 else 5e-6
    assert_close(fast(student, teacher, loss), reference(student, teacher, loss), tolerance, tolerance)


@pytest.mark.parametrize("loss", [AdaptiveKL(), Preference()], ids=str)
def test_these_are_infinite_where_the_student_likes_what_the_teacher_excludes(loss):
    student, teacher = random_logits(1, 60)
    teacher[:, 7:], student[:, 9] = -math.inf, 20.0
    assert fast(student, teacher, loss)[0].item() == reference(student, teacher, loss)[0].item() == math.inf


@pytest.mark.parametrize("junk", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("loss", LOSSES, ids=str)
def test_what_does_not_count_spreads_nothing(loss, junk):
    student, teacher = random_logits(2, 4, 30)
    counted = torch.tensor([[True, True, False, True], [False, True, True, True]])
    wanted = fast(student, teacher, loss, counted=counted)
    student[~counted], teacher[~counted] = junk, -junk
    value, gradient = fast(student, teacher, loss, counted=counted)
    assert torch.equal(value, wanted[0]) and torch.equal(gradient, wanted[1])
    assert (value[~counted] == 0).all() and (gradient[~counted] == 0).all()


@pytest.mark.parametrize("loss", LOSSES, ids=str)
def test_a_weight_of_0_gives_a_gradient_of_0(loss):
    student, teacher = random_logits(4, 30)
    if loss.group_size == 1:
        student[1] = math.nan
    student.requires_grad_()
    weights = torch.tensor([1.0, 0.0, 2.0, 0.5])
    shard = VocabShard(0, 30, 30)
    (gradient,) = torch.autograd.grad(
        vocab_parallel_logit_loss(student, teacher, loss, shard), student, weights.double()
    )
    assert torch.equal(gradient[1], torch.zeros(30).double())
    assert gradient.isfinite().all() and (gradient[[0, 2, 3]].abs().amax(-1) > 0).all()


@pytest.mark.parametrize("shape", [(30,), (1, 30), (0, 30), (2, 0, 30), (2, 3, 4, 30)], ids=str)
@pytest.mark.parametrize("loss", LOSSES, ids=str)
def test_shapes(loss, shape):
    student, teacher = random_logits(*shape)
    value, gradient = fast(student, teacher, loss, counted=torch.ones(shape[:-1], dtype=torch.bool))
    assert value.shape == shape[:-1] and gradient.shape == shape
    if len(shape) > 1:
        torch.testing.assert_close(value, reference_logit_loss(loss, student, teacher))


@pytest.mark.parametrize("loss", LOSSES, ids=str)
def test_little_waits_for_backward(loss):
    student, teacher = (logits.float().requires_grad_() for logits in random_logits(64, 4096))
    value = vocab_parallel_logit_loss(student, teacher, loss, VocabShard(0, 4096, 4096))
    assert teacher.grad is None
    told = sum(tensor.nbytes for columns in value.grad_fn.columns for tensor in columns._cached)
    assert told <= 64 * 8 * 100
    value.sum().backward()
    assert student.grad is not None and teacher.grad is None


@dataclass(frozen=True)
class Margin(LogitLoss):
    """One's own: how far the student's likeliest column is above its mean."""

    @property
    def num_collectives(self) -> int:
        return 2

    def __call__(self, student: Tensor, teacher: Tensor, columns: Columns, counted: Tensor) -> Tensor:
        _, of_student, _ = columns.top_k(student, 1, student, teacher)
        (total,) = columns.sums(student)
        return of_student.squeeze(-1) - total / columns.size


def test_ones_own():
    assert Margin.name == "Margin"
    student, teacher = random_logits(3, 20)
    value, gradient = fast(student, teacher, Margin())
    torch.testing.assert_close(value, student.amax(-1) - student.mean(-1))
    one = torch.nn.functional.one_hot(student.argmax(-1), 20).double()
    torch.testing.assert_close(gradient, one - 1 / 20)


def test_names_are_those_of_the_registry():
    for name, make in LOGIT_LOSSES.items():
        assert make.name == name


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AdaptiveKL(mu=1.0), "akl: expected mu between 0 and 1"),
        (lambda: AdaptiveKL(mu="x"), "akl: expected mu to be a finite number"),
        (lambda: AdaptiveKL(crossing="middle"), "akl: expected crossing to be tail or head, got 'middle'"),
        (lambda: ClippedKL(), "expected either top_k or mass, got top_k None and mass None"),
        (lambda: ClippedKL(top_k=3, mass=0.5), "expected either top_k or mass"),
        (lambda: ClippedKL(top_k=1), "top_k to be a whole number of at least 2"),
        (lambda: ClippedKL(mass=0), "mass between 0 and 1"),
        (lambda: Ranking(top_k=2.5), "ranking: expected top_k to be a whole number"),
        (lambda: Ranking(top_k=math.nan), "ranking: expected top_k to be a whole number"),
        (lambda: Ranking(top_k=math.inf), "ranking: expected top_k to be a whole number"),
        (lambda: Ranking(teacher_steepness=0), "ranking: expected teacher_steepness to be a finite number above 0"),
        (lambda: Sinkhorn(group=65), r"sinkhorn: expected group in 1 .. 64, got 65"),
        (lambda: Sinkhorn(epsilon=1e-3), "sinkhorn: expected epsilon of at least 0.01"),
        (lambda: Sinkhorn(iterations=0), "sinkhorn: expected iterations to be a whole number of at least 1"),
        (lambda: Preference(beta=-1), "preference: expected beta to be a finite number above 0"),
        (lambda: LogitMSE(centered=1), "logit_mse: expected centered to be true or false"),
    ],
)
def test_bad_parameters_are_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_bad_input_is_refused():
    student, teacher = random_logits(3, 20)
    shard, loss = VocabShard(0, 20, 20), Pearson()
    for args, how, message in (
        ((student, teacher[:2], loss, shard), {}, "one shape"),
        ((student.long(), teacher, loss, shard), {}, "student logits of a floating dtype"),
        ((student, teacher, "pearson", shard), {}, "expected a LogitLoss such as AdaptiveKL"),
        ((student, teacher, loss, VocabShard(0, 21, 21)), {}, "at least 21 columns"),
        ((student, teacher, loss, shard), {"temperature": 0.0}, "temperature .* above 0"),
        ((student, teacher, loss, shard), {"counted": torch.ones(3)}, "dtype torch.bool, got torch.float32"),
        ((student, teacher, loss, shard), {"counted": torch.ones(2, dtype=torch.bool)}, "counted of shape"),
    ):
        with pytest.raises(ConfigError, match=message):
            vocab_parallel_logit_loss(*args, **how)
