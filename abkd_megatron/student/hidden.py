"""Losses between layers of the student and of the teacher: checks, gradients, and sums to log.

Legend: s sequence, b micro-batch, H hidden size.
"""

import inspect
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.utils import make_viewless_tensor
from torch import Tensor

from abkd_megatron.errors import ConfigError
from abkd_megatron.losses.hidden import HiddenLoss
from abkd_megatron.student.added import add_loss, check_scaling
from abkd_megatron.student.projectors import PROJECTORS, check_projector, layer_numbers
from abkd_megatron.teacher.build import Teacher
from abkd_megatron.teacher.channel import Channel, new_group
from abkd_megatron.teacher.model import Model
from abkd_megatron.tensors import Function, check_context, check_tensor, constant


@dataclass(frozen=True)
class Layers:
    """The layers of one pipeline stage; numbers are counted over the whole model from 1."""

    stage: int
    student: tuple[int, ...]
    teacher: tuple[int, ...]


def layers_of_stages(
    chunks: Sequence[Model], teacher: Teacher, pg_collection: ProcessGroupCollection
) -> dict[int, Layers]:
    """Return {pipeline stage: its layers} of student and teacher; virtual stages are merged.

    Collectives: one all_gather_object over the job.
    """
    student = tuple(number for chunk in chunks for number in layer_numbers(chunk))
    found: list[Layers | None] = [None] * dist.get_world_size()
    dist.all_gather_object(found, Layers(pg_collection.pp.rank(), student, tuple(layer_numbers(teacher.model))))
    return {layers.stage: layers for layers in found if layers is not None}


def check_layers(
    losses: Sequence[HiddenLoss], stages: Mapping[int, Layers], *, same_layout: bool, sizes: tuple[int, int]
) -> None:
    """Reject hidden losses between layers that do not exist or are not on one rank.

    Args:
        losses: to check.
        stages: the layers of every pipeline stage; used if `same_layout`.
        same_layout: whether the teacher has the student's parallel layout, including sequence parallelism.
        sizes: hidden sizes of the student and of the teacher.

    Raises:
        ConfigError: see `check_pairs`.
    """
    if not losses:
        return
    ours, theirs = sizes
    if not same_layout:
        raise ConfigError(
            "hidden losses compare layers on one rank, so the teacher must have the student's layout; remove its "
            "tensor-model-parallel-size, pipeline-model-parallel-size and sequence-parallel from `teacher:`"
        )
    for loss in losses:
        for who, layer in (("student", loss.student_layer), ("teacher", loss.teacher_layer)):
            known = sorted({number for of in stages.values() for number in getattr(of, who)})
            if layer not in known:
                raise ConfigError(f"{loss.name}: expected a layer of the {who}, 1 to {known[-1]}, got {layer}")
        (at,) = [stage for stage, of in stages.items() if loss.student_layer in of.student]
        (other,) = [stage for stage, of in stages.items() if loss.teacher_layer in of.teacher]
        if at != other:
            near = ", ".join(map(str, stages[at].teacher)) or "none"
            raise ConfigError(
                f"{loss.name}: expected two layers of one pipeline stage, got the student's {loss.student_layer} on "
                f"stage {at} and the teacher's {loss.teacher_layer} on stage {other}; give one of the teacher's layers "
                f"on stage {at} ({near}), or another student layer"
            )
        if not loss.projector and ours != theirs:
            raise ConfigError(
                f"{loss.name}: projector: false takes equal hidden sizes, got {ours} of the student and {theirs} of "
                "the teacher; give projector: true"
            )


def check_pairs(
    chunks: Sequence[Model], teacher: Teacher, losses: Sequence[HiddenLoss], stages: Mapping[int, Layers]
) -> None:
    """Reject hidden losses that cannot be trained.

    Args:
        chunks: this rank's model chunks.
        teacher: this rank's stage.
        losses: all hidden losses of the objective.
        stages: as `layers_of_stages` returns them.

    Raises:
        ConfigError: for a teacher in another parallel layout, a layer that does not exist, two layers of different
            stages, hidden sizes that differ without a projector, projectors that were not added, or an unknown number
            of micro-batches.
    """
    config, theirs = chunks[0].config, teacher.model.config
    same_layout = teacher.layout.matches_student and theirs.sequence_parallel == config.sequence_parallel
    check_layers(losses, stages, same_layout=same_layout, sizes=(config.hidden_size, theirs.hidden_size))
    for loss in losses:
        chunk = _chunk_of(chunks, loss)
        if loss.projector and chunk is not None:
            check_projector(chunk, loss, theirs.hidden_size)
    check_scaling(config, "hidden losses")


def _layer(model: Model, number: int) -> torch.nn.Module:
    (found,) = [layer for layer in model.decoder.layers if layer.layer_number == number]
    assert isinstance(found, torch.nn.Module)
    return found


def _chunk_of(chunks: Sequence[Model], loss: HiddenLoss) -> Model | None:
    return next((chunk for chunk in chunks if loss.student_layer in layer_numbers(chunk)), None)


def _hidden_states_of(output: tuple[Tensor, Any] | Tensor) -> Tensor:
    """Return a layer's hidden states, [s, b, H]. A Mamba layer returns a tensor, other layers a tuple."""
    return output if isinstance(output, Tensor) else output[0]


def hidden_distance(kind: str, student: Tensor, teacher: Tensor) -> Tensor:
    """Compute the loss per token, [..., H] and [..., H] -> [...], in fp32 at least; see `HiddenLoss`.

    Differentiable in `student`. Saves both tensors in their own dtypes and computes in fp32 again in backward, so
    micro-batches in flight hold no fp32 copies. A token whose loss has a gradient of 0 gets a gradient of exactly 0,
    even if its hidden state is NaN or infinite.
    """
    check_context("hidden_distance")
    check_tensor("the student's hidden states", student)
    check_tensor("the teacher's hidden states", teacher, like=student)
    distance: Tensor = _Distance.apply(student, constant(teacher), kind)
    return distance


def _distance(kind: str, student: Tensor, teacher: Tensor) -> Tensor:
    dtype = torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)
    student, teacher = student.to(dtype), teacher.to(dtype)
    if kind == "mse":
        return (student - teacher).square().mean(-1)
    return 1 - torch.nn.functional.cosine_similarity(student, teacher, dim=-1)


class _Distance(Function):
    title = "a loss between layers"

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, kind: str) -> Tensor:
        ctx.save_for_backward(student, teacher)
        ctx.kind = kind
        return _distance(kind, student, teacher)

    @staticmethod
    def backward(ctx: Any, of_distance: Tensor) -> tuple[Tensor, None, None]:
        student, teacher = ctx.saved_tensors
        with torch.enable_grad():
            leaf = student.detach().requires_grad_()
            distance = _distance(ctx.kind, leaf, teacher)
        (gradient,) = torch.autograd.grad(distance, leaf, of_distance)
        return gradient.masked_fill_((of_distance == 0).unsqueeze(-1), 0.0), None, None


@dataclass(frozen=True)
class _Tokens:
    """The loss mask of a micro-batch."""

    mask: Tensor
    """[s, b] fp32, this rank's part of the sequence."""
    count: Tensor
    """[] int, the number of unmasked tokens on this context-parallel rank, as Megatron counts them."""


@dataclass
class _Pair:
    """One hidden loss on a rank with its two layers."""

    loss: HiddenLoss
    waiting: deque[Tensor] = field(default_factory=deque)
    """The teacher's hidden states, [s, b, H], of micro-batches that the student's layer has yet to run."""
    again: deque[tuple[Tensor, _Tokens]] = field(default_factory=deque)
    """The same of micro-batches whose layer runs again in backward, with full recomputation."""


@dataclass
class _Chunk:
    """A model chunk with student layers of some pairs."""

    model: Model
    pairs: list[_Pair]
    tokens: _Tokens | None = None
    """Set while the chunk runs forward and a loss is wanted, else None."""
    differentiated: bool = False
    sums: dict[str, Tensor] = field(default_factory=dict)
    """{name of a loss: sum over tokens} of the running micro-batch."""
    done: deque[dict[str, Tensor]] = field(default_factory=deque)
    """The same of micro-batches that later chunks of this rank have yet to run."""


class HiddenLosses:
    """Hooks that compute the hidden losses where their layers run and send their sums to the last pipeline stage.

    A hook on the teacher's layer queues its output until the hook on the student's layer runs the same micro-batch.
    That hook adds the loss's gradient to the student's, scaled as Megatron scales the main loss. For logging, every
    stage sends one message per micro-batch to the last stage, with one number per pair. The sender does not wait.

    Args:
        chunks: this rank's model chunks.
        teacher: this rank's stage.
        losses: all hidden losses of the objective, checked by `check_pairs`.
        stages: as `layers_of_stages` returns them.
        tp_group: the student's tensor-parallel group.
        logits_are_wanted: returns whether a forward pass with these arguments is neither training nor validation.
        timeout: for messages.

    Attributes:
        report: {name: (weight, sum over unmasked tokens of the last micro-batch)} on the last stage, else None.
        max_queued_microbatches: largest number of micro-batches that were queued at one time for any pair.

    Collectives: construction creates one group per pipeline and sends one number from each stage. Per micro-batch: with
    sequence parallelism an all-reduce of the sums over `tp_group`; the messages.
    """

    def __init__(
        self,
        chunks: Sequence[Model],
        teacher: Teacher,
        losses: Sequence[HiddenLoss],
        stages: Mapping[int, Layers],
        tp_group: dist.ProcessGroup,
        logits_are_wanted: Callable[[dict[str, Any]], bool],
        timeout: timedelta,
    ) -> None:
        self.report: dict[str, tuple[float, Tensor]] | None = None
        self.max_queued_microbatches = 0
        self._losses, self._config, self._tp_group = losses, chunks[0].config, tp_group
        self._signature, self._logits_are_wanted = inspect.signature(chunks[0].forward), logits_are_wanted
        self._device = next(parameter.device for model in (*chunks, teacher.model) for parameter in model.parameters())
        self._hooks: list[Any] = []
        self._all_chunks = list(chunks)
        self._chunks: list[_Chunk] = []
        for chunk in chunks:
            pairs = [_Pair(loss) for loss in losses if loss.student_layer in layer_numbers(chunk)]
            if pairs:
                self._watch(_Chunk(chunk, pairs), teacher)

        names = {stage: [x.name for x in losses if x.student_layer in of.student] for stage, of in stages.items()}
        self._stage, self._last, pipeline = teacher.layout.coords.pp, max(stages), teacher.layout.pipeline
        self._last_rank = pipeline[-1]
        # (rank, names of the losses it sends) of the earlier stages, in order.
        self._sources = [(pipeline[at], names[at]) for at in sorted(stages) if at < self._last and names[at]]
        group = new_group(pipeline if self._sources else (), timeout)
        # A few numbers per micro-batch do not block on the receiver, so they need not wait for Megatron's send.
        links = [(rank, self._last_rank) for rank, _ in self._sources]
        self._channel = Channel(group, links, self._device, 64) if group is not None else None
        if self._stage == self._last:
            # Registered after the hooks above, so it runs when this stage's pairs are done.
            self._hooks.append(chunks[-1].register_forward_hook(self._collect, with_kwargs=True))

    @property
    def stages_with_mask(self) -> set[int | None]:
        """Virtual stages of this rank (None without virtual stages) that need the loss mask."""
        return {chunk.model.vp_stage for chunk in self._chunks}

    @property
    def num_in_flight(self) -> int:
        """Number of messages sent and not yet completed."""
        return self._channel.num_in_flight if self._channel is not None else 0

    def drain(self) -> None:
        """Wait until every message has been sent. Only between steps."""
        if self._channel is not None:
            self._channel.drain()

    @contextmanager
    def untouched(self) -> Iterator[None]:
        """Forget outputs of the teacher's layers in this block."""
        pairs = [pair for chunk in self._chunks for pair in chunk.pairs]
        before = [pair.waiting.copy() for pair in pairs]
        try:
            yield
        finally:
            for pair, waiting in zip(pairs, before, strict=True):
                pair.waiting = waiting

    def remove(self) -> None:
        """Remove all hooks and the projectors. Only between steps."""
        for hook in self._hooks:
            hook.remove()
        self.drain()
        for chunk in self._all_chunks:
            if hasattr(chunk, PROJECTORS):
                delattr(chunk, PROJECTORS)
        self._chunks.clear()

    def _watch(self, chunk: _Chunk, teacher: Teacher) -> None:
        self._chunks.append(chunk)
        before = partial(self._before, chunk)
        self._hooks.append(chunk.model.register_forward_pre_hook(before, with_kwargs=True))
        for pair in chunk.pairs:
            theirs, ours = _layer(teacher.model, pair.loss.teacher_layer), _layer(chunk.model, pair.loss.student_layer)
            self._hooks.append(theirs.register_forward_hook(partial(self._keep, pair)))
            self._hooks.append(ours.register_forward_hook(partial(self._compare, chunk, pair)))
        self._hooks.append(chunk.model.register_forward_hook(partial(self._after, chunk)))

    def _keep(self, pair: _Pair, layer: torch.nn.Module, args: tuple, output: tuple[Tensor, Any] | Tensor) -> None:
        pair.waiting.append(_hidden_states_of(output))
        self.max_queued_microbatches = max(self.max_queued_microbatches, len(pair.waiting))

    def _before(self, chunk: _Chunk, model: Model, args: tuple, kwargs: dict[str, Any]) -> None:
        batch = self._signature.bind_partial(*args, **kwargs).arguments
        if self._logits_are_wanted(batch):
            return
        mask = batch.get("loss_mask")
        if mask is None:
            raise ConfigError(
                f"{chunk.pairs[0].loss.name} on pipeline stage {self._stage}: expected the loss mask of the "
                "micro-batch, got none; pass loss_mask= to the model on every stage that has one of the pairs"
            )
        mask = mask.float()
        count, mask = mask.sum().to(torch.int), mask.transpose(0, 1)
        if self._config.sequence_parallel:
            mask = mask.chunk(self._tp_group.size())[self._tp_group.rank()]
        chunk.tokens, chunk.differentiated = _Tokens(mask, count), torch.is_grad_enabled()

    def _compare(
        self, chunk: _Chunk, pair: _Pair, layer: torch.nn.Module, args: tuple, output: tuple[Tensor, Any] | Tensor
    ) -> tuple[Tensor, Any] | Tensor | None:
        hidden_states = _hidden_states_of(output)
        if chunk.tokens is not None:
            tokens, theirs = chunk.tokens, pair.waiting.popleft()
            loss = self._sum(chunk, pair, hidden_states, theirs, tokens)
            chunk.sums[pair.loss.name] = loss.detach()
            if chunk.differentiated and not torch.is_grad_enabled():
                # In a checkpointed block. Backward runs this layer again, in the order of the micro-batches.
                pair.again.append((theirs, tokens))
        elif torch.is_grad_enabled() and pair.again:
            theirs, tokens = pair.again.popleft()
            loss = self._sum(chunk, pair, hidden_states, theirs, tokens)
        else:
            return None
        if not torch.is_grad_enabled():
            return None
        added = add_loss(hidden_states, pair.loss.weight * loss, self._config, tokens.count)
        # Megatron frees the output of a stage after sending it, which must not be a view.
        added = make_viewless_tensor(added, requires_grad=True, keep_graph=True)
        return added if isinstance(output, Tensor) else (added, *output[1:])

    def _sum(self, chunk: _Chunk, pair: _Pair, hidden_states: Tensor, theirs: Tensor, tokens: _Tokens) -> Tensor:
        """Sum the loss over this rank's unmasked tokens. A masked token adds nothing, even if it is NaN or infinite."""
        if pair.loss.projector:
            hidden_states = getattr(chunk.model, PROJECTORS).project(pair.loss.pair, hidden_states)
        of_token = hidden_distance(pair.loss.loss, hidden_states, theirs)
        return torch.where(tokens.mask == 0, 0.0, of_token * tokens.mask).sum()

    def _after(self, chunk: _Chunk, model: Model, args: tuple, output: Any) -> None:
        if chunk.tokens is None:
            return
        chunk.tokens = None
        names = [pair.loss.name for pair in chunk.pairs]
        sums = torch.stack([chunk.sums.pop(name) for name in names])
        if self._config.sequence_parallel:
            dist.all_reduce(sums, group=self._tp_group)
        chunk.done.append(dict(zip(names, sums, strict=True)))
        if chunk is self._chunks[-1] and self._stage != self._last:
            assert self._channel is not None
            found = self._own()
            here = next(names for rank, names in self._sources if rank == dist.get_rank())
            self._channel.send(torch.stack([found[name] for name in here]), self._last_rank)

    def _own(self) -> dict[str, Tensor]:
        """Pop this rank's sums of the next micro-batch; its chunks run micro-batches in the same order."""
        return {name: value for chunk in self._chunks for name, value in chunk.done.popleft().items()}

    def _collect(self, model: Model, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        if self._logits_are_wanted(self._signature.bind_partial(*args, **kwargs).arguments):
            return
        found = self._own()
        for rank, names in self._sources:
            assert self._channel is not None
            sums = self._channel.receive((len(names),), torch.float32, rank)
            found |= dict(zip(names, sums, strict=True))
        self.report = {loss.name: (loss.weight, found[loss.name]) for loss in self._losses}
