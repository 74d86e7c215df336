"""Validation before the first step, and the best checkpoint by a number of validation."""

import json
import logging
import shutil
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import mpu
from megatron.core.rerun_state_machine import RerunDataIterator
from megatron.core.utils import get_model_config
from megatron.training import get_args, print_rank_0
from megatron.training.async_utils import maybe_finalize_async_save
from megatron.training.checkpointing import get_checkpoint_name, save_checkpoint
from megatron.training.datasets.data_samplers import build_pretraining_data_loader
from megatron.training.training import (
    cyclic_iter,
    disable_forward_pre_hook,
    enable_forward_pre_hook,
    evaluate_and_print_results,
    get_moe_metrics_tracker,
    should_disable_forward_pre_hook,
)

from abkd_megatron.config.validation import ValidationConfig
from abkd_megatron.errors import CheckpointError, ConfigError, HostError, from_rank_0
from abkd_megatron.preflight.run_record import checkpoint_to_load

logger = logging.getLogger(__name__)

# In the folder of the run's checkpoints: the best one's folder, and the file that says what it is.
_FOLDER, _FILE = "best", "best.json"


def evaluate_first(step: Callable[..., Any], student: Sequence[torch.nn.Module], datasets: Sequence[Any]) -> None:
    """Validate the student before its first step, as Megatron does after others, and log it at step 0.

    Training and later validations are what they are without it: they read the same samples, with the same random
    numbers.

    Args:
        step: Megatron's forward step.
        student: this rank's model chunks as Megatron trains them.
        datasets: of validation, one per chunk; None where this rank reads none.

    Collectives: those of Megatron's `evaluate_and_print_results`.
    """
    args = get_args()
    samples = args.consumed_valid_samples
    # A loader draws a seed, with which its workers begin.
    with torch.random.fork_rng(devices=()):
        loaders = [build_pretraining_data_loader(dataset, 0) for dataset in datasets]
        cycles = args.dataloader_type == "cyclic"
        batches = [
            RerunDataIterator(iter(cyclic_iter(loader) if cycles else loader)) if loader is not None else None
            for loader in loaders
        ]
        # Megatron's overlapped gathering of weights is for a step that has changed them.
        hooked = should_disable_forward_pre_hook(args)
        if hooked:
            disable_forward_pre_hook(student, param_sync=False)
        config = get_model_config(student[0])
        of_chunks = batches[0] if args.virtual_pipeline_model_parallel_size is None else batches
        evaluate_and_print_results("iteration 0", step, of_chunks, student, 0, None, config)
        if hooked:
            enable_forward_pre_hook(student)
        if args.num_experts is not None:
            get_moe_metrics_tracker().clear()
    args.consumed_valid_samples = samples


class BestCheckpoint:
    """Keeps the weights with the lowest number of validation in `<save>/best`, a checkpoint of Megatron's.

    A validation is a call of Megatron's `evaluate`, with rows that are the same each time.
    """

    def __init__(self, number: str, sets: Mapping[str, str], rows: int | None, save: Path, before: float) -> None:
        self._number = number
        self._what = _what(number, sets, rows)
        self._save, self._best = save, before
        self._sums: torch.Tensor | None = None

    @classmethod
    def of_job(cls, validation: ValidationConfig, args: Namespace) -> "BestCheckpoint | None":
        """Return that of a job, with what an interrupted run has found; None if none is kept.

        Args:
            validation: the configuration.
            args: Megatron's validated arguments.

        Raises:
            AbkdError: on every rank: `<save>/best` is not this run's, or of another number or other sets.

        Collectives: one broadcast_object_list.
        """
        if validation.best is None or args.skip_train:
            return None
        save, what = Path(args.save), _what(validation.best, validation.sets, validation.rows)
        before = from_rank_0(lambda: _found_before(save, what, args))
        return cls(validation.best, validation.sets, validation.rows, save, before)

    def watching(self, step: Callable[..., tuple[Any, Any]]) -> Callable[..., tuple[Any, Any]]:
        """Return the forward step with its validation numbers taken note of."""

        def watched(data_iterator: Any, model: torch.nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
            output, loss_func = step(data_iterator, model, *args, **kwargs)
            if model.training:
                self._sums = None  # of a validation that Megatron has broken off
                return output, loss_func
            return output, partial(self._note, loss_func)

        return watched

    def _note(self, loss_func: Callable[..., Any], output: torch.Tensor, **kwargs: Any) -> Any:
        found = loss_func(output, **kwargs)
        logged = found[-1]
        if self._number not in logged:
            raise HostError(
                f"validation.best: expected one of the numbers that validation logs, got {self._number}; known: "
                f"{', '.join(logged)}"
            )
        pair = logged[self._number].detach().double()
        self._sums = pair if self._sums is None else self._sums + pair
        return found

    def conclude(self, student: list[torch.nn.Module]) -> None:
        """End a validation: save the student if it is the best one.

        Megatron calls it as `non_loss_data_func` on every rank at the end of each validation.

        Args:
            student: this rank's model chunks.

        Collectives: one all-reduce over the data-parallel ranks of the last stage, one broadcast, and those of
        Megatron's `save_checkpoint` if it saves. It waits for the device.
        """
        args = get_args()
        value = torch.full((1,), torch.nan, dtype=torch.float64, device=torch.cuda.current_device())
        if self._sums is not None:  # on the last pipeline stage
            dist.all_reduce(self._sums, group=mpu.get_data_parallel_group(with_context_parallel=True))
            value = (self._sums[0] / self._sums[1]).view(1)
        self._sums = None
        # The last rank is of the last pipeline stage in every order of ranks.
        dist.broadcast(value, src=dist.get_world_size() - 1)
        found, step = value.item(), args.curr_iteration + 1
        if found < self._best:
            self._keep(student, found, step)

    def _keep(self, student: list[torch.nn.Module], value: float, step: int) -> None:
        folder, file = self._save / _FOLDER, self._save / _FILE
        if dist.get_rank() == 0:  # what a save has left that did not end
            shutil.rmtree(_folder_of(folder, step), ignore_errors=True)
        args = get_args()
        # Saves in the background and in the foreground return their results through one queue.
        maybe_finalize_async_save(blocking=True)
        # In the foreground, so that the file below is of a whole checkpoint, and without what a resume takes.
        with _changed(args, save=str(folder), async_save=False, save_retain_interval=None, no_save_optim=True):
            save_checkpoint(step, student, None, None, args.num_floating_point_operations_so_far)
        if dist.get_rank() == 0:
            before = json.loads(file.read_text())["iteration"] if file.exists() else None
            record = {**self._what, "value": value, "iteration": step}
            scratch = file.with_suffix(".tmp")
            scratch.write_text(json.dumps(record, indent=2) + "\n")
            scratch.replace(file)
            if before is not None and before != step:
                shutil.rmtree(_folder_of(folder, before), ignore_errors=True)
        self._best = value
        print_rank_0(f"best {self._number} so far: {value:.6f} at step {step}, kept in {folder}")


def _what(number: str, sets: Mapping[str, str], rows: int | None) -> dict[str, Any]:
    return {"number": number, "sets": dict(sets), "rows": rows}


def _folder_of(folder: Path, step: int) -> Path:
    return Path(get_checkpoint_name(str(folder), step, return_base_dir=True))


def _found_before(save: Path, what: Mapping[str, Any], args: Namespace) -> float:
    """Return the best value of an interrupted run in the folder, or infinity.

    Raises:
        CheckpointError: the record is damaged.
        ConfigError: it, or `best`, is of something else.
    """
    folder, file = save / _FOLDER, save / _FILE
    if not file.exists():
        if folder.exists() and any(folder.glob("iter_*")) and not _is_continued(args):
            raise ConfigError(f"validation.best: expected no checkpoints in {folder}, got some; move them away")
        return float("inf")
    try:
        found = json.loads(file.read_text())
        value, step = float(found.pop("value")), int(found.pop("iteration"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{file} is damaged ({error}); move it and {folder} away") from error
    if not _is_continued(args):
        raise ConfigError(
            f"validation.best: expected a folder without the best checkpoint of another run, got {file}; resume that "
            "run, move both away, or give another megatron.save"
        )
    if found != what:
        raise ConfigError(
            f"validation.best: expected {json.dumps(found)} as before, with which the best checkpoint in {folder} was "
            f"chosen, got {json.dumps(dict(what))}; restore it, or move {file} and {folder} away"
        )
    if not _folder_of(folder, step).is_dir():
        logger.warning("%s names the checkpoint of step %d, which is not in %s: starting anew", file, step, folder)
        return float("inf")
    return value


def _is_continued(args: Namespace) -> bool:
    """Return whether a job resumes, or would if its first checkpoint had been saved."""
    _, resumes = checkpoint_to_load(args)
    return resumes or (args.load is not None and Path(args.load).resolve() == Path(args.save).resolve())


@contextmanager
def _changed(args: Namespace, **values: Any) -> Iterator[None]:
    """Give Megatron's arguments other values in this block."""
    before = {name: getattr(args, name) for name in values}
    vars(args).update(values)
    try:
        yield
    finally:
        vars(args).update(before)
