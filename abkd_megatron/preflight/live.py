"""What is looked at once, before a student's first optimizer step: faults that would train to nonsense without a word.

Two checks are of the models as built, two of the first step's batches; together they take seconds and draw no random
number of anybody else's.
"""

import inspect
import logging
import math
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import psutil
import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.utils import get_model_config, unwrap_model
from torch import Tensor

from abkd_megatron import kernels
from abkd_megatron.errors import CheckpointError, ConfigError, on_every_rank
from abkd_megatron.losses import Divergence
from abkd_megatron.losses.objective import Objective
from abkd_megatron.student.attach import Attachment
from abkd_megatron.teacher.build import Teacher, random_states_kept
from abkd_megatron.teacher.checkpoint import TeacherCheckpoint
from abkd_megatron.teacher.checksums import check_contents
from abkd_megatron.vocab_parallel import VocabShard, vocab_parallel_distillation, vocab_parallel_logit_loss

logger = logging.getLogger(__name__)

CHECKS = ("teacher_checksums", "teacher_weights", "memory", "gradient", "batch", "teacher_loss")

# Nats around ln V, what a teacher that knows nothing costs. Below it by less than the first a teacher is worth a
# warning. Above it by more than the second it is refused: logits of variance v that say nothing of the text cost v/2
# more than ln V, which is 0.8 for Megatron's initial weights (std 0.02) at a hidden size of 4096, and next to nothing
# in a tiny model; so one that has only begun to learn goes on.
NEAR, BEYOND = 0.1, 0.5

# How far the teacher's loss may be from the expected one, of that. Rounding in bf16 moves the mean over a batch by less
# than a thousandth; a wrong rotary base, number of heads or norm epsilon moves it by several hundredths or more.
NEAR_EXPECTED = 0.02

# The loss per token at which one unit in the last place of fp32 is 1 nat. The rounding error of its gradient is then as
# large as the cross entropy's gradient, which is at most 1 in every logit. Where the student is sure of one token and
# the teacher of another, the gradient is a small difference of such numbers: fp32 against fp64, Neyman's chi-square of
# 1e5 has a gradient with an error of 2e-5 of its largest number, of 4e7 2e-4, of 1e9 2e-2, and of 1e22 no digit is
# right. Where both are unsure it is right up to 1e30, so this is a warning.
LARGEST = 2.0**23

# Tokens of the self-test, and how far it may be off, of the largest number: wide beside rounding, narrow beside the
# faults that are looked for, which are factors and sums of one rank alone.
TOKENS = 8
TOLERANCE = {torch.float64: 1e-3, torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 2e-2}

# Parameters whose rows are the vocabulary's columns, of which some ranks may hold padding alone.
_OF_VOCABULARY = ("embedding.word_embeddings.weight", "output_layer.weight")


def check_files(checkpoint: TeacherCheckpoint, skip: Collection[str] = ()) -> None:
    """Hold the teacher's tensors to the checksums beside them. The ranks read all of it once between them.

    Args:
        checkpoint: the teacher's.
        skip: those of `CHECKS` to leave out.

    Raises:
        CheckpointError: on every rank, if a tensor is not what was written.

    Collectives: one all_gather_object.
    """
    if "teacher_checksums" not in skip:
        with on_every_rank():
            check_contents(checkpoint.directory, checkpoint.index, dist.get_rank(), dist.get_world_size())


def check_models(
    student: Sequence[torch.nn.Module],
    attachment: Attachment,
    *,
    vocab_size: int,
    pg_collection: ProcessGroupCollection,
    tokens: int,
    skip: Collection[str] = (),
    expected_loss: float | None = None,
) -> None:
    """Check the teacher's weights, the room for logits, and the loss over the live process groups.

    Args:
        student: this rank's model as Megatron built it.
        attachment: of that student.
        vocab_size: true size of its vocabulary.
        pg_collection: its process groups; `tp` is used.
        tokens: of a micro-batch on one rank.
        skip: those of `CHECKS` to leave out, in the first step, too.
        expected_loss: as `FirstStep` takes it.

    The attachment gets an observer that checks the first training step.

    Raises:
        CheckpointError: on every rank, if a weight of the teacher is NaN or infinite, or a matrix all zero, on any.
        ConfigError: on every rank, if logits of a micro-batch have no room in what the models leave of the memory, or
            if the sharded loss or its gradient is not the dense one, on any.

    Collectives: three all_gather_object; those of the loss on a few tokens, and an all-gather of their logits.
    """
    objective = attachment.objective
    known = min(objective.shared_vocab or vocab_size, vocab_size)
    hint = "; or leave this check out: distillation.skip_preflight=[{}]"
    if "teacher_weights" not in skip:
        with on_every_rank():
            if wrong := wrong_weights(attachment.teacher, known, pg_collection.tp):
                more = f", and {len(wrong) - 1} more tensors" if len(wrong) > 1 else ""
                raise CheckpointError(
                    f"expected trained weights of the teacher, got {wrong[0]} on rank {dist.get_rank()}{more}; give "
                    "teacher.load a checkpoint that was converted or saved whole" + hint.format("teacher_weights")
                )
    last = unwrap_model(student[-1])
    if "memory" not in skip:
        with on_every_rank():
            needed = bytes_of_logits(last, attachment, tokens) if last.post_process else 0
            if needed > (free := free_bytes(next(last.parameters()).device)):
                raise ConfigError(
                    f"expected room for {needed / 2**30:.3g} GiB of logits, both models' of {tokens} tokens and their "
                    f"gradient, got {free / 2**30:.3g} GiB beside the models on rank {dist.get_rank()}; give a smaller "
                    "micro-batch, more tensor-parallel ranks or distillation.head=fused" + hint.format("memory")
                )
    if "gradient" not in skip:
        wrong = []
        if last.post_process:
            like = next(last.parameters())
            shard = VocabShard.megatron(last.output_layer.output_size_per_partition, pg_collection.tp, known)
            with random_states_kept():
                assert attachment.plan is not None
                with kernels.using(attachment.plan.choice):
                    wrong = wrong_losses(
                        objective, shard, last.output_layer.output_size_per_partition, like.dtype, like.device
                    )
        with on_every_rank():
            if wrong:
                raise ConfigError(
                    "expected the loss over the shards of the vocabulary, and its gradient, to be those of the whole "
                    f"vocabulary, got {wrong[0]} on rank {dist.get_rank()}; a loss of your own has to sum over the "
                    "vocabulary by `columns`; of one that is not finite raise the temperature; otherwise try "
                    "distillation.kernel=eager" + hint.format("gradient")
                )
    attachment.observers.append(FirstStep(student, attachment, pg_collection, known, skip, expected_loss))


def bytes_of_logits(last: GPTModel, attachment: Attachment, tokens: int) -> int:
    """The least memory that a micro-batch's loss takes: logits and their gradient, or the fused head's chunks.

    Args:
        last: the student's last stage.
        attachment: of that student.
        tokens: of a micro-batch on this rank.
    """
    objective, plan, weight = attachment.objective, attachment.plan, next(last.parameters())
    assert plan is not None
    every = objective.tokens.n if objective.tokens is not None and objective.tokens.n is not None else 1
    rows = (1 if attachment.execution.gradient_in_place else 2) * tokens + tokens // every
    if plan.chunk_tokens is not None:
        rows = 2 * min(plan.chunk_tokens, tokens)
    size: int = rows * last.output_layer.output_size_per_partition * weight.element_size()
    return size


def free_bytes(device: torch.device) -> int:
    """Memory that this process can still have; other ranks of a CPU may take it."""
    if device.type != "cuda":
        return psutil.virtual_memory().available
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + cached


def wrong_weights(teacher: Teacher, vocab_size: int, tp_group: dist.ProcessGroup) -> list[str]:
    """This rank's parameters of the teacher that no training leaves, in words.

    A bias may be all zero, and so may the weight of a norm that is stored as its distance from 1; a matrix may not.

    Args:
        teacher: this rank's share.
        vocab_size: tokens that the teacher knows; its padded rows beyond may hold anything.
        tp_group: the student's, over which the teacher's output layer lies.
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
    # Read at once: a GPU would be waited for at each of them.
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
    """All of this rank, with the group over which a vocabulary's rows would lie."""
    for name, parameter in teacher.model.named_parameters():
        yield name, parameter, teacher.pg_collection.tp
    if teacher.head is not None and teacher.head is not getattr(teacher.model, "output_layer", None):
        for name, parameter in teacher.head.named_parameters():
            yield f"output_layer.{name}", parameter, tp_group


def wrong_losses(
    objective: Objective, shard: VocabShard, width: int, dtype: torch.dtype, device: torch.device
) -> list[str]:
    """Losses of `objective` that differ, on random logits, from what they are on the whole vocabulary, in words.

    Divergence, cross entropy and logit losses, each with its gradient on this rank's columns. A divergence is held to
    its grad_log_q and value in fp64, the cross entropy to its formula, a logit loss to itself in fp64 on one rank.

    Args:
        objective: its weights are not looked at.
        shard: of the job's group.
        width: columns of the local logits, padding included.
        dtype: of the logits.
        device: of the logits.

    Collectives: those of the losses, and an all-gather of logits, over the shard's group.
    """
    # Each rank makes its own columns, for no two machines have to agree on a random number.
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
            alone = whole_student.detach().requires_grad_()
            wanted = vocab_parallel_logit_loss(alone, whole_teacher, loss, whole, temperature)
            (grad_log_q,) = torch.autograd.grad(wanted.sum(), alone)
        ours = vocab_parallel_logit_loss(student, teacher, loss, shard, temperature)
        compared[name] = ours, wanted.detach(), grad_log_q

    wrong = []
    for name, (ours, wanted, grad_log_q) in compared.items():
        (gradient,) = torch.autograd.grad(ours, student, weights.to(ours.dtype), retain_graph=True)
        wanted_gradient = grad_log_q * weights.unsqueeze(-1)
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
    """The divergence of whole rows of fp64 logits [n, V] and its gradient, as `Divergence` defines them."""
    log_p, log_q = (logits.div(temperature).log_softmax(dim=-1) for logits in (teacher, student))
    grad_log_q = divergence.grad_log_q(log_p, log_q, log_p - log_q)
    value = divergence.value(log_p, log_q, log_p - log_q)
    return value.sum(dim=-1), (grad_log_q - log_q.exp() * grad_log_q.sum(dim=-1, keepdim=True)) / temperature


class _Seen(NamedTuple):
    """What one rank has seen of the first step."""

    student: tuple[tuple[int, ...], int] | None
    """Its tensor-parallel ranks, and a digest of the tokens that the student was given; None beyond the first stage."""
    teacher: tuple[tuple[int, ...], int] | None
    """The same of the teacher, whose first stage may be elsewhere."""
    loss: tuple[float, float]
    """The teacher's cross entropy summed over tokens, and their number."""
    kd: tuple[float, float]
    """The same of `kd loss`."""


class FirstStep:
    """Watches the first training step of a job and refuses it, on every rank, before the optimizer changes a weight.

    Ranks meet where Megatron makes the step's gradients whole, behind the last message of its schedule. The training
    itself is not touched.

    Args:
        student: this rank's model as Megatron built it.
        attachment: of that student.
        pg_collection: the student's process groups; `tp` is used.
        vocab_size: tokens that both models know.
        skip: those of `CHECKS` to leave out. That the divergence is too large for fp32 is only warned of, and is not
            among them.
        expected_loss: the teacher's cross entropy per token on a run's first batch, as measured elsewhere; None if it
            is not known.
    """

    def __init__(
        self,
        student: Sequence[torch.nn.Module],
        attachment: Attachment,
        pg_collection: ProcessGroupCollection,
        vocab_size: int,
        skip: Collection[str] = (),
        expected_loss: float | None = None,
    ) -> None:
        teacher = attachment.teacher
        self._attachment = attachment
        self._config = get_model_config(student[0])
        self._groups = {"student": pg_collection.tp, "teacher": teacher.pg_collection.tp}
        self._models: dict[str, GPTModel] = {"student": unwrap_model(student[0]), "teacher": teacher.model}
        self._vocab_size = vocab_size
        self._checks = [name for name in ("batch", "teacher_loss") if name not in skip]
        self._expected_loss = expected_loss
        self._watching = self._is_over = False
        self._hooks: list[Any] = []
        self._digests: dict[str, Tensor] = {}
        self._losses: Tensor | None = None

    def begin(self, is_first: bool = True) -> None:
        """Watch from the first micro-batch of a training step on; later calls do nothing.

        Args:
            is_first: whether it is the first step of the run, not of a process that goes on with it. Its batch is the
                one of which a loss is expected.
        """
        if self._watching or self._is_over:
            return
        if not is_first:
            self._expected_loss = None
            return
        self._watching = True
        if "batch" in self._checks:
            for who, model in self._models.items():
                if model.pre_process:
                    self._hooks.append(model.register_forward_pre_hook(self._note_tokens(who), with_kwargs=True))
        make_whole = self._config.finalize_model_grads_func

        def conclude_first(*args: Any, **kwargs: Any) -> None:
            self._config.finalize_model_grads_func = make_whole
            self._conclude()
            if make_whole is not None:
                make_whole(*args, **kwargs)

        self._config.finalize_model_grads_func = conclude_first

    def note_losses(self, logged: Mapping[str, Tensor]) -> None:
        """Take what `masked_loss` logs of a micro-batch; nothing is waited for."""
        if self._watching:
            losses = torch.stack([logged[name].detach().double() for name in ("teacher lm loss", "kd loss")])
            self._losses = losses + (self._losses if self._losses is not None else 0.0)

    def _note_tokens(self, who: str) -> Callable[..., None]:
        signature = inspect.signature(self._models[who].forward)

        def note(model: GPTModel, args: tuple, kwargs: dict[str, Any]) -> None:
            tokens = signature.bind_partial(*args, **kwargs).arguments["input_ids"]
            self._digests[who] = digest(tokens) + self._digests.get(who, 0)

        return note

    def _conclude(self) -> None:
        """Compare what all ranks have seen.

        Raises:
            ConfigError: the same on every rank.

        Collectives: one all_gather_object.
        """
        for hook in self._hooks:
            hook.remove()
        digests = {
            who: (tuple(dist.get_process_group_ranks(self._groups[who])), int(of.item()))
            for who, of in self._digests.items()
        }
        of_teacher, kd = self._losses.tolist() if self._losses is not None else ((0.0, 0.0), (0.0, 0.0))
        seen: list[_Seen] = [_Seen(None, None, (0.0, 0.0), (0.0, 0.0))] * dist.get_world_size()
        own = _Seen(digests.get("student"), digests.get("teacher"), tuple(of_teacher), tuple(kd))
        dist.all_gather_object(seen, own)
        checks, self._watching, self._is_over = self._checks, False, True
        if "batch" in checks:
            check_batch([rank.student for rank in seen], [rank.teacher for rank in seen])
        # `masked_loss` gives no number of 0.
        total, number = (sum(numbers) for numbers in zip(*(rank.loss for rank in seen), strict=True))
        if number >= 1 and "teacher_loss" in checks:
            check_teacher_loss(total / number, self._vocab_size)
        if number >= 1 and self._expected_loss is not None:
            check_expected_loss(total / number, self._expected_loss)
        total, number = (sum(numbers) for numbers in zip(*(rank.kd for rank in seen), strict=True))
        if number >= 1:
            check_size(total / number, self._attachment.objective.kd_weight)


def digest(tokens: Tensor) -> Tensor:
    """A number of int64 that depends on every token id and on its place; sums of them do not on their order."""
    flat = tokens.reshape(-1).long()
    place = torch.arange(1, len(flat) + 1, device=flat.device)
    mixed = (flat + 1) * 0x2545F4914F6CDD1D + place * 0x1B873593CC9E2D51
    mixed = (mixed ^ (mixed >> 29)) * 0x3C79AC492BA7B653
    return (mixed ^ (mixed >> 32)).sum()


def check_batch(
    student: Sequence[tuple[tuple[int, ...], int] | None], teacher: Sequence[tuple[tuple[int, ...], int] | None]
) -> None:
    """Refuse a step whose tensor-parallel ranks were given different tokens, or whose two models were.

    Args:
        student: of each rank its tensor-parallel ranks and the sum of `digest` of the step's micro-batches, or None.
        teacher: likewise.

    Raises:
        ConfigError: naming the ranks.
    """
    sums = []
    for who, ranks in (("student", student), ("teacher", teacher)):
        groups: dict[tuple[int, ...], set[int]] = defaultdict(set)
        for group, of in filter(None, ranks):
            groups[group].add(of)
        for group, found in groups.items():
            if len(found) > 1:
                raise ConfigError(
                    f"expected the {who}'s tensor-parallel ranks {', '.join(map(str, group))} to be given the same "
                    "tokens in the first step, got different ones; a forward step has to broadcast a batch from the "
                    "first of them, or read the same samples on each; or leave this check out: "
                    "distillation.skip_preflight=[batch]"
                )
        sums.append(sum(of for found in groups.values() for of in found) % 2**64)
    if sums[0] != sums[1]:
        raise ConfigError(
            "expected the teacher to be given the student's tokens in the first step, got others; a forward step has "
            "to call the student once a micro-batch, with the tokens that it is trained on; or leave this check out: "
            "distillation.skip_preflight=[batch]"
        )


def check_teacher_loss(loss: float, vocab_size: int) -> None:
    """Refuse a teacher that does worse than guessing, and warn of one that does no better.

    Args:
        loss: its cross entropy on the first step's tokens, in nats.
        vocab_size: tokens that it knows.

    Raises:
        ConfigError: for one clearly above the logarithm of `vocab_size`.
    """
    guessing = math.log(vocab_size)
    said = f"the teacher's cross entropy on the first step is {loss:.3f} nats, guessing costs ln {vocab_size}"
    if not loss <= guessing + BEYOND:
        raise ConfigError(
            f"expected a teacher that knows the text's tokens, got one that does not: {said} = {guessing:.3f}; give "
            "the teacher of this tokenizer, with its own rotary base, norm and activation under `teacher:`; or leave "
            "this check out: distillation.skip_preflight=[teacher_loss]"
        )
    if loss > guessing - NEAR:
        logger.warning("%s = %.3f: it has learned next to nothing of this tokenizer's text", said, guessing)


def check_expected_loss(loss: float, expected: float) -> None:
    """Reject a teacher whose loss is not the expected one.

    Args:
        loss: its cross entropy on the first step's tokens, in nats.
        expected: the same, as measured elsewhere.

    Raises:
        ConfigError: they differ by more than 2 %.
    """
    if not abs(loss - expected) <= NEAR_EXPECTED * expected:
        raise ConfigError(
            f"expected the teacher's cross entropy on the first step to be teacher.expected-loss {expected:.4f} within "
            f"{NEAR_EXPECTED:.0%}, got {loss:.4f}; the teacher is loaded with another rotary base, norm, activation or "
            "number of heads than it was trained with, or the expected loss was measured on other tokens: correct "
            "`teacher:`, or remove teacher.expected-loss"
        )
    logger.info("the teacher's cross entropy on the first step is %.4f, expected %.4f", loss, expected)


def check_size(loss: float, kd_weight: float) -> None:
    """Warn of a divergence that fp32 is too coarse for.

    Args:
        loss: `kd loss` per token of the first step.
        kd_weight: what it is multiplied by.
    """
    if kd_weight and not abs(loss * kd_weight) <= LARGEST:
        logger.warning(
            "kd loss of the first step is %.3g per token (times kd_weight %g), more than %g: fp32 has no digit left "
            "for the lm loss beside it, and its gradient may be rounding errors; raise the temperature, take a bounded "
            "divergence (jensen_shannon, skew_forward_kl, skew_reverse_kl, squared_hellinger), or alpha and beta of at "
            "least 0",
            *(loss, kd_weight, LARGEST),
        )
