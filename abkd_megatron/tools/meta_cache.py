"""Simulation of a job that reads a teacher cache, on the meta device; see `meta_run`."""

from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from megatron.training import get_args
from torch import Tensor
from torch.utils.data import Dataset

from abkd_megatron.cache.dataset import RECORDS
from abkd_megatron.cache.manifest import Identity, read_manifest
from abkd_megatron.cache.record import RecordLayout
from abkd_megatron.config.schema import Config
from abkd_megatron.hosts import add_cache, megatron_lm
from abkd_megatron.hosts.cache_job import record_layout
from abkd_megatron.teacher import args as teacher_args


def layout_read(config: Config, vocab_size: int) -> RecordLayout:
    """Return the layout of the records of the job's first cache: its own, or that of `config.cache` if it is absent."""
    directory = Path(_caches(config)[0]).expanduser()
    return read_manifest(directory).layout if directory.exists() else record_layout(config, vocab_size)


def _caches(config: Config) -> list[str]:
    """Return the directories of the caches that a job reads."""
    given = [config.distillation.cache, *(entry.cache for entry in config.teachers)]
    return [directory for directory in given if directory is not None]


def replacements(config: Config) -> Iterator[tuple[Any, str, Any]]:
    """Yield the patches of a job that reads a cache, which need not exist."""
    if not _caches(config):
        return

    def identity(_: Path) -> "_AnyCache":
        args = get_args()
        layout = layout_read(config, args.vocab_size)
        form = {"vocab_size": args.vocab_size, "top_k": layout.top_k, "precision": layout.precision}
        form["draws"] = layout.draws
        names = {item.name: None for item in fields(_AnyCache)}
        return _AnyCache(**{**names, "seq_length": args.seq_length, "teacher_path": "", **form})

    def with_zeros(datasets: Sequence[Any], *_: Any) -> list[Any]:
        layout = layout_read(config, get_args().vocab_size)
        return [None if it is None else _Records(it, layout) for it in datasets]

    yield add_cache, "read_manifest", identity
    yield teacher_args, "read_manifest", identity
    yield add_cache, "from_rank_0", lambda function: function()
    yield megatron_lm, "with_records", with_zeros


class _AnyCache(Identity):
    """Identity that fits every job."""

    def check(self, *_: Any) -> None: ...


class _Records(Dataset):
    """Samples with records of zeros."""

    def __init__(self, dataset: Any, layout: RecordLayout) -> None:
        self._dataset, self._layout = dataset, layout

    def __len__(self) -> int:
        return len(self._dataset)

    @property
    def split(self) -> Any:
        return self._dataset.split

    def __getitem__(self, index: int | None) -> dict[str, Tensor]:
        sample = self._dataset[index]
        shape = len(sample["tokens"]), self._layout.bytes_per_token + 1
        return {**sample, RECORDS: torch.zeros(shape, dtype=torch.uint8)}
