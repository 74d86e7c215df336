"""A divergence on some tokens equals the dense fp64 form: losses, terms and gradients on 1, 2 and 4 gloo ranks.

With logits that exist, and from hidden states. One launch a world size runs all cases; the tests then read its results.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist
from harness import chosen, run_distributed
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from abkd_megatron import AlphaBeta, ToDi
from abkd_megatron.errors import ConfigError
from abkd_megatron.losses import Divergence
from abkd_megatron.losses.reference import reference_cross_entropy, reference_divergence
from abkd_megatron.losses.selection import TokenSelection
from abkd_megatron.vocab_parallel import VocabShard, vocab_parallel_distillation, vocab_parallel_distillation_head

WORLDS = [1, 2, 4]
TOKENS = (7, 3)
VOCAB, PADDED, HIDDEN, TEACHER_HIDDEN = 123, 128, 8, 12
KD, LM, FACTOR = 0.8, 0.3, 0.37
# Which tokens, by a mask that is known before the teacher's logits or by what the models say.
BY_POSITION = ("every third", "one", "none", "all")
BY_MODELS = ("entropy", "disagreement", "KL", "no token", "every token")
HOWS = ("materialized", "in place", "fused in forward", "fused in backward")


@dataclass(frozen=True)
class Case:
    which: str
    how: str
    dtype: torch.dtype
    divergence: Divergence = AlphaBeta(0.2, 0.7)  # noqa: RUF009 (frozen)
    temperature: float = 1.0

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.which}, {self.how}, {dtype}, {self.divergence}, T {self.temperature}"


CASES = [
    Case(which, how, dtype)
    for which, how, dtype in itertools.product((*BY_POSITION, *BY_MODELS), HOWS, (torch.float32, torch.bfloat16))
]
CASES += [
    Case(which, how, torch.float32, divergence, 2.0)
    for which, how, divergence in itertools.product(
        ("every third", "entropy"), HOWS, (AlphaBeta(1, 0), ToDi(), ToDi(2.0, detach=False))
    )
]
# With weights per token of both terms, some of them 0.
CASES += [
    Case(which, how, dtype)
    for which, how, dtype in itertools.product(
        ("weights", "weights, every third"), HOWS[2:], (torch.float32, torch.bfloat16)
    )
]


class Dense:
    """Everything in fp64 from the whole vocabulary, by plain autograd."""

    def __init__(self, case: Case, student: Tensor, teacher: Tensor, labels: Tensor) -> None:
        self.divergence = reference_divergence(
            case.divergence, student, teacher, temperature=case.temperature, vocab_size=VOCAB
        )
        known = labels.clamp_min(0)
        self.cross_entropy = torch.where(labels < 0, 0.0, reference_cross_entropy(student, known, VOCAB))
        log_q, log_p = (of[..., :VOCAB].detach().log_softmax(-1) for of in (student, teacher))
        self.metrics = {
            "teacher lm loss": torch.where(labels < 0, 0.0, -log_p.gather(-1, known[..., None])[..., 0]),
            "kl to teacher": (log_p.exp() * (log_p - log_q)).sum(-1),
            "teacher entropy": -(log_p.exp() * log_p).sum(-1),
            "student entropy": -(log_q.exp() * log_q).sum(-1),
            "top-1 agreement": (log_p.argmax(-1) == log_q.argmax(-1)).double(),
        }


def bound(values: Tensor) -> float:
    """Between two values near the middle that no rounding exchanges."""
    ordered = values.flatten().sort().values[5:-5]
    at = ordered.diff().argmax()
    return ordered[at : at + 2].mean().item()


def choice(case: Case, dense: Dense) -> tuple[Tensor, TokenSelection | None]:
    """The tokens, and the rule by which the models themselves would find them."""
    entropy, kl = dense.metrics["teacher entropy"], dense.metrics["kl to teacher"]
    at = torch.arange(TOKENS[0] * TOKENS[1]).view(TOKENS)
    if case.which == "entropy":
        rule = TokenSelection("teacher_entropy", at_least=bound(entropy), at_most=entropy.max().item() - 1e-3)
        return (entropy >= rule.at_least) & (entropy <= rule.at_most), rule
    if case.which == "disagreement":
        return dense.metrics["top-1 agreement"] == 0, TokenSelection("disagreement")
    if case.which == "KL":
        return kl >= bound(kl), TokenSelection("disagreement", kl_at_least=bound(kl))
    if case.which == "no token":
        return at < 0, TokenSelection("disagreement", kl_at_least=1e6)
    if case.which == "every token":
        return at >= 0, TokenSelection("teacher_entropy", at_most=1e6)
    if "weights" in case.which:
        return at % 3 == 2 if "third" in case.which else at >= 0, None
    return {"every third": at % 3 == 2, "one": at == 8, "none": at < 0, "all": at >= 0}[case.which], None


def run_case(case: Case, rank: int, world_size: int, group: dist.ProcessGroup | None) -> dict:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(case.dtype)

    width = PADDED // world_size
    mine = slice(rank * width, (rank + 1) * width)
    hidden, teacher_hidden = random(*TOKENS, HIDDEN), random(*TOKENS, TEACHER_HIDDEN)
    teacher_hidden[..., :4] += hidden[..., :4] * 2  # somewhat of one mind
    weight, teacher_weight = random(PADDED, HIDDEN), random(PADDED, TEACHER_HIDDEN)
    teacher_weight[:, :4] += weight[:, :4]
    labels = torch.randint(VOCAB, TOKENS, generator=generator)
    labels[1, 1] = -1
    mask = torch.randint(2, TOKENS, generator=generator).double()
    mask[0] = 0.0
    shard = VocabShard.megatron(width, group, VOCAB)

    def logits(of_hidden: Tensor, of_weight: Tensor) -> Tensor:
        exact = of_hidden @ of_weight.t()  # rounded as the models' are
        return exact + (exact.to(case.dtype).double() - exact).detach()

    leaves = hidden.double().requires_grad_(), weight.double().requires_grad_()
    dense = Dense(case, logits(*leaves), logits(teacher_hidden.double(), teacher_weight.double()), labels)
    chosen, rule = choice(case, dense)
    kd, lm = KD, LM
    if "weights" in case.which:
        kd, lm = (
            (torch.randint(4, TOKENS, generator=generator) - 1) * torch.rand(TOKENS, generator=generator) for _ in "12"
        )
    wanted = {
        "loss": torch.where(chosen, kd * dense.divergence, 0.0) + lm * dense.cross_entropy,
        "divergence": torch.where(chosen, dense.divergence, 0.0),
        "cross entropy": dense.cross_entropy,
        **{name: value if rule else torch.where(chosen, value, 0.0) for name, value in dense.metrics.items()},
    }
    of_hidden, of_weight = torch.autograd.grad((FACTOR * mask * wanted["loss"]).sum(), leaves)
    wanted |= {"of hidden": of_hidden, "of weight": of_weight[mine]}

    leaves = hidden.requires_grad_(), weight[mine].clone().requires_grad_()
    # What is not selected holds no number at all: nothing may come of it.
    if case.which in BY_POSITION:
        teacher_hidden[~chosen] = torch.nan
    if "fused" in case.how:
        loss, terms = vocab_parallel_distillation_head(
            leaves[0],
            leaves[1],
            teacher_hidden,
            teacher_weight[mine],
            case.divergence,
            labels,
            shard,
            kd_weight=kd,
            lm_weight=lm,
            temperature=case.temperature,
            token_weights=mask if case.how == "fused in forward" else None,
            chunk_tokens=4,
            selected=None if rule or case.which == "weights" else chosen,
            select=rule.of if rule else None,
        )
        found = terms
    else:
        teacher = teacher_hidden @ teacher_weight[mine].t()
        terms = vocab_parallel_distillation(
            leaves[0] @ leaves[1].t(),
            teacher if rule else teacher[chosen],
            case.divergence,
            labels,
            shard,
            case.temperature,
            gradient_in_place=case.how == "in place",
            selected=None if rule else chosen,
        )
        found = terms
        if rule:
            found = terms._replace(divergence=torch.where(rule.of(terms.metrics), terms.divergence, 0.0))
        loss = KD * found.divergence + LM * found.cross_entropy
    of_hidden, of_weight = torch.autograd.grad((FACTOR * mask * loss).sum(), leaves)
    of_hidden = of_hidden.double()
    if world_size > 1:
        dist.all_reduce(of_hidden, group=group)
    got = {"loss": loss, "divergence": found.divergence, "cross entropy": found.cross_entropy, **found.metrics}
    got |= {"of hidden": of_hidden, "of weight": of_weight}
    # Of a weight's gradient bf16 keeps 8 bits a chunk, of losses fp32 all that it had.
    relative = {"of hidden": 2e-2, "of weight": 2e-2} if case.dtype == torch.bfloat16 else {}

    def error(name: str) -> float:
        of, scale = wanted[name].detach(), wanted[name].detach().abs().amax().item() or 1.0
        worst = (got[name].detach().double() - of).abs().amax().item() / scale / relative.get(name, 1e-5)
        return worst if worst == worst else float("inf")

    return {name: error(name) for name in wanted} | {"share": chosen.double().mean().item()}


def run_cases(rank: int, world_size: int, indices: Sequence[int]) -> dict[int, dict]:
    group = dist.group.WORLD if world_size > 1 else None
    return {index: run_case(CASES[index], rank, world_size, group) for index in indices}


@pytest.fixture(scope="module", params=WORLDS, ids=lambda world_size: f"ranks{world_size}")
def ranks(request) -> list[dict[int, dict]]:
    if request.param == 1:
        return [run_cases(0, 1, chosen(request))]
    return run_distributed(run_cases, request.param, chosen(request))


@pytest.mark.parametrize("index", range(len(CASES)), ids=[str(case) for case in CASES])
def test_equals_the_dense_form(ranks, index):
    which = CASES[index].which
    for results in ranks:
        share = results[index].pop("share")
        assert share == {"none": 0, "no token": 0, "all": 1, "every token": 1, "weights": 1}.get(which, share)
        assert 0 < share < 1 or which in ("none", "no token", "all", "every token", "weights")
        assert all(error <= 1.0 for error in results[index].values()), results[index]
        results[index]["share"] = share


def ranked_on(rank: int, world_size: int) -> list[bool]:
    """Whether each sequence's quantile over context-parallel ranks is that of whole sequences, here."""
    generator = torch.Generator().manual_seed(0)
    entropy = torch.rand(24, 3, generator=generator)
    counted = torch.rand(24, 3, generator=generator) < 0.8
    rule, found = TokenSelection("teacher_entropy", quantile=[0.15, 0.9]), []
    # Chunks r and 2 * size - 1 - r, as Megatron splits a sequence.
    chunks = torch.arange(24).chunk(2 * world_size)
    mine = torch.cat([chunks[rank], chunks[2 * world_size - 1 - rank]])
    for mask in (counted, None):
        wanted = rule.ranked(entropy, mask, None)
        own = mask[mine] if mask is not None else None
        found.append(torch.equal(rule.ranked(entropy[mine], own, dist.group.WORLD), wanted[mine]))
    return found


def test_a_quantile_is_of_the_whole_sequence_under_context_parallelism():
    assert run_distributed(ranked_on, 2) == [[True, True]] * 2
    assert run_distributed(ranked_on, 4) == [[True, True]] * 4


def head_arguments():
    generator = torch.Generator().manual_seed(0)
    return {
        "student_hidden": torch.randn(12, 4, generator=generator).requires_grad_(),
        "student_weight": torch.randn(10, 4, generator=generator),
        "teacher_hidden": torch.randn(12, 5, generator=generator),
        "teacher_weight": torch.randn(10, 5, generator=generator),
        "divergence": AlphaBeta(0.2, 0.7),
        "labels": torch.zeros(12, dtype=torch.int64),
        "shard": VocabShard.megatron(10),
        "chunk_tokens": 5,
    }


def head(**changes):
    return vocab_parallel_distillation_head(**{**head_arguments(), **changes})


@pytest.mark.parametrize("token_weights", [torch.ones(12), None], ids=["in forward", "in backward"])
@pytest.mark.parametrize("every", [1, 2, 3, 12])
def test_the_teachers_products_are_of_the_selected_alone(token_weights, every):
    """2 * n * W * H of the teacher; of the student 2 * N * W * h forward and for the gradient of hidden states."""
    selected = torch.arange(12) % every == every - 1
    times = 1 if token_weights is not None else 2  # formed again in backward
    with FlopCounterMode(display=False) as counted:
        head(token_weights=token_weights, selected=selected)[0].sum().backward()
    of_teacher, of_student = times * 2 * (12 // every) * 10 * 5, (times + 1) * 2 * 12 * 10 * 4
    assert counted.get_total_flops() == of_teacher + of_student


def test_all_selected_is_no_selection_to_the_bit():
    everything = TokenSelection("teacher_entropy", at_most=1e6)
    for token_weights in (torch.ones(12), None):
        found = []
        for how in ({}, {"selected": torch.ones(12, dtype=torch.bool)}, {"select": everything.of}):
            student = head_arguments()["student_hidden"]
            loss, terms = head(token_weights=token_weights, student_hidden=student, **how)
            loss.sum().backward()
            found.append((loss, terms.divergence, terms.cross_entropy, *terms.metrics.values(), student.grad))
        for other in found[1:]:
            assert all(torch.equal(*pair) for pair in zip(found[0], other, strict=True))


def test_bad_selections_are_refused():
    with pytest.raises(ConfigError, match=r"kd_weight .*\[12\], got \[5\]"):
        head(kd_weight=torch.ones(5))
    with pytest.raises(ConfigError, match=r"selection .*\[12\], got \[5\]"):
        head(selected=torch.ones(5, dtype=torch.bool))
    with pytest.raises(ConfigError, match=r"dtype torch.bool, got torch.int64"):
        head(selected=torch.ones(12, dtype=torch.int64))
    logits, labels, shard = torch.randn(4, 10), torch.zeros(4, dtype=torch.int64), VocabShard.megatron(10)
    selected = labels == 0
    with pytest.raises(ConfigError, match=r"teacher .*\[4, 10\].*\[3, 10\]"):
        vocab_parallel_distillation(logits, logits[:3], ToDi(), labels, shard, selected=selected)
