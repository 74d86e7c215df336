"""The checkpoint that a teacher is loaded from: what it says of the model in it, and what is refused of it."""

import filecmp
import hashlib
import logging
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.strategies.cached_metadata_filesystem_reader import CachedMetadataFileSystemReader
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelLoadStrategyWrapper
from megatron.core.dist_checkpointing.strategies.torch import TorchDistLoadShardedStrategy
from megatron.core.dist_checkpointing.validation import verify_integrity_manifest
from megatron.training.vocab_utils import calculate_padded_vocab_size
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from abkd_megatron.distillation.safe_reading import plain_values, read_common, read_index
from abkd_megatron.errors import CheckpointError, on_every_rank

logger = logging.getLogger(__name__)

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
    "rope_scaling_factor",
    "rotary_seq_len_interpolation_factor",
    "no_rope_freq",
    "mrope_section",
    "rope_type",
    "yarn_original_max_position_embeddings",
    "yarn_beta_fast",
    "yarn_beta_slow",
    "yarn_correction_range_round_to_int",
    "softmax_type",
    "window_size",
    "window_attn_skip_freq",
    "normalization",
    "layernorm_epsilon",
    "layernorm_zero_centered_gamma",
    "qk_layernorm",
    "qk_l2_norm",
    "attention_output_gate",
    "swiglu",
    "squared_relu",
    "quick_geglu",
    "glu_linear_offset",
    "activation_func_clamp_value",
    "add_bias_linear",
    "add_qkv_bias",
    "untie_embeddings_and_output_weights",
    "num_experts",
    "moe_layer_freq",
    "moe_router_topk",
    "moe_router_score_function",
    "moe_router_pre_softmax",
    "moe_router_topk_scaling_factor",
    "moe_router_num_groups",
    "moe_router_group_topk",
    "moe_apply_probs_on_input",
    "moe_expert_capacity_factor",
    "moe_token_drop_policy",
    "moe_mlp_glu_interleave_size",
    "moe_shared_expert_glu_interleave_size",
    "multi_latent_attention",
    "rotary_scaling_factor",
    "mscale",
    "mscale_all_dim",
    "experimental_attention_variant",
    "dsa_indexer_topk",
    "dsa_indexer_rope_interleaved",
    "dsa_indexer_rotate_activation",
    "dsa_indexer_scoring_relu",
    "use_mup",
    "mup_width_mult",
    "mup_base_hidden_size",
    "mup_embedding_mult",
    "mup_output_mult",
    "mup_base_head_dim",
    "mup_attn_scale_power",
)

# Those of the above that mean nothing unless another one is on; Megatron may change them while it runs.
_ONLY_WITH = {
    "group_query_attention": ("num_query_groups",),
    "use_rope_scaling": ("rope_scaling_factor",),
    "num_experts": tuple(name for name in _ARCHITECTURE if name.startswith("moe_")),
    "moe_expert_capacity_factor": ("moe_token_drop_policy",),
    "multi_latent_attention": ("rope_type",),
    "experimental_attention_variant": tuple(name for name in _ARCHITECTURE if name.startswith("dsa_")),
    "use_mup": tuple(name for name in _ARCHITECTURE if name.startswith("mup_")),
}
# And those that only some position embeddings have; multi-latent attention has YaRN's under any name.
_OF_POSITIONS = {
    "yarn": tuple(name for name in _ARCHITECTURE if name.startswith("yarn_")),
    "mrope": ("mrope_section",),
}
_YARN_WITHOUT_PREFIX = ("rotary_scaling_factor", "mscale", "mscale_all_dim")

# Bytes of each of a checkpoint's files that tell it from another.
_SAMPLE = 4096


@dataclass(frozen=True)
class TeacherCheckpoint:
    """One iteration of a Megatron torch_dist checkpoint, and what it says about the model in it."""

    directory: Path
    """The folder of the iteration itself."""
    common: Mapping[str, Any]
    """What Megatron saved beside the tensors; `args` among it."""
    index: Metadata
    """Where each tensor lies in the files."""

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
        CachedMetadataFileSystemReader.clear_metadata_cache()  # what was here before may have been another
        index = read_index(directory)
        check_whole(directory, index, "teacher")
        return cls(directory, read_common(directory, index), index)

    def check_arguments(self, args: Namespace, vocab_size: int, shared_vocab: int | None = None) -> None:
        """Refuse a teacher whose saved arguments contradict the configured ones.

        Args:
            args: Megatron's arguments for the teacher, as configured.
            vocab_size: true size of the student's vocabulary, in tokens.
            shared_vocab: how many first ids are the same tokens to both, `Objective.shared_vocab`; None for all. It
                cannot be told from a checkpoint whether they are.

        Raises:
            CheckpointError: another architecture or another vocabulary, or one smaller than what is shared.
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
        self._check_vocabulary(saved, vocab_size, shared_vocab)

    def _check_vocabulary(self, saved: Namespace, vocab_size: int, shared_vocab: int | None) -> None:
        remedy = (
            "teacher and student must share one tokenizer: train the student with the teacher's; if only the first N "
            "tokens are the same in both, give distillation.shared_vocab=N"
        )
        true_size = getattr(saved, "vocab_size", None)
        if shared_vocab is not None:
            theirs = true_size or getattr(saved, "padded_vocab_size", None)
            if theirs is not None and shared_vocab > min(theirs, vocab_size):
                raise CheckpointError(
                    f"shared_vocab is {shared_vocab}; the teacher in {self.directory} has a vocabulary of {theirs} "
                    f"tokens, the student one of {vocab_size}; give at most the smaller"
                )
            logger.info(
                "vocabularies: student %d tokens, teacher %s; the divergence is over the first %d",
                vocab_size,
                true_size or f"{theirs} with its padding",
                shared_vocab,
            )
            return
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

    def check_tokenizer(self, tokenizer_model: str | None) -> None:
        """Refuse a teacher that was trained on another tokenizer's tokens: vocabularies of one size may still be two.

        Of its tokenizer a checkpoint has the path alone, so nothing is said where that, or ours, is not a file here.

        Args:
            tokenizer_model: the student's, as Megatron's argument of that name.

        Raises:
            CheckpointError: the files differ.
        """
        theirs = getattr(self.common.get("args"), "tokenizer_model", None)
        if theirs is None or tokenizer_model is None or Path(theirs) == Path(tokenizer_model):
            return
        if not all(Path(path).is_file() for path in (theirs, tokenizer_model)):
            return
        if not filecmp.cmp(theirs, tokenizer_model, shallow=False):
            raise CheckpointError(
                f"expected the tokenizer that the teacher was trained with, {theirs}, got another one, "
                f"{tokenizer_model}; train on data of the teacher's tokenizer, or give distillation.shared_vocab=N if "
                "the first N tokens are one"
            )

    def check_tensors(self, wanted: Mapping[str, Any]) -> None:
        """Refuse a checkpoint that lacks a tensor of a sharded state dict, or holds it in another shape.

        Raises:
            CheckpointError: naming the first few tensors, with both shapes.
        """
        found = _shapes(self.index)
        wrong = []
        for tensor in nested_values(wanted):
            if not isinstance(tensor, ShardedTensor):
                continue
            if tensor.key not in found:
                wrong.append(f"{tensor.key}: missing")
                continue
            # The padded vocabulary follows the tensor-parallel size, so dimension 0 of an embedding may differ.
            first = 1 if tensor.allow_shape_mismatch else 0
            shape, saved = tuple(tensor.global_shape), found[tensor.key]
            if shape[first:] != saved[first:]:
                wrong.append(f"{tensor.key}: configured {shape}, saved {saved}")
        if wrong:
            raise CheckpointError(
                f"the teacher in {self.directory} does not fit the configured one; correct `teacher:`\n  "
                + "\n  ".join(wrong[:5])
                + (f"\n  ... and {len(wrong) - 5} more" if len(wrong) > 5 else "")
            )

    def load(self, wanted: dict[str, Any], replicas: dist.ProcessGroup) -> dict[str, Any]:
        """Read this rank's share of the weights that a sharded state dict asks for, from whatever layout they lie in.

        The ranks that want the same weights read a part of them each, and send it to the others.

        Args:
            wanted: of this rank; may be empty.
            replicas: ranks that want the same, or some of it (experts), of one size over the whole job: Megatron's
                data- and context-parallel group.

        Raises:
            CheckpointError: on every rank, when something is missing or does not fit on any.

        Collectives: three or four all_gather_object over the whole job, one over the group, and a broadcast within it
            for each tensor that more than one rank wants.
        """
        with on_every_rank():
            self.check_tensors(wanted)
        strategy = FullyParallelLoadStrategyWrapper(_ReadOnEveryRank(cache_metadata=True), replicas)
        with on_every_rank(), plain_values(self.directory):
            # Validated, all ranks would tell each other of all their tensors, and rank 0 alone would refuse them.
            loaded: dict[str, Any] = dist_checkpointing.load(
                {"wanted": wanted}, str(self.directory), strategy, validate_access_integrity=False
            )
        return loaded.get("wanted") or {}  # a rank may want nothing

    def verify(self) -> None:
        """Compare every file with the SHA-256 that Megatron's --verify-integrity had written beside it at the save.

        Rank 0 reads all of the checkpoint. That tells damage: who can change a file can change its hash.

        Raises:
            CheckpointError: on every rank, when there are no hashes, or a file has another.

        Collectives: one broadcast_object_list over the whole job; none where torch.distributed is not initialised.
        """
        try:
            verify_integrity_manifest(str(self.directory))
        except CheckpointingException as error:
            raise CheckpointError(
                f"the teacher's checkpoint is not known to be whole: {error}\ncopy it again; or, of one saved without "
                "verify-integrity, give teacher.verify-integrity=false"
            ) from error

    def identity(self) -> dict[str, Any]:
        """Which teacher this is: {"path": of the iteration's folder, "iteration", "sha256"}.

        The hash is over the index (.metadata: of every tensor its name, shape, type and place; and an id that torch
        draws at each save), and over name, size and the 4 KiB in the middle of each file of tensors. It tells a copy
        from another save without reading the weights; a change elsewhere in a file is not seen.
        """
        digest = hashlib.sha256((self.directory / ".metadata").read_bytes())
        for file in sorted(self.directory.glob("*.distcp")):
            size = file.stat().st_size
            digest.update(f"{file.name}\0{size}\0".encode())
            with file.open("rb") as content:
                content.seek(max(size - _SAMPLE, 0) // 2)
                digest.update(content.read(_SAMPLE))
        return {
            "path": str(self.directory.resolve()),
            "iteration": self.common.get("iteration"),
            "sha256": digest.hexdigest(),
        }

    def has(self, key: str) -> bool:
        """Whether there is a tensor of this name."""
        return key in _shapes(self.index)

    def metadata(self, dp_cp_group: dist.ProcessGroup) -> dict[str, Any]:
        """What `sharded_state_dict` has to know: how the checkpoint was saved, and who else holds the same share."""
        saved = dist_checkpointing.load_content_metadata(preloaded_state_dict=self.common)
        return {**(saved or {}), "dp_cp_group": dp_cp_group}


class _ReadOnEveryRank(TorchDistLoadShardedStrategy):
    """Reads this rank's part. Where that fails on any rank, none goes on to wait for what that one was to send."""

    def load(self, sharded_state_dict: dict[str, Any], checkpoint_dir: Path, *args: Any) -> dict[str, Any]:
        with on_every_rank(), plain_values(checkpoint_dir):
            read: dict[str, Any] = super().load(sharded_state_dict, checkpoint_dir, *args)
        return read


def check_whole(directory: Path, index: Metadata, whose: str) -> None:
    """See that every file of a torch_dist checkpoint is there and as long as its index says.

    Args:
        directory: of the iteration.
        index: its own.
        whose: "teacher" or "student".

    Raises:
        CheckpointError: a file missing or shorter than recorded.
    """
    sizes: dict[str, int] = {}
    for item in (index.storage_data or {}).values():
        sizes[item.relative_path] = max(sizes.get(item.relative_path, 0), item.offset + item.length)
    for name, size in sorted(sizes.items()):
        file = directory / name
        found = file.stat().st_size if file.is_file() else None
        if found is None or found < size:
            raise CheckpointError(
                f"the {whose}'s checkpoint is damaged: {file} should hold {size} bytes and "
                f"{'is missing' if found is None else f'holds {found}'}; copy or save it again"
            )


def _architecture(args: Namespace) -> dict[str, Any]:
    found = {name: getattr(args, name) for name in _ARCHITECTURE if hasattr(args, name)}
    without = {name for switch, names in _ONLY_WITH.items() if not found.get(switch) for name in names}
    positions = found.get("position_embedding_type")
    without.update(name for kind, names in _OF_POSITIONS.items() if kind != positions for name in names)
    if positions != "yarn" and not found.get("multi_latent_attention"):
        without.update(_YARN_WITHOUT_PREFIX)
    return {name: value for name, value in found.items() if name not in without}


def tensor_shapes(directory: Path) -> dict[str, tuple[int, ...]]:
    """The whole shape of each tensor in a torch_dist checkpoint, by its key: what its index says.

    Megatron's `load_tensors_metadata` makes an empty tensor of each with all properties in the index, of which torch
    2.15 has one more than its `torch.empty` takes.
    """
    return _shapes(read_index(directory))


def _shapes(index: Metadata) -> dict[str, tuple[int, ...]]:
    stored = index.state_dict_metadata
    return {key: tuple(item.size) for key, item in stored.items() if isinstance(item, TensorStorageMetadata)}


def _iteration_directory(load: Path, ckpt_step: int | None) -> Path:
    if (load / "metadata.json").is_file():
        return load
    if not load.is_dir():
        raise CheckpointError(f"expected the teacher's checkpoint in {load}, found no such folder; set teacher.load")
    tracker = load / "latest_checkpointed_iteration.txt"
    if not tracker.is_file() and (load / "config.json").is_file():
        raise CheckpointError(
            f"expected a torch_dist checkpoint of the teacher in {load}, found one of Hugging Face; convert it, for "
            "example with AutoBridge.import_ckpt of NeMo's Megatron Bridge, and set teacher.load to the result"
        )
    if ckpt_step is None:
        if not tracker.is_file():
            raise CheckpointError(
                f"expected {tracker.name} in {load}, found none: no checkpoint was finished there; set teacher.load to "
                "a folder that Megatron's --save wrote, or teacher.ckpt-step to an iteration"
            )
        step = tracker.read_text(errors="replace").strip()
    else:
        step = str(ckpt_step)
    if step != "release" and not step.isdigit():
        raise CheckpointError(
            f"expected an iteration or `release` in {tracker}, got {step!r}; write the iteration into it, or give "
            "teacher.ckpt-step"
        )
    directory = load / (step if step == "release" else f"iter_{int(step):07d}")
    if not directory.is_dir():
        raise CheckpointError(
            f"expected iteration {step} of the teacher in {directory}, found no such folder; give teacher.ckpt-step of "
            "one that is there"
        )
    return directory
