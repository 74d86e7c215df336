"""The forward step of a student with a teacher, the same in every training loop."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

import torch
from megatron.core.utils import get_attr_wrapped_model

from abkd_megatron.data.aligned_text import Aligner
from abkd_megatron.errors import ConfigError, HostError
from abkd_megatron.losses.schedule import Progress
from abkd_megatron.rollouts.own_text import OwnText
from abkd_megatron.student.attach import Attachment
from abkd_megatron.student.report import LossChecks


class Host(Protocol):
    """A training loop, as far as a forward step depends on it."""

    def progress(self, training: bool) -> Progress:
        """Return what was trained on before this training step, or before the one that this validation follows."""

    def loss_checks(self) -> LossChecks:
        """Return the loop's own settings."""

    def log(self, progress: Progress, scheduled: Mapping[str, float]) -> None:
        """Keep the schedules' position of a training step with the run."""


# Before the names of all losses and metrics of a step on own text.
_OWN = "own text"


class DistilledStep:
    """A forward step of Megatron's kind, of a student that has a teacher: its numbers go into the report.

    The wrapped step stays in charge of batches, and its loss function of the loss and of what it logs. `lm loss` is the
    student's cross entropy here, not what is trained.

    Attributes:
        attachment: the teacher's, once the model is built.
        aligner: cuts text for a teacher with another tokenizer; None: it has the student's.
        own_text: makes some steps train on the student's own text; None: none does.
        needs_input_ids: whether the step has to give the model its input ids on the last pipeline stage, too.
    """

    def __init__(self, forward_step: Callable[..., tuple[Any, Any]], host: Host, needs_input_ids: bool = False) -> None:
        self.attachment: Attachment | None = None
        self.aligner: Aligner | None = None
        self.own_text: OwnText | None = None
        self.needs_input_ids = needs_input_ids
        self._forward_step = forward_step
        self._host = host

    @property
    def is_own_text(self) -> bool:
        """Whether the current training step is on the student's own text."""
        return self.own_text is not None and self.own_text.is_on

    def __call__(
        self, data_iterator: Iterator | None, model: torch.nn.Module, *args: Any, **kwargs: Any
    ) -> tuple[Any, Callable[..., Any] | None]:
        """Run the wrapped step.

        Returns:
            Its output, and its loss function with our numbers in the report.

        Raises:
            HostError: the model has no teacher.
        """
        attachment = self.attachment
        if attachment is None:
            raise HostError(
                "expected a student with a teacher, got one without: the model was not built from the model config "
                "that was to add it; give pretrain() that one"
            )
        progress = self._host.progress(model.training)
        own_lm_weight = None
        if self.own_text is not None and self.own_text.is_on and model.training:
            own_lm_weight = self.own_text.lm_weight
            data_iterator = self.own_text.batches(data_iterator, get_attr_wrapped_model(model, "vp_stage"))
            if get_attr_wrapped_model(model, "post_process"):
                attachment.lm_weights = self.own_text.lm_weights()
        attachment.on_step(progress, training=model.training, own_lm_weight=own_lm_weight)
        if model.training:
            self._host.log(progress, attachment.scheduled)
        output, loss_func = self._forward_step(data_iterator, model, *args, **kwargs)
        return output, partial(self._loss, attachment, loss_func) if loss_func is not None else None

    def _loss(
        self, attachment: Attachment, loss_func: Callable[..., Any], output_tensor: torch.Tensor, **kwargs: Any
    ) -> Any:
        if kwargs:  # non_loss_data: what the caller collects is not a loss
            return loss_func(output_tensor, **kwargs)
        if attachment.loss_mask is None:
            raise ConfigError(
                "expected a forward step that gives the model its loss mask, by which the teacher's numbers are "
                "summed, got None; call model(..., labels=labels, loss_mask=loss_mask)"
            )
        # First, since its checks name the loss that is not finite.
        checks = self._host.loss_checks()
        if attachment.is_own_text:
            assert self.own_text is not None
            # Its losses are of another size than those of the data, by which a spike is found.
            *_, ours = attachment.loss_func(attachment.loss_mask, output_tensor, replace(checks, spikes=False))
            *loss, _ = loss_func(output_tensor)
            kept = attachment.scheduled
            named = {name if name in kept else f"{_OWN} {name}": value for name, value in ours.items()}
            return (*loss, {**named, **self.own_text.report()})
        *_, ours = attachment.loss_func(attachment.loss_mask, output_tensor, checks)
        *loss, logged = loss_func(output_tensor)
        return (*loss, {**logged, **ours})
