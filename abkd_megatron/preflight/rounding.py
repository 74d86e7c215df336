"""The error of a teacher whose layers are stored in 8 bits, measured on the text of a run's first step."""

import inspect
from collections.abc import Collection, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.utils import get_model_config
from megatron.training import print_rank_0
from torch import Tensor

from abkd_megatron import kernels
from abkd_megatron.losses import AlphaBeta
from abkd_megatron.preflight.first_step import Rounding, when_gradients_are_done
from abkd_megatron.preflight.rules import ROUNDING, run_checks
from abkd_megatron.student.attach import Attachment
from abkd_megatron.student.head import batch_first
from abkd_megatron.student.wrappers import unwrapped
from abkd_megatron.teacher.weights import INT8, Stored, store_weights
from abkd_megatron.vocab_parallel import VocabShard, vocab_parallel_distillation

# Tokens of which both teachers' logits exist at a time.
_CHUNK = 256


def store_and_measure(
    student: Sequence[torch.nn.Module],
    attachment: Attachment,
    how: str,
    *,
    vocab_size: int,
    pg_collection: ProcessGroupCollection,
    skip: Collection[str] = (),
    number: int = 0,
) -> Stored:
    """Store the weights of the teacher's layers in another way, and have the first step measure what ``int8`` changes.

    Until then the weights as they were loaded are in the host's memory, too.

    Args:
        student: this rank's model as Megatron built it.
        attachment: of that student, with a live teacher. It gets a `RoundingError` as an observer.
        how: see `store_weights`.
        vocab_size: true size of the student's vocabulary, in tokens.
        pg_collection: the student's process groups; `tp` and `pp` are used.
        skip: may contain ``teacher_rounding``.
        number: of the teacher, its position in `Teachers.distinct`.
    """
    assert attachment.teachers is not None
    measured = is_measured(student, how, pg_collection, skip)
    stored = store_weights(attachment.teachers.distinct[number], how, keep_plain=measured)
    if measured:
        measure(student, attachment, stored, vocab_size=vocab_size, tp_group=pg_collection.tp, number=number)
    return stored


def is_measured(
    student: Sequence[torch.nn.Module], how: str, pg_collection: ProcessGroupCollection, skip: Collection[str] = ()
) -> bool:
    """Return whether the first step measures what a teacher's stored weights change; see `store_and_measure`."""
    measured = how == INT8 and ROUNDING.name not in skip
    if measured and get_model_config(student[0]).variable_seq_lengths and pg_collection.pp.size() > 1:
        print_rank_0("WARNING: the error of teacher.weights int8 is not measured with variable_seq_lengths over stages")
        return False
    return measured


def measure(
    student: Sequence[torch.nn.Module],
    attachment: Attachment,
    stored: Stored,
    *,
    vocab_size: int,
    tp_group: dist.ProcessGroup,
    number: int = 0,
) -> None:
    """Have the first step measure a teacher whose weights are `stored` with the plain ones; see `store_and_measure`."""
    shared = min(attachment.objective.shared_vocab or vocab_size, vocab_size)
    # What begins first ends last: `FirstStep` must not see the teacher's further passes.
    attachment.observers.insert(0, RoundingError(student, attachment, stored, shared, tp_group, number))


class RoundingError:
    """Observes the first training step, and runs the teacher twice more on its last micro-batch: rounded and plain.

    That is where Megatron finalizes the step's gradients, before the optimizer changes a weight. The plain weights come
    from the host, one layer at a time. The training is not changed. A run that is resumed measures nothing.

    Args:
        student: this rank's model as Megatron built it.
        attachment: of that student.
        stored: with the plain weights; without them on a stage that has no layers.
        vocab_size: number of tokens that both models know.
        tp_group: the student's.
        number: of the teacher, its position in `Teachers.distinct`.

    Attributes:
        found: what was measured; None before, and where no token counts.
    """

    def __init__(
        self,
        student: Sequence[torch.nn.Module],
        attachment: Attachment,
        stored: Stored,
        vocab_size: int,
        tp_group: dist.ProcessGroup,
        number: int = 0,
    ) -> None:
        assert attachment.teachers is not None
        self._number, self._teacher = number, attachment.teachers.distinct[number]
        self._name = f"{attachment.teachers.names[number]}, weights int8" if number else "teacher.weights int8"
        self._config, self._first = get_model_config(student[0]), unwrapped(student)[0]
        self.found: Rounding | None = None
        self._attachment, self._stored = attachment, stored
        self._vocab_size, self._tp_group = vocab_size, tp_group
        self._signature = inspect.signature(self._first.forward)
        self._batch: Mapping[str, Any] = {}
        self._hook: Any = None
        self._is_over = False

    def begin(self, is_first: bool) -> None:
        """Start to observe, at the first micro-batch of the first training step. Later calls do nothing."""
        if self._hook is not None or self._is_over:
            return
        if not is_first:
            self._end()
            return
        self._hook = self._first.register_forward_pre_hook(self._note, with_kwargs=True)
        when_gradients_are_done(self._config, self._conclude)

    def note_losses(self, logged: Mapping[str, Tensor]) -> None:
        """Do nothing."""

    def _note(self, model: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self._batch = self._signature.bind_partial(*args, **kwargs).arguments

    def _end(self) -> None:
        self._is_over, self._batch = True, {}
        if self._stored.rounded is not None:
            self._stored.rounded.forget_plain()

    def _conclude(self) -> None:
        """Measure on all ranks, log and check.

        Raises:
            ConfigError: the same on every rank.

        Collectives: those of two passes of the teacher and of `vocab_parallel_distillation`; one all_gather_object.
        """
        self._hook.remove()
        rounded = self._attachment.run_teacher_again(self._batch, self._number)
        with self._stored.rounded.plain() if self._stored.rounded is not None else nullcontext():
            plain = self._attachment.run_teacher_again(self._batch, self._number)
        self._end()
        sums = [0.0, 0.0, 0.0]
        if rounded is not None and plain is not None:
            sums = self._compare(rounded, plain).tolist()
        ranks: list[list[float]] = [sums] * dist.get_world_size()
        dist.all_gather_object(ranks, sums)
        kl, agreed, tokens = map(sum, zip(*ranks, strict=True))
        if tokens:
            # Every tensor-parallel rank has the same tokens.
            self.found = Rounding(kl / tokens, agreed / tokens, round(tokens / self._tp_group.size()))
            print_rank_0(f"{self._name}: {self.found}")
            run_checks([ROUNDING], self.found)

    @torch.no_grad()
    def _compare(self, rounded: Tensor, plain: Tensor) -> Tensor:
        """Return [3] fp64: sums over counted tokens of KL(plain || rounded) and of agreement, and their number."""
        plan = self._attachment.plan
        assert plan is not None
        layers = [self._teacher.output_layer(it) for it in (rounded, plain)]
        hidden = [batch_first(it.whole_hidden_states(self._tp_group)).flatten(0, 1).split(_CHUNK) for it in layers]
        weight, scale = layers[0].weight, layers[0].scale()
        shard = VocabShard.megatron(weight.shape[0], self._tp_group, self._vocab_size)
        mask, found = self._attachment.loss_mask, []
        with kernels.using(plan.choice):
            for chunk in zip(*hidden, strict=True):
                of_rounded, of_plain = ((it @ weight.t()).mul_(scale) for it in chunk)
                labels = torch.zeros(len(of_plain), dtype=torch.int64, device=weight.device)
                terms = vocab_parallel_distillation(of_rounded, of_plain, AlphaBeta(1.0, 0.0), labels, shard)
                found.append(torch.stack([terms.divergence, terms.metrics["top-1 agreement"], torch.ones_like(labels)]))
        numbers = torch.cat(found, dim=1).double()
        counted = mask.flatten() != 0 if mask is not None else torch.ones_like(numbers[0], dtype=torch.bool)
        return torch.where(counted, numbers, 0.0).sum(dim=1)
