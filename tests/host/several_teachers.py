"""Several teachers by data source, live and cached, in Megatron's models and schedules, against a dense form in fp64.

    python several_teachers.py REFERENCES

One rank computes losses and gradients of each objective from logits that exist, sequence by sequence, and saves them to
the file REFERENCES; it and jobs of more ranks compare their cases with those. The worst errors of all ranks go to rank
0's stdout as one line of JSON.
"""

import json
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from typing import Any

import sequences
import torch
import torch.distributed as dist
from sequences import HIDDEN, LAYERS, VOCAB, MicroBatch, build, error, named, process_groups
from torch import Tensor

ROWS, LENGTH, NUM_BATCHES = 3, 12, 4
# Datasets of the sequences; one of an unknown dataset, one micro-batch of one teacher only.
SOURCES = ((0, 1, 2), (1, 3, 1), (-1, 2, 0), (0, 3, 5))
# With the teacher of source 2 cached: one micro-batch of it only; and rows, (micro-batch, row), that the cache misses.
SOURCES_WITH_CACHE = ((0, 1, 2), (2, 2, 2), (-1, 2, 0), (0, 3, 5))
MISSING = {(1, 1), (2, 1)}
KL = ("kl to teacher", "bucketed kl to teacher")
# Sources of each teacher but the default; the second one is given twice.
OF_SOURCES = ((1, 4), (2,), (3,))
TEACHER_OF_SOURCE = {1: 1, 4: 1, 2: 2, 3: 1}
# Layers, hidden size and positions.
TEACHERS = ((8, 24, "learned_absolute"), (4, 32, "rope"), (6, 24, "rope"))


@dataclass(frozen=True)
class Case:
    tp: int = 1
    pp: int = 1
    virtual: int | None = None
    head: str = "materialized"
    sequence_parallel: bool = False
    select: str | None = None
    weights: bool = False
    """Weights by source, too."""
    skips: bool = False
    """The host knows the sources, so that teachers which no sequence of a micro-batch needs do not run."""
    cached: int | None = None
    """Source 2 has the records of its teacher, with so many log-probabilities per token, in place of the teacher."""
    misses: bool = False
    """The cache has no records of `MISSING`."""

    @property
    def reference(self) -> tuple[Any, ...]:
        return self.select, self.weights, self.cached, self.misses

    @property
    def sources(self) -> tuple[tuple[int, ...], ...]:
        return SOURCES if self.cached is None else SOURCES_WITH_CACHE

    def has_record(self, batch: int, row: int) -> bool:
        is_cached = self.cached is not None and self.sources[batch][row] == 2
        return is_cached and not (self.misses and (batch, row) in MISSING)

    def on_one_rank(self) -> "Case":
        return replace(self, tp=1, pp=1, virtual=None, sequence_parallel=False)

    def of_model(self, virtual: int | None) -> sequences.Case:
        return sequences.Case("rows", tp=self.tp, pp=self.pp, virtual=virtual, sequence_parallel=self.sequence_parallel)


CASES: dict[int, dict[str, Case]] = {
    1: {
        "1 rank": Case(),
        "1 rank, fused": Case(head="fused"),
        "every third": Case(select="every"),
        "every third, fused": Case(head="fused", select="every"),
        "quantile": Case(select="quantile"),
        "quantile, fused": Case(head="fused", select="quantile"),
        "weights, fused": Case(head="fused", weights=True),
        "skipped": Case(skips=True),
        "skipped, every third, fused": Case(head="fused", select="every", skips=True),
        "cached": Case(cached=VOCAB),
        "cached, fused": Case(cached=VOCAB, head="fused"),
        "few kept, misses, weights": Case(cached=5, misses=True, weights=True),
        "few kept, misses, quantile, fused": Case(cached=5, misses=True, select="quantile", head="fused"),
        "few kept, skipped, every third, fused": Case(cached=5, skips=True, select="every", head="fused"),
    },
    2: {
        "TP 2": Case(tp=2),
        "TP 2 with SP, fused": Case(tp=2, sequence_parallel=True, head="fused"),
        "TP 2 with SP, every third": Case(tp=2, sequence_parallel=True, select="every"),
        "PP 2": Case(pp=2),
        "PP 2, fused": Case(pp=2, head="fused"),
        "PP 2 x VPP 2": Case(pp=2, virtual=2),
        "PP 2 x VPP 2, fused, weights": Case(pp=2, virtual=2, head="fused", weights=True),
        "DP 2, fused": Case(head="fused"),
        "DP 2, weights": Case(weights=True),
        "DP 2, skipped, fused": Case(head="fused", skips=True),
        "TP 2 with SP, cached": Case(tp=2, sequence_parallel=True, cached=VOCAB),
        "TP 2 with SP, few kept, misses, fused": Case(
            tp=2, sequence_parallel=True, cached=5, misses=True, head="fused"
        ),
        "PP 2, few kept": Case(pp=2, cached=5),
        "PP 2 x VPP 2, cached, fused": Case(pp=2, virtual=2, cached=VOCAB, head="fused"),
        "DP 2, few kept, misses, skipped": Case(cached=5, misses=True, skips=True),
    },
}


def micro_batches() -> list[MicroBatch]:
    generator = torch.Generator().manual_seed(5)
    return [MicroBatch.random(ROWS, LENGTH, generator) for _ in range(NUM_BATCHES)]


def objective_of(case: Case) -> Any:
    from abkd_megatron import AlphaBeta
    from abkd_megatron.losses.objective import Objective
    from abkd_megatron.losses.selection import TokenSelection
    from abkd_megatron.losses.sources import SourceWeights

    tokens = {
        None: None,
        "every": TokenSelection("every", n=3),
        "quantile": TokenSelection("teacher_entropy", quantile=(0.3, 1.0)),
    }[case.select]
    weights = (SourceWeights(1, kd_weight=0.3), SourceWeights(2, kd_weight=0.0, lm_weight=2.0)) if case.weights else ()
    return Objective(AlphaBeta(0.2, 0.7), tokens=tokens, sources=weights)


def models(case: Case, groups: Any) -> tuple[list[torch.nn.Module], list[torch.nn.Module]]:
    """The student's chunks and the teachers' stages of this rank."""
    stages = [None] if case.virtual is None else list(range(case.virtual))
    student = [
        build(case.of_model(case.virtual), "student", LAYERS, HIDDEN, "rope", groups, False, vp_stage=stage)
        for stage in stages
    ]
    teachers = [
        build(case.of_model(None), f"teacher {number}", layers, hidden, positions, groups, False)
        for number, (layers, hidden, positions) in enumerate(TEACHERS)
    ]
    return student, teachers


def layout_of(case: Case) -> Any:
    from abkd_megatron.cache.record import RecordLayout

    return RecordLayout(VOCAB, case.cached, "fp32")


@torch.no_grad()
def records_of(case: Case, teacher: torch.nn.Module) -> list[Tensor]:
    """What a cache has of the micro-batches, [b, s, bytes + 1], by the sequences of source 2."""
    from abkd_megatron.vocab_parallel import VocabShard
    from abkd_megatron.vocab_parallel.truncate import truncate

    layout, found = layout_of(case), []
    for number, batch in enumerate(micro_batches()):
        logits = teacher(batch.tokens, batch.position_ids, None)[..., :VOCAB].flatten(0, 1)
        shard = VocabShard(0, VOCAB, VOCAB, None)
        packed = layout.pack(truncate(logits, batch.labels.flatten(), shard, layout.top_k)).view(ROWS, LENGTH, -1)
        packed = torch.nn.functional.pad(packed, (0, 1), value=1)
        for row in range(ROWS):
            if not case.has_record(number, row):
                packed[row] = 0
        found.append(packed)
    return found


def buckets(logits: Tensor, kept: Tensor) -> Tensor:
    """Log-probabilities [..., K + 1] of the tokens `kept`, [..., K], and of all others."""
    log_probs = logits.log_softmax(dim=-1)
    rest = log_probs.scatter(-1, kept, -torch.inf).logsumexp(dim=-1, keepdim=True)
    return torch.cat([log_probs.gather(-1, kept), rest], dim=-1)


def dense(case: Case) -> dict[str, Any]:
    """Sums of losses over the tokens, the number of tokens, and gradients of the mean, sequence by sequence."""
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    from abkd_megatron import AlphaBeta
    from abkd_megatron.losses import reference_divergence

    objective, groups = objective_of(case), process_groups(1, 1, 1)
    model_parallel_cuda_manual_seed(1)
    (student,), teachers = models(case, groups)
    sums: dict[str, Tensor] = {}
    number = total = torch.zeros((), dtype=torch.float64)
    for at, (batch, sources) in enumerate(zip(micro_batches(), case.sources, strict=True)):
        for row, source in enumerate(sources):
            tokens, labels, mask = (of[row : row + 1] for of in (batch.tokens, batch.labels, batch.loss_mask.double()))
            logits, theirs = (
                model(tokens, batch.position_ids[:1], None)[..., :VOCAB].double()
                for model in (student, teachers[TEACHER_OF_SOURCE.get(source, 0)])
            )
            theirs = theirs.detach()
            lm, teacher_lm = (
                torch.nn.functional.cross_entropy(of.transpose(1, 2), labels, reduction="none")
                for of in (logits, theirs)
            )
            compared = logits, theirs
            if case.cached is not None and case.cached < VOCAB and source == 2:
                kept = theirs.topk(case.cached, dim=-1).indices
                compared = buckets(logits, kept), buckets(theirs, kept)
            kl = reference_divergence(AlphaBeta(1, 0), *compared)
            kd = reference_divergence(AlphaBeta(0.2, 0.7), *compared)
            # Of a sequence without a record only the cross entropy counts.
            taught = torch.full_like(mask, case.cached is None or source != 2 or case.has_record(at, row))
            selected = torch.ones_like(mask)
            if case.select == "every":
                selected = (batch.position_ids[:1] % 3 == 2).double()
            elif case.select == "quantile":
                entropy = torch.distributions.Categorical(logits=theirs).entropy()
                selected = objective.tokens.ranked(entropy.t(), mask.t() != 0, None).t().double()
            selected = selected * taught
            kd = kd * selected
            weight = {1: (0.3, 1.0), 2: (0.0, 2.0)}.get(source, (1.0, 1.0)) if case.weights else (1.0, 1.0)
            loss = weight[0] * kd + weight[1] * lm
            total, number = total + (loss * mask).sum(), number + mask.sum()
            of_metrics = mask * selected if case.select == "every" or case.misses else mask
            of_kl = {"kl to teacher": of_metrics}
            if case.cached is not None:
                of_kl = {name: of_metrics * ((source == 2) == (name != "kl to teacher")) for name in KL}
            for name, value, counted in (
                ("lm loss", lm, mask),
                ("kd loss", kd, mask),
                ("total loss", loss, mask),
                ("teacher lm loss", teacher_lm, of_metrics),
                *((name, kl, counted) for name, counted in of_kl.items()),
            ):
                found = torch.stack([(value * counted).sum(), counted.sum()]).detach()
                sums[name] = sums.get(name, torch.zeros(2)) + found
    weights = dict(named(student))
    gradients = torch.autograd.grad(total / number, list(weights.values()))
    found = {"losses": sums, "gradients": dict(zip(weights, gradients, strict=True))}
    return found if case.cached is None else {**found, "records": records_of(case, teachers[2])}


def train(case: Case, records: list[Tensor]) -> dict[str, Any]:
    """One step: the sums of losses and tokens over all ranks, if this is the last stage, and this stage's gradients."""
    from megatron.core import parallel_state
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    from abkd_megatron.student.attach import attach
    from abkd_megatron.student.cached import CachedTeacher
    from abkd_megatron.teacher.build import Teacher
    from abkd_megatron.teacher.teachers import Teachers
    from abkd_megatron.vocab_parallel.execution import Execution

    groups = process_groups(case.tp, case.pp, 1)
    parallel_state.set_virtual_pipeline_model_parallel_world_size(case.virtual)
    model_parallel_cuda_manual_seed(1)
    student, of_teachers = models(case, groups)
    first, second, third = (Teacher.of(model, groups) for model in of_teachers)
    live, cache = [0, 1, 2], None
    if case.cached is None:
        teachers = Teachers(first, tuple(zip(OF_SOURCES, (second, third, second), strict=True)))
        assert teachers.distinct == (first, second, third)
    else:
        of_sources = tuple(zip(OF_SOURCES[::2], (second, second), strict=True))
        teachers, live = Teachers(first, of_sources, cached=OF_SOURCES[1]), [0, 1]
        cache = CachedTeacher(layout_of(case), "lm" if case.misses else "error")
    chunks = [DistributedDataParallel(it.config, DistributedDataParallelConfig(), it) for it in student]
    before = [sequences.attributes(chunk) for chunk in student]
    attachment = attach(
        chunks,
        teachers,
        objective_of(case),
        execution=Execution(head=case.head, chunk_tokens=7 if case.head == "fused" else None),
        vocab_size=VOCAB,
        pg_collection=groups,
        cache=cache,
    )
    assert attachment.needs_sources and attachment.teacher is first
    attachment.passes.num_steps = 2 if case.skips else 1
    passes: Counter[int] = Counter()
    for number, model in enumerate(of_teachers):
        model.register_forward_hook(lambda *_, number=number: passes.update([number]))
    batches = [replace(it, records=of) for it, of in zip(micro_batches(), records or [None] * NUM_BATCHES, strict=True)]
    given = list(zip(batches, map(torch.tensor, case.sources), strict=True))[groups.dp.rank() :: groups.dp.size()]
    for chunk in chunks:
        chunk.zero_grad_buffer()
    reports = get_forward_backward_func()(
        forward_step_func=partial(forward_step, attachment, case.skips),
        data_iterator=[iter(given) for _ in chunks] if case.virtual else iter(given),
        model=chunks,
        num_microbatches=len(given),
        seq_length=LENGTH,
        micro_batch_size=ROWS,
    )
    needed = [{TEACHER_OF_SOURCE.get(source, 0) for source in sources.tolist()} & set(live) for _, sources in given]
    every = [set(live)] * len(given)
    assert passes == Counter(number for of_one in (needed if case.skips else every) for number in of_one)
    if groups.pp.rank() + 1 == groups.pp.size() and not case.skips:
        # Of each teacher s * b * H numbers, of a rank's part of the sequence, per micro-batch that waits.
        sizes = sum(TEACHERS[number][1] for number in live) * LENGTH * ROWS * 4 // (2 if case.sequence_parallel else 1)
        assert attachment.max_queued_bytes == attachment.max_queued_microbatches * sizes
        assert attachment.max_queued_microbatches == (case.virtual or 1)
        assert attachment.passes.numbers is not None
    attachment.detach()
    assert [sequences.attributes(chunk) for chunk in student] == before, "detached, the student is what it was"
    losses = {}
    for name in sorted(reports[0].keys() - {"teacher seconds"}) if reports else ():
        losses[name] = torch.stack([report[name] for report in reports]).double().sum(0)
        dist.all_reduce(losses[name], group=groups.dp_cp)
    gradients = {name: weight.main_grad.clone() for chunk in student for name, weight in named(chunk)}
    return {"losses": losses, "gradients": gradients}


def forward_step(
    attachment: Any, skips: bool, batches: Iterator[tuple[MicroBatch, Tensor]], model: torch.nn.Module
) -> tuple[Tensor, partial]:
    batch, sources = next(batches)
    first, last = model.module.pre_process, model.module.post_process
    attachment.sources = sources if last else None
    if attachment.cache is not None and last:
        attachment.cache.packed = batch.records
    attachment.passes.sources_on_host = sources.tolist() if skips else None
    output = model(
        batch.tokens if first else None,
        batch.position_ids if first else None,
        None,
        labels=batch.labels if last else None,
        loss_mask=batch.loss_mask if last else None,
    )
    return output, partial(attachment.loss_func, batch.loss_mask)


def compare(case: Case, got: dict[str, Any], wanted: dict[str, Any]) -> dict[str, float]:
    """The largest relative error of every loss on the last stage, and of every parameter's gradient on its stage."""
    errors = {}
    for name, expected in wanted["losses"].items() if got["losses"] else ():
        assert abs(got["losses"][name][1] - expected[1]) < 1e-6, f"{name}: tokens {got['losses'][name][1]}"
        errors[name] = error(got["losses"][name][0], expected[0])
    for name, gradient in got["gradients"].items():
        whole = wanted["gradients"][name]
        (split,) = [dim for dim in range(whole.ndim) if gradient.shape[dim] != whole.shape[dim]] or [None]
        if split is not None:
            whole = whole.chunk(case.tp, dim=split)[process_groups(case.tp, case.pp, 1).tp.rank()]
        errors[f"gradient of {name}"] = error(gradient, whole)
    return errors


def main() -> None:
    from abkd_megatron import cpu_backend

    cpu_backend.install()
    cpu_backend.init_process_group(timedelta(minutes=3))
    path, num_ranks = sys.argv[1], dist.get_world_size()
    if num_ranks == 1:
        wanted = {case.reference: case for cases in CASES.values() for case in cases.values()}
        torch.save({key: dense(case.on_one_rank()) for key, case in wanted.items()}, path)
    references = torch.load(path)
    found = {}
    for name, case in sorted(CASES[num_ranks].items(), key=lambda item: (item[1].tp, item[1].pp)):
        errors: list[Any] = [None] * num_ranks
        reference = references[case.reference]
        dist.all_gather_object(errors, compare(case, train(case, reference.get("records", [])), reference))
        found[name] = {what: max(of.get(what, 0.0) for of in errors) for what in set().union(*errors)}
    if dist.get_rank() == 0:
        print("FOUND " + json.dumps(found), flush=True)
    dist.barrier()


if __name__ == "__main__":
    main()
