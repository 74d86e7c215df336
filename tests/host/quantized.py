"""Students that ModelOpt has quantized, on this rank of a tensor-parallel group, against the dense loss.

    python quantized.py FOLDER

One rank leaves a step in FOLDER, with which two pipeline stages compare theirs. Prints one line of JSON on rank 0: the
worst errors of all ranks, and what was refused.
"""

import copy
import json
import sys
from collections.abc import Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from sequences import (
    HIDDEN,
    LAYERS,
    VOCAB,
    Case,
    MicroBatch,
    build,
    error,
    forward_step,
    micro_batches,
    named,
    process_groups,
)
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata

STEPS = 12
# Of the output layer, too, which ModelOpt's configurations leave out.
WHOLE = [{"quantizer_name": f"*output_layer.{of}_quantizer", "enable": True} for of in ("weight", "input")]


def main() -> None:
    from abkd_megatron import cpu_backend

    cpu_backend.install()
    cpu_backend.init_process_group(timedelta(minutes=3))
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    tp = dist.get_world_size()
    groups = process_groups(tp, 1, 1)
    model_parallel_cuda_manual_seed(1)
    batch = MicroBatch.random(2, 12, torch.Generator().manual_seed(0))
    found: dict[str, Any] = {"errors": {}, "losses": {}}
    for name, hybrid, more in (
        ("INT8_DEFAULT_CFG", False, ()),
        ("INT8_DEFAULT_CFG", False, WHOLE),
        ("FP8_DEFAULT_CFG", False, ()),
        ("INT8_DEFAULT_CFG", True, ()),
    ):
        case = Case("masked", tp=tp, hybrid=hybrid)
        for head in ("materialized", "auto") if more else ("materialized", "fused"):
            label = f"{name}{', hybrid' * hybrid}{', output layer' * bool(more)}, {head}"
            found["errors"][label], found["losses"][label] = compare(case, name, more, head, batch, groups)
    found["refused"] = refused(Case("masked", tp=tp), batch, groups)
    found["shared"] = shared(Case("masked", tp=tp), batch, groups)
    found["kl"] = trained(Case("masked", tp=tp), batch, groups, Path(sys.argv[1]) / str(tp))
    found["errors"] |= scheduled(Path(sys.argv[1]) / "step.pt")
    every: list[Any] = [None] * tp
    dist.all_gather_object(every, found["errors"])
    found["errors"] = {name: max(of[name] for of in every) for name in found["errors"]}
    if dist.get_rank() == 0:
        print("FOUND " + json.dumps(found), flush=True)
    dist.barrier()


def pair(case: Case, groups: Any) -> tuple[torch.nn.Module, torch.nn.Module]:
    """A model, and a copy with the same weights to be its teacher."""
    student, teacher = (build(case, "student", LAYERS, HIDDEN, "rope", groups, False) for _ in range(2))
    return student, teacher.requires_grad_(False)


def quantize(
    model: torch.nn.Module, name: str, batch: MicroBatch | None = None, more: Sequence[dict[str, Any]] = ()
) -> None:
    """Quantize in one of ModelOpt's configurations, calibrated on a batch if inputs are quantized."""
    import modelopt.torch.quantization as mtq

    config = copy.deepcopy(getattr(mtq, name))
    config["quant_cfg"] += copy.deepcopy(list(more))
    mtq.quantize(model, config, partial(logits_of, batch=batch) if batch is not None else None)


def logits_of(model: torch.nn.Module, batch: MicroBatch) -> Tensor:
    """This rank's columns, by the model itself."""
    return model(batch.tokens, batch.position_ids, None)


def dense_loss(student: torch.nn.Module, teacher: torch.nn.Module, batch: MicroBatch, groups: Any) -> Tensor:
    """[b, s], from the whole vocabulary of both, in fp64."""
    from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

    from abkd_megatron import AlphaBeta
    from abkd_megatron.losses import reference_divergence

    q, p = (
        gather_from_tensor_model_parallel_region(logits_of(model, batch), group=groups.tp)[..., :VOCAB].double()
        for model in (student, teacher)
    )
    of_text = torch.nn.functional.cross_entropy(q.transpose(1, 2), batch.labels, reduction="none")
    return of_text + reference_divergence(AlphaBeta(0.2, 0.7), q, p.detach())


def attached(student: torch.nn.Module, teacher: torch.nn.Module, groups: Any, head: str = "auto", **objective: Any):
    from abkd_megatron import AlphaBeta
    from abkd_megatron.losses.objective import Objective
    from abkd_megatron.student.attach import attach
    from abkd_megatron.teacher.build import Teacher
    from abkd_megatron.vocab_parallel.execution import Execution

    trained = Objective(AlphaBeta(*objective.pop("of", (0.2, 0.7))), **objective)
    execution = Execution(head=head, chunk_tokens=7 if head == "fused" else None)
    of = Teacher.of(teacher, groups)
    return attach(student, of, trained, execution=execution, vocab_size=VOCAB, pg_collection=groups)


def loss_of(student: torch.nn.Module, batch: MicroBatch) -> Tensor:
    return student(batch.tokens, batch.position_ids, None, labels=batch.labels, loss_mask=batch.loss_mask)


def compare(
    case: Case, name: str, more: Sequence[dict[str, Any]], head: str, batch: MicroBatch, groups: Any
) -> tuple[float, float]:
    """The worst relative error of the loss and of the gradients against the dense ones, and the sum of the loss."""
    student, teacher = pair(case, groups)
    plain = logits_of(teacher, batch)
    quantize(student, name, batch, more)
    assert error(logits_of(student, batch).detach(), plain) > 1e-3, "the student is quantized"
    weights = dict(named(student))
    of_tokens = dense_loss(student, teacher, batch, groups)
    wanted = torch.autograd.grad((of_tokens * batch.loss_mask).sum(), list(weights.values()))
    attachment = attached(student, teacher, groups, head)
    assert (attachment.plan.chunk_tokens is not None) == (head == "fused"), attachment.plan
    loss = loss_of(student, batch)
    got = torch.autograd.grad((loss * batch.loss_mask).sum(), list(weights.values()))
    assert torch.equal(logits_of(teacher, batch), plain), "the teacher is not"
    attachment.detach()
    assert error(logits_of(student, batch).detach(), plain) > 1e-3, "and still is"
    counted = batch.loss_mask != 0
    errors = [error(loss.detach()[counted], of_tokens.detach()[counted].float())]
    errors += [error(ours, dense) for ours, dense in zip(got, wanted, strict=True)]
    return max(errors), (loss.detach() * batch.loss_mask).sum().item()


def refused(case: Case, batch: MicroBatch, groups: Any) -> dict[str, str]:
    """Messages where the fused head would leave the quantizers of the output layer out."""
    from abkd_megatron.errors import ConfigError

    found = {}
    student, teacher = pair(case, groups)
    quantize(student, "INT8_DEFAULT_CFG", batch, WHOLE)
    try:
        attached(student, teacher, groups, "fused")
    except ConfigError as why:
        found["before"] = str(why)
    student, teacher = pair(case, groups)
    attachment = attached(student, teacher, groups, "fused")
    quantize(student, "INT8_DEFAULT_CFG", batch)
    loss_of(student, batch)  # quantizers of layers do no harm
    student.output_layer.weight_quantizer.enable()
    try:
        loss_of(student, batch)
    except RuntimeError as why:
        found["after"] = str(why)
    attachment.detach()
    return found


def shared(case: Case, batch: MicroBatch, groups: Any) -> dict[str, float]:
    """A frozen base that is quantized in the student's pass and not in the teacher's, with its weights once."""
    from abkd_megatron.teacher.build import share_frozen_weights

    student, teacher = pair(case, groups)
    plain = logits_of(teacher, batch)
    quantize(student, "INT8_DEFAULT_CFG", batch)
    of_student = logits_of(student, batch).detach()
    for weight_name, weight in student.named_parameters():
        weight.requires_grad_("norm" in weight_name)
    kept, size = share_frozen_weights(teacher, [student])
    assert torch.equal(logits_of(teacher, batch), plain)
    assert torch.equal(logits_of(student, batch).detach(), of_student)
    trained_ones = [weight for weight in student.parameters() if weight.requires_grad]
    wanted = torch.autograd.grad((dense_loss(student, teacher, batch, groups) * batch.loss_mask).sum(), trained_ones)
    attachment = attached(student, teacher, groups)
    got = torch.autograd.grad((loss_of(student, batch) * batch.loss_mask).sum(), trained_ones)
    attachment.detach()
    return {"part": kept / size, "error": max(error(*both) for both in zip(got, wanted, strict=True))}


def trained(case: Case, batch: MicroBatch, groups: Any, folder: Path) -> dict[str, list[float]]:
    """KL to the teacher per step, and of the steps after a save: gone on, and resumed by a new model."""
    from megatron.core import dist_checkpointing
    from modelopt.torch.opt.plugins import restore_sharded_modelopt_state, save_sharded_modelopt_state

    from abkd_megatron.errors import AbkdError
    from abkd_megatron.teacher.checkpoint import TeacherCheckpoint, check_unquantized

    student, teacher = pair(case, groups)
    quantize(student, "INT4_BLOCKWISE_WEIGHT_ONLY_CFG", batch)
    found: dict[str, Any] = {}
    attachment = attached(student, teacher, groups, of=(1.0, 0.0), lm_weight=0.0)
    found["steps"] = steps(student, attachment, batch, STEPS)
    if dist.get_rank() == 0:
        folder.mkdir(parents=True)
    dist.barrier()
    metadata = {"dp_cp_group": groups.dp_cp}
    dist_checkpointing.save(student.sharded_state_dict(metadata=metadata), str(folder))
    save_sharded_modelopt_state([student], folder)
    found["gone on"] = steps(student, attachment, batch, 3)
    attachment.detach()

    again, _ = pair(case, groups)
    with torch.no_grad():
        for weight in again.parameters():
            weight.zero_()
    restore_sharded_modelopt_state([again], folder)
    again.load_state_dict(dist_checkpointing.load(again.sharded_state_dict(metadata=metadata), str(folder)))
    attachment = attached(again, teacher, groups, of=(1.0, 0.0), lm_weight=0.0)
    found["resumed"] = steps(again, attachment, batch, 3)
    # By the tensors of its quantizers, and where there are none by ModelOpt's state.
    for name, check in (
        ("as a teacher", lambda: TeacherCheckpoint.open(folder)),
        ("as a student", lambda: check_unquantized(folder, Metadata({}), "student")),
    ):
        try:
            check()
        except AbkdError as why:
            found[name] = str(why)
    return found


def scheduled(path: Path) -> dict[str, float]:
    """A step of Megatron's schedule, on as many pipeline stages as there are ranks; errors against one rank's."""
    from megatron.core import parallel_state
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.pipeline_parallel import get_forward_backward_func

    case = Case("masked", pp=dist.get_world_size())
    groups = process_groups(1, case.pp, 1)
    student, teacher = pair(case, groups)
    batches, _, _ = micro_batches(case.data, case.per_token)
    quantize(student, "INT8_WEIGHT_ONLY_CFG")
    model = DistributedDataParallel(student.config, DistributedDataParallelConfig(), student)
    attachment = attached(model, teacher, groups)
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
    got = {name: weight.main_grad.clone() for name, weight in named(student)}
    if parallel_state.is_pipeline_last_stage():
        got |= {name: sum(of[name] for of in reports) for name in ("kd loss", "lm loss", "kl to teacher")}
    if case.pp == 1:
        torch.save(got, path)
    wanted = torch.load(path)
    return {f"{case.pp} stages": max(error(value, wanted[name]) for name, value in got.items())}


def steps(student: torch.nn.Module, attachment: Any, batch: MicroBatch, number: int) -> list[float]:
    """KL to the teacher before each step of gradient descent."""
    found = []
    for _ in range(number):
        student.zero_grad()
        loss, count, logged = attachment.loss_func(batch.loss_mask, loss_of(student, batch))
        (loss / count).backward()
        of_tokens, tokens = logged["kl to teacher"].tolist()
        found.append(of_tokens / tokens)
        with torch.no_grad():
            for weight in student.parameters():
                weight -= 0.05 * weight.grad
    return found


if __name__ == "__main__":
    main()
