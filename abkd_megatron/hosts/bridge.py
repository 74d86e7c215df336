"""Distillation in Megatron Bridge's training loop: container, `distill`, recipes, and export to Hugging Face.

Importing this module needs Megatron Bridge and raises a `HostError` if it is missing or too old.
"""

from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from datetime import timedelta
from itertools import repeat
from pathlib import Path
from typing import Any

import torch
from megatron.core.utils import get_attr_wrapped_model, get_batch_on_this_cp_rank, get_model_config, unwrap_model
from megatron.training import print_rank_0
from megatron.training.models.base import ModelConfig

from abkd_megatron import cpu_backend
from abkd_megatron.config.load import load_config
from abkd_megatron.config.schema import DistillationConfig
from abkd_megatron.config.unsupported import BRIDGE, check_features
from abkd_megatron.config.yaml import flow
from abkd_megatron.errors import CheckpointError, ConfigError, HostError, on_every_rank
from abkd_megatron.losses.objective import Objective
from abkd_megatron.losses.schedule import Progress
from abkd_megatron.preflight.live import check_models
from abkd_megatron.preflight.rounding import store_and_measure
from abkd_megatron.student.attach import attach
from abkd_megatron.student.cached import CachedTeacher
from abkd_megatron.student.report import LossChecks
from abkd_megatron.student.step import DistilledStep
from abkd_megatron.student.supported import check_mixed_batches, check_tokens
from abkd_megatron.teacher.build import Teacher, share_frozen_weights
from abkd_megatron.teacher.checkpoint import TeacherCheckpoint
from abkd_megatron.teacher.weights import DEVICE

try:
    from megatron.bridge import AutoBridge
    from megatron.bridge.models.model_provider import ModelProviderMixin
    from megatron.bridge.recipes.llama import llama3
    from megatron.bridge.recipes.nemotronh import nemotron_3_nano_4b
    from megatron.bridge.recipes.qwen import qwen3
    from megatron.bridge.training import gpt_step
    from megatron.bridge.training.config import ConfigContainer, TokenizerConfig
    from megatron.bridge.training.pretrain import pretrain
    from megatron.bridge.training.state import GlobalState
    from megatron.bridge.training.utils.train_utils import maybe_inject_state, needs_global_state_injection
    from megatron.bridge.utils.instantiate_utils import register_allowed_target_prefix

    from abkd_megatron.hosts.bridge_cache import BatchRecords
    from abkd_megatron.hosts.bridge_teacher import build_bridge_teacher, num_columns

    # The newest API in use: an older Bridge is rejected here, not when its model is built.
    _ = ModelProviderMixin.apply_overrides_and_finalize
except (ImportError, AttributeError) as error:
    raise HostError(
        f"expected Megatron Bridge 0.6 and what it imports, got: {error}; use the NeMo container, or install "
        "megatron-bridge>=0.6,<0.7 and TransformerEngine (docs/bridge.md)"
    ) from error

# Lets Bridge read back the YAML of our container.
register_allowed_target_prefix("abkd_megatron.")


@dataclass(kw_only=True)
class TeacherConfig:
    """The frozen teacher, from one of `hf` and `load`."""

    hf: str | None = None
    """A Hugging Face model that AutoBridge supports: a name on the Hub, or a directory."""
    load: str | None = None
    """A torch_dist checkpoint of Bridge or Megatron-LM, which describes the model."""
    ckpt_step: int | None = None
    """The iteration of `load`; None takes the latest."""
    expected_loss: float | None = None
    """The teacher's cross entropy per token on the first step's batch as measured elsewhere, in nats."""
    weights: str = "device"
    """Its layers' weights: ``device``, ``int8`` or ``host``."""
    overrides: dict[str, Any] = field(default_factory=dict)
    """Overrides of the teacher's model config, such as attention_backend. Functions, such as transformer_layer_spec,
    are given by dotted path."""


@dataclass(kw_only=True)
class DistillConfigContainer(ConfigContainer):
    """Bridge's container with the sections `teacher` and `distillation`; overrides, YAML and printing include them."""

    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    distillation: DistillationConfig = field(default_factory=DistillationConfig)

    @classmethod
    def of(
        cls, recipe: ConfigContainer, teacher: TeacherConfig, distillation: DistillationConfig | None = None
    ) -> "DistillConfigContainer":
        """Add a teacher to a Bridge recipe. The sections are the recipe's own objects."""
        given = {item.name: getattr(recipe, item.name) for item in fields(recipe) if item.init}
        made = cls(**given, teacher=teacher, distillation=distillation or DistillationConfig())
        for item in fields(recipe):
            if not item.init:
                setattr(made, item.name, getattr(recipe, item.name))
        return made


def distill(
    config: DistillConfigContainer, forward_step: Callable[..., Any] = gpt_step.forward_step, callbacks: Any = None
) -> None:
    """Train a student with its teacher in Bridge's own `pretrain`.

    Args:
        config: its `model` gets a post-wrap hook, so it can be used once.
        forward_step: any forward step of Bridge's that calls the model with labels.
        callbacks: passed to Bridge.

    Raises:
        AbkdError: on every rank before the first step, for a job that cannot run.

    Collectives: Bridge's, and those of `check_files`, `build_teacher`, `attach` and `check_models`.
    """
    pretrain(config, add_teacher(config, forward_step), callbacks)


def add_teacher(
    config: DistillConfigContainer, forward_step: Callable[..., Any] = gpt_step.forward_step
) -> "BridgeStep":
    """Add a teacher to the student that Bridge is about to build from `config.model`.

    Args:
        config: its `model` gets a post-wrap hook that builds and attaches the teacher.
        forward_step: as in `distill`.

    Returns:
        The forward step for Bridge's `pretrain`.

    Raises:
        ConfigError: an unsupported setting. The hook raises more errors, after Bridge has built the student.
    """
    if config.distillation.cross_tokenizer is not None:
        raise ConfigError(
            "distillation.cross_tokenizer has been run in this package's own job only; use `abkd-megatron distill`, or "
            "remove it"
        )
    device = "cpu" if cpu_backend.is_installed() else "cuda"
    settings = [
        f"distillation.{item.name}={flow(value)}"
        for item in fields(DistillationConfig)
        if (value := getattr(config.distillation, item.name)) != getattr(DistillationConfig(), item.name)
    ]
    cache, source = config.distillation.cache, _source(config)
    live = [f"teacher.load={flow(source)}"] if cache is None else []
    try:
        ours = load_config(None, [f"device={device}", *live, *settings], {})
        ours.teacher.expected_loss, ours.teacher.weights = config.teacher.expected_loss, config.teacher.weights
        ours.check("distill")
    except ConfigError as error:
        raise ConfigError(str(error).replace("command line: ", "")) from None
    scheduled = ours.distillation.make_objective()
    objective = scheduled.objective
    _check_host(config, objective)
    if ours.distillation.on_policy is not None:
        raise ConfigError(
            "distillation.on_policy has been run in this package's own job only; use `abkd-megatron distill`, or "
            "remove it"
        )
    step = BridgeStep(forward_step)

    def attach_teacher(student: list[torch.nn.Module]) -> list[torch.nn.Module]:
        transformer, vocab_size = get_model_config(student[0]), config.model.vocab_size  # the tokenizer's by now
        groups = get_attr_wrapped_model(student[0], "pg_collection")
        with on_every_rank():
            if cache is not None:
                step.records = BatchRecords(config, Path(source).expanduser(), scheduled, ours.distillation.on_miss)
            check_tokens(objective, vocab_size)
            if objective.shares_part_of(vocab_size) and groups.pp.size() > 1:
                raise ConfigError(
                    f"shared_vocab {objective.shared_vocab} of the student's {vocab_size} tokens needs the input ids "
                    "on the last pipeline stage, and Bridge's forward step has them only on the first; set "
                    "model.pipeline_model_parallel_size to 1"
                )
        name = "teacher" if cache is None else "cache"
        print_rank_0(f"distilling with {objective.divergence or 'logit losses'} from the {name} in {source}")
        timeout = timedelta(minutes=config.dist.distributed_timeout_minutes)
        last = unwrap_model(student[-1])
        with on_every_rank():
            if hasattr(getattr(last, "output_layer", None), "to_wrap"):
                raise ConfigError(
                    "peft: an adapter of the output layer is not supported, since the loss reads the layer's weight; "
                    "leave output_layer out of peft.target_modules"
                )
        if step.records is not None:
            teacher: Teacher | CachedTeacher = CachedTeacher(
                step.records.reader.identity.layout, ours.distillation.on_miss
            )
        else:
            teacher = build_bridge_teacher(config, transformer, num_columns(config.model), objective, groups, timeout)
            if config.peft is not None:  # whose base is loaded by now
                of_both = share_frozen_weights(teacher.model, unwrap_model(student))
                shared, size = (f"{num_bytes / 2**20:.1f}" for num_bytes in of_both)
                print_rank_0(f"the teacher reads {shared} of its {size} MiB from the student's frozen weights")
        if last.post_process:
            last.register_forward_pre_hook(step.give_loss_mask, with_kwargs=True)
        tokens = config.train.micro_batch_size * config.model.seq_length // groups.cp.size()
        attachment = step.distilled.attachment = attach(
            student,
            teacher,
            scheduled,
            vocab_size=vocab_size,
            pg_collection=groups,
            timeout=timeout,
            execution=ours.distillation.make_execution(),
            tokens=tokens,
            seed=config.rng.seed,
        )
        check_models(
            student,
            attachment,
            vocab_size=vocab_size,
            pg_collection=groups,
            tokens=tokens,
            skip=ours.distillation.skip_preflight,
            expected_loss=config.teacher.expected_loss,
        )
        if config.teacher.weights != DEVICE and isinstance(teacher, Teacher):
            measured = {"vocab_size": vocab_size, "pg_collection": groups, "skip": ours.distillation.skip_preflight}
            print_rank_0(str(store_and_measure(student, attachment, config.teacher.weights, **measured)))
        return student

    if isinstance(config.model, ModelConfig):
        config.model.post_wrap_hooks.append(attach_teacher)
    else:
        config.model.register_post_wrap_hook(attach_teacher)
    return step


class BridgeStep:
    """A forward step of Bridge's kind, of a student that has a teacher; see `DistilledStep`.

    Bridge's own step does not pass the loss mask on: it is noted as the batch passes and given to the model, where
    multi-token prediction then uses it too.

    Attributes:
        distilled: the step of every training loop.
        records: of the batches, with a teacher cache.
    """

    def __init__(self, forward_step: Callable[..., Any]) -> None:
        self.distilled = DistilledStep(self._run, self)
        self._forward_step = forward_step
        self._takes_state = needs_global_state_injection(forward_step)
        self._state: GlobalState | None = None
        self._batch: Mapping[str, Any] = {}
        self.records: BatchRecords | None = None

    def __call__(
        self, state: GlobalState, data_iterator: Iterator | None, model: torch.nn.Module
    ) -> tuple[Any, Callable[..., Any] | None]:
        """Run the wrapped step; see `DistilledStep.__call__`."""
        self._state = state
        return self.distilled(data_iterator, model)

    def progress(self, training: bool) -> Progress:
        """Return Bridge's progress before this training step, or before the last one."""
        assert self._state is not None
        done, config = self._state.train_state, self._state.cfg
        iteration, samples = done.step, done.consumed_train_samples
        if not training:  # what was loaded was saved after a step
            iteration, samples = max(iteration - 1, 0), max(samples - config.train.global_batch_size, 0)
        lengths = {"iterations": config.train.train_iters, "total_samples": config.train.train_samples}
        return Progress.of_run(iteration, samples, config.model.seq_length, **lengths)

    def loss_checks(self) -> LossChecks:
        """Return what Bridge's container asks for."""
        assert self._state is not None
        return LossChecks(nan=self._state.cfg.rerun_state_machine.check_for_nan_in_loss)

    def log(self, progress: Progress, scheduled: Mapping[str, float]) -> None:
        """Do nothing: Bridge's checkpoints have no record of ours."""

    def give_loss_mask(
        self, student: torch.nn.Module, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, dict[str, Any]] | None:
        """Pass this rank's part of the batch's loss mask to the model: a forward pre-hook."""
        mask = self._batch.get("loss_mask")
        if mask is None or kwargs.get("labels") is None or kwargs.get("loss_mask") is not None:
            return None
        group = get_attr_wrapped_model(student, "pg_collection").cp
        if group.size() > 1:
            if kwargs.get("packed_seq_params") is not None:
                raise ConfigError(
                    "packed sequences with context parallelism are not supported here: Bridge's forward step keeps "
                    "its part of the loss mask to itself; set model.context_parallel_size to 1, or turn packing off"
                )
            mask = get_batch_on_this_cp_rank({"loss_mask": mask}, is_hybrid_cp=False, cp_group=group)["loss_mask"]
        return args, {**kwargs, "loss_mask": mask.cuda(non_blocking=True)}

    def _run(self, data_iterator: Iterator | None, model: torch.nn.Module) -> tuple[Any, Any]:
        assert self._state is not None
        step = maybe_inject_state(self._forward_step, self._state, needs_injection=self._takes_state)
        self._batch = {}
        if (records := self.records) is not None and get_attr_wrapped_model(model, "post_process"):
            assert self.distilled.attachment is not None
            teacher = self.distilled.attachment.teacher
            assert isinstance(teacher, CachedTeacher)
            group = get_attr_wrapped_model(model, "pg_collection").cp
            teacher.read = lambda: records.of_batch(self._batch, group)
        result: tuple[Any, Any] = step(self._noted(data_iterator) if data_iterator is not None else None, model)
        return result

    def _noted(self, batches: Iterator) -> Iterator:
        for self._batch in map(next, repeat(batches)):  # what Bridge gives has `next` and no more
            yield self._batch


def export_to_hf(checkpoint: str | Path, hf_reference: str | Path, out: str | Path) -> None:
    """Export a student that Bridge has saved to Hugging Face's format, with `AutoBridge.export_ckpt`.

    Run it in a separate process, on the CPU: it starts torch.distributed for one rank and ends it.

    Args:
        checkpoint: the directory of `checkpoint.save`, or one iteration in it.
        hf_reference: name or directory of a model of the student's architecture; its config and tokenizer are copied.
        out: the directory to write.

    Raises:
        CheckpointError: there is no complete torch_dist checkpoint of Bridge.
        HostError: torch.distributed is already initialized.
    """
    if torch.distributed.is_initialized():
        raise HostError(
            "expected a process without torch.distributed, which Bridge's export starts for one rank; run the export "
            "in a separate process"
        )
    directory = TeacherCheckpoint.open(checkpoint).directory
    if not (directory / "run_config.yaml").is_file():
        raise CheckpointError(
            f"expected a checkpoint that Megatron Bridge saved, with run_config.yaml, got {directory}; to export a "
            "student of Megatron-LM's loop, give its weights to AutoBridge.save_hf_pretrained yourself"
        )
    AutoBridge.from_hf_pretrained(str(hf_reference)).export_ckpt(
        str(directory), str(out), show_progress=False, strict=True
    )


def llama32_3b_to_1b_distill_config() -> DistillConfigContainer:
    """Return Bridge's Llama 3.2 1B pretraining recipe (1 GPU) with Llama 3.2 3B as the teacher."""
    return _with_hf_teacher(llama3.llama32_1b_pretrain_config(), "meta-llama/Llama-3.2-3B")


def llama31_70b_to_8b_distill_config() -> DistillConfigContainer:
    """Return Bridge's Llama 3.1 8B pretraining recipe at TP 8 with Llama 3.1 70B as the teacher.

    Each rank holds 17.5 GB of the teacher in bf16.
    """
    recipe = llama3.llama31_8b_pretrain_config()
    recipe.model.tensor_model_parallel_size = 8
    recipe.model.sequence_parallel = True
    recipe.model.context_parallel_size = 1
    return _with_hf_teacher(recipe, "meta-llama/Llama-3.1-70B")


def qwen3_8b_to_1p7b_distill_config() -> DistillConfigContainer:
    """Return Bridge's Qwen3 1.7B pretraining recipe (1 GPU) with Qwen3 8B as the teacher."""
    return _with_hf_teacher(qwen3.qwen3_1p7b_pretrain_config(), "Qwen/Qwen3-8B")


def nemotron_nano_9b_to_4b_distill_config() -> DistillConfigContainer:
    """Return Bridge's Nemotron 3 Nano 4B pretraining recipe (8 GPUs) with Nemotron Nano 9B v2 as the teacher.

    Both are HybridModels of Mamba, attention and MLPs; the 4B was pruned from the 9B. Each rank holds 18 GB of the
    teacher in bf16.
    """
    return _with_hf_teacher(
        nemotron_3_nano_4b.nemotron_3_nano_4b_pretrain_config(), "nvidia/NVIDIA-Nemotron-Nano-9B-v2"
    )


def _with_hf_teacher(recipe: ConfigContainer, hf: str) -> DistillConfigContainer:
    # Both models use the teacher's tokenizer; the recipe's NullTokenizer would resize the student's vocabulary.
    recipe.tokenizer = TokenizerConfig(tokenizer_type="HuggingFaceTokenizer", tokenizer_model=hf)
    return DistillConfigContainer.of(recipe, TeacherConfig(hf=hf))


def _source(config: DistillConfigContainer) -> str:
    teacher, cache = config.teacher, config.distillation.cache
    given = [source for source in (teacher.hf, teacher.load, cache) if source]
    if len(given) != 1:
        found = "neither" if not given else "both" if cache is None else "a teacher and a cache"
        raise ConfigError(
            "expected one of teacher.hf (a model of Hugging Face), teacher.load (a torch_dist checkpoint) and "
            f"distillation.cache (a teacher cache), got {found}; set one"
        )
    return given[0]


def _check_host(config: DistillConfigContainer, objective: Objective) -> None:
    """Reject Bridge features that are not supported with a teacher."""
    check_features(config, "student", BRIDGE)
    if objective.hidden_losses:
        raise ConfigError(
            "distillation.hidden_losses need projectors that Bridge's checkpoints do not know; use `abkd-megatron "
            "distill`, or remove them"
        )
    if objective.sources:
        raise ConfigError(
            "distillation.sources need the dataset of each sequence, and Bridge's forward step does not pass "
            "`dataset_id` on; use `abkd-megatron distill`, or remove them"
        )
    resets = {name: getattr(config.dataset, name, False) for name in ("reset_position_ids", "reset_attention_mask")}
    check_mixed_batches(objective, Namespace(micro_batch_size=config.train.micro_batch_size, **resets))
    if not isinstance(config.model, ModelConfig | ModelProviderMixin):
        raise HostError(f"expected a model provider or a ModelConfig of Bridge's, got {type(config.model).__name__}")
