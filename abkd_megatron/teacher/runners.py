"""Passes of several teachers on the student's micro-batches, whose messages share one outbox."""

from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch

from abkd_megatron.losses.mixed_sequences import Draw
from abkd_megatron.teacher.build import Teacher
from abkd_megatron.teacher.channel import Outbox
from abkd_megatron.teacher.model import Model
from abkd_megatron.teacher.runner import TeacherRunner


def _is_local(teacher: Teacher) -> bool:
    config = teacher.model.config
    tensor = config.expert_tensor_parallel_size in (None, config.tensor_model_parallel_size)
    return teacher.layout.matches_student and config.expert_model_parallel_size == 1 and tensor


class TeacherRunners:
    """Runs several teachers of one student, one after another, on each micro-batch.

    Their messages to later stages share one `Outbox` and leave in the order of the teachers, in which the next stage
    receives them. Each teacher has its own groups, so messages of two teachers cannot be confused.

    Args:
        chunks: the student's model chunks on this rank.
        teachers: this rank's share of each.
        timeout: for messages.

    Attributes:
        is_local: whether a pass concerns no ranks but those of the student's tensor- and context-parallel groups, which
            have the same sequences. They may leave a teacher out.

    Collectives: those of each `TeacherRunner`.
    """

    def __init__(self, chunks: Sequence[Model], teachers: Sequence[Teacher], timeout: timedelta) -> None:
        self._outbox = Outbox(chunks[0].config, self._post_ahead)
        self._runners = [TeacherRunner(chunks, teacher, self._outbox, timeout) for teacher in teachers]
        self._has_stages = teachers[0].layout.student_stages > 1
        self.is_local = not self._has_stages and all(_is_local(teacher) for teacher in teachers)
        self._watch()

    def run(
        self,
        batch: Mapping[str, Any],
        draw: Callable[[int, int], Draw | None] | None = None,
        needed: Sequence[int] | None = None,
    ) -> dict[int, torch.Tensor]:
        """Run this rank's stage of the teachers, see `TeacherRunner.run`.

        Args:
            batch: arguments of the student's forward on this micro-batch.
            draw: what it is mixed with.
            needed: positions of the teachers to run; None for all. Only with `is_local`.

        Returns:
            On the student's last stage, the last hidden states of each teacher that has run, by its position.
        """
        self._outbox.release()  # needed by schedules without Megatron's P2PCommunicator
        self._watch()
        numbers = range(len(self._runners)) if needed is None else needed
        found = {number: self._runners[number].run(batch, draw) for number in numbers}
        return {number: hidden for number, hidden in found.items() if hidden is not None}

    def again(self, batch: Mapping[str, Any], number: int) -> torch.Tensor | None:
        """Run one teacher's last micro-batch once more, see `TeacherRunner.again`."""
        return self._runners[number].again(batch)

    def _watch(self) -> None:
        if self._has_stages:
            self._outbox.watch()

    def _post_ahead(self, name: str) -> None:
        for runner in self._runners:
            runner.post_ahead(name)

    def drain(self) -> None:
        """Wait for all sends. Call it only between steps, or in the first forward pass of one."""
        self._outbox.release()
        for runner in self._runners:
            runner.drain()

    def close(self) -> None:
        """Drain, and restore Megatron's timers."""
        self.drain()
        self._outbox.unwatch()
        for runner in self._runners:
            runner.close()

    @property
    def num_in_flight(self) -> int:
        """Number of sends from this rank that are not known to be complete."""
        return sum(runner.num_in_flight for runner in self._runners)
