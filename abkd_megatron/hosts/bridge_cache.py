"""A teacher cache in Megatron Bridge: records are found by the content of the batches that its loaders give.

Bridge builds its datasets where no wrapper reaches them, and every tensor-parallel rank loads whole batches. So records
are read where a batch comes out of its iterator, on the last pipeline stage, by each rank for itself.
"""

from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.bridge.training.config import ConfigContainer, GPTDatasetConfig
from megatron.core.utils import get_batch_on_this_cp_rank

from abkd_megatron.cache.dataset import RECORDS, packed_records
from abkd_megatron.cache.store import CacheReader
from abkd_megatron.errors import ConfigError
from abkd_megatron.losses.objective import ScheduledObjective
from abkd_megatron.student.supported import check_cacheable
from abkd_megatron.teacher.compatibility import tokenizer_identity


class BatchRecords:
    """Records of Bridge's batches.

    Args:
        config: of the job, with the tokenizer's vocabulary size in its model.
        directory: of the cache.
        objective: of the job.
        on_miss: see `WithRecords`.

    Raises:
        ConfigError: the cache is of another tokenizer, temperature or sequence length; or the data or the objective
            cannot be used with one.
        DataError: there is no cache, or it is damaged.

    Attributes:
        reader: of the cache.
    """

    def __init__(self, config: ConfigContainer, directory: Path, objective: ScheduledObjective, on_miss: str) -> None:
        if not isinstance(config.dataset, GPTDatasetConfig):
            raise ConfigError(
                "expected a GPTDatasetConfig with distillation.cache, with the samples of `abkd-megatron cache`, "
                f"got {type(config.dataset).__name__}; train on a GPT dataset, or with a live teacher"
            )
        self.reader, self._on_miss = CacheReader(directory), on_miss
        tokenizer = config.tokenizer
        names = Namespace(
            tokenizer_model=tokenizer.tokenizer_model,
            vocab_file=tokenizer.vocab_file,
            tokenizer_type=tokenizer.tokenizer_type,
        )
        expected = {
            "tokenizer": tokenizer_identity(names),
            "vocab_size": config.model.vocab_size,
            "seq_length": config.model.seq_length,
            "reset_attention_mask": bool(config.dataset.reset_attention_mask),
            "temperature": float(objective.objective.temperature),
        }
        self.reader.identity.check(directory, expected)
        check_cacheable(objective, self.reader.identity.draws)

    def of_batch(self, batch: Mapping[str, Any], cp_group: dist.ProcessGroup) -> torch.Tensor:
        """Return this rank's records of a batch, [b, s / CP, bytes per token + 1] uint8 on its device.

        Args:
            batch: as Bridge's loaders give it, on the CPU: tokens, labels, position_ids and loss_mask, [b, s] each.
            cp_group: of the student.

        Raises:
            DataError: a sample has no records and `on_miss` is "error", or they are damaged.
        """
        samples = [{name: batch[name][row] for name in _READ} for row in range(len(batch["tokens"]))]
        found = torch.stack([packed_records(self.reader, it, self._on_miss, "of this batch") for it in samples])
        if cp_group.size() > 1:
            found = get_batch_on_this_cp_rank({RECORDS: found}, is_hybrid_cp=False, cp_group=cp_group)[RECORDS]
        return found.cuda(non_blocking=True)


_READ = ("tokens", "labels", "position_ids", "loss_mask")
