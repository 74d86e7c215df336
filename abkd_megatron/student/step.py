"""The loss contract with Megatron's schedules: sums over tokens, and the numbers to log beside them."""

from collections.abc import Callable, Collection, Mapping
from pathlib import Path

import torch

from abkd_megatron.student.loss_guard import check_losses

# Of a report, per token: 1.0 where the divergence is trained, else 0.0; logged as a share.
SELECTED = "selected tokens"

# How long the teacher's pass on a micro-batch took, in seconds.
TEACHER_SECONDS = "teacher seconds"

# Losses that are no part of `kd loss`.
_NO_PARTS = ("lm loss", "kd loss", "teacher lm loss", "total loss")

# In place of a count of 0 that something is divided by: lost beside any other in fp32.
NOTHING = 1e-12


def masked_loss(
    loss_mask: torch.Tensor,
    output_tensor: torch.Tensor,
    *,
    report: Mapping[str, torch.Tensor] | None = None,
    scheduled: Mapping[str, float] | None = None,
    selected_only_metrics: Collection[str] = (),
    hidden: Mapping[str, tuple[float, torch.Tensor]] | None = None,
    teacher_seconds: Callable[[], tuple[float, float] | None] = lambda: None,
    check_for_nan: bool = True,
    check_for_spikes: bool = False,
    tensors: Mapping[str, torch.Tensor] | None = None,
    save: str | Path | None = None,
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Return what Megatron's schedules expect of a loss function for one micro-batch.

    Megatron sums over micro-batches and data-parallel ranks and divides once by the global number of tokens, so
    nothing is divided here.

    Args:
        loss_mask: [b, s], 1 where a token counts.
        output_tensor: [b, s] the loss a token, as the model returned it.
        report: per-token numbers [b, s] to log, `Attachment.report`; None for training without a teacher.
        scheduled: numbers of the whole step to log, `Attachment.scheduled`.
        selected_only_metrics: names in `report` that are means over the selected tokens,
            `Attachment.selected_only_metrics`: they come with the number of these.
        hidden: {name: (weight, sum over the same counted tokens)} of losses between layers, `Attachment.hidden`. Their
            gradients are on their way already; here they are only logged.
        teacher_seconds: `Attachment.pop_teacher_seconds`: (seconds, passes) of the teacher to log, or None.
        check_for_nan: stop on NaN or Inf in a loss through Megatron's rerun state machine, see `check_losses`.
        check_for_spikes: with that, also tell of a loss far above what it was.
        tensors: what else there are to be statistics of when such a loss was found, `Attachment.pop_tensors`.
        save: Megatron's: a file of these statistics, and of those of `report`, is written there.

    Returns:
        (sum of the loss over counted tokens, their number as int, {name: [sum, number]}). Without a report the only
        name is `lm loss`. With one, `lm loss` is still the student's cross entropy, `total loss` is what is trained.
        A number is never 0: where no rank counts a token, a mean is logged as 0, not as NaN. `teacher seconds` is
        [seconds, passes]. What is scheduled is [value] alone, of which Megatron takes the mean
        over micro-batches. The same names on every rank and micro-batch.

    Raises:
        NumericalError: as `check_losses`.

    Collectives: none; Megatron reduces each name once an iteration.
    """
    mask = loss_mask.reshape(-1).float()
    loss = _masked_sum(output_tensor, mask)
    number = mask.sum().detach()
    num_tokens, counted = number.to(torch.int), number.clamp_min(NOTHING)
    counts: dict[str, torch.Tensor] = {}
    if report is None:
        sums = {"lm loss": loss}
    else:
        selected = mask * report[SELECTED].reshape(-1) if SELECTED in report else mask
        sums = {
            name: _masked_sum(value, selected if name in selected_only_metrics else mask)
            for name, value in report.items()
        }
        sums["total loss"] = loss
        counts = dict.fromkeys(selected_only_metrics, selected.sum().clamp_min(NOTHING))
    for name, (weight, of_layers) in (hidden or {}).items():
        sums[name] = of_layers
        sums["total loss"] = sums.get("total loss", loss).detach() + weight * of_layers
    if check_for_nan:
        between = list(hidden or ())
        losses = {name: value.detach() for name, value in sums.items() if name.endswith(" loss") or name in between}
        # Parts before what they are part of, since the first that is found is named.
        parts = [name for name in losses if name not in (*_NO_PARTS, *between)]
        checked = [name for name in ("lm loss", *parts, "kd loss", *between, "total loss") if name in losses]

        def details() -> dict[str, torch.Tensor]:
            counted = {name: torch.where(loss_mask == 0, 0.0, it) for name, it in (report or {}).items()}
            return {**counted, **(tensors or {})}

        folder = Path(save) if save is not None else None
        check_losses(losses, checked, details, folder=folder, spikes=check_for_spikes)
    logged = {
        name: torch.cat([value.detach().clone().view(1), counts.get(name, counted).view(1)])
        for name, value in sums.items()
    }
    # Filled on the device: a copy from the host would wait for it.
    logged |= {name: mask.new_full((1,), value) for name, value in (scheduled or {}).items()}
    if (measured := teacher_seconds()) is not None:  # last: where the checks wait for a GPU, it is past this pass
        logged[TEACHER_SECONDS] = torch.cat([mask.new_full((1,), value) for value in measured])
    return loss, num_tokens, logged


def _masked_sum(per_token: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The sum over counted tokens; one that does not count adds nothing, even if it is NaN or infinite."""
    return torch.where(mask == 0, 0.0, per_token.reshape(-1).float() * mask).sum()
