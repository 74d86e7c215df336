"""Losses that are NaN, infinite or far above what they were: found in a micro-batch, told with what is around them."""

import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core.rerun_state_machine import RerunMode, RerunState, get_rerun_state_machine
from torch import Tensor

from abkd_megatron.errors import NumericalError

logger = logging.getLogger(__name__)

# So many times the largest of a run's first 100 micro-batches on a rank; Megatron's own training script has the same.
SPIKE = 10.0

# What makes a loss one that training cannot go on with.
_FATAL: tuple[tuple[Callable[[Tensor], Tensor], str], ...] = ((torch.isnan, "NaN"), (torch.isinf, "Inf"))


def check_losses(
    sums: Mapping[str, Tensor],
    checked: Sequence[str],
    details: Callable[[], Mapping[str, Tensor]],
    *,
    folder: Path | None,
    spikes: bool,
) -> None:
    """Have Megatron's rerun state machine stop the run on every rank if one of these losses is NaN or infinite.

    It does the step once more, and then saves a checkpoint of before the step and ends every rank with exit code 16, or
    17 if the second time was another. What is special to a rank is told of before that, once, on the rank that has it:
    every loss of the micro-batch, and a file with statistics of `details`. In a run's first step, where Megatron cannot
    save and so looks at nothing, the rank raises instead, and the launcher ends the others. Gradients, which overflow
    in fp16 until the loss scale suits, are not looked at here.

    Args:
        sums: every loss of a micro-batch by its name, a scalar.
        checked: the names of those that are looked at, in this order.
        details: gives what a file is to have statistics of: tensors by name, of any shape. Only called for a file.
        folder: where the file is written, as fault_iter_STEP_rank_RANK.json; None for nowhere.
        spikes: also tell of a loss that is more than `SPIKE` times the largest of the first 100 micro-batches. The run
            goes on after the step was done once more.

    Raises:
        NumericalError: in the first step.
        RuntimeError: by Megatron, on the rank alone, with ``--rerun-mode disabled`` and in validation.

    Collectives: none; Megatron has one at each step's end. The host waits for a GPU once.
    """
    machine = get_rerun_state_machine()
    # The one time that the host waits for a GPU, whatever the number of losses; the rest is done on the copies.
    numbers = torch.stack([sums[name].detach() for name in checked]).cpu()
    results = dict(zip(checked, numbers.unbind(0), strict=True))
    # Not so where the step is done for the third time, from the checkpoint that Megatron saved for this.
    is_first = (
        machine.get_mode() == RerunMode.VALIDATE_RESULTS
        and machine.state == RerunState.INITIAL_RUN
        and not machine.first_iteration_complete
    )
    for name in checked:
        for test, what in _FATAL:
            found = partial(_is_found, test, f"{name} is {what}", sums, details, folder)
            if not is_first:
                machine.validate_result(
                    result=results[name],
                    rejection_func=found,
                    message=f"found {what} in the {name} of a micro-batch",
                    tolerance=0.0,  # a forward pass is deterministic
                    fatal=True,
                )
            elif found(results[name]):
                raise NumericalError(
                    f"{name} is {what} in a micro-batch of the first step; nothing was trained or "
                    "saved. The line above has all its losses; docs/troubleshooting.md says what they may come of"
                )
        if spikes:
            test = partial(machine.is_unexpectedly_large, threshold=SPIKE, context=name)
            what = f"{name} is more than {SPIKE:g} times what it was"
            machine.validate_result(
                result=results[name],
                rejection_func=partial(_is_found, test, what, sums, details, folder),
                message=f"found a spike in the {name} of a micro-batch",
                tolerance=0.0,
                fatal=False,
            )


def _is_found(
    test: Callable[[Tensor], Any],
    what: str,
    sums: Mapping[str, Tensor],
    details: Callable[[], Mapping[str, Tensor]],
    folder: Path | None,
    value: Tensor,
) -> bool:
    """Whether the test is met, which is told; Megatron does not ask again when it repeats the step."""
    if not test(value):
        return False
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    step = get_rerun_state_machine().current_iteration
    numbers = {name: float(it) for name, it in sums.items()}
    where = ""
    if folder is not None:
        file = folder / f"fault_iter_{step:07d}_rank_{rank}.json"
        content = {"rank": rank, "iteration": step, "found": what, "sums": {n: _plain(it) for n, it in numbers.items()}}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            file.write_text(
                json.dumps({**content, "tensors": {n: statistics(it) for n, it in details().items()}}, indent=1)
            )
            where = f"; statistics: {file}"
        except OSError as error:  # what was found is more important than this
            where = f"; {file} cannot be written: {error}"
    logger.error(
        "rank %d, iteration %d: %s in a micro-batch; its sums over tokens: %s%s",
        *(rank, step, what, ", ".join(f"{name} {it:.6g}" for name, it in numbers.items()), where),
    )
    return True


def statistics(tensor: Tensor) -> dict[str, Any]:
    """Smallest, largest and mean finite number of a tensor, how many are not finite, and where the first of them is.

    Returns:
        {"shape", "min", "max", "mean", "not finite", "first not finite"}; None where there is nothing to give.
    """
    tensor = tensor.detach()
    finite = torch.isfinite(tensor)
    number = int(finite.sum())
    found: dict[str, Any] = {"shape": list(tensor.shape), "min": None, "max": None, "mean": None}
    if number:
        found["min"] = float(tensor.where(finite, math.inf).amin())
        found["max"] = float(tensor.where(finite, -math.inf).amax())
        found["mean"] = float(tensor.where(finite, 0.0).sum(dtype=torch.float64)) / number
    found["not finite"] = tensor.numel() - number
    found["first not finite"] = None
    if number < tensor.numel():
        at = int(finite.flatten().int().argmin())
        found["first not finite"] = [
            int(index) for index in torch.unravel_index(torch.tensor(at, device="cpu"), tensor.shape)
        ]
    return found


def _plain(number: float) -> float | str:
    """A number as JSON has it, which has no NaN."""
    return number if math.isfinite(number) else str(number)
