"""A teacher cache in a custom pretraining script: records travel with the samples, and are taken out of the batches.

A script's own code for batches does not see them, on any rank.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from megatron.core import mpu
from megatron.core.utils import get_attr_wrapped_model, get_batch_on_this_cp_rank
from megatron.training import get_args

from abkd_megatron.cache.dataset import RECORDS
from abkd_megatron.errors import ConfigError, on_every_rank
from abkd_megatron.hosts.add_cache import with_records
from abkd_megatron.hosts.batches import on_tp_ranks
from abkd_megatron.student.cached import CachedTeacher
from abkd_megatron.student.step import DistilledStep

# Whether this process's script has called `cached`.
_is_called = False


def cached(provider: Callable[..., Sequence[Any]]) -> Callable[..., Sequence[Any]]:
    """Add a teacher's records to the samples of a script's datasets, if its command line has `--kd-cache`.

    Args:
        provider: the script's `train_valid_test_datasets_provider`.

    Returns:
        A provider for `pretrain`. Without `--kd-cache` its datasets are those of `provider`.
    """
    global _is_called
    _is_called = True
    return _Provider(provider)


class _Provider:
    def __init__(self, provider: Callable[..., Sequence[Any]]) -> None:
        self._provider = provider
        self.is_distributed = getattr(provider, "is_distributed", False)

    def __call__(
        self, num_samples: Sequence[int | None], *args: Any, vp_stage: int | None = None, **kwargs: Any
    ) -> Any:
        if vp_stage is not None:
            kwargs["vp_stage"] = vp_stage
        found = self._provider(num_samples, *args, **kwargs)
        given = get_args()
        directory = getattr(given, "kd_cache", None)
        if directory is None:
            return found
        # Megatron calls a provider that is not distributed on some ranks only.
        with on_every_rank() if self.is_distributed else nullcontext():
            if not mpu.is_pipeline_last_stage(ignore_virtual=vp_stage is None, vp_stage=vp_stage):
                return found
            on_miss = getattr(given, "kd_on_miss", "error")
            return with_records(found, num_samples, Path(str(directory)).expanduser(), on_miss)


class ReadsRecords:
    """A script's forward step whose batches come without their records, which the cached teacher gets.

    Attributes:
        distilled: the step around this one.
    """

    def __init__(self, forward_step: Callable[..., tuple[Any, Any]]) -> None:
        self._forward_step = forward_step
        self.distilled: DistilledStep | None = None

    def __call__(
        self, data_iterator: Iterator | None, model: torch.nn.Module, *args: Any, **kwargs: Any
    ) -> tuple[Any, Any]:
        """Run the script's step.

        Raises:
            ConfigError: the script has not called `cached`.

        Collectives: on the last pipeline stage one broadcast over the tensor-parallel group.
        """
        assert self.distilled is not None and self.distilled.attachment is not None
        if not _is_called:
            raise ConfigError(
                "expected a script that adds the cache's records to its samples, got one that does not; write "
                "pretrain(..., cached(train_valid_test_datasets_provider), ...), with `from abkd_megatron import "
                "cached`"
            )
        tap = _Tap(data_iterator) if data_iterator is not None else None
        teacher = self.distilled.attachment.teacher
        assert isinstance(teacher, CachedTeacher)
        if get_attr_wrapped_model(model, "post_process"):
            teacher.read = lambda: _records(tap, teacher, model.training)
        return self._forward_step(tap, model, *args, **kwargs)


class _Tap(Iterator[dict[str, Any]]):
    """Takes the records out of the batches."""

    def __init__(self, batches: Iterator[dict[str, Any]]) -> None:
        self._batches = batches
        self.records: torch.Tensor | None = None

    def __next__(self) -> dict[str, Any]:
        batch = next(self._batches)
        self.records = batch.pop(RECORDS, None)
        return batch

    def __getattr__(self, name: str) -> Any:
        return getattr(self._batches, name)


def _records(tap: _Tap | None, teacher: CachedTeacher, training: bool) -> torch.Tensor:
    """Return this rank's part of the records that were taken, [b, s, bytes per token + 1] on its device."""
    args = get_args()
    size = args.micro_batch_size if training else getattr(args, "eval_micro_batch_size", args.micro_batch_size)
    read = tap.records if tap is not None and mpu.get_tensor_model_parallel_rank() == 0 else None
    found = on_tp_ranks(read, (size, args.seq_length, teacher.layout.bytes_per_token + 1), torch.uint8)
    group = mpu.get_context_parallel_group()
    return get_batch_on_this_cp_rank({RECORDS: found}, is_hybrid_cp=False, cp_group=group)[RECORDS]
