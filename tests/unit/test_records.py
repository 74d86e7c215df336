"""Losses on teacher records are the dense fp64 form on K + 1 buckets, and the live loss if every token is kept."""

import math
from dataclasses import replace

import kernel_cases
import pytest
import torch
from megatron.training.distillation.cached_logits_loss import topk_kl_div
from record_cases import records_of, with_draws
from torch import Tensor

from abkd_megatron import AlphaBeta, ToDi, kernels
from abkd_megatron.errors import ConfigError
from abkd_megatron.losses import (
    Divergence,
    JensenShannon,
    TotalVariation,
    WeightedSum,
    reference_bucketed_divergence,
    reference_cross_entropy,
    reference_divergence,
    registry,
)
from abkd_megatron.losses.objective import Objective, ScheduledObjective
from abkd_megatron.losses.schedule import Schedule
from abkd_megatron.vocab_parallel import (
    TeacherRecords,
    VocabShard,
    vocab_parallel_distillation,
    vocab_parallel_record_distillation,
    vocab_parallel_record_distillation_head,
)
from abkd_megatron.vocab_parallel.noise import places_in_tail
from abkd_megatron.vocab_parallel.teacher_records import BUCKETED_KL, SAMPLED_KL
from abkd_megatron.vocab_parallel.truncate import truncate

ARGUMENTS = {"alpha_beta": (0.3, 0.6)}
REGISTRY = {name: make(*ARGUMENTS.get(name, ())) for name, make in registry.DIVERGENCES.items()}
DIVERGENCES = {**REGISTRY, **kernel_cases.DIVERGENCES, **kernel_cases.OTHERS}
TWINS = {"ab(1e-9,0.5)": AlphaBeta(0.0, 0.5)}
"""The reference cancels near a limit."""
VOCAB, TOKENS, WIDTH = 130, (2, 4), 137
TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 1e-5}


@pytest.fixture(params=["eager", "cpp"])
def kernel(request):
    with kernels.using(request.param):
        yield request.param


def dense(dtype: torch.dtype, near: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """Student, teacher, with a token on which they are `near`, and labels: one the likeliest token, one ignored."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = 2 * torch.randn(2, *TOKENS, VOCAB, generator=generator, dtype=torch.float64)
    if near:
        student[0, 0] = teacher[0, 0] + 0.01 * student[0, 0]
    student, teacher = student.to(dtype), teacher.to(dtype)
    labels = torch.randint(VOCAB, TOKENS, generator=generator)
    labels[0, 1], labels[1, 0] = teacher[0, 1].argmax(), -1
    return student, teacher, labels


def padded(logits: Tensor) -> Tensor:
    wide = logits.new_full((*logits.shape[:-1], WIDTH), math.nan)
    wide[..., :VOCAB] = logits
    return wide


def check(divergence: Divergence, dtype: torch.dtype, num_kept: int, temperature: float, twin: Divergence) -> None:
    student, teacher, labels = dense(dtype)
    records = records_of(teacher, num_kept, labels, temperature, torch.promote_types(dtype, torch.float32))
    leaf = padded(student).requires_grad_()
    shard = VocabShard.megatron(WIDTH, None, VOCAB)
    terms = vocab_parallel_record_distillation(leaf, records, divergence, labels, shard, temperature)
    weights = torch.rand(2, *TOKENS, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    loss = weights[0] * terms.divergence + weights[1] * terms.cross_entropy
    (gradient,) = torch.autograd.grad(loss.sum(), leaf)

    exact = student.double().requires_grad_()
    in_shape = [it.view(*TOKENS, *it.shape[1:]).double() for it in (records.ids, records.log_probs, records.log_rest)]
    wanted = reference_bucketed_divergence(twin, exact, *in_shape, temperature)
    cross_entropy = reference_cross_entropy(exact, labels.clamp_min(0)) * (labels >= 0)
    (wanted_gradient,) = torch.autograd.grad((weights[0] * wanted + weights[1] * cross_entropy).sum(), exact)

    tolerance = TOLERANCES[dtype]
    if twin is not divergence:
        tolerance = max(tolerance, 1e-7)
    # The rounding of log q, relative to the logarithms that are compared.
    torch.testing.assert_close(terms.divergence.double(), wanted, rtol=tolerance, atol=tolerance * 1e-2)
    torch.testing.assert_close(terms.cross_entropy.double(), cross_entropy, rtol=tolerance, atol=0)
    allowed = tolerance * wanted_gradient.abs().amax(dim=-1, keepdim=True)
    if dtype == torch.bfloat16:
        allowed = allowed + wanted_gradient.abs() * 2**-8
    assert ((gradient[..., :VOCAB].double() - wanted_gradient).abs() <= allowed).all()
    assert (gradient[..., VOCAB:] == 0).all()


@pytest.mark.parametrize("num_kept", [1, 4, VOCAB])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_equals_the_dense_form(name, temperature, num_kept):
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        check(DIVERGENCES[name], dtype, num_kept, temperature, TWINS.get(name, DIVERGENCES[name]))


def test_equals_the_dense_form_in_the_eager_kernel():
    with kernels.using("eager"):
        for divergence in (AlphaBeta(0.2, 0.7), ToDi(), JensenShannon()):
            for dtype in (torch.float32, torch.bfloat16):
                for temperature in (1.0, 2.0):
                    check(divergence, dtype, 4, temperature, divergence)


def live_and_recorded(
    student: Tensor, teacher: Tensor, labels: Tensor, divergence: Divergence, temperature: float
) -> list[dict[str, Tensor]]:
    found = []
    shard = VocabShard.megatron(student.shape[-1])
    records = records_of(teacher, student.shape[-1], labels, temperature, torch.float64)
    for compute, reference in (
        (vocab_parallel_distillation, teacher),
        (vocab_parallel_record_distillation, records),
    ):
        leaf = student.clone().requires_grad_()
        terms = compute(leaf, reference, divergence, labels, shard, temperature)
        gradients = [torch.autograd.grad(term.sum(), leaf, retain_graph=True)[0] for term in terms[:2]]
        found.append({"divergence": terms[0].detach(), "cross entropy": terms[1].detach(), **terms.metrics})
        found[-1] |= {"gradient": gradients[0], "gradient of ce": gradients[1]}
    live, recorded = found
    if BUCKETED_KL in recorded:
        recorded["kl to teacher"] = recorded.pop(BUCKETED_KL)
    else:
        del live["kl to teacher"]
    assert set(live) == set(recorded)
    return found


def test_forward_kl_is_that_of_megatrons_own_cache():
    student, teacher, labels = dense(torch.bfloat16)
    student = student.transpose(0, 1).contiguous()  # theirs is [s, b, V]
    records = records_of(teacher, 16, labels, 1.0, torch.float32)
    shard = VocabShard.megatron(VOCAB)
    leaf = student.transpose(0, 1).contiguous().requires_grad_()
    ours = vocab_parallel_record_distillation(leaf, records, DIVERGENCES["forward_kl"], labels, shard).divergence
    kept = [it.view(*TOKENS, -1).transpose(0, 1) for it in (records.log_probs, records.ids.long())]
    their_leaf = student.clone().requires_grad_()
    theirs = topk_kl_div(their_leaf, *kept, tp_size=1, tp_rank=0, tp_group=None, add_ghost_token=True)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)  # their rest is 1 - sum in fp32
    ours.sum().backward()
    theirs.sum().backward()
    torch.testing.assert_close(leaf.grad, their_leaf.grad.transpose(0, 1), rtol=2**-7, atol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_all_tokens_kept_is_the_live_loss(kernel, name, temperature):
    # Where the models are near, the live loss is off by more, in fp32; buckets are compared in fp64.
    student, teacher, labels = dense(torch.float32, near=False)
    live, recorded = live_and_recorded(student, teacher, labels, DIVERGENCES[name], temperature)
    for key, wanted in live.items():
        scale = wanted.abs().clamp_min(0.1)
        if key.startswith("gradient"):
            scale = wanted.abs().amax(dim=-1, keepdim=True).clamp_min(1e-30)
        off = ((recorded[key] - wanted).abs() / scale).max()
        assert off <= 1e-5, (key, off)


@pytest.mark.parametrize("setting", [name for name, it in kernel_cases.SETTINGS.items() if it[2]])
@pytest.mark.parametrize("name", ["ab(0.2,0.7)", "ab(1,0)", "todi", "js", "tv"])
def test_hard_logits_are_taken_as_live_ones(name, setting):
    """Excluded columns, one-hot models, ties, other tokens' infinities."""
    generator = torch.Generator().manual_seed(0)
    student, teacher, labels, temperature = kernel_cases.inputs(setting, generator, "cpu")
    rows = [0, 1, 2, 3, 5, 6, 7]  # not the one that neither model has a token of
    student, teacher, labels = student[rows].contiguous(), teacher[rows].contiguous(), (labels - 300)[rows]
    live, recorded = live_and_recorded(student, teacher, labels, kernel_cases_of(name), temperature)
    finite = live["divergence"].isfinite()
    assert torch.equal(recorded["divergence"][~finite], live["divergence"][~finite])
    for key, wanted in live.items():
        got, scale = recorded[key], wanted.double().abs().clamp_min(1.0)
        if key.startswith("gradient"):
            # Of a one-hot student it is 0, of which the live one is off by the rounding of its terms.
            scale = kernel_cases.row_scale(wanted).clamp_min(0.1).expand(wanted.shape)
            if wanted.dtype == torch.bfloat16:
                scale = scale + 2**-8 / 1e-5 * wanted.double().abs()
        at = finite if key == "gradient" else slice(None)
        assert (error := kernel_cases.error(got[at], wanted[at], scale[at])) <= 1e-5, (key, error)


def kernel_cases_of(name: str) -> Divergence:
    return {**kernel_cases.DIVERGENCES, **kernel_cases.OTHERS}[name]


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("num_kept", [1, 16, 2100])
@pytest.mark.parametrize("name", ["ab(0.2,0.7)", "ab(1,0)", "ab(0,1)", "todi", "js", "sum with todi"])
def test_maxima_that_rise_late(kernel, name, num_kept, temperature):
    student, teacher = kernel_cases.hard_pairs(2100, torch.Generator().manual_seed(0))
    labels = torch.arange(7) * 299
    records = records_of(teacher, num_kept, labels, temperature, torch.float64)
    divergence = kernel_cases_of(name)
    exact = student.double().requires_grad_()
    wanted = reference_bucketed_divergence(
        divergence, exact, records.ids, records.log_probs, records.log_rest, temperature
    )
    (wanted_gradient,) = torch.autograd.grad(wanted.sum(), exact)
    leaf = student.clone().requires_grad_()
    terms = vocab_parallel_record_distillation(
        leaf, records, divergence, labels, VocabShard.megatron(2100), temperature
    )
    (gradient,) = torch.autograd.grad(terms.divergence.sum(), leaf)
    torch.testing.assert_close(terms.divergence.double(), wanted.detach(), rtol=1e-5, atol=1e-6)
    largest = wanted_gradient.abs().amax(dim=-1, keepdim=True)
    assert ((gradient - wanted_gradient).abs() <= 1e-5 * largest + 1e-6).all()


def test_a_small_rest_keeps_its_digits():
    """The rest's mass, 1e-30, is lost in 1 - sum."""
    student = torch.full((1, 64), -70.0)
    teacher = torch.full((1, 64), -80.0)
    student[0, :2], teacher[0, :2] = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    labels = torch.zeros(1, dtype=torch.int64)
    records = records_of(teacher, 2, labels)
    for divergence in (AlphaBeta(0.0, 0.0), AlphaBeta(1.0, 0.0)):
        exact = student.double().requires_grad_()
        wanted = reference_bucketed_divergence(
            divergence, exact, records.ids, records.log_probs.double(), records.log_rest.double()
        )
        (wanted_gradient,) = torch.autograd.grad(wanted.sum(), exact)
        leaf = student.clone().requires_grad_()
        terms = vocab_parallel_record_distillation(leaf, records, divergence, labels, VocabShard.megatron(64))
        (gradient,) = torch.autograd.grad(terms.divergence.sum(), leaf)
        torch.testing.assert_close(terms.divergence.double(), wanted.detach(), rtol=1e-6, atol=0)
        torch.testing.assert_close(gradient.double(), wanted_gradient, rtol=1e-5, atol=1e-40)


@pytest.mark.parametrize("divergence", [AlphaBeta(0.2, 0.7), AlphaBeta(0.0, 0.0), ToDi(detach=False), JensenShannon()])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_gradcheck(divergence, temperature):
    student, teacher, labels = (it[0, :2] for it in dense(torch.float64))
    student, teacher, labels = student[:, :9].contiguous(), teacher[:, :9], labels % 9
    records = records_of(teacher, 3, labels, temperature, torch.float64)

    def losses(logits: Tensor) -> Tensor:
        terms = vocab_parallel_record_distillation(
            logits, records, divergence, labels, VocabShard.megatron(9), temperature
        )
        return terms.divergence + 0.3 * terms.cross_entropy

    torch.autograd.gradcheck(losses, student.requires_grad_())


def test_metrics():
    student, teacher, labels = dense(torch.float32)
    shard = VocabShard.megatron(VOCAB)
    records = records_of(teacher, 5, labels)
    live = vocab_parallel_distillation(student, teacher, ToDi(), labels, shard)
    got = vocab_parallel_record_distillation(student, records, ToDi(), labels, shard)
    names = [BUCKETED_KL if name == "kl to teacher" else name for name in live.metrics]
    assert list(got.metrics) == names
    for name, wanted in live.metrics.items():
        if name != "kl to teacher":
            torch.testing.assert_close(got.metrics[name], wanted, rtol=1e-5, atol=1e-5, msg=name)
    kl = got.metrics[BUCKETED_KL]
    assert (kl <= live.metrics["kl to teacher"] * (1 + 1e-5)).all() and (kl > 0).all()

    bare = TeacherRecords(records.ids.int(), records.log_probs, records.log_rest)
    fewer = vocab_parallel_record_distillation(student, bare, ToDi(), labels, shard, 2.0)
    unknown = ("teacher lm loss", "kl to teacher", "teacher entropy")
    assert list(fewer.metrics) == [name for name in live.metrics if name not in unknown]


F_DIVERGENCES = [AlphaBeta(1, 0), AlphaBeta(0, 1), AlphaBeta(0.3, 0.7), AlphaBeta(2, -1), JensenShannon(0.3)]
F_DIVERGENCES += [TotalVariation(), ToDi(), WeightedSum([(0.5, AlphaBeta(1, 0)), (2.0, TotalVariation())])]


@pytest.mark.parametrize("divergence", F_DIVERGENCES, ids=str)
def test_buckets_bound_an_f_divergence_from_below(divergence):
    student, teacher, labels = dense(torch.float64)
    whole = reference_divergence(divergence, student, teacher)
    before = torch.zeros_like(whole)
    for num_kept in (1, 2, 8, 64, VOCAB):
        records = records_of(teacher, num_kept, labels, dtype=torch.float64)
        value = vocab_parallel_record_distillation(
            student, records, divergence, labels, VocabShard.megatron(VOCAB)
        ).divergence
        assert (value >= before - 1e-12).all() and (value <= whole + 1e-12).all()
        before = value


@pytest.mark.parametrize("divergence", [AlphaBeta(0.8, 0.3), AlphaBeta(1, 1)], ids=str)
def test_buckets_bound_no_other_divergence(divergence):
    student, teacher = torch.zeros(1, 64, dtype=torch.float64), torch.zeros(1, 64, dtype=torch.float64)
    student[0, 0], teacher[0, 0] = 4.0, 1.0
    labels = torch.zeros(1, dtype=torch.int64)
    records = records_of(teacher, 1, labels, dtype=torch.float64)
    value = vocab_parallel_record_distillation(student, records, divergence, labels, VocabShard.megatron(64)).divergence
    assert value > reference_divergence(divergence, student, teacher)


def test_padding_of_records_is_not_read():
    student, teacher, labels = dense(torch.float32)
    shard = VocabShard.megatron(VOCAB)
    few = records_of(teacher, 3, labels)
    wide = TeacherRecords(
        torch.cat([torch.full_like(few.ids[:, :1], -1), few.ids, torch.full_like(few.ids, -7)], dim=-1),
        torch.cat([few.log_probs[:, :1] + math.nan, few.log_probs, few.log_probs], dim=-1),
        few.log_rest,
        few.entropy,
        few.label_log_prob,
    )
    found = []
    for records in (few, wide):
        leaf = student.clone().requires_grad_()
        terms = vocab_parallel_record_distillation(leaf, records, AlphaBeta(0.2, 0.7), labels, shard)
        (gradient,) = torch.autograd.grad((terms.divergence + terms.cross_entropy).sum(), leaf)
        found.append([terms.divergence, terms.cross_entropy, gradient, *terms.metrics.values()])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)


def test_an_id_beyond_the_vocabulary_trains_nothing_quietly():
    student, teacher, labels = dense(torch.float32)
    records = records_of(teacher, 3, labels)
    records.ids[1, 2] = VOCAB
    for divergence in (AlphaBeta(0.2, 0.7), TotalVariation()):
        value = vocab_parallel_record_distillation(
            student, records, divergence, labels, VocabShard.megatron(VOCAB)
        ).divergence.flatten()
        assert value[1].isnan() and value.isfinite().sum() == len(value) - 1


def test_a_teacher_without_rest():
    """Its other columns are excluded: they have probability 0 for it, and some for the student."""
    student, teacher, labels = dense(torch.float64)
    kept = teacher.topk(4).values[..., -1:]
    teacher = teacher.masked_fill(teacher < kept, -math.inf)
    records = records_of(teacher, 4, labels, dtype=torch.float64)
    assert records.log_rest.isneginf().all()
    for divergence in (AlphaBeta(1, 0), AlphaBeta(0.2, 0.7), TotalVariation(), JensenShannon()):
        leaf, exact = student.clone().requires_grad_(), student.clone().requires_grad_()
        terms = vocab_parallel_record_distillation(leaf, records, divergence, labels, VocabShard.megatron(VOCAB))
        in_shape = [it.view(*TOKENS, *it.shape[1:]) for it in (records.ids, records.log_probs, records.log_rest)]
        wanted = reference_bucketed_divergence(divergence, exact, *in_shape)
        torch.testing.assert_close(terms.divergence, wanted, rtol=1e-10, atol=0)
        torch.testing.assert_close(
            *(torch.autograd.grad(of.sum(), at)[0] for of, at in ((terms.divergence, leaf), (wanted, exact))),
            rtol=1e-10,
            atol=1e-14,
        )


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_tokens_of_no_weight_have_no_gradient(kernel, broken, temperature):
    student, teacher, labels = dense(torch.float32)
    student[0, 0, 3] = student[1, 2, int(teacher[1, 2].argmax())] = broken
    labels[0, 0] = 5
    live = vocab_parallel_distillation(student, teacher, ToDi(), labels, VocabShard.megatron(VOCAB), temperature)
    records = records_of(teacher, 4, labels, temperature)
    leaf = student.clone().requires_grad_()
    terms = vocab_parallel_record_distillation(leaf, records, ToDi(), labels, VocabShard.megatron(VOCAB), temperature)
    for got, wanted in zip(terms[:2], live[:2], strict=True):
        assert torch.equal(got.isfinite(), wanted.isfinite())
    mask = torch.ones(TOKENS)
    mask[0, 0] = mask[1, 2] = 0.0
    for loss in (terms.divergence, terms.cross_entropy, terms.divergence + terms.cross_entropy):
        loss = torch.where(mask == 0, 0.0, loss * mask).sum()
        (gradient,) = torch.autograd.grad(loss, leaf, retain_graph=True)
        assert gradient.isfinite().all() and (gradient[mask == 0] == 0).all()
        assert (gradient[mask == 1] != 0).any(dim=-1).sum() >= 5


def test_in_place():
    student, teacher, labels = dense(torch.float32)
    leaf = student.clone().requires_grad_()
    records, shard = records_of(teacher, 4, labels), VocabShard.megatron(VOCAB)
    found = []
    for in_place in (False, True):
        logits = leaf * 1.0
        terms = vocab_parallel_record_distillation(logits, records, ToDi(), labels, shard, 1.0, in_place)
        loss = (terms.divergence + terms.cross_entropy).sum()
        found.append(torch.autograd.grad(loss, leaf, retain_graph=True)[0])
        assert torch.equal(logits.detach(), found[-1] if in_place else student)
    assert torch.equal(*found)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, leaf)
    with pytest.raises(ConfigError, match="leaf"):
        vocab_parallel_record_distillation(leaf, records, ToDi(), labels, shard, 1.0, True)


def test_selected():
    student, teacher, labels = dense(torch.float32)
    student[0, 1, 0] = math.nan
    selected = torch.ones(TOKENS, dtype=torch.bool)
    selected[0, 1] = selected[1, 3] = False
    leaf = student.clone().requires_grad_()
    records, shard = records_of(teacher, 4, labels), VocabShard.megatron(VOCAB)
    whole = vocab_parallel_record_distillation(leaf, records, ToDi(), labels, shard)
    terms = vocab_parallel_record_distillation(leaf, records, ToDi(), labels, shard, selected=selected)
    for name in whole.metrics:
        assert torch.equal(terms.metrics[name], torch.where(selected, whole.metrics[name], 0.0))
    assert (terms.divergence[~selected] == 0).all()
    (gradient,) = torch.autograd.grad(terms.divergence.sum(), leaf)
    assert (gradient[~selected] == 0).all() and (gradient[selected] != 0).any(dim=-1).all()
    torch.testing.assert_close(terms.cross_entropy, whole.cross_entropy, rtol=0, atol=0, equal_nan=True)


def head_inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(*TOKENS, 16, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(WIDTH, 16, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    _, teacher, labels = dense(torch.float64)
    return hidden, weight, teacher, labels


@pytest.mark.parametrize("in_forward", [True, False], ids=["in forward", "in backward"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("temperature", "scale", "per_token"), [(1.0, 1.0, False), (2.0, 0.5, True)])
def test_the_fused_head_equals_logits_that_exist(dtype, in_forward, temperature, scale, per_token):
    hidden, weight, teacher, labels = head_inputs(dtype)
    records = records_of(teacher, 4, labels, temperature)
    shard = VocabShard.megatron(WIDTH, None, VOCAB)
    mask = torch.arange(8).view(TOKENS) % 3
    kd_weight = torch.rand(TOKENS, generator=torch.Generator().manual_seed(1)) if per_token else 0.8
    selected = labels != labels[0, 0] if per_token else None
    for divergence in (AlphaBeta(0.2, 0.7), ToDi(), JensenShannon()):
        wanted = vocab_parallel_record_distillation(
            (hidden @ weight.t()) * scale, records, divergence, labels, shard, temperature, selected=selected
        )
        loss = kd_weight * wanted.divergence + 0.3 * wanted.cross_entropy
        expected = [loss, *torch.autograd.grad((0.37 * mask * loss).sum(), (hidden, weight))]
        loss, terms = vocab_parallel_record_distillation_head(
            *(hidden, weight, records, divergence, labels, shard),
            kd_weight=kd_weight,
            lm_weight=0.3,
            temperature=temperature,
            token_weights=mask if in_forward else None,
            student_scale=scale,
            chunk_tokens=3,
            selected=selected,
        )
        got = [loss, *torch.autograd.grad((0.37 * mask * loss).sum(), (hidden, weight))]
        expected += [wanted.divergence, wanted.cross_entropy, *wanted.metrics.values()]
        got += [terms.divergence, terms.cross_entropy, *terms.metrics.values()]
        assert list(terms.metrics) == list(wanted.metrics)
        relative = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
        for one, other in zip(got, expected, strict=True):
            allowed = relative * other.detach().abs().amax()
            assert ((one.detach() - other.detach()).abs() <= allowed).all()


@pytest.mark.parametrize("in_forward", [True, False], ids=["in forward", "in backward"])
def test_the_fused_head_selects_by_metrics_and_adds_to_main_grad(in_forward):
    hidden, weight, teacher, labels = head_inputs(torch.bfloat16)
    records, shard = records_of(teacher, 4, labels), VocabShard.megatron(WIDTH, None, VOCAB)
    limit = records.entropy.median()

    def run(into_main_grad: bool) -> tuple[Tensor, ...]:
        weight.main_grad = torch.zeros(weight.shape)
        loss, terms = vocab_parallel_record_distillation_head(
            *(hidden, weight, records, ToDi(), labels, shard),
            token_weights=torch.ones(TOKENS) if in_forward else None,
            chunk_tokens=3,
            into_main_grad=into_main_grad,
            select=lambda metrics: metrics["teacher entropy"] > limit,
        )
        off = records.entropy.view(TOKENS) <= limit
        assert (terms.divergence[off] == 0).all() and (terms.divergence[~off] != 0).all()
        assert 0 < off.sum() < off.numel()
        return torch.autograd.grad(loss.sum(), (hidden, weight))

    alone, added = run(False), run(True)
    assert torch.equal(alone[0], added[0])
    torch.testing.assert_close(weight.main_grad.bfloat16(), alone[1], rtol=2**-7, atol=0)


def test_other_weights_than_were_said_raise_in_backward():
    hidden, weight, teacher, labels = head_inputs(torch.float32)
    records, shard = records_of(teacher, 4, labels), VocabShard.megatron(WIDTH, None, VOCAB)
    loss, _ = vocab_parallel_record_distillation_head(
        hidden, weight, records, ToDi(), labels, shard, token_weights=torch.ones(TOKENS)
    )
    with pytest.raises(RuntimeError, match="token weight"):
        (loss * torch.arange(8).view(TOKENS)).sum().backward()


def test_no_tokens():
    records = TeacherRecords(torch.zeros(0, 3, dtype=torch.int64), torch.zeros(0, 3), torch.zeros(0))
    leaf = torch.zeros(0, 7, requires_grad=True)
    terms = vocab_parallel_record_distillation(
        leaf, records, ToDi(), torch.zeros(0, dtype=torch.int64), VocabShard.megatron(7)
    )
    terms.divergence.sum().backward()
    assert terms.divergence.shape == (0,) and leaf.grad.shape == (0, 7)


def run_with(divergence: object = None, labels: Tensor | None = None, **of_records: object) -> None:
    student, teacher, some_labels = dense(torch.float32)
    records = records_of(teacher, 3, some_labels)
    fields = {**vars(records), **of_records}
    vocab_parallel_record_distillation(
        student,
        TeacherRecords(**fields),
        divergence or ToDi(),
        some_labels if labels is None else labels,
        VocabShard.megatron(VOCAB),
    )


@pytest.mark.parametrize("name", registry.LOGIT_LOSSES)
def test_logit_losses_are_refused_by_name(name):
    make = registry.LOGIT_LOSSES[name]
    loss = make(top_k=3) if name == "clipped_kl" else make()
    with pytest.raises(ConfigError, match=loss.name):
        run_with(loss)


@pytest.mark.parametrize(
    "changes",
    [
        {"ids": torch.zeros(8, 2, dtype=torch.int64)},
        {"ids": torch.zeros(8, 3)},
        {"ids": torch.zeros(8, 3, dtype=torch.int16)},
        {"ids": torch.zeros(8, 0, dtype=torch.int64), "log_probs": torch.zeros(8, 0)},
        {"log_probs": torch.zeros(8, 3, dtype=torch.int64)},
        {"log_rest": torch.zeros(7)},
        {"log_rest": torch.zeros(8, 1)},
        {"log_rest": None},
        {"entropy": torch.zeros(9)},
        {"label_log_prob": [0.0] * 8},
        {"labels": torch.zeros(2, 3, dtype=torch.int64)},
        {"divergence": "todi"},
    ],
    ids=str,
)
def test_bad_input_is_refused(changes):
    with pytest.raises(ConfigError):
        run_with(**changes)
    student, _, labels = dense(torch.float32)
    with pytest.raises(ConfigError, match="TeacherRecords"):
        vocab_parallel_record_distillation(student, student, ToDi(), labels, VocabShard.megatron(VOCAB))


# ---- draws


SUITABLE = {
    "forward_kl": AlphaBeta(1, 0),
    "alpha_beta(0.8, 0.3)": AlphaBeta(0.8, 0.3),
    "a sum": WeightedSum([(1.0, AlphaBeta(1, 0)), (0.5, AlphaBeta(0.9, 0.1))]),
}


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("name", SUITABLE)
def test_draws_are_unbiased(name: str, temperature: float) -> None:
    """The mean over draws of value and gradient is the full loss's, within 5 standard errors of each number."""
    size, num_seeds, number = 40, 3000, 3
    generator = torch.Generator().manual_seed(2)
    student, teacher = 2 * torch.randn(2, 1, number, size, generator=generator, dtype=torch.float64)
    student = 0.5 * student + 0.5 * teacher
    labels = torch.randint(size, (num_seeds, number), generator=generator)
    places = places_in_tail(labels, 4)
    shard = VocabShard(0, size, size)
    records = truncate(teacher.expand(num_seeds, -1, -1).flatten(0, 1), labels.flatten(), shard, 3, temperature, places)
    leaf = student.repeat(num_seeds, 1, 1).requires_grad_()
    terms = vocab_parallel_record_distillation(leaf, records, SUITABLE[name], labels, shard, temperature)
    (gradient,) = torch.autograd.grad(terms.divergence.sum(), leaf)
    exact = student.requires_grad_()
    value = reference_divergence(SUITABLE[name], exact, teacher, temperature)
    (wanted,) = torch.autograd.grad(value.sum(), exact)
    found = [(terms.divergence.detach(), value.detach()), (gradient, wanted)]
    if temperature == 1.0:
        found.append((terms.metrics[SAMPLED_KL], reference_divergence(AlphaBeta(1, 0), exact.detach(), teacher)))
    for of_seeds, full in found:
        error = of_seeds.std(0) / num_seeds**0.5
        assert error.amax() < 0.05 * full.abs().amax(), "enough seeds to tell"
        assert ((of_seeds.mean(0) - full[0]).abs() <= 5 * error + 1e-6).all()


def test_divergences_that_draws_do_not_suit() -> None:
    student, teacher, labels = dense(torch.float64)
    records = with_draws(records_of(teacher, 4, labels), teacher, 3, 1.0)
    shard = VocabShard(0, VOCAB, VOCAB)
    suitable = {name for name, it in REGISTRY.items() if it.suits_draws}
    assert suitable == {"forward_kl"}
    others = [AlphaBeta(0.2, 0.7), AlphaBeta(0.8, 0.1), AlphaBeta(1.2, -0.1), AlphaBeta(0.9, 0.3), ToDi()]
    for divergence in (*others, WeightedSum([(1.0, AlphaBeta(1, 0)), (0.1, ToDi())])):
        with pytest.raises(ConfigError):
            vocab_parallel_record_distillation(student, records, divergence, labels, shard)
    for divergence in SUITABLE.values():
        vocab_parallel_record_distillation(student, records, divergence, labels, shard)
    for wrong in (torch.zeros(8, 7, dtype=torch.int32), torch.zeros(3, 3, dtype=torch.int32), torch.zeros(8, 3)):
        with pytest.raises(ConfigError):
            vocab_parallel_record_distillation(student, replace(records, draws=wrong), AlphaBeta(1, 0), labels, shard)


def test_schedules_are_within_the_rule_over_their_whole_range() -> None:
    def named(**schedules: Schedule) -> list[Divergence]:
        return list(ScheduledObjective(Objective(AlphaBeta(1, 0)), schedules).divergences())

    together = named(alpha=Schedule.linear(1, 0.8, end=10), beta=Schedule.linear(0, 0.2, end=10))
    assert together == [AlphaBeta(1, 0), AlphaBeta(0.8, 0.2)]
    apart = named(alpha=Schedule.linear(1, 0.8, end=10), beta=Schedule.linear(0, 0.2, end=20))
    assert AlphaBeta(0.8, 0) in apart and len(apart) == 4
    assert all(it.suits_draws for it in together) and not all(it.suits_draws for it in apart)
    assert named() == [AlphaBeta(1, 0)]
