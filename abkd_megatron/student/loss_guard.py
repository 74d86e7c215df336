"""Detection of NaN, infinite and exploding losses in a micro-batch."""

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

# Multiple of the largest loss of a run's first 100 micro-batches on a rank; Megatron-LM's pretrain_gpt.py uses 10 too.
SPIKE = 10.0

# Tests of a loss that training cannot continue with.
_FATAL: tuple[tuple[Callable[[Tensor], Tensor], str], ...] = ((torch.isnan, "NaN"), (torch.isinf, "Inf"))


def check_losses(
    sums: Mapping[str, Tensor],
    checked: Sequence[str],
    details: Callable[[], Mapping[str, Tensor]],
    *,
    folder: Path | None,
    spikes: bool,
) -> None:
    """Stop the run on every rank, through Megatron's rerun state machine, if a loss is NaN or infinite.

    Megatron repeats the step, saves a checkpoint of the state before it, and ends every rank with exit code 16, or 17
    if the second result differs. The affected rank first logs every loss of the micro-batch and writes a file with
    statistics of `details`. In a run's first step, where Megatron cannot save and checks nothing, the rank raises
    instead and the launcher ends the others. Gradients are not checked: in fp16 they overflow until the loss scale
    fits.

    Args:
        sums: every loss of a micro-batch by name, a scalar each.
        checked: names of the losses to check, in this order.
        details: returns tensors of any shape by name; only called to write a file.
        folder: folder of fault_iter_STEP_rank_RANK.json; None to write no file.
        spikes: also report a loss above `SPIKE` times the largest of the first 100 micro-batches. Megatron then repeats
            the step, and the run continues.

    Raises:
        NumericalError: in the first step.
        RuntimeError: by Megatron, on the affected rank only, with ``--rerun-mode disabled`` and in validation.

    Collectives: none; Megatron has one at the end of each step. The host waits for a GPU once.
    """
    machine = get_rerun_state_machine()
    # The host waits for the GPU once here, for all losses together.
    numbers = torch.stack([sums[name].detach() for name in checked]).cpu()
    results = dict(zip(checked, numbers.unbind(0), strict=True))
    # False where Megatron repeats the step a third time, from the checkpoint that it saved for this.
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
                    f"{name} is {what} in a micro-batch of the first step; nothing was trained or saved. The line "
                    "above has all losses of the micro-batch; docs/troubleshooting.md lists causes"
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
    """Return whether the test is met, and log it; Megatron does not call this again when it repeats the step."""
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
        except OSError as error:  # the finding matters more than the file
            where = f"; {file} cannot be written: {error}"
    logger.error(
        "rank %d, iteration %d: %s in a micro-batch; its sums over tokens: %s%s",
        *(rank, step, what, ", ".join(f"{name} {it:.6g}" for name, it in numbers.items()), where),
    )
    return True


def statistics(tensor: Tensor) -> dict[str, Any]:
    """Summarize the finite elements of a tensor, and count and locate those that are not finite.

    Returns:
        {"shape", "min", "max", "mean", "not finite", "first not finite"}; None for a value that does not exist.
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
    """Return the number, or its text if JSON cannot represent it."""
    return number if math.isfinite(number) else str(number)
