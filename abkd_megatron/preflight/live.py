"""Checks that need a job's ranks: of the teacher's files, of the models as built, and of the first training step."""

import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.utils import get_model_config
from torch import Tensor

from abkd_megatron.errors import on_every_rank
from abkd_megatron.preflight.first_step import Observed, digest, sums_by_teacher, when_gradients_are_done
from abkd_megatron.preflight.models import Models, check_weights_of
from abkd_megatron.preflight.rules import CHECKSUMS, FIRST_STEP_CHECKS, MODEL_CHECKS, Check, Phase, run_checks
from abkd_megatron.student.attach import Attachment
from abkd_megatron.student.report import SELECTED
from abkd_megatron.student.wrappers import unwrapped
from abkd_megatron.teacher.build import Teacher
from abkd_megatron.teacher.checkpoint import TeacherCheckpoint
from abkd_megatron.teacher.model import Model


def check_files(checkpoint: TeacherCheckpoint, skip: Collection[str] = ()) -> None:
    """Compare the teacher's tensors with their checksums. The ranks share the reading.

    Args:
        checkpoint: the teacher's.
        skip: may contain ``teacher_checksums``.

    Raises:
        CheckpointError: on every rank, if a tensor is damaged.

    Collectives: one all_gather_object.
    """
    if CHECKSUMS.name not in skip:
        with on_every_rank():
            run_checks([CHECKSUMS], checkpoint)


def check_loaded(
    teacher: Teacher, *, name: str, vocab_size: int, tp_group: dist.ProcessGroup, skip: Collection[str] = ()
) -> None:
    """Run the check of a teacher's weights, before they are stored in another way, see `store_weights`.

    Args:
        teacher: as loaded.
        name: in messages.
        vocab_size: number of tokens that both models know.
        tp_group: the student's.
        skip: may contain ``teacher_weights``.

    Raises:
        CheckpointError: as `check_models`.

    Collectives: one all_gather_object.
    """

    def run(of: Teacher) -> None:
        check_weights_of(name, of, vocab_size, tp_group)

    check: Check[Teacher] = Check("teacher_weights", Phase.MODELS, run)
    if check.name not in skip:
        with on_every_rank():
            run_checks([check], teacher)


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
    """Run `MODEL_CHECKS`: the teacher's weights, the memory for logits, and the loss over the live process groups.

    Takes seconds and does not advance the random generators of torch or Megatron.

    Args:
        student: this rank's model as Megatron built it.
        attachment: of that student.
        vocab_size: true size of its vocabulary, in tokens.
        pg_collection: its process groups; `tp` is used.
        tokens: per micro-batch on one rank.
        skip: names of `MODEL_CHECKS` and `FIRST_STEP_CHECKS` to skip.
        expected_loss: see `FirstStep`.

    The attachment gets a `FirstStep` as an observer.

    Raises:
        CheckpointError: on every rank, if a weight of the teacher is NaN or infinite, or a matrix all zero, on any.
        ConfigError: on every rank, if the logits of a micro-batch do not fit in the memory left by the models, or if
            the sharded loss or its gradient differs from the dense one, on any.

    Collectives: one all_gather_object per check, and those of the loss on a few tokens with an all-gather of their
    logits.
    """
    if attachment.teachers is None:
        skip = {*skip, "teacher_weights"}
    shared = min(attachment.objective.shared_vocab or vocab_size, vocab_size)
    models = Models(student, attachment, shared, pg_collection.tp, tokens)
    for check in MODEL_CHECKS:
        if check.name not in skip:
            with on_every_rank():
                run_checks([check], models)
    attachment.observers.append(FirstStep(models, skip, expected_loss))


class FirstStep:
    """Observes the first training step, and checks it on every rank before the optimizer changes a weight.

    Ranks exchange their observations where Megatron finalizes the step's gradients, after the last message of its
    pipeline schedule. The training is not changed.

    Args:
        models: as built.
        skip: names of `FIRST_STEP_CHECKS` to skip.
        expected_loss: the teacher's cross entropy in nats per token on a run's first batch, measured elsewhere; None if
            it is not known.
    """

    def __init__(self, models: Models, skip: Collection[str] = (), expected_loss: float | None = None) -> None:
        self._attachment = models.attachment
        self._objective = models.attachment.objective
        self._config = get_model_config(models.student[0])
        self._groups = {"student": models.tp_group}
        self._models: dict[str, Model] = {"student": unwrapped(models.student)[0]}
        teachers = models.attachment.teachers
        self._teachers = teachers.names if teachers is not None else []
        for name, teacher in zip(self._teachers, teachers.distinct if teachers is not None else (), strict=True):
            self._groups[name], self._models[name] = teacher.pg_collection.tp, teacher.model
        # Of the losses, of which records have one too.
        self._names = list(self._teachers)
        if teachers is not None and teachers.cached:
            self._names.append(teachers.name_of_cached)
        own_vocabulary = teachers.default.vocab_size if teachers is not None else None
        self._vocab_size = own_vocabulary or models.vocab_size
        # With its own tokens a teacher is not given the student's.
        self._compares_tokens = own_vocabulary is None
        self._skip = skip
        self._expected_loss = expected_loss
        self._watching = self._is_over = False
        self._hooks: list[Any] = []
        self._digests: dict[str, Tensor] = {}
        self._losses: Tensor | None = None
        self._losses_of_teachers: Tensor | None = None

    def begin(self, is_first: bool = True) -> None:
        """Start to observe, at the first micro-batch of the first training step. Later calls do nothing.

        Args:
            is_first: whether it is the first step of the run, not of a process that resumes it.
        """
        if self._watching or self._is_over:
            return
        if not is_first:
            self._expected_loss = None
            return
        self._watching = True
        if "batch" not in self._skip:
            for who, model in self._models.items():
                if model.pre_process:
                    self._hooks.append(model.register_forward_pre_hook(self._note_tokens(who), with_kwargs=True))
        when_gradients_are_done(self._config, self._conclude)

    def note_losses(self, logged: Mapping[str, Tensor]) -> None:
        """Add the losses of a micro-batch as `masked_loss` logs them. Does not synchronize."""
        if self._watching:
            losses = torch.stack([logged[name].detach().double() for name in ("teacher lm loss", "kd loss")])
            self._losses = losses + (self._losses if self._losses is not None else 0.0)
            if len(self._names) > 1:
                losses = self._teacher_losses()
                before = self._losses_of_teachers
                self._losses_of_teachers = losses + (before if before is not None else 0.0)

    def _teacher_losses(self) -> Tensor:
        """Return each teacher's cross entropy on the last micro-batch, see `sums_by_teacher`."""
        report, mask = self._attachment.report, self._attachment.loss_mask
        assert report is not None and mask is not None and self._attachment.passes is not None
        numbers, tokens, cache = self._attachment.passes.numbers, self._objective.tokens, self._attachment.cache
        of_some = (tokens is not None and tokens.by_position) or (cache is not None and cache.on_miss == "lm")
        counted = mask.double() * (report[SELECTED] if of_some else 1.0)
        assert numbers is not None
        return sums_by_teacher(report["teacher lm loss"], counted, numbers, len(self._names))

    def _note_tokens(self, who: str) -> Callable[..., None]:
        signature = inspect.signature(self._models[who].forward)

        def note(model: Model, args: tuple, kwargs: dict[str, Any]) -> None:
            tokens = signature.bind_partial(*args, **kwargs).arguments["input_ids"]
            self._digests[who] = digest(tokens) + self._digests.get(who, 0)

        return note

    def _conclude(self) -> None:
        """Gather the observations of all ranks and check them.

        Raises:
            ConfigError: the same on every rank.

        Collectives: one all_gather_object.
        """
        for hook in self._hooks:
            hook.remove()
        self._watching, self._is_over = False, True
        digests = {
            who: (tuple(dist.get_process_group_ranks(self._groups[who])), int(of.item()))
            for who, of in self._digests.items()
        }
        # (sum over tokens, number of tokens) of the two losses.
        losses = self._losses.tolist() if self._losses is not None else [(0.0, 0.0), (0.0, 0.0)]
        of_teachers = [(0.0, 0.0)] * len(self._names)
        if self._losses_of_teachers is not None:
            of_teachers = self._losses_of_teachers.tolist()
        ranks: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(ranks, (digests, [*losses, *of_teachers]))
        gathered = torch.tensor([losses for _, losses in ranks], dtype=torch.float64, device="cpu")
        totals, of_teachers = gathered[:, :2].sum(dim=0).tolist(), gathered[:, 2:].sum(dim=0).tolist()
        # `masked_loss` replaces a number of 0 by a tiny one.
        teacher_loss, kd_loss = (total / number if number >= 1 else None for total, number in totals)
        teacher_losses = {"the teacher": teacher_loss}
        if self._objective.mix is not None:  # of sequences that are no text
            teacher_losses = {}
        elif len(self._names) > 1:
            of_each = zip(self._names, of_teachers, strict=True)
            teacher_losses = {name: total / number if number >= 1 else None for name, (total, number) in of_each}
        observed = Observed(
            student=[digests.get("student") for digests, _ in ranks],
            teachers=[[digests.get(name) for digests, _ in ranks] for name in self._teachers if self._compares_tokens],
            teacher_losses=teacher_losses,
            kd_loss=kd_loss,
            vocab_size=self._vocab_size,
            kd_weight=self._objective.kd_weight,
            expected_loss=self._expected_loss,
        )
        run_checks(FIRST_STEP_CHECKS, observed, self._skip)
