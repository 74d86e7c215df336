"""Packed sequences, sequences of any length, loss masks and context parallelism in Megatron's models and schedules.

    python sequences.py REFERENCES

One rank trains the same weights on the plain form of the same data, with Megatron's own attention and logits that
exist, and saves losses and gradients to the file REFERENCES; it and jobs of more ranks compare their cases with those.
The worst errors of all ranks go to rank 0's stdout as one line of JSON.

Megatron's CPU attention refuses packed sequences and context parallelism, so in those cases the layer spec names ours.
"""

import copy
import functools
import json
import sys
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from abkd_megatron.cache.record import RecordLayout
from abkd_megatron.data.aligned_text import AlignedText
from abkd_megatron.losses.chunks import ChunkLikelihood
from abkd_megatron.student.cached import CachedTeacher

VOCAB, PADDED, LONGEST = 250, 256, 24
VOCAB_CHUNKS, PADDED_CHUNKS = 300, 320
SPLIT = 2  # context-parallel ranks of the cases that average over micro-batches
LAYERS, HIDDEN, TEACHER_LAYERS, TEACHER_HIDDEN = 4, 16, 8, 24
MTP_WEIGHT = 0.6
RECORDS = RecordLayout(VOCAB, VOCAB, "fp32")
CACHED = ("packed", "context", "packed context")
# What may stand where no token counts: Megatron's and torch's marks, padded columns, ids that no vocabulary has.
GARBAGE = torch.tensor([-100, -1, VOCAB, PADDED - 1, 2**40])


@dataclass(frozen=True)
class Case:
    data: str
    tp: int = 1
    pp: int = 1
    cp: int = 1
    head: str = "materialized"
    todi: bool = False
    """ToDi, and the models swap their kinds of positions."""
    per_token: bool = True
    """Megatron's calculate_per_token_loss."""
    mask_known: bool = True
    """Whether the model is told the loss mask."""
    every: int | None = None
    """The divergence is on every so manieth token of a sequence."""
    hybrid: bool = False
    """Both models are HybridModels `*-`, compared with GPTModels."""
    cached: bool = False
    """In place of the teacher there are its records, with all tokens, as the reference has made them."""
    factors: bool = False
    """The terms of the loss have weights per token, also negative ones and 0."""

    weights: str = "device"
    """Of the teacher's layers."""
    chunks: bool = False
    """The teacher has its own tokens of a text, and the loss is of chunks."""
    heads: int = 0
    """Of the student's multi-token prediction, which learn from the teacher."""
    sequence_parallel: bool = False
    virtual: int | None = None
    """Virtual pipeline stages per rank of the student."""

    @property
    def reference(self) -> tuple[str, bool, bool, int | None, bool, str, int, bool]:
        weights = "int8" if self.weights == "int8" else "device"
        return self.data, self.todi, self.per_token, self.every, self.factors, weights, self.heads, self.chunks


CASES: dict[int, dict[str, Case]] = {
    1: {
        "packed": Case("packed"),
        "packed, fused": Case("packed", head="fused"),
        "packed, ToDi": Case("packed", todi=True),
        "variable": Case("variable"),
        "variable, fused": Case("variable", head="fused"),
        "masked": Case("masked"),
        "masked, fused": Case("masked", head="fused"),
        "masked, fused, mask unknown": Case("masked", head="fused", mask_known=False),
        "masked, by micro-batch": Case("masked", per_token=False),
        "masked, by micro-batch, fused": Case("masked", head="fused", per_token=False),
        "packed, every third": Case("packed", every=3),
        "packed, every third, fused": Case("packed", head="fused", every=3),
        "packed, hybrid": Case("packed", hybrid=True),
        "masked, hybrid, fused": Case("masked", head="fused", hybrid=True),
        "packed, fused, factors": Case("packed", head="fused", factors=True),
        "packed, cached": Case("packed", cached=True),
        "packed, every third, cached, fused": Case("packed", head="fused", every=3, cached=True),
        "masked, int8": Case("masked", weights="int8"),
        "packed, host": Case("packed", weights="host"),
        "packed, hybrid, host": Case("packed", hybrid=True, weights="host"),
        "packed, 2 heads": Case("packed", heads=2),
        "masked, 2 heads, fused": Case("masked", heads=2, head="fused"),
        "masked, chunks": Case("masked", chunks=True),
    },
    2: {
        "packed, TP 2": Case("packed", tp=2),
        "packed, TP 2, fused": Case("packed", tp=2, head="fused"),
        "packed, PP 2": Case("packed", pp=2),
        "packed, PP 2, fused": Case("packed", pp=2, head="fused"),
        "packed, PP 2, ToDi": Case("packed", pp=2, todi=True),
        "variable, PP 2": Case("variable", pp=2),
        "variable, TP 2, fused": Case("variable", tp=2, head="fused"),
        "masked, TP 2": Case("masked", tp=2),
        "packed, TP 2, factors": Case("packed", tp=2, factors=True),
        "packed, PP 2, fused, factors": Case("packed", pp=2, head="fused", factors=True),
        "masked, TP 2, fused": Case("masked", tp=2, head="fused"),
        "masked, PP 2, by micro-batch": Case("masked", pp=2, per_token=False),
        "masked, DP 2": Case("masked"),
        "masked, DP 2, by micro-batch, fused": Case("masked", head="fused", per_token=False),
        "context, CP 2": Case("context", cp=2),
        "context, CP 2, fused": Case("context", cp=2, head="fused"),
        "context, CP 2, ToDi": Case("context", cp=2, todi=True),
        "context, CP 2, by micro-batch": Case("context", cp=SPLIT, per_token=False),
        "packed context, CP 2": Case("packed context", cp=2),
        "packed context, CP 2, fused": Case("packed context", cp=2, head="fused"),
        "context, CP 2, fused, factors": Case("context", cp=2, head="fused", factors=True),
        "masked, DP 2, every third, fused": Case("masked", head="fused", every=3),
        "context, CP 2, every third, fused": Case("context", cp=2, head="fused", every=3),
        "packed context, CP 2, every third": Case("packed context", cp=2, every=3),
        "packed, TP 2, hybrid, fused": Case("packed", tp=2, head="fused", hybrid=True),
        "packed, PP 2, hybrid": Case("packed", pp=2, hybrid=True),
        "variable, PP 2, hybrid": Case("variable", pp=2, hybrid=True),
        "context, CP 2, hybrid": Case("context", cp=2, hybrid=True),
        "packed context, CP 2, hybrid, fused": Case("packed context", cp=2, head="fused", hybrid=True),
        "packed, TP 2, 2 heads": Case("packed", tp=2, heads=2),
        "packed, PP 2, 2 heads, fused": Case("packed", pp=2, heads=2, head="fused"),
        "masked, DP 2, 2 heads": Case("masked", heads=2),
        "masked, TP 2, chunks": Case("masked", tp=2, chunks=True),
        "masked, DP 2, chunks": Case("masked", chunks=True),
        "context, CP 2, 2 heads": Case("context", cp=2, heads=2),
        "packed context, CP 2, 2 heads, fused": Case("packed context", cp=2, heads=2, head="fused"),
        "packed, PP 2, int8": Case("packed", pp=2, weights="int8"),
        "packed, TP 2, host": Case("packed", tp=2, weights="host"),
        "variable, PP 2, host, fused": Case("variable", pp=2, head="fused", weights="host"),
        "packed, TP 2, cached, fused": Case("packed", tp=2, head="fused", cached=True),
        "packed, PP 2, cached": Case("packed", pp=2, cached=True),
        "context, CP 2, cached": Case("context", cp=2, cached=True),
        "context, CP 2, ToDi, cached": Case("context", cp=2, todi=True, cached=True),
        "context, CP 2, every third, cached, fused": Case("context", cp=2, head="fused", every=3, cached=True),
        "packed context, CP 2, cached": Case("packed context", cp=2, cached=True),
        "packed context, CP 2, every third, cached": Case("packed context", cp=2, every=3, cached=True),
    },
    4: {
        "packed, TP 2 x PP 2": Case("packed", tp=2, pp=2),
        "variable, TP 2 x PP 2": Case("variable", tp=2, pp=2),
        "variable, PP 4, fused": Case("variable", pp=4, head="fused"),
        "context, CP 2 x TP 2": Case("context", cp=2, tp=2),
        "context, CP 2 x TP 2, fused": Case("context", cp=2, tp=2, head="fused"),
        "context, CP 2 x PP 2": Case("context", cp=2, pp=2),
        "context, CP 2 x DP 2": Case("context", cp=2),
        "context, CP 4": Case("context", cp=4),
        "context, CP 4, every third": Case("context", cp=4, every=3),
        "packed context, CP 2 x PP 2, fused": Case("packed context", cp=2, pp=2, head="fused"),
        "packed context, CP 2 x PP 2, hybrid": Case("packed context", cp=2, pp=2, hybrid=True),
        "context, CP 2 x TP 2, hybrid": Case("context", cp=2, tp=2, hybrid=True),
        "context, CP 2 x TP 2, cached, fused": Case("context", cp=2, tp=2, head="fused", cached=True),
        "context, CP 4, cached": Case("context", cp=4, cached=True),
        "packed context, CP 2 x PP 2, cached, fused": Case("packed context", cp=2, pp=2, head="fused", cached=True),
    },
}


@dataclass(frozen=True)
class MicroBatch:
    tokens: Tensor
    """[b, s], as are the next three."""
    labels: Tensor
    loss_mask: Tensor
    position_ids: Tensor
    lengths: tuple[int, ...] = ()
    """Of the sequences packed into one row."""
    records: Tensor | None = None
    """[b, s, bytes + 1]."""

    @classmethod
    def random(cls, rows: int, length: int, generator: torch.Generator) -> "MicroBatch":
        tokens, labels = torch.randint(VOCAB, (2, rows, length), generator=generator)
        mask = (torch.rand(rows, length, generator=generator) < 0.7).float()
        mask[:, 0] = 1.0
        return cls(tokens, labels, mask, torch.arange(length).repeat(rows, 1))

    def text(self) -> AlignedText:
        """Some text in other tokens, [b, s + 3], which depends only on the student's tokens."""
        rows = []
        for tokens in self.tokens:
            generator = torch.Generator().manual_seed(zlib.crc32(tokens.numpy().tobytes()))
            length = len(tokens)
            ours, theirs = (
                (torch.rand(of, generator=generator) < 0.6).cumsum(0) - 1 for of in (length - 1, length + 2)
            )
            most = torch.minimum(ours.max(), theirs.max())
            ours, theirs = (torch.where(of > most, -1, of) for of in (ours, theirs))
            other = torch.randint(VOCAB_CHUNKS, (2, length + 3), generator=generator)
            left_out = torch.full((1,), -1)
            num_bytes = torch.randint(5, (length,), generator=generator)
            rows.append(torch.cat([*other, left_out, theirs, left_out, ours, num_bytes]))
        return AlignedText.unpack(torch.stack(rows), length)

    def masked(self, mask: Tensor) -> "MicroBatch":
        return replace(self, loss_mask=self.loss_mask * mask)

    def with_garbage(self) -> "MicroBatch":
        garbage = GARBAGE[torch.arange(self.labels.numel()).view_as(self.labels) % len(GARBAGE)]
        return replace(self, labels=torch.where(self.loss_mask == 0, garbage, self.labels))


def packed(sequences: Sequence[MicroBatch]) -> MicroBatch:
    """One row of several."""
    parts = [(part.tokens, part.labels, part.loss_mask, part.position_ids) for part in sequences]
    lengths = tuple(part.tokens.shape[1] for part in sequences)
    return MicroBatch(*(torch.cat(of_parts, dim=1) for of_parts in zip(*parts, strict=True)), lengths)


def padded(batch: MicroBatch) -> MicroBatch:
    """Every row LONGEST tokens, of which the last ones do not count."""
    rows, length = batch.tokens.shape
    return MicroBatch(
        *(
            torch.cat((of_batch, torch.zeros(rows, LONGEST - length, dtype=of_batch.dtype)), dim=1)
            for of_batch in (batch.tokens, batch.labels, batch.loss_mask)
        ),
        torch.arange(LONGEST).repeat(rows, 1),
    )


def micro_batches(data: str, per_token: bool) -> tuple[list[MicroBatch], list[MicroBatch], float]:
    """What a case trains on, the same in its plain form, and how many times the plain one's gradient is wanted."""
    generator = torch.Generator().manual_seed(zlib.crc32(data.encode()))
    random = partial(MicroBatch.random, generator=generator)
    if "packed" in data:  # rows of one length, as Megatron's pipeline expects them
        any_lengths, even_lengths = ((5, 11, 1, 7), (8, 3, 13), (LONGEST,)), ((4, 8, 12), (16, 8), (LONGEST,))
        lengths = even_lengths if "context" in data else any_lengths
        rows = [[random(1, length) for length in of_row] for of_row in lengths]
        return [packed(row).with_garbage() for row in rows], [sequence for row in rows for sequence in row], 1.0
    if data == "variable":
        given = [random(2, length) for length in (8, LONGEST, 16, 1, 11)]
        return [batch.with_garbage() for batch in given], [padded(batch) for batch in given], 1.0
    if data == "masked":  # a row of nothing, micro-batches of nothing; at DP 2 one rank has nothing else
        first, second, nothing = random(2, 12), random(2, 12), random(2, 12).masked(torch.zeros(2, 12))
        second = second.masked(torch.tensor([[1.0], [0.0]]))
        given = [batch.with_garbage() for batch in (first, nothing, second, nothing)]
        only = MicroBatch(*(of[:1] for of in (second.tokens, second.labels, second.loss_mask, second.position_ids)))
        return given, [first, only], 1.0 if per_token else 2 / 4
    given = [random(2, 16) for _ in range(4)]
    if per_token:
        return [batch.with_garbage() for batch in given], given, 1.0
    # Megatron then averages each rank's share by itself, so each is a micro-batch of its own on one rank.
    held = [torch.isin(torch.arange(16), cp_positions([16], rank, SPLIT)).float() for rank in range(SPLIT)]
    return [batch.with_garbage() for batch in given], [batch.masked(share) for batch in given for share in held], 1.0


def cp_positions(lengths: Sequence[int], rank: int, size: int) -> Tensor:
    """Where a rank's tokens stand in the whole row: of a sequence's 2 * size chunks it has one and its mirror."""
    if size == 1:
        return torch.arange(sum(lengths))
    chunks = [sequence.chunk(2 * size) for sequence in torch.arange(sum(lengths)).split(list(lengths))]
    return torch.cat([of_sequence[at] for of_sequence in chunks for at in (rank, 2 * size - 1 - rank)])


class CoreAttention(torch.nn.Module):
    """Causal attention [s, b, n, d] -> [s, b, n * d], also for packed sequences [t, n, d] and context parallelism."""

    def __init__(self, *, pg_collection: Any, **_: Any) -> None:
        super().__init__()
        self.cp_group = pg_collection.cp

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, *_: Any, packed_seq_params: Any = None, **__: Any
    ) -> Tensor:
        rank, size = self.cp_group.rank(), self.cp_group.size()
        lengths = [key.shape[0] * size]
        if packed_seq_params is not None:
            query, key, value = (of[:, None] for of in (query, key, value))
            lengths = packed_seq_params.cu_seqlens_q.diff().tolist()
        key, value = _Gather.apply(torch.stack((key, value), dim=1), self.cp_group).unbind(1)
        at = cp_positions(lengths, rank, size)[-query.shape[0] :, None]  # the last ones, after keys of a cache
        keys_at = torch.cat([cp_positions(lengths, other, size) for other in range(size)])
        sequence = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
        seen = (at >= keys_at) & (sequence[at] == sequence[keys_at])
        query, key, value = (of.permute(1, 2, 0, 3) for of in (query, key, value))
        context = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=seen)
        return context.permute(2, 0, 1, 3).flatten(2)


def packed_layers(_: Any) -> Any:
    """Megatron's own layers with this attention, for `spec`."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    spec = get_gpt_layer_local_spec(normalization="RMSNorm")
    spec.submodules.self_attention.submodules.core_attention = CoreAttention
    return spec


class _Gather(torch.autograd.Function):
    """Every rank's part along dimension 0, in the order of the ranks."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        parts = [torch.empty_like(part) for _ in range(group.size())]
        dist.all_gather(parts, part.contiguous(), group=group)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(gradient, group=ctx.group)
        return gradient.chunk(ctx.group.size())[ctx.group.rank()], None


def main() -> None:
    from abkd_megatron import cpu_backend

    cpu_backend.install()
    cpu_backend.init_process_group(timedelta(minutes=3))
    path, num_ranks = sys.argv[1], dist.get_world_size()
    if num_ranks == 1:
        wanted = {case.reference: case for cases in CASES.values() for case in cases.values()}
        torch.save({key: train(case_of(*key), plain=True) for key in wanted}, path)
    references = torch.load(path)
    found = {}
    for name, case in sorted(CASES[num_ranks].items(), key=lambda item: (item[1].tp, item[1].pp, item[1].cp)):
        errors: list[Any] = [None] * num_ranks
        reference = references[case.reference]
        dist.all_gather_object(
            errors, compare(case, train(case, False, reference["records"], reference["rounding"]), reference)
        )
        found[name] = {what: max(of.get(what, 0.0) for of in errors) for what in set().union(*errors)}
    if dist.get_rank() == 0:
        print("FOUND " + json.dumps(found), flush=True)
    dist.barrier()


def case_of(
    data: str, todi: bool, per_token: bool, every: int | None, factors: bool, weights: str, heads: int, chunks: bool
) -> Case:
    names = {"weights": weights, "heads": heads, "chunks": chunks}
    return Case(data, todi=todi, per_token=per_token, every=every, factors=factors, **names)


def compare(case: Case, got: dict[str, Any], wanted: dict[str, Any]) -> dict[str, float]:
    """The largest relative error of every loss on the last stage, and of every parameter's gradient on its stage."""
    from megatron.core import parallel_state

    factor = micro_batches(case.data, case.per_token)[2]
    errors = {}
    for name, (of_tokens, tokens) in got["losses"].items():
        in_wanted, wanted_tokens = wanted["losses"][name]
        assert abs(tokens - wanted_tokens) < 1e-9, f"{tokens} tokens in place of {wanted_tokens}"
        errors[name] = error(of_tokens, in_wanted)
    for name, gradient in got["gradients"].items():
        whole = factor * wanted["gradients"][name]
        (split,) = [dim for dim in range(whole.ndim) if gradient.shape[dim] != whole.shape[dim]] or [None]
        if split is not None:
            whole = whole.chunk(case.tp, dim=split)[parallel_state.get_tensor_model_parallel_rank()]
        errors[f"gradient of {name}"] = error(gradient, whole)
    return errors


def error(got: Tensor, wanted: Tensor) -> float:
    assert got.shape == wanted.shape
    if not torch.isfinite(got).all():
        return float("inf")  # NaN would be lost in a maximum
    return ((got - wanted).abs().amax() / wanted.abs().amax().clamp_min(1e-30)).item()


@functools.lru_cache(maxsize=1)  # Megatron knows one layout at a time; a change leaves the old one's threads behind
def process_groups(tp: int, pp: int, cp: int) -> Any:
    from megatron.core import parallel_state
    from megatron.core.process_groups_config import ProcessGroupCollection

    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        context_parallel_size=cp,
        create_gloo_process_groups=False,
    )
    return ProcessGroupCollection.use_mpu_process_groups()


def train(
    case: Case, plain: bool = False, records: Sequence[Tensor] = (), wanted_rounding: Sequence[float] = ()
) -> dict[str, Any]:
    """One step: the sums of losses and tokens over all ranks, if this is the last stage, and this stage's gradients.

    The plain form also returns the teacher's records of each micro-batch that is not plain.
    """
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    from abkd_megatron import AlphaBeta, ToDi
    from abkd_megatron.losses.objective import Objective
    from abkd_megatron.losses.selection import TokenSelection
    from abkd_megatron.preflight.rounding import RoundingError
    from abkd_megatron.student.attach import attach
    from abkd_megatron.teacher.build import Teacher
    from abkd_megatron.teacher.weights import store_weights
    from abkd_megatron.vocab_parallel.execution import Execution

    groups = process_groups(case.tp, case.pp, case.cp)
    model_parallel_cuda_manual_seed(1)
    kinds = ("learned_absolute", "rope") if case.todi else ("rope", "learned_absolute")
    own_attention = not plain and ("packed" in case.data or case.cp > 1)
    student = build(case, "student", LAYERS, HIDDEN, kinds[0], groups, own_attention)
    alone = replace(case, heads=0)
    size = PADDED_CHUNKS if case.chunks else PADDED
    teacher = build(alone, "teacher", TEACHER_LAYERS, TEACHER_HIDDEN, kinds[1], groups, own_attention, size)
    rounding = []
    if plain and case.weights == "int8":
        given = micro_batches(case.data, case.per_token)[1][-1]
        before_rounding = log_probabilities(teacher, given)
        round_layers(teacher)
        after = log_probabilities(teacher, given)
        kl = (before_rounding.exp() * (before_rounding - after)).sum(-1)[given.loss_mask != 0]
        same = (before_rounding.argmax(-1) == after.argmax(-1))[given.loss_mask != 0]
        rounding = [kl.mean().item(), same.double().mean().item(), len(kl)]
    model = DistributedDataParallel(student.config, DistributedDataParallelConfig(), student)
    divergence = ToDi() if case.todi else AlphaBeta(0.2, 0.7)
    tokens = TokenSelection("every", n=case.every) if case.every else None
    objective = Objective(
        divergence,
        tokens=tokens,
        mtp_weight=MTP_WEIGHT if case.heads else 0.0,
        cross_tokenizer=ChunkLikelihood(20.0) if case.chunks else None,
    )
    execution = Execution(head=case.head, chunk_tokens=7 if case.head == "fused" else None)
    before = attributes(student)
    frozen = replace(Teacher.of(teacher, groups), vocab_size=VOCAB_CHUNKS if case.chunks else None)
    if not plain and case.weights != "device":
        stored = store_weights(frozen, case.weights, keep_plain=case.weights == "int8")
        assert all(it.dim() == 1 for it in teacher.decoder.layers.parameters()), "no matrix is left"
        assert (stored.error > 0) == (case.weights == "int8") and stored.kept > 0
    attachment = attach(
        model,
        CachedTeacher(RECORDS, "error") if case.cached else frozen,
        objective,
        execution=execution,
        vocab_size=VOCAB,
        pg_collection=groups,
    )

    measured = None
    if not plain and case.weights == "int8":
        measured = RoundingError([model], attachment, stored, VOCAB, groups.tp)
        measured.begin(is_first=True)
    batches = micro_batches(case.data, case.per_token)[plain]
    if case.cached:
        batches = [replace(batch, records=of_batch) for batch, of_batch in zip(batches, records, strict=True)]
    batches = batches[groups.dp.rank() :: groups.dp.size()]
    model.zero_grad_buffer()
    reports = get_forward_backward_func()(
        forward_step_func=partial(forward_step, case, attachment),
        data_iterator=iter(batches),
        model=[model],
        num_microbatches=len(batches),
        seq_length=batches[0].tokens.shape[1],
        micro_batch_size=batches[0].tokens.shape[0],
    )
    attachment.detach()
    assert attributes(student) == before, "detached, the student is what it was"
    assert measured is None or student.config.finalize_model_grads_func is finalize_model_grads
    if measured is not None and case.data == "masked":
        assert measured.found is None, "no token of the last micro-batch counts"
    elif measured is not None:
        assert measured.found.tokens == wanted_rounding[2] and measured.found.agreement == wanted_rounding[1]
        assert abs(measured.found.kl / wanted_rounding[0] - 1) < 1e-2, (measured.found, wanted_rounding)
    losses = {}
    for name in reports[0].keys() - {"teacher seconds"} if reports else ():
        losses[name.removeprefix("bucketed ")] = torch.stack([report[name] for report in reports]).double().sum(0)
        dist.all_reduce(losses[name.removeprefix("bucketed ")], group=groups.dp_cp)
    if plain:  # the models by themselves, so that no case can agree with a teacher that was run wrongly everywhere
        losses["lm loss"][0] = sum(cross_entropy(student, batch) for batch in batches)
        if case.every:
            batches = [batch.masked(batch.position_ids % case.every == case.every - 1) for batch in batches]
        if not case.chunks:
            losses["teacher lm loss"][0] = sum(cross_entropy(teacher, batch) for batch in batches)
        for name, loss in check_heads(student, teacher, batches).items() if case.heads and case.per_token else ():
            torch.testing.assert_close(losses[name][0].double(), loss.double(), rtol=1e-5, atol=1e-6)
    found = {"losses": losses, "gradients": {name: weight.main_grad.clone() for name, weight in named(student)}}
    found["rounding"] = rounding
    if plain:
        found["records"] = records_of(teacher, case) if case.data in CACHED and case.per_token else []
    return found


@torch.no_grad()
def log_probabilities(model: torch.nn.Module, batch: MicroBatch) -> Tensor:
    return model(batch.tokens, batch.position_ids, None)[..., :VOCAB].double().log_softmax(-1)


@torch.no_grad()
def round_layers(teacher: torch.nn.Module) -> None:
    """Round the matrices of the layers to 255 numbers per row."""
    for weight in teacher.decoder.layers.parameters():
        if weight.dim() > 1:
            step = weight.abs().amax(dim=1, keepdim=True) / 127
            weight.copy_((weight / step).round() * step)


@torch.no_grad()
def records_of(teacher: torch.nn.Module, case: Case) -> list[Tensor]:
    """The teacher's records of each micro-batch, [b, s, bytes + 1], from its sequences by themselves."""
    from abkd_megatron.vocab_parallel import VocabShard
    from abkd_megatron.vocab_parallel.truncate import truncate

    given, sequences, _ = micro_batches(case.data, case.per_token)
    found, rest = [], iter(sequences)
    for batch in given:
        parts = []
        for sequence in [next(rest) for _ in batch.lengths or (0,)]:
            logits = teacher(sequence.tokens, sequence.position_ids, None).flatten(0, 1)
            shard = VocabShard(0, VOCAB, VOCAB, None)
            packed = RECORDS.pack(truncate(logits, sequence.labels.flatten(), shard, VOCAB))
            parts.append(packed.view(*sequence.labels.shape, -1))
        found.append(torch.nn.functional.pad(torch.cat(parts, dim=1), (0, 1), value=1))
    return found


def attributes(model: torch.nn.Module) -> list[tuple[str, Any]]:
    """The attributes of a model in their order, and how many hooks and parts it has."""
    return [(name, len(it) if isinstance(it, dict) else it) for name, it in vars(model).items()]


@torch.no_grad()
def cross_entropy(model: torch.nn.Module, batch: MicroBatch) -> Tensor:
    logits = model(batch.tokens, batch.position_ids, None)[..., :VOCAB].transpose(1, 2)
    return (torch.nn.functional.cross_entropy(logits, batch.labels, reduction="none") * batch.loss_mask).sum()


def check_heads(student: torch.nn.Module, teacher: torch.nn.Module, batches: Sequence[MicroBatch]) -> dict[str, Tensor]:
    """Sums of the heads' losses as they are defined; and asserts that the gradients are theirs and the main losses'."""
    from abkd_megatron import AlphaBeta
    from abkd_megatron.losses import reference_divergence

    kept: list[Tensor] = []
    hook = student.mtp.register_forward_hook(lambda _module, _args, output: kept.append(output))
    sums: dict[str, Tensor] = {}
    total = torch.zeros(())
    for batch in batches:
        student(batch.tokens, batch.position_ids, None, labels=batch.labels, loss_mask=batch.loss_mask)
        length, mask = batch.tokens.shape[1], batch.loss_mask
        main, *heads = (student.output_layer(of)[0].transpose(0, 1)[..., :VOCAB] for of in kept.pop().split(length))
        with torch.no_grad():
            theirs = teacher(batch.tokens, batch.position_ids, None)[..., :VOCAB]
        of_text = torch.nn.functional.cross_entropy(main.transpose(1, 2), batch.labels, reduction="none")
        total = total + ((of_text + reference_divergence(AlphaBeta(0.2, 0.7), main, theirs)) * mask).sum()
        for number, head in enumerate(heads, 1):
            if length > number:
                of_head = reference_divergence(AlphaBeta(0.2, 0.7), head[:, :-number], theirs[:, number:])
                name, value = f"mtp {number} kd loss", (of_head * mask[:, number:]).sum()
                sums[name] = sums.get(name, torch.zeros(())) + value.detach()
                total = total + MTP_WEIGHT / len(heads) * value
    hook.remove()
    counted = sum(batch.loss_mask.sum() for batch in batches)
    weights = dict(named(student))
    gradients = torch.autograd.grad(total, list(weights.values()))
    for (name, weight), gradient in zip(weights.items(), gradients, strict=True):
        assert error(weight.main_grad, gradient / counted) < 2e-5, name
    return sums


def build(
    case: Case,
    who: str,
    layers: int,
    hidden: int,
    positions: str,
    groups: Any,
    own_attention: bool,
    vocab_size: int = PADDED,
    vp_stage: int | None = None,
) -> torch.nn.Module:
    """This rank's part of a model whose weights depend on its name alone."""
    from megatron.core.distributed import finalize_model_grads
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec, get_gpt_mtp_block_spec
    from megatron.core.models.hybrid.hybrid_model import HybridModel
    from megatron.core.transformer import TransformerConfig

    from abkd_megatron.local_hybrid_spec import local_hybrid_stack_spec

    config = TransformerConfig(
        num_layers=2 * layers if case.hybrid else layers,
        hidden_size=hidden,
        num_attention_heads=4,
        tensor_model_parallel_size=case.tp,
        pipeline_model_parallel_size=case.pp,
        context_parallel_size=case.cp,
        sequence_parallel=case.sequence_parallel,
        virtual_pipeline_model_parallel_size=case.virtual,
        # As Megatron's arguments ask for it: on two stages a batch of messages would mix activations and gradients.
        overlap_p2p_comm=case.virtual is not None,
        batch_p2p_comm=case.virtual is None,
        pipeline_dtype=torch.float32,
        variable_seq_lengths=case.data == "variable",
        moe_token_dispatcher_type="alltoall",  # Megatron asks for it beside variable lengths, without any experts
        calculate_per_token_loss=case.per_token,
        mtp_num_layers=case.heads or None,
        mtp_loss_scaling_factor=0.0,
        normalization="RMSNorm",
        hidden_dropout=0.0,
        attention_dropout=0.0,
        use_cpu_initialization=True,
    )
    config.finalize_model_grads_func = finalize_model_grads
    if case.hybrid:
        spec = copy.deepcopy(local_hybrid_stack_spec)
        make, attention = partial(HybridModel, hybrid_layer_pattern="*-" * layers), spec.submodules.attention_layer
    else:
        make = GPTModel
        spec = attention = get_gpt_layer_local_spec(normalization="RMSNorm")
    if own_attention:
        attention.submodules.self_attention.submodules.core_attention = CoreAttention
    if case.heads:
        stage = groups.pp.rank()
        make = partial(make, mtp_block_spec=get_gpt_mtp_block_spec(config, spec, False, pp_rank=stage))
    model = make(
        config,
        spec,
        vocab_size=vocab_size,
        max_sequence_length=LONGEST,
        pre_process=groups.pp.rank() == 0 and not vp_stage,
        post_process=groups.pp.rank() == case.pp - 1 and vp_stage in (None, (case.virtual or 1) - 1),
        **({"vp_stage": vp_stage} if vp_stage is not None else {}),
        position_embedding_type=positions,
        pg_collection=groups,
    )
    with torch.no_grad():
        for name, weight in named(model):
            generator = torch.Generator().manual_seed(zlib.crc32(f"{who} {name}".encode()))
            shape, split = list(weight.shape), getattr(weight, "partition_dim", -1)
            if split >= 0 and weight.tensor_model_parallel:
                shape[split] *= case.tp
            whole = torch.randn(shape, generator=generator)
            # Wide enough that attention attends to something, and both models are sure of something.
            whole = 1 + 0.1 * whole if "norm" in name else whole * (1.5 / shape[-1] ** 0.5 if len(shape) > 1 else 0.1)
            weight.copy_(whole.chunk(case.tp, dim=split)[groups.tp.rank()] if shape != list(weight.shape) else whole)
    return model


def named(model: Any) -> Iterator[tuple[str, Any]]:
    """The parameters by their names in a GPTModel of one stage."""
    is_hybrid = hasattr(model, "hybrid_layer_pattern")
    for name, weight in model.named_parameters():
        if name.startswith("decoder.layers."):
            index, rest = name.removeprefix("decoder.layers.").split(".", 1)
            number = model.decoder.layers[int(index)].layer_number - 1
            name = f"decoder.layers.{number // 2 if is_hybrid else number}.{rest}"
        name = name.replace("decoder.final_norm.", "decoder.final_layernorm.")
        yield name, weight


def forward_step(
    case: Case, attachment: Any, batches: Iterator[MicroBatch], model: torch.nn.Module
) -> tuple[Tensor, partial]:
    from megatron.core import parallel_state
    from megatron.core.packed_seq_params import PackedSeqParams
    from megatron.core.utils import get_batch_on_this_cp_rank

    batch = next(batches)
    first, last = parallel_state.is_pipeline_first_stage(), parallel_state.is_pipeline_last_stage()
    here = {
        "tokens": batch.tokens if first or case.heads else None,
        "position_ids": batch.position_ids if first or case.heads else None,
        "labels": batch.labels if last else None,
        "loss_mask": batch.loss_mask if last else None,
        "of divergence": 0.7 * (batch.position_ids % 3 - 1) if last and case.factors else None,
        "of cross entropy": 0.5 * (batch.position_ids % 4 - 1) if last and case.factors else None,
        "records": batch.records if last else None,
    }
    packed_seq_params, cp_group = None, parallel_state.get_context_parallel_group()
    if batch.lengths:
        ends = torch.tensor((0, *batch.lengths), dtype=torch.int32).cumsum(0, dtype=torch.int32)
        longest = max(batch.lengths)
        packed_seq_params = PackedSeqParams("thd", ends, ends, max_seqlen_q=longest, max_seqlen_kv=longest)
        # Megatron asks TransformerEngine for these.
        held = cp_positions(batch.lengths, cp_group.rank(), cp_group.size())
        here = {name: whole[:, held] if whole is not None else None for name, whole in here.items()}
    else:
        here = get_batch_on_this_cp_rank(here, is_hybrid_cp=False, cp_group=cp_group)
    if last and case.factors:
        attachment.kd_weights, attachment.lm_weights = here["of divergence"], here["of cross entropy"]
    if case.cached:
        attachment.teacher.packed = here["records"]
    if case.chunks:
        attachment.text = batch.text()
    output = model(
        here["tokens"],
        here["position_ids"],
        None,
        labels=here["labels"],
        packed_seq_params=packed_seq_params,
        loss_mask=here["loss_mask"] if case.mask_known else None,
    )
    return output, partial(attachment.loss_func, here["loss_mask"])


if __name__ == "__main__":
    main()
