"""Pretraining script like Megatron-LM's pretrain_gpt.py, with three more lines for distillation.

    torchrun --nproc-per-node 4 examples/pretrain_gpt.py MEGATRON ARGUMENTS
    torchrun --nproc-per-node 4 examples/pretrain_gpt.py MEGATRON ARGUMENTS --kd-teacher-load CHECKPOINT

The three lines are an import and its two uses. Without a teacher they change nothing. To run on CPU, prefix the script
with `-m abkd_megatron.cpu_backend`.
"""

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from megatron.core import mpu
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
from megatron.core.enums import ModelType
from megatron.core.rerun_state_machine import get_rerun_state_machine
from megatron.core.transformer.multi_token_prediction import mtp_on_this_rank
from megatron.core.utils import get_attr_wrapped_model, get_batch_on_this_cp_rank, get_batch_on_this_tp_rank
from megatron.training import get_args, get_tensorboard_writer, get_timers, get_tokenizer, pretrain
from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args
from megatron.training.arguments import parse_and_validate_args
from megatron.training.utils import get_blend_and_blend_per_split, is_first_or_last_pipeline_stage

from abkd_megatron import add_kd_arguments, distill

KEYS = ("tokens", "labels", "loss_mask", "position_ids", "attention_mask", "cu_seqlens")


def takes_part(vp_stage: int | None) -> tuple[bool, bool]:
    """Return whether this pipeline stage needs batches, and whether it has multi-token prediction."""
    ahead = mtp_on_this_rank(None, get_args().mtp_num_layers, ignore_virtual=False, vp_stage=vp_stage)
    return is_first_or_last_pipeline_stage(vp_stage) or ahead, ahead


def get_batch(data_iterator: Iterator | None, vp_stage: int | None) -> dict[str, torch.Tensor | None]:
    """Return this rank's part of the next micro-batch."""
    args = get_args()
    batch: dict[str, torch.Tensor | None] = dict.fromkeys(KEYS)
    needed, ahead = takes_part(vp_stage)
    if not needed:
        return batch
    if mpu.get_tensor_model_parallel_rank() == 0:
        assert data_iterator is not None
        sample = next(data_iterator)
        batch |= {key: sample[key].cuda(non_blocking=True) for key in KEYS if sample.get(key) is not None}
    batch = get_batch_on_this_tp_rank(
        batch,
        has_cu_seqlens=False,
        is_hybrid_cp=False,
        create_attention_mask_in_dataloader=args.create_attention_mask_in_dataloader,
        broadcast_src_rank=mpu.get_tensor_model_parallel_src_rank(),
        broadcast_group=mpu.get_tensor_model_parallel_group(),
        cp_size=args.context_parallel_size,
        tp_rank=mpu.get_tensor_model_parallel_rank(),
        micro_batch_size=args.micro_batch_size,
        seq_length=args.seq_length,
        mtp_on_this_rank=ahead,
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        is_pipeline_first_stage=mpu.is_pipeline_first_stage(),
        is_pipeline_last_stage=mpu.is_pipeline_last_stage(),
    )
    return get_batch_on_this_cp_rank(batch, is_hybrid_cp=False, cp_group=mpu.get_context_parallel_group())


def loss_func(loss_mask: torch.Tensor | None, output_tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict]:
    """Return the loss summed over counted tokens, their number, and the values to log."""
    assert loss_mask is not None  # Megatron computes the loss only on the last stage
    mask = loss_mask.reshape(-1).float()
    loss = (output_tensor.reshape(-1).float() * mask).sum()
    num_tokens = mask.sum().detach().clone().to(torch.int)
    if get_args().check_for_nan_in_loss_and_grad:
        for rejected, name in ((torch.isnan, "NaN"), (torch.isinf, "Inf")):
            get_rerun_state_machine().validate_result(
                result=loss, rejection_func=rejected, message=f"{name} in the loss", tolerance=0.0, fatal=True
            )
    return loss, num_tokens, {"lm loss": torch.cat([loss.detach().clone().view(1), num_tokens.view(1)])}


def forward_step(data_iterator: Iterator | None, model: torch.nn.Module) -> tuple[torch.Tensor, partial]:
    """Run the model on one micro-batch; return its output and the loss function."""
    timers = get_timers()
    timers("batch-generator", log_level=2).start()
    batch = get_batch(data_iterator, get_attr_wrapped_model(model, "vp_stage"))
    timers("batch-generator").stop()
    output_tensor = model(
        batch["tokens"],
        batch["position_ids"],
        batch["attention_mask"],
        labels=batch["labels"],
        loss_mask=batch["loss_mask"],
    )
    return output_tensor, partial(loss_func, batch["loss_mask"])


def train_valid_test_datasets_provider(num_samples: Sequence[int], vp_stage: int | None = None) -> tuple:
    """Build Megatron's GPT datasets for training, validation and test, on the ranks that read data."""
    args = get_args()
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    config = GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=blend,
        blend_per_split=blend_per_split,
        split=args.split,
        multiple_validation_sets=args.multiple_validation_sets,
        full_validation=args.full_validation,
        num_dataset_builder_threads=args.num_dataset_builder_threads,
        path_to_cache=args.data_cache_path,
        mmap_bin_files=args.mmap_bin_files,
        tokenizer=get_tokenizer(),
        reset_position_ids=args.reset_position_ids,
        reset_attention_mask=args.reset_attention_mask,
        eod_mask_loss=args.eod_mask_loss,
        create_attention_mask=args.create_attention_mask_in_dataloader,
        object_storage_cache_path=args.object_storage_cache_path,
        mid_level_dataset_surplus=args.mid_level_dataset_surplus,
        allow_ambiguous_pad_tokens=args.allow_ambiguous_pad_tokens,
        context_parallel_size=args.context_parallel_size,
        data_parallel_size=args.data_parallel_size,
        sequence_parallel_size=args.tensor_model_parallel_size * args.sequence_parallel,
    )

    def is_built_here() -> bool:
        return mpu.get_tensor_model_parallel_rank() == 0 and takes_part(vp_stage)[0]

    dataset = MockGPTDataset if args.mock_data else GPTDataset
    return BlendedMegatronDatasetBuilder(dataset, num_samples, is_built_here, config).build()


if __name__ == "__main__":
    # Every rank builds the datasets that it needs, not only rank 0.
    train_valid_test_datasets_provider.is_distributed = True  # type: ignore[attr-defined]
    args = parse_and_validate_args(
        extra_args_provider=add_kd_arguments,
        args_defaults={"tokenizer_type": "GPT2BPETokenizer"},
    )
    model_cfg = gpt_config_from_args(args)
    model_cfg.rope_scaling_factor = args.rope_scaling_factor  # missing in gpt_config_from_args
    forward_step = distill(args, model_cfg, forward_step)
    pretrain(
        pretrain_cfg_container_from_args(args, model_cfg),
        train_valid_test_datasets_provider,
        ModelType.encoder_or_decoder,
        forward_step,
    )
    if (writer := get_tensorboard_writer()) is not None:
        writer.flush()  # otherwise queued events are lost when the process ends
