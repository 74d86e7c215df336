"""Jobs `pretrain` and `distill`: Megatron-LM's own training loop (`megatron.training.pretrain`)."""

import copy
import logging
import re
import signal
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from textwrap import indent
from types import FunctionType, SimpleNamespace
from typing import Any

import torch
from megatron.core import mpu
from megatron.core.dist_checkpointing.strategies.filesystem_async import get_write_results_queue
from megatron.core.enums import ModelType
from megatron.core.rerun_state_machine import RerunMode
from megatron.core.utils import (
    StragglerDetector,
    get_attr_wrapped_model,
)
from megatron.training import get_args, get_tensorboard_writer, get_timers, get_tokenizer, pretrain
from megatron.training.argument_utils import pretrain_cfg_container_from_args
from megatron.training.arguments import parse_and_validate_args
from megatron.training.training import get_optimizer_param_scheduler

from abkd_megatron.cache.dataset import RECORDS
from abkd_megatron.config.load import CONFIG_TEXT, render
from abkd_megatron.config.megatron_args import (
    assertion,
    checked_model_config,
    command_line,
    job_arguments,
    megatron_errors_as_config_error,
    parse_model,
)
from abkd_megatron.config.model_config import check_layers_here
from abkd_megatron.config.schema import Config
from abkd_megatron.config.unsupported import JOB
from abkd_megatron.data.aligned_text import ALIGNED, AlignedText
from abkd_megatron.data.prepare import data_arguments
from abkd_megatron.errors import ConfigError, from_rank_0, on_every_rank
from abkd_megatron.hosts.add_cache import add_cache, cache_directories, with_records
from abkd_megatron.hosts.add_teacher import add_teacher
from abkd_megatron.hosts.align import with_aligned_text
from abkd_megatron.hosts.batches import (
    SOURCES_ON_HOST,
    CountedTokens,
    Packing,
    get_batch,
    train_valid_test_datasets_provider,
)
from abkd_megatron.hosts.evaluation import BestCheckpoint, evaluate_first
from abkd_megatron.hosts.held_out import SET, HeldOut, check_rows, number_of_rows
from abkd_megatron.preflight.rules import EVENT_FILES, FOLDER_CHECKS, STUDENT_CHECKS, Setup, run_checks
from abkd_megatron.preflight.student_checkpoint import only_writer, other_schedule_named
from abkd_megatron.student.report import LossChecks, ValidationSets, masked_loss
from abkd_megatron.student.step import DistilledStep

logger = logging.getLogger(__name__)
_stimer = StragglerDetector()


def run(config: Config, job: str) -> None:
    """Train with Megatron's own loop on this rank.

    Args:
        config: checked for `job`.
        job: "pretrain" (no teacher) or "distill".

    Raises:
        AbkdError: on every rank before the first step, for a job that cannot run.
    """
    with ExitStack() as held:
        _run(config, job, held)


def _run(config: Config, job: str, held: ExitStack) -> None:
    with on_every_rank():
        megatron = job_arguments(config, data_arguments(config.data))
        args = parse_model(megatron, "student", JOB)
        # Before Megatron opens an event file.
        parsed = Setup(config=config, job=job, student=args)
        run_checks(FOLDER_CHECKS, parsed)
        if args.rank == 0:
            held.enter_context(only_writer(args))
            run_checks([EVENT_FILES], parsed)
    with command_line(megatron):
        args = parse_and_validate_args()
        # Megatron saves its arguments with the checkpoint; this one lets a later student see whose vocabulary it was.
        args.vocab_size = get_tokenizer().vocab_size
    with on_every_rank():
        config_of_model = checked_model_config(args, "student", JOB)
        check_layers_here(config_of_model, "student")
        job_config = job_config_from_args(args, config_of_model)
        if args.rank == 0:  # reads for all
            run_checks(STUDENT_CHECKS, Setup(config=config, job=job, student=args, vocab_size=args.vocab_size))
    if (writer := get_tensorboard_writer()) is not None:  # on the last rank
        shown = [
            "megatron",
            *(("teacher", "teachers", "distillation") if job == "distill" else ()),
            "data",
            "validation",
        ]
        # Indented, which TensorBoard's Markdown takes for code.
        writer.add_text(CONFIG_TEXT, indent(render(config, shown), " " * 4))
    if args.save and args.exit_signal_handler:
        _keep_checkpoint_writer_from_signals()
    best = BestCheckpoint.of_job(config.validation, args)
    plain = _ForwardStep(Packing.of(args), list(config.validation.sets))
    if plain.packing is not None:
        args.create_attention_mask_in_dataloader = False  # boundaries stand for it
        # From here on only Megatron's validation reads it, to average the means of micro-batches, however many tokens
        # count in each, and not all tokens.
        args.sft = False
    distilled = None
    if job == "distill":
        if config.distillation.cache is not None:
            distilled = add_cache(config, args, config_of_model, plain)
        else:
            distilled = add_teacher(config, megatron, args, config_of_model, plain, JOB)
        plain.distilled = distilled
    datasets = _DatasetsProvider(plain, config)
    config_of_model.post_wrap_hooks.append(datasets.note_student)

    try:
        with other_schedule_named():
            pretrain(
                job_config,
                datasets,
                ModelType.encoder_or_decoder,
                best.watching(distilled or plain) if best is not None else distilled or plain,
                non_loss_data_func=best.conclude if best is not None else None,
            )
    finally:
        plain.counted.end()
        # TensorBoard's writer thread ends with the process and what is still in its queue: the last validation.
        if (writer := get_tensorboard_writer()) is not None:
            writer.flush()
    if distilled is not None and distilled.attachment is not None:
        attachment = distilled.attachment
        attachment.detach()
        if distilled.own_text is not None:
            distilled.own_text.remove()
        logger.info(
            f"teacher hidden states: at most {attachment.max_queued_microbatches} micro-batches at a time waited here, "
            f"{attachment.max_queued_bytes} bytes"
        )
        if attachment.objective.hidden_losses:
            logger.info(
                f"outputs of the teacher's layers: those of at most {attachment.max_queued_layer_outputs} "
                "micro-batches at a time waited for the student's layer here"
            )


def job_config_from_args(args: Namespace, model_config: Any) -> Any:
    """Make Megatron's PretrainConfigContainer, and reject early what Megatron rejects after it has built the models.

    Args:
        args: Megatron's validated arguments.
        model_config: made from them.

    Raises:
        ConfigError: an invalid optimizer, schedule or rerun mode.

    Collectives: none.
    """
    modes = [mode.value for mode in RerunMode]
    if args.rerun_mode not in modes:
        raise ConfigError(f"rerun-mode: expected one of {', '.join(modes)}, got {args.rerun_mode}")
    if not args.skip_train:
        _check_schedule(args)
    with megatron_errors_as_config_error():
        return pretrain_cfg_container_from_args(args, model_config)


# Arguments from which Megatron's scheduler makes the values in its assertions.
_OF_SCHEDULE = {
    "init_lr": ("lr_warmup_init",),
    "max_lr": ("lr",),
    "min_lr": ("min_lr",),
    "lr_warmup_steps": ("lr_warmup_iters", "lr_warmup_samples", "lr_warmup_fraction"),
    "lr_decay_steps": ("lr_decay_iters", "lr_decay_samples", "train_iters", "train_samples"),
    "wsd_decay_steps": ("lr_wsd_decay_iters", "lr_wsd_decay_samples"),
    "start_wd": ("start_weight_decay",),
    "end_wd": ("end_weight_decay",),
}


def _check_schedule(args: Namespace) -> None:
    """Build Megatron's scheduler once without an optimizer, and name the arguments of its bare assertions.

    Raises:
        ConfigError: an invalid schedule.
    """
    if args.lr is None:
        raise ConfigError("expected megatron.lr, the learning rate, got none; set it")
    if not (args.train_iters or args.train_samples):
        raise ConfigError("expected megatron.train-iters or megatron.train-samples, got neither; set one above 0")
    # The same code on a copy of the arguments: it changes them, and a dry run has no global ones.
    names = {"get_args": lambda: copy.copy(args), "update_train_iters": lambda _: None}
    make = FunctionType(get_optimizer_param_scheduler.__code__, get_optimizer_param_scheduler.__globals__ | names)
    try:
        make(SimpleNamespace(param_groups=[{}]))
    except AssertionError as error:
        said = str(error) or assertion(error)
        asked = [name for words, names in _OF_SCHEDULE.items() if re.search(rf"\b{words}\b", said) for name in names]
        given = [f"{name.replace('_', '-')} is {value}" for name in asked if (value := getattr(args, name)) is not None]
        missing = f"none of {', '.join(name.replace('_', '-') for name in asked)} is given"
        raise ConfigError(
            f"Megatron refuses this schedule of learning rate and weight decay: {said.partition(' (')[0]}; "
            f"{', '.join(given) or missing}; change one of them"
        ) from error


def _keep_checkpoint_writer_from_signals() -> None:
    """Start the helper process of Megatron's checkpoint writer with SIGTERM ignored.

    torchrun and schedulers also signal a rank's children, and without that process the save that the signal requests
    fails.
    """
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)  # what is ignored is inherited
    try:
        get_write_results_queue()
    finally:
        signal.signal(signal.SIGTERM, before)


class _ForwardStep:
    """Megatron's forward step for GPT pretraining.

    Attributes:
        packing: of the data.
        sets: names of the validation sets.
        distilled: the step that wraps this one if there is a teacher; it decides which batch keys a stage needs.
        counted: gets the loss masks that this rank reads.
    """

    def __init__(self, packing: Packing | None, sets: Sequence[str] = ()) -> None:
        self.packing = packing
        self.sets = sets
        self.distilled: DistilledStep | None = None
        self.counted = CountedTokens()

    def __call__(
        self, data_iterator: Iterator | None, model: torch.nn.Module, return_schedule_plan: bool = False
    ) -> tuple[torch.Tensor, partial]:
        timers = get_timers()
        timers("batch-generator", log_level=2).start()
        attachment = self.distilled.attachment if self.distilled is not None else None
        is_last = get_attr_wrapped_model(model, "post_process")
        tokens_on_last = self.distilled is not None and self.distilled.needs_input_ids
        cache = attachment.cache if attachment is not None else None
        aligner = self.distilled.aligner if self.distilled is not None else None
        seq_length = get_args().seq_length
        vp_stage = get_attr_wrapped_model(model, "vp_stage")
        with _stimer(bdata=True):
            batch = get_batch(
                data_iterator,
                vp_stage,
                tokens_on_last,
                self.needs_loss_mask(vp_stage),
                training=model.training,
                # What counts in own text is on the device, and is known.
                counted=self.counted if is_last and not self._is_own_text else None,
                with_sources=is_last and attachment is not None and attachment.needs_sources,
                with_sets=is_last and bool(self.sets) and not model.training,
                record_bytes=cache.layout.bytes_per_token + 1 if cache is not None and is_last else None,
                aligned_length=3 * aligner.length + 2 * seq_length if aligner is not None else None,
                packed=self.packing is not None,
            )
        sets = ValidationSets(self.sets, batch[SET]) if batch[SET] is not None else None
        if attachment is not None:
            attachment.sources, attachment.validation_sets = batch["dataset_id"], sets
            if attachment.passes is not None:
                attachment.passes.sources_on_host = batch[SOURCES_ON_HOST]
            if cache is not None and is_last:
                cache.packed = batch[RECORDS]
            if batch[ALIGNED] is not None:
                attachment.text = AlignedText.unpack(batch[ALIGNED], seq_length)
        timers("batch-generator").stop()
        with _stimer:
            output = model(
                batch["tokens"],
                batch["position_ids"],
                batch["attention_mask"],
                labels=batch["labels"],
                loss_mask=batch["loss_mask"],
                packed_seq_params=batch["packed_seq_params"],
            )
        return output, partial(self._loss, batch["loss_mask"], sets)

    @property
    def _is_own_text(self) -> bool:
        return self.distilled is not None and self.distilled.is_own_text

    def needs_loss_mask(self, vp_stage: int | None) -> bool:
        """Return whether this stage needs the loss mask even if it is not the last one."""
        attachment = self.distilled.attachment if self.distilled is not None else None
        return attachment is not None and vp_stage in attachment.needs_loss_mask

    def _loss(
        self, loss_mask: torch.Tensor | None, sets: ValidationSets | None, output_tensor: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        assert loss_mask is not None  # Megatron computes the loss on the last stage only
        args = get_args()
        # With a teacher the wrapping step checks the losses, by name.
        nan = args.check_for_nan_in_loss_and_grad and self.distilled is None
        checks = LossChecks(nan=nan, spikes=args.check_for_spiky_loss, save=args.save)
        return masked_loss(loss_mask, output_tensor, checks=checks, sets=sets if self.distilled is None else None)


class _DatasetsProvider:
    """Datasets provider that knows which stages need the loss mask, once Megatron has built the model.

    Megatron calls it for each chunk of the model, and then trains. A validation before the first step is done here.
    """

    is_distributed = True

    def __init__(self, step: _ForwardStep, config: Config) -> None:
        self._step, self._config = step, config
        self._student: list[torch.nn.Module] = []
        self._held_out: list[Any] = []
        self._rows: list[int] = []

    def note_student(self, student: list[torch.nn.Module]) -> list[torch.nn.Module]:
        """Take the model's chunks, once they are built."""
        self._student = student
        return student

    def __call__(self, num_samples: Sequence[int], vp_stage: int | None = None) -> tuple:
        config, step, args = self._config, self._step, get_args()
        validation = config.validation
        numbers: list[int | None] = list(num_samples)
        mask_here = step.needs_loss_mask(vp_stage)
        train, valid, test = train_valid_test_datasets_provider(
            num_samples, vp_stage, mask_here, config.data.seed, step.packing, validation
        )
        if validation.sets:
            numbers[1] = None
            self._rows = self._rows or from_rank_0(lambda: self._number_rows(valid))
        if step.distilled is not None and (directories := cache_directories(config, args)) is not None:
            with on_every_rank():
                if mpu.is_pipeline_last_stage(ignore_virtual=vp_stage is None, vp_stage=vp_stage):
                    on_miss = config.distillation.on_miss
                    train, valid, test = with_records((train, valid, test), numbers, directories, on_miss)
        if step.distilled is not None and step.distilled.aligner is not None:
            with on_every_rank():
                train, valid, test = with_aligned_text((train, valid, test), step.distilled.aligner)
        if validation.sets:
            batch, args.consumed_valid_samples = args.eval_global_batch_size, 0
            is_here = valid[0] is not None
            valid = HeldOut(valid, self._rows, batch, args.dataloader_type == "single") if is_here else None
        self._held_out.append(valid)
        if len(self._held_out) == len(self._student):
            # Not before: Megatron's numbers of samples, and so its indices of the data, have to be those of all chunks.
            if validation.sets:
                args.eval_iters = number_of_rows(self._rows, args.eval_global_batch_size) // args.eval_global_batch_size
            if validation.at_start and args.iteration == 0 and args.eval_iters and not args.skip_train:
                evaluate_first(step.distilled or step, self._student, self._held_out)
        return train, valid, test

    def _number_rows(self, sets: Sequence[Any]) -> list[int]:
        """Return the number of rows of each validation set, and log them."""
        rows = [len(of) for of in sets]
        check_rows(self._config.validation.sets, rows)
        named = ", ".join(f"{name} ({number})" for name, number in zip(self._config.validation.sets, rows, strict=True))
        logger.info(f"validation reads all {sum(rows)} rows of {named}, in place of eval-iters batches")
        return rows
