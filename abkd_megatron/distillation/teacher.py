"""The teacher: built in its own layout, loaded from its own checkpoint, then frozen."""

import copy
import filecmp
import hashlib
import logging
import random
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.models.gpt import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import ColumnParallelLinear, get_cuda_rng_tracker
from megatron.core.transformer import TransformerConfig
from megatron.training.models import GPTModelConfig
from megatron.training.vocab_utils import calculate_padded_vocab_size
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from abkd_megatron.distillation.head import OutputLayer
from abkd_megatron.distillation.lane import new_group
from abkd_megatron.distillation.layout import Place, TeacherLayout
from abkd_megatron.errors import CheckpointError, ConfigError, on_every_rank

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
    "softmax_type",
    "window_size",
    "window_attn_skip_freq",
    "normalization",
    "layernorm_epsilon",
    "layernorm_zero_centered_gamma",
    "qk_layernorm",
    "qk_l2_norm",
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
    "multi_latent_attention",
    "rotary_scaling_factor",
    "mscale",
    "mscale_all_dim",
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
    "multi_latent_attention": ("rotary_scaling_factor", "mscale", "mscale_all_dim"),
    "use_mup": tuple(name for name in _ARCHITECTURE if name.startswith("mup_")),
}


# Bytes of each of a checkpoint's files that tell it from another.
_SAMPLE = 4096


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
                f"the index of the teacher's checkpoint in {directory} cannot be read ({error}); copy or save it "
                "again, or read it with the torch that wrote it"
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
        found = tensor_shapes(self.directory)
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

    def load(self, wanted: dict[str, Any]) -> dict[str, Any]:
        """Read this rank's share of the weights that a sharded state dict asks for, from whatever layout they lie in.

        Raises:
            CheckpointError: on every rank, when something is missing or does not fit on any.

        Collectives: those of Megatron's distributed load, over the whole job; two all_gather_object.
        """
        with on_every_rank():
            self.check_tensors(wanted)
        with on_every_rank():
            try:
                loaded: dict[str, Any] = dist_checkpointing.load({"wanted": wanted}, str(self.directory))
            except Exception as error:
                raise CheckpointError(f"the teacher in {self.directory} cannot be loaded: {error}") from error
        return loaded.get("wanted") or {}  # a rank may want nothing

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
        return key in tensor_shapes(self.directory)

    def metadata(self, dp_cp_group: dist.ProcessGroup) -> dict[str, Any]:
        """What `sharded_state_dict` has to know: how the checkpoint was saved, and who else holds the same share."""
        saved = dist_checkpointing.load_content_metadata(preloaded_state_dict=self.common)
        return {**(saved or {}), "dp_cp_group": dp_cp_group}


@dataclass(frozen=True)
class Teacher:
    """This rank's share of a frozen teacher."""

    model: GPTModel
    """Its stage, in eval mode, without gradients. Its forward ends with hidden states where the head is apart."""
    layout: TeacherLayout
    pg_collection: ProcessGroupCollection
    """The teacher's own process groups."""
    head: Any
    """The output layer, sharded as the student's: a module on the student's last stage, elsewhere None."""

    @classmethod
    def of(cls, model: GPTModel, pg_collection: ProcessGroupCollection) -> "Teacher":
        """A teacher that lies as the student does, from a model that is built and loaded; it is frozen here.

        Args:
            model: this rank's stage.
            pg_collection: its process groups and the student's: `tp`, `pp`, `cp` and `dp` are used.

        Collectives: one all_gather_object.
        """
        layout = _layout(model.config, _places(pg_collection))
        if not layout.is_students:
            raise ConfigError(
                "the teacher has another tensor or pipeline parallelism than the student: build_teacher()"
            )
        _freeze(model)
        return cls(model, layout, pg_collection, model.output_layer if model.post_process else None)

    def output_layer(self, hidden_states: torch.Tensor) -> OutputLayer:
        """What the loss makes of the teacher's last hidden states."""
        assert self.head is not None
        tied = None
        if self.model.share_embeddings_and_output_weights:
            tied = self.model.shared_embedding_or_output_weight()
        return OutputLayer(hidden_states, self.head, tied, self.model._scale_logits)

    def parameters(self) -> Iterator[torch.nn.Parameter]:
        """All parameters on this rank."""
        yield from self.model.parameters()
        if self.head is not None and self.head is not getattr(self.model, "output_layer", None):
            yield from self.head.parameters()


def build_teacher(
    config: GPTModelConfig,
    checkpoint: TeacherCheckpoint,
    pg_collection: ProcessGroupCollection,
    *,
    sequence_parallel: bool | None = None,
    timeout: timedelta = timedelta(minutes=10),
) -> Teacher:
    """Build this rank's share of the teacher, load it and freeze it.

    The teacher is never a submodule of the student: it stays out of the student's state dict, optimizer, gradient
    buffers and parameter count. Random states are left as they were found, so a run with a teacher draws the same
    numbers as one without.

    Its tensor, pipeline and expert parallelism are the config's. Where they are the student's, so are its process
    groups. Where not, it gets groups of its own over the same ranks (see `TeacherLayout`), its body ends with the last
    norm, and its output layer is made apart, sharded as the student's, on the ranks that take the loss.

    Args:
        config: Megatron's model config, from the teacher's arguments; without virtual pipeline stages.
        checkpoint: opened and checked against those arguments.
        pg_collection: the process groups of the student: `tp`, `pp`, `cp`, `dp` and `dp_cp` are used, with experts
            `ep`, too.
        sequence_parallel: whether the student is; None for as the teacher is.
        timeout: of groups made here.

    Raises:
        CheckpointError: on every rank, when the checkpoint does not fit on any.
        ConfigError: on every rank, for a layout that cannot be had on these ranks, see `TeacherLayout`.

    Collectives: those of building a Megatron model and of a distributed load; a few all_gather_object.
    """
    transformer, places = config.transformer, _places(pg_collection)
    layout = _layout(transformer, places)
    students_scatter = transformer.sequence_parallel if sequence_parallel is None else sequence_parallel
    apart = not layout.is_students or students_scatter != transformer.sequence_parallel
    groups = _process_groups(config, layout, places, pg_collection, timeout)
    if apart:
        config = copy.copy(config)
        config.share_embeddings_and_output_weights = False  # the body needs no second copy of the embedding
    with random_states_kept():
        (model,) = config.get_builder_cls()(config).build_distributed_models(
            groups, wrap_with_ddp=False, mixed_precision_wrapper=None
        )
        head = getattr(model, "output_layer", None)
        if apart:
            head = _head_apart(config, students_scatter, pg_collection)
    if apart and model.post_process:
        model.post_process = False  # of the model, not of its decoder: the last norm stays
        del model.output_layer
    model.load_state_dict(checkpoint.load(model.sharded_state_dict(metadata=checkpoint.metadata(groups.dp_cp))))
    if apart:
        _load_head(head, checkpoint, pg_collection)
    for module in (model, head):
        if module is not None:
            _freeze(module.to(transformer.params_dtype))
    return Teacher(model, layout, groups, head)


def _process_groups(
    config: GPTModelConfig,
    layout: TeacherLayout,
    places: Sequence[Place],
    students: ProcessGroupCollection,
    timeout: timedelta,
) -> ProcessGroupCollection:
    """The teacher's process groups; the student's where they serve."""
    transformer = config.transformer
    groups = copy.copy(students)
    if not layout.is_students:
        shares: list[tuple[int, int]] = [(0, 0)] * len(places)
        dist.all_gather_object(shares, (layout.stage, layout.index))
        same = [rank for rank, share in enumerate(shares) if share == (layout.stage, layout.index)]
        copies = new_group(same, timeout)
        groups = ProcessGroupCollection(
            tp=new_group(layout.host, timeout),
            pp=new_group(layout.pipeline, timeout),
            cp=students.cp,
            dp=copies,
            dp_cp=copies,
            embd=None,
            pos_embd=None,
        )
    experts = transformer.expert_model_parallel_size
    tensor = transformer.expert_tensor_parallel_size or transformer.tensor_model_parallel_size
    if transformer.num_moe_experts and (experts, tensor) != (students.ep.size(), students.expt_tp.size()):
        # As Megatron lays them out: expert-tensor ranks side by side, then experts, within a pipeline stage.
        stage = sorted((p.dp, p.cp, p.tp, rank) for rank, p in enumerate(places) if p.pp == layout.place.pp)
        ranks = [rank for *_, rank in stage]
        check_experts(len(ranks), experts, tensor)
        me = ranks.index(dist.get_rank())
        block = me - me % (tensor * experts)
        both = ranks[block : block + tensor * experts]
        first = me - me % tensor
        groups.expt_tp = new_group(ranks[first : first + tensor], timeout)
        groups.ep = new_group(both[me % tensor :: tensor], timeout)
        groups.tp_ep = new_group(both, timeout)
        groups.expt_dp = groups.expt_dp_gtp_remat = new_group(
            ranks[me % (tensor * experts) :: tensor * experts], timeout
        )
    return groups


def check_experts(num_ranks: int, experts: int, tensor: int) -> None:
    """Refuse expert groups of the teacher that do not fit its ranks.

    Args:
        num_ranks: of one pipeline stage.
        experts: expert-model-parallel-size.
        tensor: expert-tensor-parallel-size.

    Raises:
        ConfigError: naming all three.
    """
    if num_ranks % (tensor * experts):
        raise ConfigError(
            f"teacher.expert-model-parallel-size {experts} x expert-tensor-parallel-size {tensor} does not divide "
            f"the {num_ranks} ranks of a pipeline stage; make one of them smaller"
        )


def _head_apart(
    config: GPTModelConfig, sequence_parallel: bool, students: ProcessGroupCollection
) -> ColumnParallelLinear | None:
    """The teacher's output layer in the student's layout, on the student's last stage."""
    if students.pp.rank() + 1 < students.pp.size():
        return None
    transformer = copy.copy(config.transformer)
    transformer.tensor_model_parallel_size = students.tp.size()
    transformer.sequence_parallel = sequence_parallel
    return ColumnParallelLinear(
        transformer.hidden_size,
        config.vocab_size,
        config=transformer,
        init_method=transformer.init_method,
        bias=False,
        gather_output=False,
        tp_group=students.tp,
    )


def _load_head(
    head: ColumnParallelLinear | None, checkpoint: TeacherCheckpoint, students: ProcessGroupCollection
) -> None:
    """Read the output layer's weight; that of a tied teacher is saved as its embedding's."""
    wanted = {}
    if head is not None:
        metadata = checkpoint.metadata(students.dp_cp)
        weight = head.sharded_state_dict("output_layer.", metadata=metadata)["output_layer.weight"]
        weight.allow_shape_mismatch = True  # as GPTModel marks it: the padding depends on the layout
        if not checkpoint.has("output_layer.weight"):
            weight.key = "embedding.word_embeddings.weight"
        wanted["weight"] = weight
    loaded = checkpoint.load(wanted)
    if head is not None:
        with torch.no_grad():
            head.weight.copy_(loaded["weight"])


def _places(pg_collection: ProcessGroupCollection) -> list[Place]:
    """Where every rank of the job is in the student's layout."""
    groups = (getattr(pg_collection, name) for name in ("pp", "dp", "cp", "tp"))
    places: list[Place] = [Place(0, 0, 0, 0)] * dist.get_world_size()
    dist.all_gather_object(places, Place(*(0 if group is None else group.rank() for group in groups)))
    return places


def _layout(config: TransformerConfig, places: Sequence[Place]) -> TeacherLayout:
    sizes = config.tensor_model_parallel_size, config.pipeline_model_parallel_size
    return TeacherLayout(places, dist.get_rank(), *sizes, has_experts=bool(config.num_moe_experts))


def _freeze(module: torch.nn.Module) -> None:
    module.requires_grad_(False)
    module.eval()


def _architecture(args: Namespace) -> dict[str, Any]:
    found = {name: getattr(args, name) for name in _ARCHITECTURE if hasattr(args, name)}
    without = {name for switch, names in _ONLY_WITH.items() if not found.get(switch) for name in names}
    return {name: value for name, value in found.items() if name not in without}


def tensor_shapes(directory: Path) -> dict[str, tuple[int, ...]]:
    """The whole shape of each tensor in a torch_dist checkpoint, by its key: what its index says.

    Megatron's `load_tensors_metadata` makes an empty tensor of each with all properties in the index, of which torch
    2.15 has one more than its `torch.empty` takes.
    """
    stored = FileSystemReader(directory).read_metadata().state_dict_metadata
    return {key: tuple(item.size) for key, item in stored.items() if isinstance(item, TensorStorageMetadata)}


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
def random_states_kept() -> Iterator[None]:
    """Run the block, and put every random state back: what is drawn in it, nobody outside sees."""
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
