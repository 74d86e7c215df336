"""Mixed sequences of a student and its teacher: the same pairs and shares in both, in any layout of the two."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from megatron.core.num_microbatches_calculator import get_num_microbatches

from abkd_megatron.errors import ConfigError, HostError
from abkd_megatron.losses.mixed_sequences import Draw, SequenceMix
from abkd_megatron.teacher.layout import TeacherLayout
from abkd_megatron.teacher.model import Model


class Mixing:
    """Mixes the sequences of training micro-batches. Validation is not mixed.

    Micro-batches are numbered as Megatron reads them: micro-batch m of data-parallel rank d of D is number m D + d of
    its step. So the mixture depends on the micro-batch size, but not on the layout.

    Args:
        student: this rank's first chunk. Its embedding, where there is one, gets a forward hook.
        layout: of the teacher; it has the student's data-parallel ranks.
        mix: what to draw.
        seed: of the draws.

    Attributes:
        hooks: to remove with the attachment.
    """

    def __init__(self, student: Model, layout: TeacherLayout, mix: SequenceMix, seed: int) -> None:
        self._student, self._layout, self._mix, self._seed = student, layout, mix, seed
        self._step = self._count = 0
        self._micro_batch: int | None = None
        self._of_student: Draw | None = None
        self.hooks = [student.embedding.register_forward_hook(self._mix_student)] if student.pre_process else []

    def begin(self, step: int) -> None:
        """Begin a training step; `step` is the number of steps before it."""
        self._step, self._count = step, 0

    def next(self, batch: Mapping[str, Any]) -> Callable[[int, int], Draw | None]:
        """Begin a micro-batch, before either model runs.

        Args:
            batch: arguments of the student's forward.

        Returns:
            What it is mixed with, by DP replica (counted within the sharing group of the teacher's layout) and number
            of sequences; None in validation.

        Raises:
            ConfigError: packed sequences, whose documents do not end at the same tokens; or one sequence.
            HostError: the student has not called its embedding for the micro-batch before.
        """
        if self._of_student is not None:
            raise HostError(
                "distillation.mix: expected the student to embed its input ids, got a micro-batch for which it has "
                "not; call it with input_ids and without decoder_input"
            )
        self._micro_batch = None
        if not self._student.training:
            return self._draw
        if batch.get("packed_seq_params") is not None:
            raise ConfigError(
                "distillation.mix: packed sequences are not supported, since the documents of two rows end at "
                "different tokens; turn packing off, or remove distillation.mix"
            )
        # A step that Megatron runs again, to check it, starts at its first micro-batch again.
        self._micro_batch, self._count = self._count % get_num_microbatches(), self._count + 1
        if self._student.pre_process:
            self._of_student = self._draw(self._layout.dp_replica, batch["input_ids"].shape[0])
        return self._draw

    def _draw(self, dp_replica: int, sequences: int) -> Draw | None:
        if self._micro_batch is None:
            return None
        number = self._micro_batch * self._layout.data_parallel + self._layout.first_dp_replica + dp_replica
        return self._mix.draw(self._seed, self._step, number, sequences)

    def _mix_student(self, _module: torch.nn.Module, _args: tuple, output: torch.Tensor) -> torch.Tensor:
        draw, self._of_student = self._of_student, None
        return output if draw is None else draw.mix(output)
