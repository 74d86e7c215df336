"""Batches and datasets of Megatron's GPT pretraining, for our jobs."""

import json
import logging
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from megatron.core import mpu
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.multi_token_prediction import mtp_on_this_rank
from megatron.core.utils import (
    flatten_batch_for_packed_sequences,
    get_batch_on_this_cp_rank,
    get_batch_on_this_tp_rank,
)
from megatron.training import get_args, get_tokenizer
from megatron.training.datasets.sft_dataset import SFTDataset
from megatron.training.training import update_seqlen_stats_from_cu_seqlens
from megatron.training.utils import get_blend_and_blend_per_split, is_first_or_last_pipeline_stage
from torch.utils.data import Dataset, Subset

from abkd_megatron.cache.dataset import RECORDS
from abkd_megatron.config.validation import ValidationConfig
from abkd_megatron.data.aligned_text import ALIGNED
from abkd_megatron.hosts.held_out import SET
from abkd_megatron.losses.sources import UNKNOWN

logger = logging.getLogger(__name__)


# The datasets of a micro-batch's sequences on the host, where it has read them for all ranks that share them.
SOURCES_ON_HOST = "dataset_id on the host"


class Packing(Enum):
    """What is packed into the rows of packed data."""

    CONVERSATIONS = "sft"
    DOCUMENTS = "dataloader_inter_document_masking"

    @classmethod
    def of(cls, args: Namespace) -> "Packing | None":
        """Return that of Megatron's arguments; None for rows of one sequence."""
        return next((one for one in cls if getattr(args, one.value)), None)


class CountedTokens:
    """Warns on a rank that reads data if none of its tokens in a step counts, so that means are logged as 0."""

    def __init__(self) -> None:
        self._step: tuple[str, int] | None = None
        self._is_empty = False

    def add(self, loss_mask: torch.Tensor, training: bool) -> None:
        """Add the loss mask of a micro-batch, while it is still on the host."""
        args = get_args()
        done = getattr(args, "curr_iteration", args.iteration - 1)  # absent in an evaluation without training
        step = "step" if training else "validation after step", done + 1
        if step != self._step:
            self.end()
            self._step, self._is_empty = step, True
        self._is_empty = self._is_empty and not loss_mask.any()

    def end(self) -> None:
        """End the step, with a warning if no token counted."""
        if self._step is not None and self._is_empty:
            logger.warning(
                "%s %d: the loss mask is 0 for all tokens that rank %d has read; if so on all ranks, losses are logged "
                "as 0 and there is no gradient",
                *self._step,
                torch.distributed.get_rank(),
            )
        self._step = None


def get_batch(
    data_iterator: Iterator | None,
    vp_stage: int | None,
    tokens_on_last: bool = False,
    mask_here: bool = False,
    *,
    training: bool = True,
    counted: CountedTokens | None = None,
    with_sources: bool = False,
    with_sets: bool = False,
    record_bytes: int | None = None,
    aligned_length: int | None = None,
    packed: bool = False,
) -> dict[str, Any]:
    """Return this rank's part of the next micro-batch; None values on pipeline stages that need no batch.

    All are tensors or None, except `packed_seq_params`: the boundaries of a `packed` row's sequences, which every stage
    needs.

    With `tokens_on_last` the last stage also gets the input tokens, as with multi-token prediction. With `mask_here`
    this stage gets the whole batch. Validation may use another micro-batch size. `counted` gets the loss mask on the
    rank that reads it. With `with_sources` there is a `dataset_id`, [b] int64: the position of each sequence's dataset
    in a blend, or `UNKNOWN`; on one tensor-parallel rank also `SOURCES_ON_HOST`, a list of them. With `with_sets` there
    is a `SET`, [b] int64, see `HeldOut`. With `record_bytes` there are `RECORDS`, [b, s, record_bytes] uint8. With
    `aligned_length` there is `ALIGNED`, [b, aligned_length] int64.

    Collectives: Megatron's broadcasts over the tensor-parallel group, and one more each of [b] with `with_sources` and
    with `with_sets`, of the records and of the aligned text. Megatron reads the lengths of packed sequences on the
    host, which waits for the device.
    """
    args = get_args()
    keys = ("tokens", "labels", "loss_mask", "position_ids", "attention_mask", "cu_seqlens", "max_seqlen")
    batch: dict[str, Any] = dict.fromkeys(keys)
    predicts_ahead = mtp_on_this_rank(None, args.mtp_num_layers, ignore_virtual=False, vp_stage=vp_stage)
    is_whole = is_first_or_last_pipeline_stage(vp_stage) or predicts_ahead or mask_here
    if not is_whole and not packed:
        absent = dict.fromkeys(("packed_seq_params", "dataset_id", SOURCES_ON_HOST, SET, RECORDS, ALIGNED))
        return {**batch, **absent}
    size = args.micro_batch_size if training else args.eval_micro_batch_size
    sources = sets = records = aligned = None
    if mpu.get_tensor_model_parallel_rank() == 0:
        assert data_iterator is not None
        data = next(data_iterator)
        sources, sets, records = data.get("dataset_id"), data.get(SET), data.get(RECORDS)
        aligned = data.get(ALIGNED)
        if counted is not None:
            counted.add(data["loss_mask"], training)
        batch.update({key: data[key].cuda(non_blocking=True) for key in keys if data.get(key) is not None})
    batch = get_batch_on_this_tp_rank(
        batch,
        has_cu_seqlens=packed,
        is_hybrid_cp=False,
        create_attention_mask_in_dataloader=args.create_attention_mask_in_dataloader,
        broadcast_src_rank=mpu.get_tensor_model_parallel_src_rank(),
        broadcast_group=mpu.get_tensor_model_parallel_group(),
        cp_size=args.context_parallel_size,
        tp_rank=mpu.get_tensor_model_parallel_rank(),
        micro_batch_size=size,
        seq_length=args.seq_length,
        mtp_on_this_rank=predicts_ahead or tokens_on_last or mask_here,
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        is_pipeline_first_stage=mpu.is_pipeline_first_stage(),
        is_pipeline_last_stage=mpu.is_pipeline_last_stage(),
    )
    packed_seq_params = _packed_seq_params(batch) if packed else None
    shape = (size, args.seq_length, record_bytes or 0)
    batch[RECORDS] = on_tp_ranks(records, shape, torch.uint8) if record_bytes is not None else None
    batch[ALIGNED] = None
    batch = get_batch_on_this_cp_rank(batch, is_hybrid_cp=False, cp_group=mpu.get_context_parallel_group())
    batch[SOURCES_ON_HOST] = None
    if with_sources and sources is not None and mpu.get_tensor_model_parallel_world_size() == 1:
        batch[SOURCES_ON_HOST] = sources.tolist()
    batch["dataset_id"] = on_tp_ranks(sources, (size,), torch.int64) if with_sources else None
    batch[SET] = on_tp_ranks(sets, (size,), torch.int64) if with_sets else None
    if aligned_length is not None:
        batch[ALIGNED] = on_tp_ranks(aligned, (size, aligned_length), torch.int64)
    return {**batch, "packed_seq_params": packed_seq_params}


def _packed_seq_params(batch: dict[str, Any]) -> PackedSeqParams:
    """Return the boundaries of the sequences in a row, and count them for Megatron's FLOPs."""
    flatten_batch_for_packed_sequences(batch)  # removes what pads the boundaries
    ends, longest = batch["cu_seqlens"].squeeze(0), int(batch["max_seqlen"].item())
    update_seqlen_stats_from_cu_seqlens(ends)
    return PackedSeqParams(
        qkv_format="thd", cu_seqlens_q=ends, cu_seqlens_kv=ends, max_seqlen_q=longest, max_seqlen_kv=longest
    )


def on_tp_ranks(read: torch.Tensor | None, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Return what the first tensor-parallel rank has `read` (None: `UNKNOWN`) on the device of every one."""
    if read is not None:
        found = read.cuda(non_blocking=True).to(dtype)
    else:
        unknown = UNKNOWN if dtype.is_signed else 0
        found = torch.full(shape, unknown, dtype=dtype, device=torch.cuda.current_device())
    group = mpu.get_tensor_model_parallel_group()
    if group.size() > 1:
        torch.distributed.broadcast(found, mpu.get_tensor_model_parallel_src_rank(), group=group)
    return found


def train_valid_test_datasets_provider(
    num_samples: Sequence[int],
    vp_stage: int | None = None,
    mask_here: bool = False,
    held_out_seed: int | None = None,
    packing: Packing | None = None,
    validation: ValidationConfig | None = None,
) -> tuple:
    """Build Megatron's GPT datasets for training, validation and test on the ranks that read data; see `get_batch`.

    `held_out_seed` chooses the samples of validation and test, Megatron's seed those of training. None: Megatron's.
    """

    def is_built_here() -> bool:
        reads = mask_here or packing is not None or is_first_or_last_pipeline_stage(vp_stage)
        return mpu.get_tensor_model_parallel_rank() == 0 and reads

    return build_datasets(get_args(), get_tokenizer(), num_samples, is_built_here, held_out_seed, packing, validation)


def build_datasets(
    args: Namespace,
    tokenizer: Any,
    num_samples: Sequence[int | None],
    is_built_here: Callable[[], bool],
    held_out_seed: int | None,
    packing: Packing | None,
    validation: ValidationConfig | None = None,
) -> tuple:
    """Build Megatron's GPT datasets for training, validation and test.

    With `validation.sets` the second is a list with an entry per set, a `Subset` or None, and the third None.

    Args:
        args: Megatron's validated arguments.
        tokenizer: Megatron's.
        num_samples: of each split; None for all.
        is_built_here: whether this rank reads data.
        held_out_seed: see `train_valid_test_datasets_provider`.
        packing: of the rows.
        validation: sets in place of validation and test.
    """
    dataset = SFTDataset if packing is Packing.CONVERSATIONS else MockGPTDataset if args.mock_data else GPTDataset

    def build(seed: int) -> list:
        config = datasets_config(args, tokenizer, seed)
        return BlendedMegatronDatasetBuilder(dataset, num_samples, is_built_here, config).build()

    train, *held_out = build(args.seed)
    if validation is not None and validation.sets:
        seed, most = args.seed if held_out_seed is None else held_out_seed, validation.rows

        def rows(prefix: str) -> Dataset | None:
            """Return the first rows of one pass over a data set, in its random order."""
            config = datasets_config(args, tokenizer, seed)
            alone = replace(config, blend=None, blend_per_split=[None, ([prefix], None), None], split=None)
            found = BlendedMegatronDatasetBuilder(dataset, [0, None, 0], is_built_here, alone).build()[1]
            return Subset(found, range(min(len(found), most or len(found)))) if found is not None else None

        return train, [rows(prefix) for prefix in validation.sets.values()], None
    if held_out_seed is not None and held_out_seed != args.seed:
        _, *held_out = build(held_out_seed)
    return train, *held_out


def datasets_config(args: Namespace, tokenizer: Any, seed: int) -> GPTDatasetConfig:
    """Make the configuration of Megatron's GPT datasets."""
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    sequences = args.per_dataset_sequences_path
    return GPTDatasetConfig(
        random_seed=seed,
        sequence_length=args.seq_length,
        blend=blend,
        blend_per_split=blend_per_split,
        split=args.split,
        multiple_validation_sets=args.multiple_validation_sets,
        full_validation=args.full_validation,
        num_dataset_builder_threads=args.num_dataset_builder_threads,
        path_to_cache=args.data_cache_path,
        mmap_bin_files=args.mmap_bin_files,
        tokenizer=tokenizer,
        reset_position_ids=args.reset_position_ids,
        reset_attention_mask=args.reset_attention_mask,
        eod_mask_loss=args.eod_mask_loss,
        create_attention_mask=args.create_attention_mask_in_dataloader,
        inter_document_masking=args.dataloader_inter_document_masking,
        object_storage_cache_path=args.object_storage_cache_path,
        mid_level_dataset_surplus=args.mid_level_dataset_surplus,
        allow_ambiguous_pad_tokens=args.allow_ambiguous_pad_tokens,
        fast_cache_load=args.dataloader_fast_cache_load,
        defer_npy_index_mmap=args.dataloader_defer_npy_index_mmap,
        sequences_per_dataset=json.loads(Path(sequences).read_text()) if sequences is not None else None,
        context_parallel_size=args.context_parallel_size,
        data_parallel_size=args.data_parallel_size,
        sequence_parallel_size=args.tensor_model_parallel_size * args.sequence_parallel,
    )


# Megatron then builds the datasets on every rank that needs them, not only on rank 0.
train_valid_test_datasets_provider.is_distributed = True  # type: ignore[attr-defined]
