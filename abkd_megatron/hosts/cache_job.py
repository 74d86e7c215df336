"""Job `cache`: the teacher alone, in its own layout, over the samples of a student's job.

The teacher's arguments are Megatron's arguments of this job. Its forward-only schedule, loaders and datasets run the
teacher, and records take the place of the model's output on the last pipeline stage.
"""

import logging
import time
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import mpu
from megatron.core.num_microbatches_calculator import get_num_microbatches
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.training import get_tokenizer
from megatron.training.arguments import parse_and_validate_args
from megatron.training.datasets.data_samplers import build_pretraining_data_loader
from megatron.training.initialize import initialize_megatron
from megatron.training.training import build_train_valid_test_datasets, get_train_valid_test_num_samples
from torch.utils.data import Dataset, Subset

from abkd_megatron.cache.key import KEY_BYTES, sample_key
from abkd_megatron.cache.manifest import Identity
from abkd_megatron.cache.record import RecordLayout
from abkd_megatron.cache.store import CacheReader, CacheWriter
from abkd_megatron.config.cache import DEFAULT_TOP_K
from abkd_megatron.config.megatron_args import (
    checked_model_config,
    command_line,
    job_arguments,
    megatron_options,
    parse_model,
)
from abkd_megatron.config.model_config import check_layers_here
from abkd_megatron.config.schema import Config
from abkd_megatron.config.unsupported import JOB
from abkd_megatron.config.values import MegatronOptions
from abkd_megatron.data.conversations import check_conversations
from abkd_megatron.data.indexed import check_datasets, positions_of, prefixes_of
from abkd_megatron.data.prepare import data_arguments
from abkd_megatron.data.wrapped import samples_of
from abkd_megatron.errors import ConfigError, from_rank_0, on_every_rank
from abkd_megatron.hosts.batches import Packing, get_batch, train_valid_test_datasets_provider
from abkd_megatron.preflight.live import check_files
from abkd_megatron.teacher.args import check_teacher, open_teacher
from abkd_megatron.teacher.build import Teacher, build_teacher
from abkd_megatron.teacher.checkpoint import TeacherCheckpoint
from abkd_megatron.teacher.compatibility import tokenizer_identity
from abkd_megatron.teacher.inherited import group_of_each, teacher_settings
from abkd_megatron.teacher.model import process_output
from abkd_megatron.teacher.output_layer import OutputLayer
from abkd_megatron.teacher.weights import DEVICE, store_weights
from abkd_megatron.vocab_parallel import VocabShard
from abkd_megatron.vocab_parallel.noise import places_in_tail
from abkd_megatron.vocab_parallel.truncate import truncate

logger = logging.getLogger(__name__)

# The student's settings that define the samples, or the ranks of the job.
_GROUPS = ("validation", "data and dataloader", "sft")
_NAMES = (
    *("train_iters", "train_samples", "global_batch_size", "seed"),
    *("distributed_backend", "distributed_timeout_minutes", "disable_jit_fuser", "nccl_communicator_config_path"),
)
_SECONDS_BETWEEN_REPORTS = 10.0
# A sample: the first bytes of its key, its data set, and its number there; 20 bytes.
_PLAN = np.dtype([("key", "<u8"), ("dataset", "<i4"), ("index", "<i8")])


def run(config: Config) -> None:
    """Write the records of all samples of a student's job that the cache does not have.

    Args:
        config: checked for `cache`.

    Raises:
        AbkdError: on every rank before the first sample for a job that cannot run; later on the rank that cannot write.
    """
    with on_every_rank():
        megatron = job_arguments(config, data_arguments(config.data))
        settings = teacher_job_settings(megatron, config.teacher.megatron)
        if parse_model(settings, "teacher", JOB).context_parallel_size > 1:
            raise ConfigError(
                "expected context-parallel-size 1 in the job `cache`, got more; set teacher.context-parallel-size=1 "
                "(a student with context parallelism reads the cache all the same)"
            )
    with command_line(settings):
        args = parse_and_validate_args()
        args.vocab_size = get_tokenizer().vocab_size
    with on_every_rank():
        teacher_config = checked_model_config(args, "teacher", JOB)
        check_layers_here(teacher_config, "teacher")
        checkpoint = open_teacher(config, megatron)
        layout = record_layout(config, args.vocab_size)
        names = [int(name) if name.isdecimal() else name for name in config.cache.sources]
        sources = positions_of(names, args, "cache.sources")
    initialize_megatron()

    def check_all() -> tuple[str, Identity]:
        if args.sft:
            check_conversations(prefixes_of(args))
        else:
            check_datasets([*prefixes_of(args), *config.validation.sets.values()], args.vocab_size)
        compared = check_teacher(config, checkpoint, args, args.vocab_size)
        checkpoint.check_tokenizer(args.tokenizer_model)
        return compared, identity_of(checkpoint, args, config, layout)

    compared, identity = from_rank_0(check_all)
    directory = Path(str(config.cache.dir)).expanduser()
    logger.info(f"teacher's checkpoint: {checkpoint.directory}; compared with {compared}")
    logger.info(
        f"{layout.bytes_per_token} bytes per token: {layout.form} in {layout.precision} at "
        f"temperature {identity.temperature:g}; into {directory}"
    )
    check_files(checkpoint, config.distillation.skip_preflight)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    timeout = timedelta(minutes=args.distributed_timeout_minutes)
    teacher = build_teacher(teacher_config, checkpoint, groups, timeout=timeout)
    if config.teacher.weights != DEVICE:
        logger.info(str(store_weights(teacher, config.teacher.weights)))
    packing = Packing.of(args)
    if packing is not None:
        args.create_attention_mask_in_dataloader = False  # boundaries stand for it
    datasets = _datasets(config, sources, packing)
    with ExitStack() as held:
        writer = None
        with on_every_rank():
            if _writes_here():
                shard_bytes = config.cache.shard_mib * 2**20
                writer = held.enter_context(CacheWriter(directory, identity, shard_bytes))
        with on_every_rank():
            keys = _keys_here(datasets, directory)
        missing, total = _missing(keys)
        logger.info(f"{total} samples, of which {total - len(missing)} are in the cache")
        if len(missing):
            _Pass(teacher, identity, groups.tp, writer).run(_Missing(datasets, missing, args.global_batch_size), args)
        with on_every_rank():
            if writer is not None:
                writer.publish()


def teacher_job_settings(megatron: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """Return Megatron's arguments of the teacher alone, with the student's samples.

    Args:
        megatron: the student's arguments, see `to_argv`.
        own: arguments of the `teacher:` section.
    """
    options = megatron_options()
    known, groups = MegatronOptions(options), group_of_each(options)
    samples = {
        name: value
        for name, value in megatron.items()
        if (dest := known.dest(name)) in _NAMES or groups[dest] in _GROUPS
    }
    return {**samples, **teacher_settings(megatron, own, options), "dataloader-type": "single"}


def record_layout(config: Config, vocab_size: int) -> RecordLayout:
    """Return the configured layout of a record.

    Raises:
        ConfigError: it does not fit the vocabulary.
    """
    cache = config.cache
    if cache.bytes_per_token is not None:
        return RecordLayout.of_bytes(vocab_size, cache.bytes_per_token, cache.precision, cache.draws)
    return RecordLayout(vocab_size, cache.top_k or min(DEFAULT_TOP_K, vocab_size), cache.precision, cache.draws)


def identity_of(checkpoint: TeacherCheckpoint, args: Namespace, config: Config, layout: RecordLayout) -> Identity:
    """Return the identity of the cache that a job writes."""
    teacher = checkpoint.identity()
    return Identity(
        teacher=teacher["sha256"],
        teacher_path=teacher["path"],
        teacher_iteration=teacher["iteration"],
        tokenizer=tokenizer_identity(args),
        vocab_size=args.vocab_size,
        seq_length=args.seq_length,
        reset_attention_mask=args.reset_attention_mask,
        temperature=float(config.distillation.make_objective().objective.temperature),
        top_k=layout.top_k,
        precision=layout.precision,
        draws=layout.draws,
    )


def _writes_here() -> bool:
    return bool(mpu.is_pipeline_last_stage() and mpu.get_tensor_model_parallel_rank() == 0)


def _datasets(config: Config, sources: Sequence[int], packing: Packing | None) -> list[Dataset]:
    """Build the train, validation and test sets of this rank; none on ranks that do not read data.

    Megatron's sets may have more samples than a job reads. With `sources` those of other datasets are left out.
    """

    def provide(num_samples: Sequence[int], vp_stage: int | None = None) -> tuple:
        return train_valid_test_datasets_provider(
            num_samples, vp_stage, held_out_seed=config.data.seed, packing=packing, validation=config.validation
        )

    wanted = get_train_valid_test_num_samples()
    numbers = (wanted[0], None, None) if config.validation.sets else wanted
    found: list[Dataset] = []
    for split, number in zip(build_train_valid_test_datasets(provide, wanted), numbers, strict=True):
        for dataset in split if isinstance(split, list) else [split]:
            if dataset is not None:
                most = len(dataset) if number is None else min(number, len(dataset))
                samples: Any = samples_of(dataset, sources, most) if sources else range(most)
                found.append(Subset(dataset, samples))
    return found


def _keys_here(datasets: Sequence[Any], directory: Path) -> np.ndarray:
    """Return this rank's share of the samples.

    The ranks that write share the hashing; the others have none.

    Returns:
        [n] of `_PLAN`; `index` is -1 if the cache has the sample.

    Raises:
        DataError: the cache is damaged.
    """
    if not _writes_here():
        return np.empty(0, dtype=_PLAN)
    reader = CacheReader(directory)
    rank, size = mpu.get_data_parallel_rank(), mpu.get_data_parallel_world_size()
    parts = []
    for number, dataset in enumerate(datasets):
        part = np.empty(len(range(rank, len(dataset), size)), dtype=_PLAN)
        for row, index in enumerate(range(rank, len(dataset), size)):
            key = sample_key(dataset[index])
            part[row] = int.from_bytes(key[:8], "little"), number, -1 if reader.has(key) else index
        parts.append(part)
    return np.concatenate(parts) if parts else np.empty(0, dtype=_PLAN)


def _missing(mine: np.ndarray) -> tuple[np.ndarray, int]:
    """Return what the cache lacks, [n, 2] int64 of (data set, number of the sample), and the number of all samples.

    Samples with the same content count once. The result is the same on every rank.

    Args:
        mine: from `_keys_here`.

    Memory: about 60 bytes per sample on every rank.

    Collectives: one all-reduce, and one broadcast per rank that has samples.
    """
    everywhere = _gathered(mine)
    everywhere = everywhere[np.lexsort((everywhere["index"], everywhere["dataset"]))]
    _, first = np.unique(everywhere["key"], return_index=True)  # of equal ones the first
    kept = everywhere[np.sort(first)]
    kept = kept[kept["index"] >= 0]
    return np.stack([kept["dataset"].astype(np.int64), kept["index"]], axis=-1), len(first)


def _gathered(mine: np.ndarray) -> np.ndarray:
    """Return the rows of all ranks, in the order of ranks."""
    counts = torch.zeros(dist.get_world_size(), dtype=torch.int64, device=torch.cuda.current_device())
    counts[dist.get_rank()] = len(mine)
    dist.all_reduce(counts)
    parts = []
    for rank, number in enumerate(counts.tolist()):
        if number:  # one rank at a time, which bounds the memory on a GPU
            rows = mine if rank == dist.get_rank() else np.empty(number, dtype=_PLAN)
            part = torch.from_numpy(rows.view(np.uint8)).cuda()
            dist.broadcast(part, rank)
            parts.append(part.cpu().numpy().view(_PLAN))
    return np.concatenate(parts) if parts else mine


class _Missing(Dataset):
    """The samples of a pass, with their keys; filled up to whole batches with repetitions that have the key 0."""

    def __init__(self, datasets: Sequence[Any], places: np.ndarray, batch: int) -> None:
        self._datasets, self._places = datasets, places
        self.number, self.batch = len(places), batch
        self._length = -(-len(places) // batch) * batch

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, position: int) -> dict[str, torch.Tensor]:
        is_filled_up = position >= len(self._places)
        number, index = self._places[0 if is_filled_up else position]
        sample = self._datasets[number][int(index)]
        key = bytes(KEY_BYTES) if is_filled_up else sample_key(sample)
        return {**sample, "key": torch.frombuffer(bytearray(key), dtype=torch.uint8)}


class _Keys(Iterator[dict[str, torch.Tensor]]):
    """Takes the keys out of the micro-batches that the forward step reads."""

    def __init__(self, batches: Iterator[dict[str, torch.Tensor]]) -> None:
        self._batches = batches
        self._taken: list[torch.Tensor] = []

    def __next__(self) -> dict[str, torch.Tensor]:
        batch = next(self._batches)
        self._taken.append(batch.pop("key"))
        return batch

    def taken(self) -> list[torch.Tensor]:
        """Return the keys since the last call, [b, 16] uint8 per micro-batch."""
        taken, self._taken = self._taken, []
        return taken


@dataclass
class _Pass:
    """The teacher over all samples of a pass."""

    teacher: Teacher
    identity: Identity
    tp_group: dist.ProcessGroup
    writer: CacheWriter | None

    def run(self, samples: _Missing, args: Namespace) -> None:
        """Compute and write the records of samples.

        Args:
            samples: of this pass.
            args: Megatron's.

        Raises:
            DataError: on a rank that cannot write.

        Collectives: those of Megatron's forward-only schedule, and those of `truncate` per micro-batch.
        """
        model, config = self.teacher.model, self.teacher.model.config
        keys = None
        packed = Packing.of(args) is not None
        if mpu.get_tensor_model_parallel_rank() == 0 and (model.pre_process or model.post_process or packed):
            keys = _Keys(iter(build_pretraining_data_loader(samples, 0)))
        hooks = process_output(model, lambda *_: self.identity.layout, self._records) if model.post_process else []
        schedule, config.timers = get_forward_backward_func(), None
        progress = _Progress(samples.number, self.identity)
        for done in range(0, len(samples), samples.batch):
            with torch.no_grad():
                outputs = schedule(
                    forward_step_func=partial(_forward_step, packed=packed),
                    data_iterator=keys,
                    model=[model],
                    num_microbatches=get_num_microbatches(),
                    seq_length=args.seq_length,
                    micro_batch_size=args.micro_batch_size,
                    forward_only=True,
                )
            if keys is not None:
                self._write(keys.taken(), outputs)
            progress.report(min(done + samples.batch, samples.number))
        for hook in hooks:
            hook.remove()

    def _write(self, keys: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor]) -> None:
        """Write the records of a batch, [b, s, bytes] per micro-batch, on the ranks that do."""
        if self.writer is None:
            return
        for of_batch, packed in zip(keys, outputs, strict=True):
            for key, records in zip(of_batch, packed.cpu(), strict=True):
                if key.any():
                    self.writer.add(key.numpy().tobytes(), records.numpy())

    def _records(
        self,
        *,
        hidden_states: torch.Tensor,
        output_layer: torch.nn.Module,
        output_weight: torch.Tensor | None,
        labels: torch.Tensor,
        context: RecordLayout,
        scale_logits: Any,
        **_: Any,
    ) -> torch.Tensor:
        """Return the packed records, [b, s, bytes] uint8, in place of a loss."""
        logits = OutputLayer(hidden_states, output_layer, output_weight, scale_logits).logits()
        shard = VocabShard.megatron(logits.shape[-1], self.tp_group, self.identity.vocab_size)
        of_tokens = logits.transpose(0, 1).reshape(-1, logits.shape[-1])
        places = places_in_tail(labels, context.draws) if context.draws else None
        records = truncate(of_tokens, labels.reshape(-1), shard, context.top_k, self.identity.temperature, places)
        return context.pack(records).view(*labels.shape, -1)


class _Progress:
    """Logs a pass: samples, rate, time left, bytes."""

    def __init__(self, number: int, identity: Identity) -> None:
        self._number, self._identity = number, identity
        self._begin = self._last = time.monotonic()

    def report(self, done: int) -> None:
        """Log that `done` samples are computed, if it is time."""
        now = time.monotonic()
        if now - self._last < _SECONDS_BETWEEN_REPORTS and done < self._number:
            return
        self._last = now
        rate = done / max(now - self._begin, 1e-9)
        size = done * self._identity.bytes_per_sample
        logger.info(
            f"{done} of {self._number} samples, {size / 2**20:.1f} MiB, {rate:.1f} samples/s "
            f"({rate * self._identity.seq_length:.0f} tokens/s), {(self._number - done) / rate:.0f} s left"
        )


def _forward_step(
    data_iterator: Iterator | None, model: torch.nn.Module, packed: bool = False
) -> tuple[torch.Tensor, None]:
    batch = get_batch(data_iterator, None, packed=packed)
    read = (batch[name] for name in ("tokens", "position_ids", "attention_mask"))
    return model(*read, labels=batch["labels"], packed_seq_params=batch["packed_seq_params"]), None
