"""Construction of the teacher: built in its own layout, loaded from its checkpoint, frozen."""

import copy
import random
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import ColumnParallelLinear, get_cuda_rng_tracker
from megatron.core.transformer import TransformerConfig

from abkd_megatron.config.model_config import ModelConfig
from abkd_megatron.errors import ConfigError, on_every_rank
from abkd_megatron.teacher.channel import new_group, new_group_of
from abkd_megatron.teacher.checkpoint import TeacherCheckpoint
from abkd_megatron.teacher.layout import RankCoords, TeacherLayout
from abkd_megatron.teacher.model import Model, check_gpt_source, pattern_of_model, read_gpt_checkpoint
from abkd_megatron.teacher.output_layer import OutputLayer


@dataclass(frozen=True)
class Teacher:
    """This rank's share of a frozen teacher."""

    model: Model
    """This rank's stage, in eval mode, without gradients. With a separate head its forward returns hidden states."""
    layout: TeacherLayout
    pg_collection: ProcessGroupCollection
    """The teacher's process groups."""
    head: Any
    """Output layer, sharded like the student's: a module on the student's last stage, elsewhere None."""
    stored: list[torch.Tensor] = field(default_factory=list)
    """On this device in place of its layers' weights, see `store_weights`."""
    vocab_size: int | None = None
    """True size of its own vocabulary; None if it is the student's."""

    @classmethod
    def of(cls, model: Model, pg_collection: ProcessGroupCollection) -> "Teacher":
        """Wrap and freeze a built and loaded model that has the student's layout.

        Args:
            model: this rank's stage.
            pg_collection: process groups of teacher and student: `tp`, `pp`, `cp` and `dp` are used.

        Raises:
            ConfigError: if its tensor or pipeline parallelism differs from the student's.

        Collectives: one all_gather_object.
        """
        layout = _layout(model.config, _gather_coords(pg_collection))
        if not layout.matches_student:
            raise ConfigError(
                "expected a teacher with the student's tensor and pipeline parallelism, got another; use build_teacher"
            )
        _freeze(model)
        return cls(model, layout, pg_collection, model.output_layer if model.post_process else None)

    def output_layer(self, hidden_states: torch.Tensor) -> OutputLayer:
        """Return the output layer applied to the teacher's last hidden states."""
        assert self.head is not None
        tied = None
        if self.model.share_embeddings_and_output_weights:
            tied = self.model.shared_embedding_or_output_weight()
        return OutputLayer(hidden_states, self.head, tied, self.model._scale_logits)

    def parameters(self) -> Iterator[torch.nn.Parameter]:
        """Iterate over all parameters on this rank."""
        yield from self.model.parameters()
        if self.head is not None and self.head is not getattr(self.model, "output_layer", None):
            yield from self.head.parameters()


def build_teacher(
    config: ModelConfig,
    checkpoint: TeacherCheckpoint,
    pg_collection: ProcessGroupCollection,
    *,
    sequence_parallel: bool | None = None,
    timeout: timedelta = timedelta(minutes=10),
    vocab_size: int | None = None,
) -> Teacher:
    """Build this rank's share of the teacher, load it and freeze it.

    The teacher is not a submodule of the student, so it is absent from the student's state dict, optimizer, gradient
    buffers and parameter count. Random states are restored, so a run with a teacher draws the same numbers as one
    without.

    If the teacher has the student's tensor, pipeline and expert parallelism, it uses the student's process groups.
    Otherwise it gets new groups over the same ranks (see `TeacherLayout`), its body ends with the final norm, and a
    separate output layer, sharded like the student's, is built on the ranks that compute the loss.

    Args:
        config: Megatron's model config, from the teacher's arguments; no virtual pipeline stages.
        checkpoint: opened and checked against those arguments.
        pg_collection: the student's process groups: `tp`, `pp`, `cp`, `dp` and `dp_cp` are used; with experts also
            `ep`.
        sequence_parallel: whether the student is sequence parallel; None if as the teacher.
        timeout: of groups created here.
        vocab_size: see `Teacher`.

    Raises:
        CheckpointError: on every rank, if the checkpoint does not match on any.
        ConfigError: on every rank, for a layout that these ranks do not allow, see `TeacherLayout`.

    Collectives: from building a Megatron model and a distributed load; a few all_gather_object.
    """
    transformer, all_coords = config.transformer, _gather_coords(pg_collection)
    layout = _layout(transformer, all_coords)
    student_sequence_parallel = transformer.sequence_parallel if sequence_parallel is None else sequence_parallel
    separate_head = not layout.matches_student or student_sequence_parallel != transformer.sequence_parallel
    groups = _process_groups(config, layout, all_coords, pg_collection, timeout)
    if separate_head:
        config = copy.copy(config)
        config.share_embeddings_and_output_weights = False  # avoids a second copy of the embedding
    with random_states_kept():
        (model,) = config.get_builder_cls()(config).build_distributed_models(
            groups, wrap_with_ddp=False, mixed_precision_wrapper=None
        )
        head = getattr(model, "output_layer", None)
        if separate_head:
            head = _build_separate_head(config, student_sequence_parallel, pg_collection)
    if separate_head and model.post_process:
        model.post_process = False  # of the model only: its decoder keeps the final norm
        del model.output_layer
    wanted = model.sharded_state_dict(metadata=checkpoint.metadata(groups.dp_cp))
    if (pattern := pattern_of_model(model)) is not None and not checkpoint.is_hybrid:
        with on_every_rank():
            check_gpt_source(pattern, "teacher")
            read_gpt_checkpoint(wanted, pattern)
    model.load_state_dict(checkpoint.load(wanted, groups.dp_cp))
    if separate_head:
        _load_head(head, checkpoint, pg_collection)
    for module in (model, head):
        if module is not None:
            _freeze(to_params_dtype(module, transformer.params_dtype))
    return Teacher(model, layout, groups, head, vocab_size=vocab_size)


def share_frozen_weights(teacher: torch.nn.Module, student: Sequence[torch.nn.Module]) -> tuple[int, int]:
    """Let a teacher read the student's weights where these are frozen and equal to its own, whose memory is freed.

    The base of a student with adapters is such a teacher. Call it once the student's frozen weights are loaded: what
    is written into them later, the teacher would read.

    Args:
        teacher: this rank's stage.
        student: this rank's chunks, unwrapped. A module that an adapter wraps is its child ``to_wrap``.

    Returns:
        Bytes of the teacher that are shared, and all its bytes, on this rank.
    """
    frozen = {
        name.replace(".to_wrap.", "."): parameter
        for chunk in student
        for name, parameter in chunk.named_parameters()
        if not parameter.requires_grad
    }
    shared = total = 0
    for name, own in teacher.named_parameters():
        total += own.nbytes
        theirs = frozen.get(name)
        if theirs is None or (theirs.shape, theirs.dtype, theirs.device) != (own.shape, own.dtype, own.device):
            continue
        if type(theirs) is type(own) and torch.equal(theirs, own):
            own.data = theirs.data
            shared += own.nbytes
    return shared, total


def to_params_dtype(module: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
    """Cast a loaded model as Megatron does for training: everything except the biases of MoE routers.

    Float16Module casts parameters and buffers. Routers then restore fp32 biases, because top-k routing depends on their
    last bits. Megatron loads weights after that; here they are already loaded, so the biases are copied back unrounded.

    Args:
        module: changed in place.
        dtype: Megatron's `params_dtype`.

    Returns:
        The same module.
    """
    routers: list[Any] = [router for router in module.modules() if hasattr(router, "_maintain_float32_expert_bias")]
    loaded = [dict(router.named_buffers(recurse=False)) for router in routers]
    module.to(dtype)
    for router, buffers in zip(routers, loaded, strict=True):
        router._maintain_float32_expert_bias()
        for name, before in buffers.items():
            if (buffer := getattr(router, name)) is not before and buffer.dtype == before.dtype:
                buffer.copy_(before)
    return module


def _process_groups(
    config: ModelConfig,
    layout: TeacherLayout,
    all_coords: Sequence[RankCoords],
    student_groups: ProcessGroupCollection,
    timeout: timedelta,
) -> ProcessGroupCollection:
    """Return the teacher's process groups, reusing the student's where they match."""
    transformer = config.transformer
    groups = copy.copy(student_groups)
    if not layout.matches_student:
        shares: list[tuple[int, int]] = [(0, 0)] * len(all_coords)
        dist.all_gather_object(shares, (layout.stage, layout.index))
        # In a large job these are few groups of many ranks, so their members are not exchanged as lists.
        same: dict[tuple[int, int], list[int]] = defaultdict(list)
        for rank, share in enumerate(shares):
            same[share].append(rank)
        copies = new_group_of(map(tuple, same.values()), same[layout.stage, layout.index], timeout)
        groups = ProcessGroupCollection(
            tp=new_group(layout.stage_group, timeout),
            pp=new_group(layout.pipeline, timeout),
            cp=student_groups.cp,
            dp=copies,
            dp_cp=copies,
            embd=None,
            pos_embd=None,
        )
    experts = transformer.expert_model_parallel_size
    tensor = transformer.expert_tensor_parallel_size or transformer.tensor_model_parallel_size
    if transformer.num_moe_experts and (experts, tensor) != (student_groups.ep.size(), student_groups.expt_tp.size()):
        # Megatron's order within a pipeline stage: expert-tensor ranks, then experts.
        stage = sorted((p.dp, p.cp, p.tp, rank) for rank, p in enumerate(all_coords) if p.pp == layout.coords.pp)
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
    """Reject expert groups of the teacher that do not fit its ranks.

    Args:
        num_ranks: of one pipeline stage.
        experts: expert-model-parallel-size.
        tensor: expert-tensor-parallel-size.

    Raises:
        ConfigError: with all three numbers.
    """
    if num_ranks % (tensor * experts):
        raise ConfigError(
            f"expected teacher.expert-model-parallel-size {experts} x expert-tensor-parallel-size {tensor} to divide "
            f"the {num_ranks} ranks of a pipeline stage; lower one of them"
        )


def _build_separate_head(
    config: ModelConfig, sequence_parallel: bool, student_groups: ProcessGroupCollection
) -> ColumnParallelLinear | None:
    """Build the teacher's output layer in the student's layout, on the student's last stage."""
    if student_groups.pp.rank() + 1 < student_groups.pp.size():
        return None
    transformer = copy.copy(config.transformer)
    transformer.tensor_model_parallel_size = student_groups.tp.size()
    transformer.sequence_parallel = sequence_parallel
    return ColumnParallelLinear(
        transformer.hidden_size,
        config.vocab_size,
        config=transformer,
        init_method=transformer.init_method,
        bias=False,
        gather_output=False,
        tp_group=student_groups.tp,
    )


def _load_head(
    head: ColumnParallelLinear | None, checkpoint: TeacherCheckpoint, student_groups: ProcessGroupCollection
) -> None:
    """Load the output layer's weight; for a tied teacher from its embedding."""
    wanted = {}
    if head is not None:
        metadata = checkpoint.metadata(student_groups.dp_cp)
        weight = head.sharded_state_dict("output_layer.", metadata=metadata)["output_layer.weight"]
        weight.allow_shape_mismatch = True  # as in Megatron's models: the padding depends on the layout
        if not checkpoint.has("output_layer.weight"):
            weight.key = "embedding.word_embeddings.weight"
        wanted["weight"] = weight
    loaded = checkpoint.load(wanted, student_groups.dp_cp)
    if head is not None:
        with torch.no_grad():
            head.weight.copy_(loaded["weight"])


def _gather_coords(pg_collection: ProcessGroupCollection) -> list[RankCoords]:
    """Gather the coordinates of every rank in the student's layout."""
    groups = (getattr(pg_collection, name) for name in ("pp", "dp", "cp", "tp"))
    all_coords: list[RankCoords] = [RankCoords(0, 0, 0, 0)] * dist.get_world_size()
    dist.all_gather_object(all_coords, RankCoords(*(0 if group is None else group.rank() for group in groups)))
    return all_coords


def _layout(config: TransformerConfig, all_coords: Sequence[RankCoords]) -> TeacherLayout:
    sizes = config.tensor_model_parallel_size, config.pipeline_model_parallel_size
    return TeacherLayout(all_coords, dist.get_rank(), *sizes, has_experts=bool(config.num_moe_experts))


def _freeze(module: torch.nn.Module) -> None:
    module.requires_grad_(False)
    module.eval()


@contextmanager
def random_states_kept() -> Iterator[None]:
    """Restore all random states after the block."""
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
