"""Losses between layers through Megatron's models and schedules, against their definition and plain autograd.

    python hidden_states.py REFERENCES

One rank trains the plain form: whole models, losses written out, one backward; it saves losses and gradients to the
file REFERENCES. It and jobs of more ranks compare their cases with those. The worst errors of all ranks, and what is
refused, go to rank 0's stdout as one line of JSON.
"""

import json
import sys
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from typing import Any

import sequences
import torch
import torch.distributed as dist
from sequences import HIDDEN, LAYERS, TEACHER_HIDDEN, TEACHER_LAYERS, VOCAB, MicroBatch, build, error, named
from torch import Tensor

PAIRS = ((1, 3, "mse", 0.5), (2, 2, "cosine", 1.5), (2, 4, "mse", 1.0), (3, 5, "cosine", 1.0), (4, 8, "mse", 2.0))
KD_WEIGHT, LM_WEIGHT = 0.5, 2.0


@dataclass(frozen=True)
class Case:
    data: str = "masked"
    """Micro-batches as `sequences.py` has them: with empty rows, and some without a token that counts."""
    tp: int = 1
    pp: int = 1
    cp: int = 1
    per_token: bool = True
    projector: bool = True
    """Without, both models have one hidden size."""
    kd_weight: float = KD_WEIGHT
    grad_scale: float = 1.0
    """What fp16 would multiply the loss by."""

    @property
    def reference(self) -> "Case":
        return replace(self, tp=1, pp=1, cp=1, grad_scale=1.0)

    @property
    def built(self) -> sequences.Case:
        return sequences.Case(self.data, tp=self.tp, pp=self.pp, cp=self.cp, per_token=self.per_token)


CASES: dict[int, dict[str, Case]] = {
    1: {
        "per token": Case(),
        "by micro-batch": Case(per_token=False),
        "loss scale": Case(per_token=False, grad_scale=8.0),
        "no projector": Case(projector=False),
        "no distillation loss": Case(kd_weight=0.0),
    },
    2: {
        "TP 2": Case(tp=2),
        "PP 2": Case(pp=2),
        "PP 2, by micro-batch, loss scale": Case(pp=2, per_token=False, grad_scale=8.0),
        "PP 2, no projector": Case(pp=2, projector=False),
        "DP 2": Case(),
        "DP 2, by micro-batch": Case(per_token=False),
        "CP 2": Case("context", cp=2),
    },
}


def main() -> None:
    from abkd_megatron import cpu_backend

    cpu_backend.install()
    cpu_backend.init_process_group(timedelta(minutes=3))
    path, num_ranks = sys.argv[1], dist.get_world_size()
    if num_ranks == 1:
        wanted = {case.reference for cases in CASES.values() for case in cases.values()}
        torch.save({repr(case): plain(case) for case in wanted}, path)
    references = torch.load(path)
    found: dict[str, Any] = {}
    for name, case in sorted(CASES[num_ranks].items(), key=lambda item: (item[1].tp, item[1].pp, item[1].cp)):
        errors: list[Any] = [None] * num_ranks
        dist.all_gather_object(errors, compare(case, train(case), references[repr(case.reference)]))
        found[name] = {what: max(of.get(what, 0.0) for of in errors) for what in set().union(*errors)}
    said: list[Any] = [None] * num_ranks
    dist.all_gather_object(said, refused(num_ranks))
    if dist.get_rank() == 0:
        print("FOUND " + json.dumps({"errors": found, "refused": said}), flush=True)
    dist.barrier()


def losses(case: Case) -> tuple[Any, ...]:
    from abkd_megatron.losses.hidden import HiddenLoss

    return tuple(HiddenLoss(*pair, projector=case.projector) for pair in PAIRS)


def models(case: Case) -> tuple[Any, Any, Any]:
    """Process groups, student and teacher."""
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    groups = sequences.process_groups(case.tp, case.pp, case.cp)
    model_parallel_cuda_manual_seed(1)
    size = TEACHER_HIDDEN if case.projector else HIDDEN
    student = build(case.built, "student", LAYERS, HIDDEN, "rope", groups, case.cp > 1)
    teacher = build(case.built, "teacher", TEACHER_LAYERS, size, "rope", groups, case.cp > 1)
    return groups, student, teacher


def first_projector(name: str) -> Tensor:
    return torch.randn(TEACHER_HIDDEN, HIDDEN, generator=torch.Generator().manual_seed(zlib.crc32(name.encode()))) / 4


def batches_of(case: Case) -> list[MicroBatch]:
    return sequences.micro_batches(case.data, case.per_token)[0]


def plain(case: Case) -> dict[str, Any]:
    """The definition: what is logged, and the gradient of what is trained."""
    from abkd_megatron.losses.reference import reference_alpha_beta

    _, student, teacher = models(case)
    outputs: dict[tuple[str, int], Tensor] = {}
    for who, model in (("student", student), ("teacher", teacher)):
        for number, layer in enumerate(model.decoder.layers, 1):
            layer.register_forward_hook(
                lambda layer, args, output, key=(who, number): outputs.__setitem__(key, output[0])
            )
    names = [f"distillation_projectors.{pair[0]}-{pair[1]}.weight" for pair in PAIRS]
    projectors = {name: first_projector(name).requires_grad_() for name in names if case.projector}
    given = batches_of(case)
    columns = VOCAB if case.kd_weight else None  # Megatron's own cross entropy takes padded columns in
    tokens = sum(batch.loss_mask.sum().item() for batch in given)
    sums: dict[str, Any] = {}
    loss: Any = 0.0
    for batch in given:
        logits = student(batch.tokens, batch.position_ids, None)
        with torch.no_grad():
            of_teacher = teacher(batch.tokens, batch.position_ids, None)
        counted = batch.loss_mask > 0
        labels = batch.labels.where(counted, torch.zeros_like(batch.labels))
        terms = {
            "kd loss": reference_alpha_beta(logits, of_teacher, 0.2, 0.7, vocab_size=VOCAB),
            "lm loss": -logits[..., :columns].double().log_softmax(-1).gather(-1, labels[..., None])[..., 0],
        }
        weights = {"kd loss": case.kd_weight, "lm loss": LM_WEIGHT}
        for (ours, theirs, kind, weight), name in zip(PAIRS, names, strict=True):
            s, t = (outputs[key].transpose(0, 1).double() for key in (("student", ours), ("teacher", theirs)))
            if case.projector:
                s = s @ projectors[name].T.double()
            cosine = (s * t).sum(-1) / (s.norm(dim=-1) * t.norm(dim=-1))
            terms[f"hidden loss {ours}-{theirs}"] = ((s - t) ** 2).mean(-1) if kind == "mse" else 1 - cosine
            weights[f"hidden loss {ours}-{theirs}"] = weight
        here = {name: of_token[counted].sum() for name, of_token in terms.items()}
        here["total loss"] = sum(weights[name] * here[name] for name in terms)
        count = counted.sum().item()
        loss = loss + here["total loss"] / (tokens if case.per_token else max(count, 1) * len(given))
        for name, value in here.items():
            of, counts = sums.get(name, (0.0, 0))
            sums[name] = (of + value.item(), counts + count)
    loss.backward()
    gradients = {name: weight.grad for name, weight in (*named(student), *projectors.items())}
    return {"losses": sums, "gradients": gradients}


def train(case: Case) -> dict[str, Any]:
    """One step of Megatron's schedules with a teacher attached."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.num_microbatches_calculator import (
        init_num_microbatches_calculator,
        unset_num_microbatches_calculator,
    )
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from abkd_megatron import AlphaBeta
    from abkd_megatron.losses.objective import Objective
    from abkd_megatron.student.attach import attach
    from abkd_megatron.student.projectors import add_projectors
    from abkd_megatron.teacher.build import Teacher

    groups, student, teacher = models(case)
    before = list(student.state_dict())
    batches = batches_of(case)[groups.dp.rank() :: groups.dp.size()]
    rows, length = batches[0].tokens.shape
    size = rows * len(batches) * groups.dp.size()
    init_num_microbatches_calculator(0, None, size, rows, groups.dp.size())
    add_projectors([student], losses(case), TEACHER_HIDDEN, tp_group=groups.tp)
    with torch.no_grad():
        for name, weight in student.named_parameters():
            if name.startswith("distillation_projectors."):
                weight.copy_(first_projector(name))
    if case.grad_scale != 1:
        student.config.grad_scale_func = lambda loss: loss * case.grad_scale
    model = DistributedDataParallel(student.config, DistributedDataParallelConfig(), student)
    objective = Objective(
        AlphaBeta(0.2, 0.7), kd_weight=case.kd_weight, lm_weight=LM_WEIGHT, hidden_losses=losses(case)
    )
    attachment = attach(model, Teacher.of(teacher, groups), objective, vocab_size=VOCAB, pg_collection=groups)
    model.zero_grad_buffer()
    reports = get_forward_backward_func()(
        forward_step_func=partial(forward_step, attachment),
        data_iterator=iter(batches),
        model=[model],
        num_microbatches=len(batches),
        seq_length=length,
        micro_batch_size=rows,
    )
    gradients = {name: weight.main_grad / case.grad_scale for name, weight in named(student)}
    attachment.detach()
    assert list(student.state_dict()) == before, "detached, the student is a plain one"
    assert not any(layer._forward_hooks for layer in (*student.decoder.layers, *teacher.decoder.layers))
    unset_num_microbatches_calculator()
    sums = {}
    for name in reports[0].keys() - {"teacher seconds"} if reports else ():
        sums[name] = torch.stack([report[name] for report in reports]).double().sum(0)
        dist.all_reduce(sums[name], group=groups.dp_cp)
    return {"losses": sums, "gradients": gradients}


def forward_step(attachment: Any, batches: Iterator[MicroBatch], model: Any) -> tuple[Tensor, partial]:
    from megatron.core import parallel_state
    from megatron.core.utils import get_batch_on_this_cp_rank

    batch = next(batches)
    here = {name: getattr(batch, name) for name in ("tokens", "position_ids", "labels", "loss_mask")}
    here = get_batch_on_this_cp_rank(here, is_hybrid_cp=False, cp_group=parallel_state.get_context_parallel_group())
    output = model(here["tokens"], here["position_ids"], None, labels=here["labels"], loss_mask=here["loss_mask"])
    return output, partial(attachment.loss_func, here["loss_mask"])


def compare(case: Case, got: dict[str, Any], wanted: dict[str, Any]) -> dict[str, float]:
    from megatron.core import parallel_state

    errors = {}
    for name in wanted["losses"] if got["losses"] else ():
        for value, of in zip(got["losses"][name], wanted["losses"][name], strict=True):
            errors[name] = max(errors.get(name, 0.0), error(value, torch.tensor(of, dtype=torch.float64)))
    for name, gradient in got["gradients"].items():
        whole = wanted["gradients"][name]
        (split,) = [dim for dim in range(whole.ndim) if gradient.shape[dim] != whole.shape[dim]] or [None]
        if split is not None:
            whole = whole.chunk(case.tp, dim=split)[parallel_state.get_tensor_model_parallel_rank()]
        errors[f"gradient of {name}"] = error(gradient, whole)
    return errors


def refused(num_ranks: int) -> dict[str, str]:
    """What attach() and add_projectors() say to what cannot be trained; at PP 2 on two ranks."""
    from megatron.core.num_microbatches_calculator import (
        init_num_microbatches_calculator,
        unset_num_microbatches_calculator,
    )

    from abkd_megatron import AlphaBeta
    from abkd_megatron.errors import AbkdError
    from abkd_megatron.losses.hidden import HiddenLoss
    from abkd_megatron.losses.objective import Objective
    from abkd_megatron.student.attach import attach
    from abkd_megatron.student.projectors import add_projectors
    from abkd_megatron.teacher.build import Teacher

    groups, student, teacher = models(Case(pp=num_ranks, per_token=False))
    arguments = {"vocab_size": VOCAB, "pg_collection": groups}

    def attached(*hidden: HiddenLoss, projectors: bool = True, size: int = TEACHER_HIDDEN) -> None:
        if projectors:
            add_projectors([student], hidden, size, tp_group=groups.tp)
        try:
            objective = Objective(AlphaBeta(0.2, 0.7), hidden_losses=hidden)
            attachment = attach(student, Teacher.of(teacher, groups), objective, **arguments)
        finally:
            if hasattr(student, "distillation_projectors"):
                del student.distillation_projectors
        if num_ranks == 1:
            batch = batches_of(Case())[0]
            try:
                student(batch.tokens, batch.position_ids, None, labels=batch.labels)
            finally:
                attachment.detach()

    def with_sequence_parallel_teacher() -> None:
        teacher.config.sequence_parallel = True
        try:
            attached(HiddenLoss(1, 1, "mse"))
        finally:
            teacher.config.sequence_parallel = False

    def twice() -> None:
        add_projectors([student], [HiddenLoss(1, 1, "mse"), HiddenLoss(4, 8, "mse")], 24, tp_group=groups.tp)
        try:
            add_projectors([student], [HiddenLoss(1, 1, "mse")], 24, tp_group=groups.tp)
        finally:
            del student.distillation_projectors

    attempts = {"number of micro-batches": lambda: attached(HiddenLoss(1, 1, "mse"))}
    init = partial(init_num_microbatches_calculator, 0, None, 8, 2, 1)
    attempts |= {
        "student's layer": lambda: (init(), attached(HiddenLoss(LAYERS + 1, 1, "mse"))),
        "teacher's layer": lambda: attached(HiddenLoss(1, TEACHER_LAYERS + 1, "mse")),
        "stages": lambda: attached(HiddenLoss(4, 4, "mse")),
        "sizes": lambda: attached(HiddenLoss(1, 1, "mse", projector=False)),
        "no projectors": lambda: attached(HiddenLoss(1, 1, "mse"), projectors=False),
        "projector of another size": lambda: attached(HiddenLoss(1, 1, "mse"), size=7),
        "sequence-parallel teacher": with_sequence_parallel_teacher,
        "projectors twice": twice,
        "no loss mask": lambda: attached(HiddenLoss(1, 1, "mse")),
    }
    said = {}
    for name, attempt in attempts.items():
        try:
            attempt()
        except AbkdError as found:
            said[name] = str(found)
    unset_num_microbatches_calculator()
    return said


if __name__ == "__main__":
    main()
