"""Checks of the models as built: the teacher's weights, free memory, and the loss over the live process groups."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import psutil
import torch
import torch.distributed as dist
from torch import Tensor

from abkd_megatron import kernels
from abkd_megatron.errors import CheckpointError, ConfigError
from abkd_megatron.losses import Divergence
from abkd_megatron.losses.objective import Objective
from abkd_megatron.student.attach import Attachment
from abkd_megatron.student.wrappers import unwrapped
from abkd_megatron.teacher.build import Teacher, random_states_kept
from abkd_megatron.teacher.model import Model
from abkd_megatron.vocab_parallel import VocabShard, vocab_parallel_distillation, vocab_parallel_logit_loss

# Tokens of the self-test of the loss, and its tolerance relative to the largest number. It is wide compared with
# rounding, and narrow compared with the faults it finds: wrong factors, and sums over one rank only.
TOKENS = 8
TOLERANCE = {torch.float64: 1e-3, torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 2e-2}

# Parameters with one row per column of the padded vocabulary. On some ranks all rows may be padding.
_OF_VOCABULARY = ("embedding.word_embeddings.weight", "output_layer.weight")


@dataclass(frozen=True)
class Models:
    """Subject of the phase `models`."""

    student: Sequence[torch.nn.Module]
    """This rank's model chunks as Megatron built them."""
    attachment: Attachment
    vocab_size: int
    """Number of tokens that both models know."""
    tp_group: dist.ProcessGroup
    """The student's tensor-parallel group."""
    tokens: int
    """Per micro-batch on one rank."""

    @property
    def last(self) -> Model:
        """This rank's last model chunk."""
        return unwrapped(self.student)[-1]


def check_weights(models: Models) -> None:
    """Reject teachers with weights that are NaN, infinite or all zero.

    Raises:
        CheckpointError: with the first such tensor.
    """
    assert models.attachment.teachers is not None
    for name, teacher in zip(models.attachment.teachers.names, models.attachment.teachers.distinct, strict=True):
        check_weights_of(name, teacher, models.vocab_size, models.tp_group)


def check_weights_of(name: str, teacher: Teacher, vocab_size: int, tp_group: dist.ProcessGroup) -> None:
    """Reject one teacher, see `check_weights`; `vocab_size` is of the student."""
    if wrong := wrong_weights(teacher, teacher.vocab_size or vocab_size, tp_group):
        more = f", and {len(wrong) - 1} more tensors" if len(wrong) > 1 else ""
        raise CheckpointError(
            f"expected trained weights of {name}, got {wrong[0]} on rank {dist.get_rank()}{more}; give "
            "teacher.load a checkpoint that was converted or saved whole"
        )


def check_memory(models: Models) -> None:
    """Reject a micro-batch whose logits do not fit in the memory left by the models.

    Raises:
        ConfigError: with both sizes.
    """
    last, tokens = models.last, models.tokens
    needed = bytes_of_logits(last, models.attachment, tokens) if last.post_process else 0
    if needed > (free := free_bytes(next(last.parameters()).device)):
        raise ConfigError(
            f"expected room for {needed / 2**30:.3g} GiB of logits, both models' of {tokens} tokens and their "
            f"gradient, got {free / 2**30:.3g} GiB free on rank {dist.get_rank()} with both models loaded; give a "
            "smaller micro-batch, more tensor-parallel ranks or distillation.head=fused"
        )


def check_gradient(models: Models) -> None:
    """Reject a loss whose value or gradient over vocabulary shards differs from the dense loss.

    Raises:
        ConfigError: with the first loss that differs.

    Collectives: those of the loss on `TOKENS` tokens, and an all-gather of their logits, over the tensor-parallel
    group of the last pipeline stage.
    """
    last = models.last
    if not last.post_process:
        return
    plan, like = models.attachment.plan, next(last.parameters())
    assert plan is not None
    width = last.output_layer.output_size_per_partition
    shard = VocabShard.megatron(width, models.tp_group, models.vocab_size)
    with random_states_kept(), kernels.using(plan.choice):
        wrong = wrong_losses(models.attachment.objective, shard, width, like.dtype, like.device)
    if wrong:
        raise ConfigError(
            "expected the loss over the shards of the vocabulary, and its gradient, to be those of the whole "
            f"vocabulary, got {wrong[0]} on rank {dist.get_rank()}; a custom loss has to sum over the vocabulary with "
            "`columns`; if the loss is not finite, raise the temperature; otherwise try distillation.kernel=eager"
        )


def bytes_of_logits(last: Model, attachment: Attachment, tokens: int) -> int:
    """Return a lower bound of the bytes for a micro-batch's loss: logits and gradient, or the fused head's chunks.

    Args:
        last: the student's last stage.
        attachment: of that student.
        tokens: per micro-batch on this rank.
    """
    objective, plan, weight = attachment.objective, attachment.plan, next(last.parameters())
    assert plan is not None
    every = objective.tokens.n if objective.tokens is not None and objective.tokens.n is not None else 1
    # A teacher with another tokenizer has its logits before the student's, and another number of them.
    compared = tokens // every if objective.cross_tokenizer is None else 0
    rows = (1 if attachment.execution.gradient_in_place else 2) * tokens + compared
    if attachment.teachers is not None and len(attachment.teachers.distinct) > 1:
        rows += tokens // every
    # The gradient from records has its own rows.
    of_both = attachment.teachers is not None and attachment.cache is not None
    rows += tokens * of_both
    if plan.chunk_tokens is not None:
        rows = (2 + of_both) * min(plan.chunk_tokens, tokens)
    size: int = rows * last.output_layer.output_size_per_partition * weight.element_size()
    return size


def free_bytes(device: torch.device) -> int:
    """Return the bytes of memory available to this process. On a CPU other ranks share them."""
    if device.type != "cuda":
        return psutil.virtual_memory().available
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + cached


def wrong_weights(teacher: Teacher, vocab_size: int, tp_group: dist.ProcessGroup) -> list[str]:
    """Describe this rank's parameters of the teacher that cannot be trained weights.

    A bias may be all zero, and so may the weight of a norm, which may be stored as its distance from 1. A matrix may
    not.

    Args:
        teacher: this rank's share.
        vocab_size: tokens that the teacher knows. Rows beyond it are padding and may hold anything.
        tp_group: the student's, over which the teacher's output layer is sharded.

    Returns:
        One line of text per parameter.
    """
    found: list[tuple[str, Tensor]] = []
    for name, parameter, group in _named_parameters(teacher, tp_group):
        values = parameter.detach()
        if name in _OF_VOCABULARY:
            values = values[: VocabShard.megatron(len(values), group, vocab_size).num_columns]
        if values.numel():
            found.append((name, values))
    if not found:
        return []
    # One copy to the host for all of them, so that the GPU is waited for once.
    extremes = torch.stack([torch.stack(values.aminmax()).double() for _, values in found]).tolist()
    wrong = []
    for (name, values), (low, high) in zip(found, extremes, strict=True):
        if not (math.isfinite(low) and math.isfinite(high)):
            wrong.append(f"NaN or infinite numbers in {name} {list(values.shape)}")
        elif low == high == 0 and values.dim() > 1:
            wrong.append(f"nothing but zeros in {name} {list(values.shape)}")
    return wrong


def _named_parameters(
    teacher: Teacher, tp_group: dist.ProcessGroup
) -> Iterator[tuple[str, torch.nn.Parameter, dist.ProcessGroup]]:
    """Yield (name, parameter, group that shards the vocabulary) of this rank's teacher."""
    for name, parameter in teacher.model.named_parameters():
        yield name, parameter, teacher.pg_collection.tp
    if teacher.head is not None and teacher.head is not getattr(teacher.model, "output_layer", None):
        for name, parameter in teacher.head.named_parameters():
            yield f"output_layer.{name}", parameter, tp_group


def wrong_losses(
    objective: Objective, shard: VocabShard, width: int, dtype: torch.dtype, device: torch.device
) -> list[str]:
    """Compare the losses of `objective` on random logits with the losses on the whole vocabulary.

    Compared are values, and gradients on this rank's columns. The reference of a divergence is its `value` and
    `grad_log_q` in fp64, of the cross entropy its formula, of a logit loss the same loss in fp64 on one rank.

    Args:
        objective: its weights are not used.
        shard: of the job's tensor-parallel group.
        width: columns of the local logits, including padding.
        dtype: of the logits.
        device: of the logits.

    Returns:
        One line of text per loss that differs.

    Collectives: those of the losses, and an all-gather of logits, over the shard's group.
    """
    # Each rank makes its own columns, because random numbers may differ between machines.
    generator = torch.Generator().manual_seed(shard.start + 1)
    local = (2 * torch.randn(2, TOKENS, width, generator=generator, device="cpu")).to(device, dtype)
    gathered = [local.double()]
    if shard.num_ranks > 1:
        gathered = [torch.empty_like(gathered[0]) for _ in range(shard.num_ranks)]
        dist.all_gather(gathered, local.double(), group=shard.group)
    whole_student, whole_teacher = torch.cat(gathered, dim=-1)[..., : shard.size].unbind(0)
    student, teacher = local.unbind(0)
    student = student.clone().requires_grad_()
    labels = torch.linspace(0, shard.size - 1, TOKENS, device="cpu").long().to(device)
    weights = torch.linspace(0.5, 1.5, TOKENS, dtype=torch.float64, device=device)

    temperature, divergence = objective.temperature, objective.effective_divergence
    terms = vocab_parallel_distillation(student, teacher, divergence, labels, shard, temperature)
    log_q = whole_student.log_softmax(dim=-1)
    hit = torch.nn.functional.one_hot(labels, shard.size)
    compared = {
        f"{divergence}": (terms.divergence, *_dense(divergence, whole_student, whole_teacher, temperature)),
        "the cross entropy": (terms.cross_entropy, -(log_q * hit).sum(dim=-1), log_q.exp() - hit),
    }
    whole = VocabShard(0, shard.size, shard.size)
    for name, (_, loss) in zip(objective.names_of_logit_losses, objective.logit_losses, strict=True):
        with torch.enable_grad():
            leaf = whole_student.detach().requires_grad_()
            wanted = vocab_parallel_logit_loss(leaf, whole_teacher, loss, whole, temperature, drawn=labels)
            (gradient,) = torch.autograd.grad(wanted.sum(), leaf)
        ours = vocab_parallel_logit_loss(student, teacher, loss, shard, temperature, drawn=labels)
        compared[name] = ours, wanted.detach(), gradient

    wrong = []
    for name, (ours, wanted, dense_gradient) in compared.items():
        (gradient,) = torch.autograd.grad(ours, student, weights.to(ours.dtype), retain_graph=True)
        wanted_gradient = dense_gradient * weights.unsqueeze(-1)
        here = wanted_gradient[:, shard.start : shard.stop]
        padded = torch.nn.functional.pad(here, (0, width - here.shape[-1]))
        for what, got, of, scale in (
            ("value", ours.detach(), wanted, wanted.abs().max()),
            ("gradient", gradient, padded, wanted_gradient.abs().max()),
        ):
            off = ((got.double() - of).abs().max() / scale.clamp_min(torch.finfo(torch.float32).tiny)).item()
            if not off <= TOLERANCE[dtype]:
                times = ((got.double() * of).sum() / (of * of).sum()).item()
                wrong.append(f"a {what} of {name} that is {times:.3g} times the dense one and off by {off:.2g} of it")
    return wrong


def _dense(divergence: Divergence, student: Tensor, teacher: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Return the divergence [n] of fp64 logits [n, V] and its gradient [n, V], as `Divergence` defines them."""
    log_p, log_q = (logits.div(temperature).log_softmax(dim=-1) for logits in (teacher, student))
    grad_log_q = divergence.grad_log_q(log_p, log_q, log_p - log_q)
    value = divergence.value(log_p, log_q, log_p - log_q)
    return value.sum(dim=-1), (grad_log_q - log_q.exp() * grad_log_q.sum(dim=-1, keepdim=True)) / temperature
