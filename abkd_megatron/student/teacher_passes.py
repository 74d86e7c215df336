"""Passes of a student's teachers on its micro-batches, and their hidden states until the student needs them.

Legend: s sequence, b micro-batch, H hidden size of a teacher.
"""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor

from abkd_megatron.errors import ConfigError
from abkd_megatron.losses.mixed_sequences import Draw
from abkd_megatron.student.timer import PassTimer
from abkd_megatron.teacher.model import Model
from abkd_megatron.teacher.output_layer import TeacherOutput
from abkd_megatron.teacher.runners import TeacherRunners
from abkd_megatron.teacher.teachers import Teachers


class TeacherPasses:
    """Runs every teacher once per micro-batch, one after another, or those that a micro-batch needs.

    Args:
        chunks: the student's model chunks on this rank.
        teachers: of this rank.
        timeout: for messages.

    Attributes:
        numbers: [b], the teachers of the last micro-batch's sequences, see `Teachers.numbers`, on the last pipeline
            stage; None with one teacher.
        any_cached: whether the last micro-batch may have a sequence of `Teachers.cached`.
        num_steps: training steps begun. In the first one all teachers run, so that it shows the memory of the run and
            its checks see all of them.
        sources_on_host: dataset of each sequence of the next micro-batch, where the host knows it, the same on all
            ranks of the tensor- and context-parallel groups. Then teachers that no sequence needs do not run, if
            `TeacherRunners.is_local`. The pass takes it.
        max_queued_microbatches: see `Attachment`.
        max_queued_bytes: see `Attachment`.

    Collectives: those of `TeacherRunners`.
    """

    def __init__(self, chunks: Sequence[Model], teachers: Teachers, timeout: timedelta) -> None:
        self.numbers: Tensor | None = None
        self.any_cached = bool(teachers.cached)
        self.num_steps = 0
        self.sources_on_host: Sequence[int] | None = None
        self.max_queued_microbatches = self.max_queued_bytes = 0
        self._teachers = teachers
        self._runners = TeacherRunners(chunks, teachers.distinct, timeout)
        self._waiting: deque[tuple[dict[int, Tensor], bool]] = deque()
        # Only where the loss is reported.
        self._timer = PassTimer(next(chunks[-1].parameters()).device) if chunks[-1].post_process else None

    def run(self, batch: Mapping[str, Any], draw: Callable[[int, int], Draw | None] | None) -> None:
        """Run this rank's stage of every teacher on its share of the next micro-batch; see `TeacherRunner.run`."""
        measured = self._timer.measure() if self._timer and torch.is_grad_enabled() else nullcontext()
        sources, self.sources_on_host = self.sources_on_host, None
        needed, any_cached = None, bool(self._teachers.cached)
        if sources is not None and self.num_steps > 1 and self._runners.is_local:
            needed = self._teachers.needed(sources)
            any_cached = any(source in self._teachers.cached for source in sources)
        with measured, torch.no_grad():
            hidden_states = self._runners.run(batch, draw, needed)
        if hidden_states or needed == []:
            self._waiting.append((hidden_states, any_cached))
            self.max_queued_microbatches = max(self.max_queued_microbatches, len(self._waiting))
            size = sum(hidden.nbytes for waiting, _ in self._waiting for hidden in waiting.values())
            self.max_queued_bytes = max(self.max_queued_bytes, size)

    def take(self, sources: Tensor | None) -> TeacherOutput | None:
        """Return the output of the oldest micro-batch that waits; None if no teacher has run on it.

        Args:
            sources: [b] int64, the dataset of each of its sequences; needed with several teachers.

        Raises:
            ConfigError: there are several teachers and no sources.
        """
        several = self._teachers.count > 1
        if several and sources is None:
            raise ConfigError(
                "teachers by source need the dataset of each sequence (`dataset_id` of Megatron's BlendedDataset), and "
                "this forward step has not given it; set attachment.sources before the model runs, use `abkd-megatron "
                "distill`, or attach one teacher"
            )
        self.numbers = self._teachers.numbers(sources) if several and sources is not None else None
        hidden_states, self.any_cached = self._waiting.popleft()
        return self._teachers.output(hidden_states, self.numbers)

    def again(self, batch: Mapping[str, Any], number: int) -> Tensor | None:
        """Run one teacher's last micro-batch once more; see `TeacherRunner.again`."""
        return self._runners.again(batch, number)

    def pop_seconds(self) -> tuple[float, float] | None:
        """Return (seconds, passes) of the teachers in training on this rank since the last call; see `PassTimer.take`.

        A pass is this rank's part of all teachers' forward for one micro-batch, and its waiting for their messages.
        Output layers are part of the loss. None in validation, and on all stages but the last.
        """
        return self._timer.take() if self._timer and torch.is_grad_enabled() else None

    @property
    def num_in_flight(self) -> int:
        """Number of messages that this rank has started and that are not known to have arrived."""
        return self._runners.num_in_flight

    def drain(self) -> None:
        """Wait for all messages. Call it only between steps, or in the first forward pass of one."""
        self._runners.drain()

    def close(self) -> None:
        """Drain, forget what waits, and restore Megatron's timers."""
        self._runners.close()
        self._waiting.clear()
