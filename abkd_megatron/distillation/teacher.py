"""The teacher: built like the student, loaded from its own checkpoint, then frozen."""

import random
from argparse import Namespace
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.models.gpt import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.training.models import GPTModelConfig
from megatron.training.vocab_utils import calculate_padded_vocab_size
from torch.distributed.checkpoint.filesystem import FileSystemReader

from abkd_megatron.errors import CheckpointError, on_every_rank

# Megatron arguments that decide what the weights mean. Some of them (heads, rotary base, activation) leave every shape
# as it is, so a wrong one would load without a complaint.
_ARCHITECTURE = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "kv_channels",
    "group_query_attention",
    "num_query_groups",
    "position_embedding_type",
    "rotary_base",
    "rotary_percent",
    "rotary_interleaved",
    "use_rope_scaling",
    "normalization",
    "norm_epsilon",
    "apply_layernorm_1p",
    "qk_layernorm",
    "swiglu",
    "squared_relu",
    "quick_geglu",
    "add_bias_linear",
    "add_qkv_bias",
    "untie_embeddings_and_output_weights",
    "num_experts",
    "moe_router_topk",
    "multi_latent_attention",
)


@dataclass(frozen=True)
class TeacherCheckpoint:
    """One iteration of a Megatron torch_dist checkpoint, and what it says about the model in it."""

    directory: Path
    """The folder of the iteration itself."""
    common: Mapping[str, Any]
    """What Megatron saved beside the tensors; `args` among it."""

    @classmethod
    def open(cls, load: str | Path, ckpt_step: int | None = None) -> "TeacherCheckpoint":
        """Find the checkpoint and see that all of it is there, without reading a tensor.

        Args:
            load: what Megatron's --load takes (a folder with latest_checkpointed_iteration.txt), or one iteration.
            ckpt_step: the iteration to take instead of the latest.

        Raises:
            CheckpointError: nothing there, not in torch_dist format, or a file missing or shorter than recorded.
        """
        directory = _iteration_directory(Path(load), ckpt_step)
        if not dist_checkpointing.check_is_distributed_checkpoint(str(directory)):
            raise CheckpointError(
                f"expected a torch_dist checkpoint of the teacher in {directory}, found none; save it with "
                "--ckpt-format torch_dist, or convert it with Megatron's --ckpt-convert-format"
            )
        try:
            stored = FileSystemReader(directory).read_metadata().storage_data or {}
        except Exception as error:
            raise CheckpointError(
                f"the index of the teacher's checkpoint in {directory} cannot be read ({error}); copy or save it again"
            ) from error
        sizes: dict[str, int] = {}
        for item in stored.values():
            sizes[item.relative_path] = max(sizes.get(item.relative_path, 0), item.offset + item.length)
        for name, size in sorted(sizes.items()):
            file = directory / name
            found = file.stat().st_size if file.is_file() else None
            if found is None or found < size:
                raise CheckpointError(
                    f"the teacher's checkpoint is damaged: {file} should hold {size} bytes and "
                    f"{'is missing' if found is None else f'holds {found}'}; copy or save it again"
                )
        try:
            common = dist_checkpointing.load_common_state_dict(str(directory))
        except Exception as error:
            raise CheckpointError(
                f"the common state of the teacher's checkpoint in {directory} cannot be read ({error}); "
                "copy or save it again"
            ) from error
        return cls(directory, common)

    def check_arguments(self, args: Namespace, vocab_size: int) -> None:
        """Refuse a teacher whose saved arguments contradict the configured ones.

        Args:
            args: Megatron's arguments for the teacher, as configured.
            vocab_size: true size of the student's vocabulary, in tokens.

        Raises:
            CheckpointError: another architecture or another vocabulary.
        """
        saved = self.common.get("args")
        if saved is None:
            return
        theirs, ours = _architecture(saved), _architecture(args)
        wrong = [
            f"{name.replace('_', '-')}: the checkpoint has {theirs[name]}, the configuration {ours[name]}"
            for name in theirs
            if name in ours and theirs[name] != ours[name]
        ]
        if wrong:
            raise CheckpointError(
                f"the teacher in {self.directory} is not the one configured; set under `teacher:` what differs from "
                "the student:\n  " + "\n  ".join(wrong)
            )
        self._check_vocabulary(saved, vocab_size)

    def _check_vocabulary(self, saved: Namespace, vocab_size: int) -> None:
        remedy = "teacher and student must share one tokenizer: train the student with the teacher's"
        true_size = getattr(saved, "vocab_size", None)
        if true_size is not None:
            if true_size != vocab_size:
                raise CheckpointError(
                    f"the teacher in {self.directory} has a vocabulary of {true_size} tokens, "
                    f"the student one of {vocab_size}; {remedy}"
                )
            return
        # Megatron itself records only the padded size; what it was padded from can still be told apart.
        padded = getattr(saved, "padded_vocab_size", None)
        if padded is None:
            return
        expected = calculate_padded_vocab_size(
            vocab_size, saved.make_vocab_size_divisible_by, saved.tensor_model_parallel_size, logging_enabled=False
        )
        if padded != expected:
            raise CheckpointError(
                f"the teacher in {self.directory} has {padded} padded vocabulary columns; the student's {vocab_size} "
                f"tokens would have given {expected}; {remedy}"
            )

    def check_tensors(self, model: GPTModel) -> None:
        """Refuse a checkpoint that lacks a tensor of `model`, or holds it in another shape.

        Raises:
            CheckpointError: naming the first few tensors, with both shapes.
        """
        found = dist_checkpointing.load_tensors_metadata(str(self.directory))
        wrong = []
        for wanted in nested_values(model.sharded_state_dict(metadata=self._content_metadata)):
            if not isinstance(wanted, ShardedTensor):
                continue
            if wanted.key not in found:
                wrong.append(f"{wanted.key}: missing")
                continue
            # The padded vocabulary follows the tensor-parallel size, so dimension 0 of an embedding may differ.
            first = 1 if wanted.allow_shape_mismatch else 0
            shape, saved = tuple(wanted.global_shape), tuple(found[wanted.key].global_shape)
            if shape[first:] != saved[first:]:
                wrong.append(f"{wanted.key}: configured {shape}, saved {saved}")
        if wrong:
            raise CheckpointError(
                f"the teacher in {self.directory} does not fit the configured one; correct `teacher:`\n  "
                + "\n  ".join(wrong[:5])
                + (f"\n  ... and {len(wrong) - 5} more" if len(wrong) > 5 else "")
            )

    def load_into(self, model: GPTModel) -> None:
        """Read this rank's share of the weights, resharded from the layout they were saved in.

        Collectives: those of Megatron's distributed load, over the whole job.
        """
        wanted = {"model": model.sharded_state_dict(metadata=self._content_metadata)}
        try:
            loaded = dist_checkpointing.load(wanted, str(self.directory))
        except Exception as error:
            raise CheckpointError(f"the teacher in {self.directory} cannot be loaded: {error}") from error
        model.load_state_dict(loaded["model"])

    @property
    def _content_metadata(self) -> dict[str, Any] | None:
        return dist_checkpointing.load_content_metadata(preloaded_state_dict=self.common)


def build_teacher(
    config: GPTModelConfig, checkpoint: TeacherCheckpoint, pg_collection: ProcessGroupCollection
) -> GPTModel:
    """Build this rank's stage of the teacher, load it and freeze it.

    The teacher is never a submodule of the student: it stays out of the student's state dict, optimizer, gradient
    buffers and parameter count. Random states are left as they were found, so a run with a teacher draws the same
    numbers as one without.

    Args:
        config: Megatron's model config, from the teacher's arguments.
        checkpoint: opened and checked against those arguments.
        pg_collection: the process groups of the student, which the teacher shares.

    Returns:
        A GPTModel in eval mode, in the config's parameter dtype, without gradients.

    Raises:
        CheckpointError: on every rank, when the checkpoint does not fit on any.

    Collectives: those of building a Megatron model and of a distributed load; two all_gather_object.
    """
    with _random_states_kept():
        (model,) = config.get_builder_cls()(config).build_distributed_models(
            pg_collection, wrap_with_ddp=False, mixed_precision_wrapper=None
        )
    with on_every_rank():
        checkpoint.check_tensors(model)
    with on_every_rank():
        checkpoint.load_into(model)
    model.to(config.transformer.params_dtype)
    model.requires_grad_(False)
    return model.eval()


def _architecture(args: Namespace) -> dict[str, Any]:
    found = {name: getattr(args, name) for name in _ARCHITECTURE if hasattr(args, name)}
    if not found.get("group_query_attention"):
        found.pop("num_query_groups", None)  # means nothing then, and Megatron overwrites it while it runs
    return found


def _iteration_directory(load: Path, ckpt_step: int | None) -> Path:
    if (load / "metadata.json").is_file():
        return load
    if not load.is_dir():
        raise CheckpointError(f"expected the teacher's checkpoint in {load}, found no such folder; set teacher.load")
    tracker = load / "latest_checkpointed_iteration.txt"
    if ckpt_step is None:
        if not tracker.is_file():
            raise CheckpointError(
                f"expected {tracker.name} in {load}, found none: no checkpoint was finished there; set teacher.load to "
                "a folder that Megatron's --save wrote, or teacher.ckpt-step to an iteration"
            )
        step = tracker.read_text().strip()
    else:
        step = str(ckpt_step)
    if step != "release" and not step.isdigit():
        raise CheckpointError(f"expected an iteration or `release` in {tracker}, got {step!r}")
    directory = load / (step if step == "release" else f"iter_{int(step):07d}")
    if not directory.is_dir():
        raise CheckpointError(f"expected iteration {step} of the teacher in {directory}, found no such folder")
    return directory


@contextmanager
def _random_states_kept() -> Iterator[None]:
    tracker = get_cuda_rng_tracker()
    states = (random.getstate(), np.random.get_state(), torch.get_rng_state(), torch.cuda.get_rng_state())
    tracked = tracker.get_states()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        torch.cuda.set_rng_state(states[3])
        tracker.set_states(tracked)
