"""The loss contract with Megatron's schedules: sums over tokens, and the numbers to log with them."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch

from abkd_megatron.student.loss_guard import check_losses
from abkd_megatron.vocab_parallel.teacher_records import BUCKETED_KL, SAMPLED_KL

# Per token in a report: 1.0 where the divergence is trained, else 0.0; logged as a share.
SELECTED = "selected tokens"

# Per token in a report: 1.0 where it trains from a teacher cache's record, else 0.0; logged as a share.
CACHED = "cached share"

# Seconds of the teacher's pass on a micro-batch.
TEACHER_SECONDS = "teacher seconds"

# Numbers that validation also logs of each set, after its name.
_OF_SETS = ("lm loss", "kd loss", "teacher lm loss", "kl to teacher", BUCKETED_KL, SAMPLED_KL, "top-1 agreement")

# Losses that are not part of `kd loss`.
_NO_PARTS = ("lm loss", "kd loss", "teacher lm loss", "total loss")

# Avoids 0/0; vanishes in fp32 when added to a real count.
NOTHING = 1e-12


@dataclass(frozen=True, kw_only=True)
class LossChecks:
    """Checks of a micro-batch's losses, as the training loop is configured."""

    nan: bool = True
    """Stop on NaN or Inf in a loss, through Megatron's rerun state machine; see `check_losses`."""
    spikes: bool = False
    """With `nan`, also report a loss far above what it was."""
    save: str | Path | None = None
    """Where statistics of such a micro-batch are written; Megatron's `save`."""


@dataclass(frozen=True)
class ValidationSets:
    """Named sets of the rows of a micro-batch."""

    names: Sequence[str]
    """Of all sets."""
    of_rows: torch.Tensor
    """[b] int64, position in `names` of each row's set; -1 for none."""


@dataclass(frozen=True)
class Report:
    """Numbers of a distilled micro-batch to log."""

    per_token: Mapping[str, torch.Tensor]
    """[b, s] each, by the name they are logged under."""
    selected_only: Collection[str] = ()
    """Names in `per_token` that are means over the selected tokens."""
    cached_only: Collection[str] = ()
    """Names in `per_token` that are means over the tokens with a record, see `CACHED`."""
    live_only: Collection[str] = ()
    """Names in `per_token` that are means over the tokens without one."""
    sums: Mapping[str, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    """{name: (sum, number that it is divided by)} of what is not per token of the student."""
    hidden: Mapping[str, tuple[float, torch.Tensor]] = field(default_factory=dict)
    """{name: (weight, sum over counted tokens)} of losses between layers. They are only logged here: their gradients
    are added elsewhere."""
    scheduled: Mapping[str, float] = field(default_factory=dict)
    """Numbers of the whole step."""
    teacher_seconds: Callable[[], tuple[float, float] | None] = lambda: None
    """Returns (seconds, passes) of the teacher, or None."""
    tensors: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """What else statistics are written of when a loss is not finite."""


class StepObserver(Protocol):
    """Watches training steps."""

    def begin(self, is_first: bool) -> None:
        """Begin a training step; `is_first` in a run's first. Called again at each of its micro-batches."""

    def note_losses(self, logged: Mapping[str, torch.Tensor]) -> None:
        """Take what a micro-batch logs, on the last pipeline stage."""


def masked_loss(
    loss_mask: torch.Tensor,
    output_tensor: torch.Tensor,
    report: Report | None = None,
    checks: LossChecks | None = None,
    sets: ValidationSets | None = None,
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Return what Megatron's schedules expect of a loss function for one micro-batch.

    Megatron sums over micro-batches and data-parallel ranks and divides once by the global number of tokens, so
    nothing is divided here.

    Args:
        loss_mask: [b, s], 1 where a token counts.
        output_tensor: [b, s], the loss per token as the model returned it.
        report: numbers to log; None for training without a teacher.
        checks: None for `LossChecks()`.
        sets: of a micro-batch of validation, whose numbers are also logged by set, as `SET lm loss`.

    Returns:
        (sum of the loss over counted tokens, their number as int, {name: [sum, number]}). Without a report the only
        name is `lm loss`. With one, `lm loss` is still the student's cross entropy, and `total loss` is what is
        trained. A number is never 0: where no rank counts a token, a mean is logged as 0, not as NaN. `teacher
        seconds` is [seconds, passes]. A scheduled number is [value], of which Megatron takes the mean over
        micro-batches. The names are the same on every rank and micro-batch.

    Raises:
        NumericalError: as `check_losses`.

    Collectives: none; Megatron reduces each name once per iteration.
    """
    checks = checks or LossChecks()
    mask = loss_mask.reshape(-1).float()
    loss = _masked_sum(output_tensor, mask)
    number = mask.sum().detach()
    num_tokens, counted = number.to(torch.int), number.clamp_min(NOTHING)
    counts: dict[str, torch.Tensor] = {}
    per_token = {"lm loss": output_tensor}
    of_some: dict[str, torch.Tensor] = {}
    hidden = report.hidden if report is not None else {}
    if report is None:
        sums = {"lm loss": loss}
    else:
        per_token = dict(report.per_token)
        of_some = _counted(report, mask)
        sums = {name: _masked_sum(value, of_some.get(name, mask)) for name, value in per_token.items()}
        sums["total loss"] = loss
        counts = {name: counted_here.sum().clamp_min(NOTHING) for name, counted_here in of_some.items()}
        for name, (total, of) in report.sums.items():
            sums[name], counts[name] = total.float(), of.float().clamp_min(NOTHING)
        for name, (weight, of_layers) in hidden.items():
            sums[name] = of_layers
            sums["total loss"] = sums["total loss"].detach() + weight * of_layers
    if checks.nan:
        losses = {name: value.detach() for name, value in sums.items() if name.endswith(" loss") or name in hidden}
        # Parts before their sum, since the first one found is named.
        parts = [name for name in losses if name not in (*_NO_PARTS, *hidden)]
        checked = [name for name in ("lm loss", *parts, "kd loss", *hidden, "total loss") if name in losses]

        def details() -> dict[str, torch.Tensor]:
            if report is None:
                return {}
            counted = {name: torch.where(loss_mask == 0, 0.0, it) for name, it in report.per_token.items()}
            return {**counted, **report.tensors}

        folder = Path(checks.save) if checks.save is not None else None
        check_losses(losses, checked, details, folder=folder, spikes=checks.spikes)
    logged = {
        name: torch.cat([value.detach().clone().view(1), counts.get(name, counted).view(1)])
        for name, value in sums.items()
    }
    if sets is not None:
        for position, of_set in enumerate(sets.names):
            here = (sets.of_rows == position).unsqueeze(-1).expand_as(loss_mask).reshape(-1)
            for name in (name for name in _OF_SETS if name in per_token):
                counted_here = torch.where(here, of_some.get(name, mask), 0.0)
                pair = [_masked_sum(per_token[name].detach(), counted_here), counted_here.sum().clamp_min(NOTHING)]
                logged[f"{of_set} {name}"] = torch.stack(pair)
    if report is not None:
        # Filled on the device: a copy from the host would wait for it.
        logged |= {name: mask.new_full((1,), value) for name, value in report.scheduled.items()}
        if (measured := report.teacher_seconds()) is not None:  # last: where the checks wait for a GPU, it is past this
            logged[TEACHER_SECONDS] = torch.cat([mask.new_full((1,), value) for value in measured])
    return loss, num_tokens, logged


def _counted(report: Report, mask: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the mask of the tokens, [b * s], over which a number is a mean, by name; not of those over all."""
    per_token, found = report.per_token, dict[str, torch.Tensor]()
    of_groups: list[tuple[Collection[str], torch.Tensor]] = []
    if SELECTED in per_token:
        of_groups.append((report.selected_only, per_token[SELECTED]))
    if CACHED in per_token:
        of_groups += [(report.cached_only, per_token[CACHED]), (report.live_only, 1.0 - per_token[CACHED])]
    for names, group in of_groups:
        for name in names:
            found[name] = found.get(name, mask) * group.reshape(-1)
    return found


def _masked_sum(per_token: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The sum over counted tokens; one that does not count adds nothing, even if it is NaN or infinite."""
    return torch.where(mask == 0, 0.0, per_token.reshape(-1).float() * mask).sum()
