"""The host never waits for a GPU within a loss: forward and backward, of every loss and every way to select tokens.

Meta tensors stand for a GPU's (see host_waits). On one rank, and as one rank of two whose messages arrive at once.
"""

import pytest
import torch
import torch.distributed as dist
from host_waits import GPU, HostWaits, host_waits
from torch import Tensor
from torch.testing._internal.distributed import fake_pg

from abkd_megatron import AlphaBeta, ToDi, vocab_parallel_divergence
from abkd_megatron.cache.record import RecordLayout
from abkd_megatron.data.aligned_text import AlignedText
from abkd_megatron.losses import (
    K3,
    AdaptiveKL,
    ClippedKL,
    JensenShannon,
    LogitCosine,
    LogitMSE,
    LogitPearson,
    Pearson,
    Preference,
    Ranking,
    Sinkhorn,
)
from abkd_megatron.losses.chunks import ChunkLikelihood, chunk_losses
from abkd_megatron.losses.objective import Objective
from abkd_megatron.losses.selection import TokenSelection, positions_here
from abkd_megatron.student.chunked import teacher_batch
from abkd_megatron.vocab_parallel import (
    TeacherRecords,
    VocabShard,
    vocab_parallel_distillation,
    vocab_parallel_distillation_head,
    vocab_parallel_logit_loss,
    vocab_parallel_record_distillation,
    vocab_parallel_record_distillation_head,
)
from abkd_megatron.vocab_parallel.noise import places_in_tail
from abkd_megatron.vocab_parallel.truncate import truncate

TOKENS, VOCAB, WIDTH, HIDDEN = (24, 2), 1000, 512, 16
DIVERGENCES = [AlphaBeta(0.2, 0.7), ToDi(), ToDi(detach=False), JensenShannon()]
LOGIT_LOSSES = [
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
    Sinkhorn(group=8),
    Preference(),
    K3(),
]


@pytest.fixture(scope="module", params=[1, 2], ids=["one rank", "two ranks"])
def shard(request):
    if request.param == 1:
        yield VocabShard(0, VOCAB // 2, VOCAB // 2)
        return
    dist.Backend.register_backend("silent", fake_pg._create_fake_pg, extended_api=True, devices=["cpu", "meta"])
    dist.init_process_group("silent", store=fake_pg.FakeStore(), rank=0, world_size=2)
    yield VocabShard.megatron(WIDTH, dist.group.WORLD, VOCAB)
    dist.destroy_process_group()


def logits(*shape: int) -> Tensor:
    return torch.empty(shape or (*TOKENS, WIDTH), dtype=torch.bfloat16, device=GPU)


def ints(*shape: int) -> Tensor:
    return torch.zeros(shape or TOKENS, dtype=torch.int64, device=GPU)


def test_the_instrument_finds_what_it_is_for():
    x, host = torch.ones(3, 4, device=GPU), torch.zeros(3, dtype=torch.int64)
    waits = {
        "item": lambda: x.sum().item(),
        "bool": lambda: bool(x.sum() > 0),
        "an index of one number": lambda: x[ints(1)[0]],
        "nonzero": lambda: x.nonzero(),
        "mask": lambda: x[x > 0],
        "mask that is written": lambda: x.__setitem__(x > 0, torch.ones(2, device=GPU)),
        "list": lambda: x[[0, 2]],
        "list that is written": lambda: x.__setitem__(([0, 2], 1), 5.0),
        "host's index": lambda: x[host],
        "to host": lambda: x.cpu(),
        "tolist": lambda: x.tolist(),
        "to GPU": lambda: host.to(GPU),
        "pageable": lambda: host.to(GPU, non_blocking=True),
        "pinned, blocking": lambda: host.pin_memory().to(GPU),
        "data": lambda: torch.tensor([1.0, 2.0], device=GPU),
        "unravel": lambda: torch.unravel_index(ints(3), (2, 2)),
    }
    for name, wait in waits.items():
        found = host_waits(wait).found
        assert len(found) == 1, (name, found)
    fine = [
        lambda: x[ints(5)],
        lambda: x.sum() / x.numel(),
        lambda: x.where(x > 0, 0.0),
        lambda: x[1:, 0].fill_(2.0),
        lambda: host.pin_memory().to(GPU, non_blocking=True),
        lambda: host.nonzero().sum().item(),
        lambda: torch.full((3,), 2.0, device=GPU),
    ]
    for within in fine:
        assert host_waits(within).found == []
    assert host_waits(lambda: x.cumsum(0)).by_chance and not host_waits(lambda: ints(3).cumsum(0)).by_chance


def assert_none(function) -> HostWaits:
    waits = host_waits(function)
    assert waits.found == []
    assert waits.by_chance == []
    assert waits.launches > 0
    return waits


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
def test_divergence(shard, divergence, temperature):
    def run():
        student = logits().requires_grad_()
        vocab_parallel_divergence(
            student,
            logits(),
            divergence,
            tp_group=shard.group,
            vocab_size=None if shard.group is None else VOCAB,
            temperature=temperature,
        ).sum().backward()

    assert_none(run)


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
def test_chunks(divergence):
    def run():
        student = torch.empty(2, 24, device=GPU, requires_grad=True)
        row = ints(2, 3 * 30 + 2 * 24)
        text = AlignedText.unpack(row, 24)
        mask = torch.empty(2, 24, device=GPU)
        found = chunk_losses(student, torch.empty(2, 30, device=GPU), text.chunks, mask, divergence, ChunkLikelihood())
        (found.per_token.sum() + found.log_ratio.sum()).backward()
        teacher_batch(Objective(divergence, cross_tokenizer=ChunkLikelihood()), text, {})

    assert_none(run)


@pytest.mark.parametrize("every", [None, 4])
@pytest.mark.parametrize("columns", [16032, 128256])
def test_eager_passes_over_logits_of_a_gpu_are_few(columns, every):
    """An operation on 2^24 of them takes a GPU some 50 microseconds, and a launch 5 to 10; a chunk is 300 launches."""

    def run() -> None:
        selected, num_compared = None, 8192
        if every:
            selected, num_compared = torch.arange(8192) % every == 0, 8192 // every
        terms = vocab_parallel_distillation(
            logits(8192, columns).requires_grad_(),
            logits(num_compared, columns),
            JensenShannon(),
            ints(8192),
            VocabShard.megatron(columns),
            selected=selected,
        )
        (terms.divergence + terms.cross_entropy).sum().backward()

    assert assert_none(run).launches < 350 * 8192 * columns / 2**24


def strided() -> Tensor:
    """Rows that are not one stride apart."""
    return logits(*TOKENS[::-1], WIDTH).transpose(0, 1)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("select", [None, "every"])
@pytest.mark.parametrize("make", [logits, strided])
@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
def test_distillation(shard, divergence, make, select, temperature):
    def run():
        selected, teacher = None, make()
        if select:
            at = TokenSelection("every", n=4).at(positions_here(TOKENS[0], None, 0, 1))
            selected = at.unsqueeze(-1).expand(TOKENS)
            teacher = logits(TOKENS[0] // 4 * TOKENS[1], WIDTH)
        terms = vocab_parallel_distillation(
            make().requires_grad_(), teacher, divergence, ints(), shard, temperature, selected=selected
        )
        (terms.divergence + terms.cross_entropy).sum().backward()

    assert_none(run)


@pytest.mark.parametrize("select", [None, "every", "disagreement", "teacher_entropy"])
@pytest.mark.parametrize("known", [True, False], ids=["in forward", "in backward"])
@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
def test_fused_head(shard, divergence, known, select):
    rules = {
        "every": TokenSelection("every", n=4),
        "disagreement": TokenSelection("disagreement"),
        "teacher_entropy": TokenSelection("teacher_entropy", at_most=1.0),
    }

    def run():
        rule, how = rules.get(select), {}
        if select == "every":
            at = rule.at(positions_here(TOKENS[0], None, 0, 1))
            how = {"selected": at.unsqueeze(-1).expand(TOKENS)}
        elif rule:
            how = {"select": rule.of}
        loss, _ = vocab_parallel_distillation_head(
            logits(*TOKENS, HIDDEN).requires_grad_(),
            logits(WIDTH, HIDDEN).requires_grad_(),
            logits(*TOKENS, HIDDEN),
            logits(WIDTH, HIDDEN),
            divergence,
            ints(),
            shard,
            token_weights=torch.ones(TOKENS, device=GPU) if known else None,
            chunk_tokens=8,
            **how,
        )
        loss.sum().backward()

    assert_none(run)


def records(num_tokens: int) -> TeacherRecords:
    log_rest, entropy, label_log_prob = torch.zeros(3, num_tokens, device=GPU)
    return TeacherRecords(
        ints(num_tokens, 8).int(), torch.zeros(num_tokens, 8, device=GPU), log_rest, entropy, label_log_prob
    )


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("selected", [False, True])
@pytest.mark.parametrize("make", [logits, strided])
@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
def test_records(shard, divergence, make, selected, temperature):
    def run():
        terms = vocab_parallel_record_distillation(
            *(make().requires_grad_(), records(TOKENS[0] * TOKENS[1]), divergence, ints(), shard, temperature),
            selected=torch.ones(TOKENS, dtype=torch.bool) if selected else None,
        )
        (terms.divergence + terms.cross_entropy).sum().backward()

    assert_none(run)


def test_records_with_draws(shard):
    layout = RecordLayout(shard.size, 6, draws=2)

    def run():
        packed = torch.zeros(TOKENS[0] * TOKENS[1], layout.bytes_per_token, dtype=torch.uint8, device=GPU)
        terms = vocab_parallel_record_distillation(
            logits().requires_grad_(), layout.unpack(packed), AlphaBeta(0.8, 0.3), ints(), shard
        )
        (terms.divergence + terms.cross_entropy).sum().backward()

    assert_none(run)


def test_draws(shard):
    def run():
        places = places_in_tail(ints(), 2)
        flat = logits().flatten(0, -2)
        RecordLayout(shard.size, 6, draws=2).pack(truncate(flat, ints().flatten(), shard, 6, 1.0, places))

    assert_none(run)


@pytest.mark.parametrize("select", [None, "disagreement", "teacher_entropy"])
@pytest.mark.parametrize("known", [True, False], ids=["in forward", "in backward"])
def test_fused_head_on_records(shard, known, select):
    rules = {
        "disagreement": TokenSelection("disagreement"),
        "teacher_entropy": TokenSelection("teacher_entropy", at_most=1.0),
    }

    def run():
        loss, _ = vocab_parallel_record_distillation_head(
            logits(*TOKENS, HIDDEN).requires_grad_(),
            logits(WIDTH, HIDDEN).requires_grad_(),
            records(TOKENS[0] * TOKENS[1]),
            ToDi(),
            ints(),
            shard,
            token_weights=torch.ones(TOKENS, device=GPU) if known else None,
            chunk_tokens=8,
            selected=torch.ones(TOKENS, dtype=torch.bool) if select is None else None,
            select=rules[select].of if select else None,
        )
        loss.sum().backward()

    assert_none(run)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("loss", LOGIT_LOSSES, ids=str)
def test_logit_loss(shard, loss, masked):
    def run():
        counted = torch.ones(TOKENS, dtype=torch.bool, device=GPU) if masked else None
        value = vocab_parallel_logit_loss(logits().requires_grad_(), logits(), loss, shard, 2.0, counted, ints())
        value.sum().backward()

    assert_none(run)


def test_sinkhorn_launches_as_much_for_many_groups_as_for_one():
    def launches(tokens: int) -> int:
        student, teacher = logits(tokens, WIDTH).requires_grad_(), logits(tokens, WIDTH)
        shard = VocabShard(0, WIDTH, WIDTH)
        return assert_none(
            lambda: vocab_parallel_logit_loss(student, teacher, Sinkhorn(group=8), shard).sum().backward()
        ).launches

    assert launches(800) == launches(8)
