"""Teacher checkpoint: files, metadata and loading."""

import functools
import hashlib
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
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from abkd_megatron.errors import CheckpointError, on_every_rank
from abkd_megatron.teacher.compatibility import check_vocabulary, differences, option_name, same_tokenizer
from abkd_megatron.teacher.description import Description, describe
from abkd_megatron.teacher.model import check_gpt_source
from abkd_megatron.teacher.safe_load import plain_values, read_common, read_index

# Tensors with one row per column of the padded vocabulary.
_OF_VOCABULARY = ("embedding.word_embeddings.weight", "output_layer.weight")
# Prefixes of tensors that are loaded on one rank together: one layer, or all layers stacked in one tensor.
_LAYER = re.compile(r"decoder\.layers\.(\d+\.)?|decoder\.final_(layer)?norm\.")
# Of a HybridModel only; a GPTModel has a final_layernorm.
_HYBRID_NORM = "decoder.final_norm."
# Parts of a GPTModel's layer, which are layers of their own in a HybridModel, perhaps on different stages.
_PARTS = (
    ("decoder.layers.self_attention.", "decoder.layers.input_layernorm."),
    ("decoder.layers.mlp.", "decoder.layers.pre_mlp_layernorm."),
)

# Bytes of each file that `TeacherCheckpoint.identity` hashes.
_SAMPLE = 4096


@dataclass(frozen=True)
class TeacherCheckpoint:
    """One iteration of a Megatron torch_dist checkpoint, and its description of the model."""

    directory: Path
    """The folder of the iteration itself."""
    common: Mapping[str, Any]
    """Megatron's common state, with its arguments as `args`."""
    index: Metadata
    """Name, shape and place in the files of every tensor."""
    inherited: Mapping[str, str] = field(default_factory=dict)
    """Architecture arguments that the configured teacher inherits from the student, for messages: {name in Megatron's
    namespace: the setting as written}, such as {"add_bias_linear": "disable-bias-linear=true"}."""

    @classmethod
    def open(
        cls, load: str | Path, ckpt_step: int | None = None, inherited: Mapping[str, str] | None = None
    ) -> "TeacherCheckpoint":
        """Find the checkpoint and check that its files are complete, without reading a tensor.

        Args:
            load: a folder as for Megatron's --load, with latest_checkpointed_iteration.txt, or the folder of one
                iteration.
            ckpt_step: the iteration to load instead of the latest.
            inherited: see the field.

        Raises:
            CheckpointError: no checkpoint, not in torch_dist format, a file is missing or shorter than recorded, or the
                model was quantized.
        """
        directory = _iteration_directory(Path(load), ckpt_step)
        if not dist_checkpointing.check_is_distributed_checkpoint(str(directory)):
            raise CheckpointError(
                f"expected a torch_dist checkpoint of the teacher in {directory}, found none; save it with "
                "--ckpt-format torch_dist, or convert it with Megatron's --ckpt-convert-format"
            )
        CachedMetadataFileSystemReader.clear_metadata_cache()  # it may hold an earlier checkpoint of this folder
        index = read_index(directory)
        check_whole(directory, index, "teacher")
        check_unquantized(directory, index, "teacher")
        return cls(directory, read_common(directory, index), index, inherited or {})

    @functools.cached_property
    def described(self) -> Description | None:
        """The saved description of the model, see `describe`; None if there is none.

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
        """Reject a teacher that differs from the configuration, or that has no description.

        The configured sizes and the arguments that do not show in any shape, such as the rotary base, are compared with
        the saved description (`describe`). The rows of the embedding and of the output layer are compared with the
        vocabulary.

        Args:
            args: Megatron's arguments for the teacher, as configured.
            vocab_size: true size of the student's vocabulary, in tokens.
            shared_vocab: number of first ids that are the same tokens in both vocabularies, `Objective.shared_vocab`;
                None for all. A checkpoint cannot show whether this is true.
            declared: whether the user declares that the teacher is the configured one. Used only if the description
                is missing or incomplete.
            declared_vocab: true size of the teacher's vocabulary, if the user declares it.

        Returns:
            Text for a log: the source of the description and the number of settings compared.

        Raises:
            CheckpointError: the architecture or the vocabulary differs, the vocabulary is smaller than the shared part,
                or there is neither a description nor a declaration.
        """
        pattern = getattr(args, "hybrid_layer_pattern", None)
        if pattern is None and self.is_hybrid:
            raise CheckpointError(
                f"the teacher in {self.directory} is a HybridModel, the configured one a GPTModel; set "
                "teacher.hybrid-layer-pattern, and remove teacher.num-layers"
            )
        if pattern is not None and not self.is_hybrid:
            check_gpt_source(pattern, "teacher")
        described = self.described
        if not declared and (described is None or described.left_open(args)):
            got = "neither Megatron's arguments nor Megatron Bridge's run_config.yaml nor Hugging Face's config.json"
            if described is not None:
                got = f"{described.source} without {', '.join(map(option_name, described.left_open(args)))}"
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
                f"the teacher in {self.directory} has an untied output layer, the configured one is tied to the "
                "embedding; set teacher.untie-embeddings-and-output-weights=true"
            )
        positions = getattr(args, "position_embedding_type", "learned_absolute")
        if positions != "learned_absolute" and self.has("embedding.position_embeddings.weight"):
            raise CheckpointError(
                f"the teacher in {self.directory} has learned positions, the configured one {positions}; set "
                "teacher.position-embedding-type=learned_absolute"
            )
        shapes = _shapes(self.index)
        rows = [shapes[name][0] for name in _OF_VOCABULARY if name in shapes]
        check_vocabulary(self.directory, described, rows, args, vocab_size, shared_vocab, declared_vocab)
        return compared

    @property
    def tokenizer(self) -> str | None:
        """Path of the teacher's tokenizer: in the checkpoint, or as it was when the weights were saved."""
        if (saved := self.directory / "tokenizer").is_dir():
            return str(saved)
        return getattr(self.described.args, "tokenizer_model", None) if self.described is not None else None

    def check_tokenizer(self, tokenizer_model: str | None) -> bool:
        """Reject a teacher that was trained with another tokenizer, whose vocabulary may have the same size.

        Args:
            tokenizer_model: the student's, as Megatron's argument of that name.

        Returns:
            Whether the tokenizers were compared; False if either is not a file or folder on this machine.

        Raises:
            CheckpointError: they differ.
        """
        same = same_tokenizer(self.tokenizer, tokenizer_model)
        if same is False:
            raise CheckpointError(
                f"expected the tokenizer that the teacher was trained with, {self.tokenizer}, got another one, "
                f"{tokenizer_model}; give distillation.cross_tokenizer and teacher.tokenizer-model, train on data of "
                "the teacher's tokenizer, or give distillation.shared_vocab=N if the first N tokens are the same"
            )
        return same is not None

    def check_tensors(self, wanted: Mapping[str, Any]) -> None:
        """Reject a checkpoint whose tensors are not those of a sharded state dict.

        A tensor may be missing or have another shape, or a layer may have a weight more, such as a bias.

        Args:
            wanted: this rank's sharded state dict.

        Raises:
            CheckpointError: with the names of the first few tensors and both shapes.
        """
        found, keys = _shapes(self.index), set()
        wrong = []
        for tensor in _tensors_in(wanted):
            if tensor.key not in found:
                wrong.append(f"{tensor.key}: missing")
                continue
            # Padding depends on the tensor-parallel size, so dimension 0 of an embedding may differ.
            first = 1 if tensor.allow_shape_mismatch else 0
            shape, saved = tuple(tensor.global_shape), found[tensor.key]
            if shape[first:] != saved[first:]:
                wrong.append(f"{tensor.key}: configured {shape}, saved {saved}")
            keys.add(tensor.key)
        # A layer is loaded as a whole, except for experts, which may be on other ranks.
        here = {part[0] for key in keys if (part := _LAYER.match(key))}
        elsewhere = tuple(name for part in _PARTS if not any(it.startswith(part) for it in keys) for name in part)
        for key in found.keys() - keys:
            part = _LAYER.match(key)
            if part and part[0] in here and ".experts." not in key and not key.startswith(elsewhere):
                wrong.append(f"{key}: saved {found[key]}, and the configured model has no such weight")
        if wrong:
            raise CheckpointError(
                f"the teacher in {self.directory} does not fit the configured one; correct `teacher:`\n  "
                + "\n  ".join(wrong[:5])
                + (f"\n  ... and {len(wrong) - 5} more" if len(wrong) > 5 else "")
                + self._hint()
            )

    def _hint(self) -> str:
        """Return the settings that the configured teacher inherits from the student, for a message about tensors."""
        if not self.inherited:
            return ""
        named = ", ".join(sorted(self.inherited.values()))
        return f"\ninherited from the student, to be set under `teacher:` where the teacher differs: {named}"

    def load(self, wanted: dict[str, Any], replicas: dist.ProcessGroup) -> dict[str, Any]:
        """Load the weights of a sharded state dict, whatever parallel layout they were saved in.

        Ranks that want the same weights read one part each and send it to the others.

        Args:
            wanted: this rank's sharded state dict; may be empty.
            replicas: the ranks that want the same weights, or some of them (experts). The groups of all ranks have one
                size: Megatron's data- and context-parallel group.

        Returns:
            `wanted` with its tensors loaded.

        Raises:
            CheckpointError: on every rank, if a tensor is missing or does not fit on any rank.

        Collectives: three or four all_gather_object over the whole job, one over `replicas`, and one broadcast in
            `replicas` per tensor that more than one rank wants.
        """
        with on_every_rank():
            self.check_tensors(wanted)
        strategy = FullyParallelLoadStrategyWrapper(_ReadOnEveryRank(cache_metadata=True), replicas)
        with on_every_rank(), plain_values(self.directory):
            # Megatron's validation would gather the names of all tensors, and raise on rank 0 only.
            loaded: dict[str, Any] = dist_checkpointing.load(
                {"wanted": wanted}, str(self.directory), strategy, validate_access_integrity=False
            )
        return loaded.get("wanted") or {}  # a rank may want nothing

    def verify(self) -> None:
        """Compare every file with its SHA-256, which Megatron's --verify-integrity wrote when the checkpoint was saved.

        Rank 0 reads the whole checkpoint. The hashes detect damage, not an attacker, who can write new hashes.

        Raises:
            CheckpointError: on every rank, if there are no hashes or one differs.

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
        """Return what identifies this teacher: {"path": the iteration's folder, "iteration", "sha256"}.

        The hash covers the index (.metadata: name, shape, type and place of every tensor, and an id that torch draws at
        each save), and the name, size and middle 4 KiB of each file of tensors. Copies have the same hash, another save
        has a different one. The weights are not read, so a change elsewhere in a file does not change the hash.
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

    @property
    def is_hybrid(self) -> bool:
        """Whether the tensors are a HybridModel's."""
        return any(key.startswith(_HYBRID_NORM) for key in _shapes(self.index))

    def has(self, key: str) -> bool:
        """Return whether there is a tensor of this name."""
        return key in _shapes(self.index)

    def metadata(self, dp_cp_group: dist.ProcessGroup) -> dict[str, Any]:
        """Return the metadata for Megatron's `sharded_state_dict`: how the checkpoint was saved, and the replicas."""
        saved = dist_checkpointing.load_content_metadata(preloaded_state_dict=self.common)
        return {**(saved or {}), "dp_cp_group": dp_cp_group}


class _ReadOnEveryRank(TorchDistLoadShardedStrategy):
    """Read this rank's part; if that fails on one rank, raise on all, which would wait for its tensors."""

    def load(self, sharded_state_dict: dict[str, Any], checkpoint_dir: Path, *args: Any) -> dict[str, Any]:
        with on_every_rank(), plain_values(checkpoint_dir):
            read: dict[str, Any] = super().load(sharded_state_dict, checkpoint_dir, *args)
        return read


def check_whole(directory: Path, index: Metadata, whose: str) -> None:
    """Check that every file of a torch_dist checkpoint exists and has the length recorded in the index.

    Args:
        directory: of the iteration.
        index: of this checkpoint.
        whose: "teacher" or "student".

    Raises:
        CheckpointError: a file is missing or too short.
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


def check_unquantized(directory: Path, index: Metadata, whose: str) -> None:
    """Reject the checkpoint of a model that ModelOpt has quantized: our models would read it without its quantizers.

    Args:
        directory: of the iteration.
        index: of this checkpoint.
        whose: "teacher" or "student".

    Raises:
        CheckpointError: the checkpoint has quantizers.
    """
    found = [name for name in index.state_dict_metadata if "_quantizer." in name]
    state = directory / "modelopt_state"
    if not found and state.is_dir():  # scales that are computed anew in every pass are not in the checkpoint
        modes = read_common(state, read_index(state)).get("modelopt_state_dict", ())
        found = [f"mode {mode}" for mode, _ in modes if "quantize" in mode]
    if found:
        raise CheckpointError(
            f"expected a {whose} without quantizers of ModelOpt in {directory}, got {found[0]}; give the checkpoint of "
            "the model before it was quantized, or train a quantized student in a custom loop (docs/training.md)"
        )


def _tensors_in(wanted: Mapping[str, Any]) -> Iterator[ShardedTensor]:
    """Yield the tensors of a sharded state dict, including the parts that a factory makes, as for a gated MLP."""
    for item in nested_values(wanted):
        if isinstance(item, ShardedTensorFactory):
            yield from _tensors_in({"": item.build()})
        elif isinstance(item, ShardedTensor):
            yield item


def tensor_shapes(directory: Path) -> dict[str, tuple[int, ...]]:
    """Return {name: global shape} of the tensors in a torch_dist checkpoint, from its index.

    Megatron's `load_tensors_metadata` fails with torch 2.15: it passes all properties in the index to `torch.empty`,
    which does not take one of them.
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
