"""A cache in place of the teacher of a run of Megatron-LM's training loop."""

from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from megatron.core.utils import get_attr_wrapped_model
from megatron.training import print_rank_0

from abkd_megatron.cache.dataset import WithRecords, readers_of
from abkd_megatron.cache.manifest import read_manifest
from abkd_megatron.config.schema import Config
from abkd_megatron.config.teachers import reads_cache
from abkd_megatron.errors import from_rank_0, on_every_rank
from abkd_megatron.hosts.add_teacher import MegatronHost, objective_of_job
from abkd_megatron.preflight import run_record
from abkd_megatron.preflight.live import check_models
from abkd_megatron.preflight.rules import RESUME, TEACHER_CHECKS, Setup, run_checks
from abkd_megatron.student.attach import attach
from abkd_megatron.student.cached import CachedTeacher
from abkd_megatron.student.step import DistilledStep
from abkd_megatron.teacher.args import other_teachers


def add_cache(
    config: Config, args: Namespace, model_config: Any, forward_step: Callable[..., tuple[Any, Any]]
) -> DistilledStep:
    """Let the student that Megatron is about to build train from a cache.

    Args:
        config: checked for "distill", with a `distillation.cache`.
        args: see `add_teacher`.
        model_config: see `add_teacher`.
        forward_step: the job's, which sets `CachedTeacher.packed`.

    Returns:
        The forward step for `pretrain`.

    Raises:
        AbkdError: on every rank, for a cache of another tokenizer or temperature, or a job that cannot run.

    Collectives: one all_gather_object if torch.distributed is initialized. In the hook one broadcast_object_list, and
    those of `attach` and `check_models`.
    """
    execution = config.distillation.make_execution()
    directory = Path(str(config.distillation.cache)).expanduser()
    with on_every_rank():
        scheduled = objective_of_job(config, args)
        identity = read_manifest(directory)
        setup = Setup(
            config=config,
            job="distill",
            student=args,
            vocab_size=args.vocab_size,
            cache=identity,
            objective=scheduled.objective,
            execution=execution,
        )
        findings = run_checks(TEACHER_CHECKS, setup)
    step = DistilledStep(forward_step, MegatronHost())

    def recorded() -> dict[str, Any]:
        run_checks([RESUME], setup)
        assert setup.record is not None
        return setup.record

    def attach_cache(student: list[torch.nn.Module]) -> list[torch.nn.Module]:
        print_rank_0(f"distilling with {scheduled.objective.divergence} from the cache in {directory}")
        print_rank_0(f"teacher's cache: {findings["teacher's cache"].text}")
        record = from_rank_0(recorded)
        setattr(args, run_record.RECORD, record)
        pg_collection = get_attr_wrapped_model(student[0], "pg_collection")
        tokens = args.micro_batch_size * args.seq_length // args.context_parallel_size
        step.attachment = attach(
            student,
            CachedTeacher(identity.layout, config.distillation.on_miss),
            scheduled,
            vocab_size=args.vocab_size,
            pg_collection=pg_collection,
            timeout=timedelta(minutes=args.distributed_timeout_minutes),
            execution=execution,
            tokens=tokens,
        )
        if step.attachment.plan is not None:
            record["plan"] = step.attachment.plan.record()
        check_models(
            student,
            step.attachment,
            vocab_size=args.vocab_size,
            pg_collection=pg_collection,
            tokens=tokens,
            skip=config.distillation.skip_preflight,
            expected_loss=config.teacher.expected_loss,
        )
        return student

    model_config.post_wrap_hooks.append(attach_cache)
    return step


def cache_directories(config: Config, args: Namespace) -> Path | dict[int, Path] | None:
    """Return the directory of a job's cache, those of its teachers by source, or None without any.

    Args:
        config: checked for "distill".
        args: Megatron's validated arguments of the student.
    """
    if config.distillation.cache is not None:
        return Path(config.distillation.cache).expanduser()
    if not reads_cache(config):
        return None
    return {at: of.cache for of in other_teachers(config, args) if of.cache is not None for at in of.sources}


def with_records(
    datasets: Sequence[Any], num_samples: Sequence[int | None], directories: Path | Mapping[int, Path], on_miss: str
) -> tuple:
    """Add the records of a cache to the samples of Megatron's data sets, and compare a few of them with the data.

    Args:
        datasets: train, validation and test: each a data set, a list of them, or None.
        num_samples: that the job reads of each; None for all.
        directories: of the cache, or of the caches by source: samples of other sources have no records.
        on_miss: see `WithRecords`.

    Raises:
        DataError: the cache is damaged; with "error", one of the samples tried is not in it.
    """
    if all(dataset is None for dataset in datasets):  # this rank reads none
        return tuple(datasets)
    reader = readers_of(directories)

    def wrapped(dataset: Any, number: int | None) -> Any:
        if dataset is None:
            return None
        if isinstance(dataset, list):
            return [wrapped(it, number) for it in dataset]
        found = WithRecords(dataset, reader, on_miss)
        found.check(number)
        return found

    return tuple(wrapped(of, number) for of, number in zip(datasets, num_samples, strict=True))
