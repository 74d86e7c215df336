"""The teacher: built in its own layout, loaded from its own checkpoint, then frozen."""

import copy
import random
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import ColumnParallelLinear, get_cuda_rng_tracker
from megatron.core.transformer import TransformerConfig
from megatron.training.models import GPTModelConfig

from abkd_megatron.errors import ConfigError
from abkd_megatron.teacher.channel import new_group, new_group_of
from abkd_megatron.teacher.checkpoint import TeacherCheckpoint
from abkd_megatron.teacher.layout import RankCoords, TeacherLayout
from abkd_megatron.teacher.output_layer import OutputLayer


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
    wanted = model.sharded_state_dict(metadata=checkpoint.metadata(groups.dp_cp))
    model.load_state_dict(checkpoint.load(wanted, groups.dp_cp))
    if apart:
        _load_head(head, checkpoint, pg_collection)
    for module in (model, head):
        if module is not None:
            _freeze(to_params_dtype(module, transformer.params_dtype))
    return Teacher(model, layout, groups, head)


def to_params_dtype(module: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
    """Cast a loaded model as Megatron casts one for training: all of it but the biases of MoE routers.

    Float16Module casts parameters and buffers. Routers then make their biases fp32 again, since top-k routing depends
    on their last bits. Megatron loads them after that; here they are loaded already and keep every bit.

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
    config: GPTModelConfig,
    layout: TeacherLayout,
    places: Sequence[RankCoords],
    students: ProcessGroupCollection,
    timeout: timedelta,
) -> ProcessGroupCollection:
    """The teacher's process groups; the student's where they serve."""
    transformer = config.transformer
    groups = copy.copy(students)
    if not layout.is_students:
        shares: list[tuple[int, int]] = [(0, 0)] * len(places)
        dist.all_gather_object(shares, (layout.stage, layout.index))
        # Of a large job they are many ranks in few groups: who is in one is not told again, by each to each.
        same: dict[tuple[int, int], list[int]] = defaultdict(list)
        for rank, share in enumerate(shares):
            same[share].append(rank)
        copies = new_group_of(map(tuple, same.values()), same[layout.stage, layout.index], timeout)
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
    loaded = checkpoint.load(wanted, students.dp_cp)
    if head is not None:
        with torch.no_grad():
            head.weight.copy_(loaded["weight"])


def _places(pg_collection: ProcessGroupCollection) -> list[RankCoords]:
    """Where every rank of the job is in the student's layout."""
    groups = (getattr(pg_collection, name) for name in ("pp", "dp", "cp", "tp"))
    places: list[RankCoords] = [RankCoords(0, 0, 0, 0)] * dist.get_world_size()
    dist.all_gather_object(places, RankCoords(*(0 if group is None else group.rank() for group in groups)))
    return places


def _layout(config: TransformerConfig, places: Sequence[RankCoords]) -> TeacherLayout:
    sizes = config.tensor_model_parallel_size, config.pipeline_model_parallel_size
    return TeacherLayout(places, dist.get_rank(), *sizes, has_experts=bool(config.num_moe_experts))


def _freeze(module: torch.nn.Module) -> None:
    module.requires_grad_(False)
    module.eval()


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
