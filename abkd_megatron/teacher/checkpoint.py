"""Teacher checkpoint metadata and compatibility checks."""

import filecmp
import functools
import hashlib
import json
import logging
import math
import re
from argparse import Namespace
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.strategies.cached_metadata_filesystem_reader import CachedMetadataFileSystemReader
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelLoadStrategyWrapper
from megatron.core.dist_checkpointing.strategies.torch import TorchDistLoadShardedStrategy
from megatron.core.dist_checkpointing.validation import verify_integrity_manifest
from megatron.training.vocab_utils import calculate_padded_vocab_size
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from abkd_megatron.errors import CheckpointError, on_every_rank
from abkd_megatron.teacher.description import BEYOND_ARGUMENTS, Description, describe
from abkd_megatron.teacher.safe_load import plain_values, read_common, read_index

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
    "apply_residual_connection_post_layernorm",
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
    "moe_router_enable_expert_bias",
    "moe_apply_probs_on_input",
    "moe_expert_capacity_factor",
    "moe_token_drop_policy",
    "moe_mlp_glu_interleave_size",
    "moe_shared_expert_glu_interleave_size",
    "multi_latent_attention",
    "q_lora_rank",
    "kv_lora_rank",
    "qk_head_dim",
    "qk_pos_emb_head_dim",
    "v_head_dim",
    "rotary_scaling_factor",
    "mscale",
    "mscale_all_dim",
    "experimental_attention_variant",
    "linear_attention_freq",
    "linear_conv_kernel_dim",
    "linear_key_head_dim",
    "linear_value_head_dim",
    "linear_num_key_heads",
    "linear_num_value_heads",
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

_OF_LATENT_ATTENTION = ("q_lora_rank", "kv_lora_rank", "qk_head_dim", "qk_pos_emb_head_dim", "v_head_dim")
# Those of the above that mean nothing unless another one is on; Megatron may change them while it runs.
_ONLY_WITH = {
    "group_query_attention": ("num_query_groups",),
    "use_rope_scaling": ("rope_scaling_factor",),
    "num_experts": tuple(name for name in _ARCHITECTURE if name.startswith("moe_")),
    "moe_expert_capacity_factor": ("moe_token_drop_policy",),
    "multi_latent_attention": ("rope_type", *_OF_LATENT_ATTENTION),
    "experimental_attention_variant": tuple(name for name in _ARCHITECTURE if name.startswith(("dsa_", "linear_"))),
    "window_size": ("window_attn_skip_freq",),
    "use_mup": tuple(name for name in _ARCHITECTURE if name.startswith("mup_")),
}
# And those that only some position embeddings have; multi-latent attention has YaRN's under any name.
_OF_POSITIONS = {
    "yarn": tuple(name for name in _ARCHITECTURE if name.startswith("yarn_")),
    "mrope": ("mrope_section",),
}
_YARN_WITHOUT_PREFIX = ("rotary_scaling_factor", "mscale", "mscale_all_dim")

# Values that build the same model as None does.
_AS_NONE = {
    "rotary_seq_len_interpolation_factor": (1,),
    "moe_router_topk_scaling_factor": (1,),
    "moe_router_num_groups": (0, 1),
    "moe_router_group_topk": (0, 1),
    "rope_type": ("yarn",),
}

# Tensors with a row for each column of the padded vocabulary.
_OF_VOCABULARY = ("embedding.word_embeddings.weight", "output_layer.weight")
# How the names of the tensors begin that are on one rank together: numbered, or of all layers stacked in one.
_LAYER = re.compile(r"decoder\.layers\.(\d+\.)?|decoder\.final_layernorm\.")
# Where the size of a vocabulary counts rows, the share of them that may belong to no token. Of public models
# gpt-oss has 0.5 %, DeepSeek-V3 0.4 %, Qwen2.5 0.3 %, the larger Pythias 0.8 %.
_RESERVED_ROWS = 0.01

# The arguments by which Megatron pads a vocabulary.
_PADDED_BY = ("make_vocab_size_divisible_by", "tensor_model_parallel_size")

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
    inherited: Mapping[str, str] = field(default_factory=dict)
    """Architecture arguments that the configured teacher inherited from the student, by their names in Megatron's
    namespace, and as they were written, such as {"add_bias_linear": "disable-bias-linear=true"}; messages name them."""

    @classmethod
    def open(
        cls, load: str | Path, ckpt_step: int | None = None, inherited: Mapping[str, str] | None = None
    ) -> "TeacherCheckpoint":
        """Find the checkpoint and see that all of it is there, without reading a tensor.

        Args:
            load: what Megatron's --load takes (a folder with latest_checkpointed_iteration.txt), or one iteration.
            ckpt_step: the iteration to take instead of the latest.
            inherited: as the field.

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
        return cls(directory, read_common(directory, index), index, inherited or {})

    @functools.cached_property
    def described(self) -> Description | None:
        """What is saved with the weights about their model, see `describe`; None if there is nothing.

        Raises:
            CheckpointError: a file that describes it cannot be read.
        """
        return describe(self.directory, self.common.get("args"))

    def check_arguments(
        self,
        args: Namespace,
        vocab_size: int,
        shared_vocab: int | None = None,
        *,
        declared: bool = False,
        declared_vocab: int | None = None,
    ) -> str:
        """Reject a teacher that is not the configured one, or of which nothing is known.

        Compared are the arguments that leave every shape as it is, such as the rotary base, and the sizes, with what
        is saved with the weights: see `describe`. The rows of the embedding and of the output layer are compared with
        the vocabulary.

        Args:
            args: Megatron's arguments for the teacher, as configured.
            vocab_size: true size of the student's vocabulary, in tokens.
            shared_vocab: how many first ids are the same tokens to both, `Objective.shared_vocab`; None for all. It
                cannot be told from a checkpoint whether they are.
            declared: whether the user declares that the teacher is the configured one. It matters only where nothing
                is saved about it, or not enough.
            declared_vocab: the true size of the teacher's vocabulary, if the user declares it.

        Returns:
            What was compared with what, for a log.

        Raises:
            CheckpointError: another architecture or another vocabulary, or one smaller than what is shared; or nothing
                is known and nothing is declared.
        """
        described = self.described
        if not declared and (described is None or described.left_open(args)):
            got = "neither Megatron's arguments nor Megatron Bridge's run_config.yaml nor Hugging Face's config.json"
            if described is not None:
                got = f"{described.source} without {', '.join(map(_option, described.left_open(args)))}"
            raise CheckpointError(
                f"expected a description of the teacher in {self.directory}, got {got}. Rotary base, heads, norm "
                "epsilon, activation and tokenizer do not show in the weights, so wrong ones would load. Put the "
                "config.json of the model next to the weights; or check `teacher:` yourself and declare it with "
                "teacher.declared=true (and give teacher.expected-loss, which the first step is compared with)"
            )
        compared = "nothing: declared in the configuration"
        if described is not None:
            number, wrong = differences(described, args, self.inherited)
            if wrong:
                raise CheckpointError(
                    f"the teacher in {self.directory} is not the one configured; set under `teacher:` what differs "
                    "from the student:\n  " + "\n  ".join(wrong)
                )
            compared = f"{described.source}, {number} settings"
        if not getattr(args, "untie_embeddings_and_output_weights", True) and self.has("output_layer.weight"):
            raise CheckpointError(
                f"the teacher in {self.directory} has an output layer of its own, the configured one uses its "
                "embedding; set teacher.untie-embeddings-and-output-weights=true"
            )
        positions = getattr(args, "position_embedding_type", "learned_absolute")
        if positions != "learned_absolute" and self.has("embedding.position_embeddings.weight"):
            raise CheckpointError(
                f"the teacher in {self.directory} has learned positions, the configured one {positions}; set "
                "teacher.position-embedding-type=learned_absolute"
            )
        self._check_vocabulary(args, vocab_size, shared_vocab, declared_vocab)
        return compared

    def _check_vocabulary(
        self, args: Namespace, vocab_size: int, shared_vocab: int | None, declared_vocab: int | None
    ) -> None:
        remedy = (
            "teacher and student must share one tokenizer: train the student with the teacher's; if only the first N "
            "tokens are the same in both, give distillation.shared_vocab=N"
        )
        saved = self.described.args if self.described is not None else Namespace()
        is_exact = self.described is None or self.described.is_exact
        true_size = getattr(saved, "vocab_size", None)
        if self.described is None:
            true_size = declared_vocab
        shapes = _shapes(self.index)
        rows = {name: shapes[name][0] for name in _OF_VOCABULARY if name in shapes}
        fewest = min(rows.values(), default=None)
        if true_size is not None and fewest is not None and fewest < true_size:
            raise CheckpointError(
                f"the teacher in {self.directory} has weights of {fewest} tokens, and is said to have a vocabulary of "
                f"{true_size}; give teacher.load a checkpoint of that model"
            )
        if shared_vocab is not None:
            theirs = true_size or getattr(saved, "padded_vocab_size", None) or fewest
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
        reserved = max(int(vocab_size * (1 + _RESERVED_ROWS)), vocab_size)
        if true_size is not None:
            if not (vocab_size == true_size or (not is_exact and vocab_size < true_size <= reserved)):
                raise CheckpointError(
                    f"the teacher in {self.directory} has a vocabulary of {true_size} tokens, "
                    f"the student one of {vocab_size}; {remedy}"
                )
            if true_size != vocab_size:
                logger.warning(
                    "the teacher has rows for %d tokens, the student's tokenizer knows %d: the last %d are taken to "
                    "belong to no token, and left out",
                    true_size,
                    vocab_size,
                    true_size - vocab_size,
                )
            return
        if fewest is not None and fewest < vocab_size:
            raise CheckpointError(
                f"the teacher in {self.directory} has weights of {fewest} tokens, the student a vocabulary of "
                f"{vocab_size}; {remedy}"
            )
        # Megatron itself records only the padded size; what it was padded from can still be told apart.
        padded = getattr(saved, "padded_vocab_size", None)
        if padded is not None:
            expected = calculate_padded_vocab_size(
                vocab_size, saved.make_vocab_size_divisible_by, saved.tensor_model_parallel_size, logging_enabled=False
            )
            if padded != expected:
                raise CheckpointError(
                    f"the teacher in {self.directory} has {padded} padded vocabulary columns; the student's "
                    f"{vocab_size} tokens would have given {expected}; {remedy}"
                )
        elif rows:
            multiple, tensor = (getattr(args, name, 1) for name in _PADDED_BY)
            expected = calculate_padded_vocab_size(vocab_size, multiple, tensor, logging_enabled=False)
            if max(rows.values()) > max(expected, reserved):
                raise CheckpointError(
                    f"the teacher in {self.directory} has weights of {max(rows.values())} tokens, the student a "
                    f"vocabulary of {vocab_size}, padded to {expected}; if the rest is padding, give the true size of "
                    f"the teacher's vocabulary as teacher.vocab-size; otherwise {remedy}"
                )

    @property
    def tokenizer(self) -> str | None:
        """Where the teacher's tokenizer was when the weights were saved, or is now: beside them."""
        if (beside := self.directory / "tokenizer").is_dir():
            return str(beside)
        return getattr(self.described.args, "tokenizer_model", None) if self.described is not None else None

    def check_tokenizer(self, tokenizer_model: str | None) -> bool:
        """Reject a teacher that was trained on another tokenizer's tokens: two vocabularies may have the same size.

        Args:
            tokenizer_model: the student's, as Megatron's argument of that name.

        Returns:
            Whether they were compared: not where either is not a file or a folder here.

        Raises:
            CheckpointError: they differ.
        """
        theirs = self.tokenizer
        if theirs is None or tokenizer_model is None:
            return False
        files = [_tokenizer_file(Path(of)) for of in (theirs, tokenizer_model)]
        if files[0] is None or files[1] is None or (files[0].suffix == ".json") != (files[1].suffix == ".json"):
            return False
        if not _is_same_tokenizer(files[0], files[1]):
            raise CheckpointError(
                f"expected the tokenizer that the teacher was trained with, {theirs}, got another one, "
                f"{tokenizer_model}; train on data of the teacher's tokenizer, or give distillation.shared_vocab=N if "
                "the first N tokens are one"
            )
        return True

    def check_tensors(self, wanted: Mapping[str, Any]) -> None:
        """Reject a checkpoint that lacks a tensor of a sharded state dict, holds it in another shape, or holds more.

        More is a weight of a layer, of which the sharded state dict has others: a bias, say.

        Raises:
            CheckpointError: naming the first few tensors, with both shapes.
        """
        found, keys = _shapes(self.index), set()
        wrong = []
        for tensor in _tensors_in(wanted):
            if tensor.key not in found:
                wrong.append(f"{tensor.key}: missing")
                continue
            # The padded vocabulary follows the tensor-parallel size, so dimension 0 of an embedding may differ.
            first = 1 if tensor.allow_shape_mismatch else 0
            shape, saved = tuple(tensor.global_shape), found[tensor.key]
            if shape[first:] != saved[first:]:
                wrong.append(f"{tensor.key}: configured {shape}, saved {saved}")
            keys.add(tensor.key)
        # Of a layer that is loaded here, all has to be; experts may be on other ranks.
        here = {part[0] for key in keys if (part := _LAYER.match(key))}
        for key in found.keys() - keys:
            part = _LAYER.match(key)
            if part and part[0] in here and ".experts." not in key:
                wrong.append(f"{key}: saved {found[key]}, and the configured model has no such weight")
        if wrong:
            raise CheckpointError(
                f"the teacher in {self.directory} does not fit the configured one; correct `teacher:`\n  "
                + "\n  ".join(wrong[:5])
                + (f"\n  ... and {len(wrong) - 5} more" if len(wrong) > 5 else "")
                + self._hint()
            )

    def _hint(self) -> str:
        """What the configured teacher has from the student, for a message about tensors."""
        if not self.inherited:
            return ""
        named = ", ".join(sorted(self.inherited.values()))
        return f"\ninherited from the student, to be set under `teacher:` where the teacher has another: {named}"

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

        Collectives: one broadcast_object_list over the whole job; none where torch.distributed is not initialized.
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


def _tensors_in(wanted: Mapping[str, Any]) -> Iterator[ShardedTensor]:
    """The tensors of a sharded state dict, among them those into which a factory divides one, such as a gated MLP's."""
    for item in nested_values(wanted):
        if isinstance(item, ShardedTensorFactory):
            yield from _tensors_in({"": item.build()})
        elif isinstance(item, ShardedTensor):
            yield item


def _architecture(args: Namespace, seq_length: int | None) -> dict[str, Any]:
    """What of `args` has a meaning for sequences of a length."""
    found = {name: getattr(args, name) for name in _ARCHITECTURE if hasattr(args, name)}
    window = found.get("window_size")
    if window and (window[0] < 0 or (seq_length is not None and seq_length <= window[0] + 1)):
        found["window_size"] = None  # as wide as any sequence of this job
    if found.get("group_query_attention") and found.get("num_query_groups") == found.get("num_attention_heads"):
        found["group_query_attention"] = False
    without = {name for switch, names in _ONLY_WITH.items() if not found.get(switch) for name in names}
    positions = found.get("position_embedding_type")
    without.update(name for kind, names in _OF_POSITIONS.items() if kind != positions for name in names)
    if positions != "yarn" and not found.get("multi_latent_attention"):
        without.update(_YARN_WITHOUT_PREFIX)
    return {name: value for name, value in found.items() if name not in without}


def _is_same(name: str, theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> bool:
    """Whether both values of an argument make the same model."""
    values = []
    for of in (theirs, ours):
        value = of[name]
        value = list(value) if isinstance(value, tuple) else value
        if value in _AS_NONE.get(name, ()):
            value = None
        layers = of.get("num_layers")
        values.append(_by_layer(name, value, layers) if isinstance(layers, int) else value)
    a, b = values
    if all(isinstance(value, int | float) for value in values):
        return math.isclose(a, b, rel_tol=1e-9)
    return bool(a == b)


def _by_layer(name: str, value: Any, layers: int) -> Any:
    """A pattern of layers that Megatron's arguments may give as a period, written out as Megatron's layers read it."""
    if isinstance(value, list) and name == "no_rope_freq" and not any(value):
        return None
    if name == "window_attn_skip_freq" and value is None:
        return [1] * layers
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        return value
    if name == "moe_layer_freq":
        return [int(layer % value == 0) for layer in range(layers)]
    if name in ("linear_attention_freq", "window_attn_skip_freq"):
        return [int((layer + 1) % value != 0) for layer in range(layers)]
    if name == "no_rope_freq":
        return [int((layer + 1) % value == 0) for layer in range(layers)]
    return value


def _remedy(inherited: str, theirs: Any) -> str:
    """What to set in place of a setting of the student's, so that the teacher has its own."""
    option, _, written = inherited.partition("=")
    if isinstance(theirs, bool):
        value = {"true": "false", "false": "true"}.get(written, str(theirs).lower())  # the option may say the opposite
    elif isinstance(theirs, list | tuple):
        value = f"'{theirs}'".replace(" ", "")
    else:
        value = "null" if theirs is None else str(theirs)
    return f", inherited from the student; set teacher.{option}={value}"


def _option(name: str) -> str:
    return name.replace("_", "-")


def _tokenizer_file(path: Path) -> Path | None:
    """The file of a tokenizer's tokens: the path itself, or in Hugging Face's folder the first that is there."""
    candidates = [path] if not path.is_dir() else [path / "tokenizer.json", path / "tokenizer.model"]
    return next((file for file in candidates if file.is_file()), None)


def _is_same_tokenizer(one: Path, other: Path) -> bool:
    """Whether both files have the same tokens; of Hugging Face's the special ones are not looked at."""
    if one == other or filecmp.cmp(one, other, shallow=False):
        return True
    try:
        vocabularies = [json.loads(file.read_text(encoding="utf-8"))["model"]["vocab"] for file in (one, other)]
    except (ValueError, KeyError, TypeError):
        return False  # of another kind, and not the same file
    return bool(vocabularies[0] == vocabularies[1])


def differences(
    described: Description, args: Namespace, inherited: Mapping[str, str] | None = None
) -> tuple[int, list[str]]:
    """Compare a model as it is described with one as it is configured.

    Args:
        described: what is saved with the weights.
        args: Megatron's arguments, validated.
        inherited: as `TeacherCheckpoint.inherited`.

    Returns:
        How many settings both have, and in which they differ, in words.
    """
    theirs, ours = (_architecture(of, getattr(args, "seq_length", None)) for of in (described.args, args))
    both = [name for name in theirs if name in ours]
    wrong = []
    for name in both:
        if not _is_same(name, theirs, ours):
            remedy = _remedy(inherited[name], theirs[name]) if inherited and name in inherited else ""
            wrong.append(
                f"{_option(name)}: {described.source} has {theirs[name]}, the configuration {ours[name]}{remedy}"
            )
    beyond = {} if described.is_exact else {k: v for k, v in vars(described.args).items() if k in BEYOND_ARGUMENTS}
    wrong += [
        f"{_option(name)}: {described.source} has {value}, which no argument of Megatron's gives a GPT model"
        for name, value in beyond.items()
        if value not in BEYOND_ARGUMENTS[name]
    ]
    return len(both) + len(beyond), wrong


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
