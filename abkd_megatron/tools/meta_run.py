"""One rank of a distill job on tensors that have sizes and no data: what it would hold in memory, and when.

`measure` runs the job itself: Megatron's arguments, process groups, model, gradient buffers, optimizer and schedule,
our teacher and head, for two steps. Every tensor is on torch's `meta` device, every message arrives at once and brings
nothing, and numbers that Python asks of a tensor are 1. A `MemoryTracker` keeps account of all storages. A rank takes
seconds and a few hundred MiB, whatever the models' size.

It changes torch, Megatron and this package for the whole process, as `abkd_megatron.cpu_backend` does, so `measure` is
called once in a process of its own. See `abkd_megatron.tools.estimate` for what it is good for and what it leaves out.
"""

import contextlib
import io
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_outplace
from megatron.core.transformer import transformer_block
from megatron.training import get_args, training
from torch import Tensor
from torch._C._distributed_c10d import FakeWork
from torch.distributed.checkpoint.metadata import Metadata
from torch.overrides import TorchFunctionMode
from torch.testing._internal.distributed import fake_pg
from torch.utils._pytree import tree_map_only

from abkd_megatron import cpu_backend, kernels
from abkd_megatron.config.schema import PREFLIGHT, Config, Value
from abkd_megatron.hosts import add_teacher, megatron_lm
from abkd_megatron.losses import AlphaBeta, Divergence, ToDi
from abkd_megatron.student import head, plan, step
from abkd_megatron.student.attach import Attachment
from abkd_megatron.teacher import runner
from abkd_megatron.teacher.checkpoint import TeacherCheckpoint
from abkd_megatron.teacher.layout import RankCoords
from abkd_megatron.tools.memory_tracker import (
    ACTIVATIONS,
    GRADIENTS,
    HEADS,
    OPTIMIZER,
    PARAMETERS,
    TEACHER,
    TEACHER_PASS,
    WAITING,
    MemoryTracker,
)
from abkd_megatron.tools.meta_layers import Norm
from abkd_megatron.vocab_parallel.fused_head import automatic_chunk_tokens


@dataclass(frozen=True)
class Account:
    """What one rank holds, in bytes."""

    peak: dict[str, int]
    """By part, at the moment of the second step at which it is most in all."""
    kept: dict[str, int]
    """By part, between the first step and the second."""
    parameters: int
    """The student's, on this rank."""
    teacher_parameters: int
    """The teacher's, on this rank."""
    waiting: int
    """The most that the teacher's hidden states took while they waited here."""

    @property
    def total(self) -> int:
        """The peak."""
        return sum(self.peak.values())

    @property
    def largest(self) -> str:
        """The part that is most of it."""
        return max(self.peak, key=self.peak.__getitem__)


def measure(
    config: Config, world_size: int, rank: int, *, vocab_size: int, global_batch_size: int, memory: float = 80.0
) -> Account:
    """Run one rank's first two steps without data. In a process of its own, which is of no other use afterward.

    Args:
        config: checked for "distill". Checkpoints and data are not looked at.
        world_size: of the job.
        rank: whose memory it is.
        vocab_size: in tokens, without padding.
        global_batch_size: of the job, or a smaller one with as many micro-batches as are ever under way at a time.
        memory: GiB of a GPU: the fused head sizes its chunks by what is free.

    Raises:
        AbkdError: what a job of this configuration refuses.
    """
    os.environ.update(WORLD_SIZE=str(world_size), RANK=str(rank), LOCAL_RANK="0", CUDA_DEVICE_MAX_CONNECTIONS="1")
    cpu_backend.install()
    backend = "phantom"
    dist.Backend.register_backend(backend, fake_pg._create_fake_pg, extended_api=True, devices=["cpu", "meta"])
    dist.init_process_group(backend, store=fake_pg.FakeStore(), rank=rank, world_size=world_size)
    tokens = config.distillation.tokens
    ledger = MemoryTracker(one_in=tokens.n if tokens is not None and tokens.n is not None else 1)
    watch = _Watch(ledger)
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        stack.enter_context(warnings.catch_warnings(action="ignore"))
        logging.disable(logging.ERROR)
        for owner, name, value in _replacements(config, ledger, watch, memory):
            stack.enter_context(mock.patch.object(owner, name, value))
        stack.enter_context(ledger)
        stack.enter_context(_Numbers())
        with contextlib.suppress(_Enough):
            megatron_lm.run(_without_files(config, vocab_size, global_batch_size), "distill")
    assert watch.account is not None
    return watch.account


class _Numbers(TorchFunctionMode):
    """What torch reads of a tensor's data without asking a dispatch mode, and the type that Megatron looks at."""

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is torch.Tensor.type and len(args) == 1:
            return func(args[0]).replace("meta.", "")
        if func is torch.Tensor.tolist:
            return _ones(args[0].shape, 1)
        if func is torch.tensor and args:
            args = tree_map_only(Tensor, lambda tensor: _ones(tensor.shape, 1.0), args[0]), *args[1:]
        return func(*args, **(kwargs or {}))


def _ones(shape: Sequence[int], one: float) -> Any:
    return [_ones(shape[1:], one) for _ in range(shape[0])] if shape else one


class _Enough(Exception):
    """Everything has been seen."""


class _Watch:
    """Tells the parts apart in the second step, and ends the job after it."""

    def __init__(self, ledger: MemoryTracker) -> None:
        self.account: Account | None = None
        self._ledger = ledger
        self._step = training.train_step
        self._steps = 0

    def step(self, forward_step: Any, data_iterator: Any, model: Any, optimizer: Any, *args: Any, **kwargs: Any) -> Any:
        """Megatron's `train_step`."""
        self._steps += 1
        if self._steps == 1:  # it only has to leave an optimizer's state behind
            fewest = get_args().pipeline_model_parallel_size if len(model) > 1 else 1
            with mock.patch.object(training, "get_num_microbatches", lambda: fewest):
                return self._step(forward_step, data_iterator, model, optimizer, *args, **kwargs)
        ledger, attachment = self._ledger, forward_step.attachment
        student = [parameter for chunk in model for parameter in chunk.parameters()]
        teacher = list(attachment.teacher.parameters())
        ledger.assign_rest(OPTIMIZER, kept=())
        ledger.assign((it.main_grad for it in student if hasattr(it, "main_grad")), GRADIENTS)
        ledger.assign((it.grad for it in student if it.grad is not None), GRADIENTS)
        ledger.assign(student, PARAMETERS)
        ledger.assign(teacher, TEACHER)
        ledger.restart()
        kept = ledger.held
        self._step(forward_step, data_iterator, model, optimizer, *args, **kwargs)
        parameters, teachers = (sum(parameter.numel() for parameter in of) for of in (student, teacher))
        self.account = Account(dict(ledger.peak), kept, parameters, teachers, attachment.max_queued_bytes)
        raise _Enough


def _replacements(
    config: Config, ledger: MemoryTracker, watch: _Watch, memory: float
) -> Iterator[tuple[Any, str, Any]]:
    """What there is no data for, and where parts are told apart: (owner, name, in its place)."""

    def within(part: str, function: Callable) -> Callable:
        def call(*args: Any, **kwargs: Any) -> Any:
            with ledger.belongs_to(part):
                return function(*args, **kwargs)

        return call

    def teacher_pass(self: Any, batch: Mapping[str, Any]) -> Tensor | None:
        with ledger.belongs_to(TEACHER_PASS):
            hidden = run_teacher(self, batch)
        if hidden is not None:
            ledger.assign([hidden], WAITING)
        return hidden

    run_teacher, get_kernel, size_chunks = runner.TeacherRunner.run, kernels.get, automatic_chunk_tokens
    elements = kernels.chunk_elements
    device: Any = _Device(config.device)
    yield training, "train_step", watch.step
    yield runner.TeacherRunner, "run", teacher_pass
    attaching = sys.modules[Attachment.__module__]  # the package has a function of this name
    yield attaching, "compute_loss", within(HEADS, head.compute_loss)
    yield step.DistilledStep, "__call__", within(ACTIVATIONS, step.DistilledStep.__call__)
    yield dist, "all_gather_object", _all_gather_object
    yield add_teacher, "from_rank_0", lambda function: function()
    yield TeacherCheckpoint, "open", classmethod(lambda cls, *_: _NoCheckpoint(Path(), {}, Metadata({})))
    yield kernels, "_automatic", lambda divergence, *_: _automatic_kernel(config, divergence)
    yield kernels, "get", lambda name: replace(_SIZES, name=name) if name in ("cpp", "triton") else get_kernel(name)
    yield kernels, "chunk_elements", lambda _: elements(device)
    yield plan, "automatic_chunk_tokens", lambda _, of_token: size_chunks(device, of_token)
    yield torch.cuda, "mem_get_info", lambda *_: (max(int(memory * 2**30) - ledger.total, 0), int(memory * 2**30))
    yield FakeWork, "is_completed", lambda _: config.device == "cuda"  # gloo's are never, until they are waited for
    if config.device == "cuda":
        yield transformer_block, "LayerNormImpl", Norm


class _Device(NamedTuple):
    """What is asked of a torch.device; the stand-in for a GPU makes no real one."""

    type: str


def _all_gather_object(objects: list, mine: object, group: object = None) -> None:
    """Every rank says the same, but for its place."""
    objects[:] = places_of(get_args()) if isinstance(mine, RankCoords) else [mine] * len(objects)


def places_of(args: Any) -> list[RankCoords]:
    """Where each rank of a job is in the student's layout, as Megatron numbers them.

    Args:
        args: Megatron's, validated.
    """
    tensor, context, data, stages = (
        args.tensor_model_parallel_size,
        args.context_parallel_size,
        args.data_parallel_size,
        args.pipeline_model_parallel_size,
    )
    places = []
    for rank in range(tensor * context * data * stages):
        outer, tp, cp = rank // (tensor * context), rank % tensor, rank // tensor % context
        dp, pp = divmod(outer, stages) if args.use_tp_pp_dp_mapping else (outer % data, outer // data)
        places.append(RankCoords(pp=pp, dp=dp, cp=cp, tp=tp))
    return places


class _NoCheckpoint(TeacherCheckpoint):
    """Whatever is asked for is there, and as it was."""

    def check_arguments(self, *_: Any, **__: Any) -> str:
        return ""

    def verify(self) -> None: ...

    def identity(self) -> dict[str, Any]:
        return {"path": "", "iteration": None, "sha256": ""}

    def has(self, key: str) -> bool:
        return True

    def metadata(self, dp_cp_group: Any) -> dict[str, Any]:
        return {"dp_cp_group": dp_cp_group}

    def load(self, wanted: dict[str, Any], replicas: Any) -> dict[str, Any]:
        loaded: dict[str, Any] = dict_list_map_outplace(lambda tensor: tensor.data, wanted)
        return loaded


# ---- the job's settings


# What a job reads, writes and schedules; by the beginning of an argument's name.
_LEFT_OUT = (
    *("load", "save", "pretrained-checkpoint", "ckpt-step", "finetune", "auto-detect-ckpt", "async-save"),
    *("data-path", "data-args-path", "data-cache-path", "train-data", "valid-data", "test-data", "split", "per-split"),
    *("tokenizer", "vocab-", "merge-file", "mock-data", "tensorboard", "wandb", "log-", "eval-", "exit-", "profile"),
    *("train-iters", "train-samples", "lr-warmup", "lr-decay-iters", "lr-decay-samples", "lr-wsd", "rampup"),
    *("step-batch-size-schedule", "decrease-batch-size", "global-batch-size", "non-persistent", "rerun-mode"),
)

# What stands in for TransformerEngine, apex and their fused kernels.
_ON_GPU: Mapping[str, Value] = {
    "transformer-impl": "local",
    "spec": ["abkd_megatron.tools.meta_run", "layers_of_a_gpu"],
    "no-gradient-accumulation-fusion": True,
    "no-persist-layer-norm": True,
    "no-masked-softmax-fusion": True,
    "no-rope-fusion": True,
    "disable-jit-fuser": True,
    "no-create-attention-mask-in-dataloader": True,
}


def _without_files(config: Config, vocab_size: int, global_batch_size: int) -> Config:
    """The same job, of two steps, with neither data nor checkpoints."""
    left_out = (*_LEFT_OUT, *(_ON_GPU if config.device == "cuda" else ()))
    kept = {key: value for key, value in config.megatron.items() if not key.removeprefix("no-").startswith(left_out)}
    teacher = {
        key: value for key, value in config.teacher.megatron.items() if not key.startswith(("transformer-impl", "spec"))
    }
    megatron: dict[str, Value] = {
        **kept,
        **(_ON_GPU if config.device == "cuda" else {}),
        "train-iters": 3,
        "eval-interval": 1000,
        "eval-iters": 0,
        "global-batch-size": global_batch_size,
        "tokenizer-type": "NullTokenizer",
        "vocab-size": vocab_size,
        "mock-data": True,
        "num-workers": 0,
        "disable-gloo-process-groups": True,
        "rerun-mode": "disabled",
    }
    return replace(
        config,
        megatron=megatron,
        teacher=replace(config.teacher, load="none", megatron=teacher),
        distillation=replace(config.distillation, skip_preflight=list(PREFLIGHT)),
        data=replace(config.data, dir=None),
    )


# ---- what the loss takes without data


def _automatic_kernel(config: Config, divergence: Divergence) -> str:
    known = isinstance(divergence, (AlphaBeta, ToDi))
    if config.device == "cuda":
        return "triton" if known else "eager"
    return "cpp" if known and kernels.cpp.compiler() else "eager"


def _record(student: Tensor, teacher: Tensor, labels: Any, first: int, divergence: Any, layout: Any, _: Any) -> Tensor:
    return student.new_empty(layout.size, student.shape[0], dtype=torch.float64)


def _second_record(student: Tensor, *others: Any) -> Tensor:
    scalars, value, slope = others[-3:]
    return torch.empty(value + slope, student.shape[0], dtype=torch.float64, device=scalars.device)


# What a kernel allocates that has no temporaries.
_SIZES = kernels.Kernel("sizes", _record, _second_record, lambda *_: None, 2**62, strided=True)


# ---- what layers on a GPU keep, where there is neither TransformerEngine nor apex
