"""Memory per rank and FLOPs per token of a distillation job, without GPUs.

Memory is counted, not calculated. One rank of each kind runs the job on the meta device
(`abkd_megatron.tools.meta_run`), and the estimate is the peak of all allocations of Megatron, teacher and head. With
`device: cpu` this is the CPU backend's memory. With `device: cuda`, attention and norms keep what fused kernels keep,
without an [s, s] tensor, and so do Mamba and gated delta nets (`meta_layers`). All other layers are Megatron's local
ones; TransformerEngine's are assumed to keep the same. Every expert gets the same number of tokens.

Not counted: allocator fragmentation, NCCL buffers, CUDA context, workspaces of TransformerEngine, cuBLAS, attention and
Mamba kernels, checkpoint writing, validation. A weight's gradient counts until it is added to its buffer; gradient
accumulation fusion avoids this temporary.

FLOPs and parameters are calculated (`model_size`).
"""

import math
import multiprocessing
import os
from argparse import Namespace
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

from abkd_megatron.config.pattern import layers_and_pipes, model_name
from abkd_megatron.config.rollouts import OnPolicy
from abkd_megatron.config.schema import Config, Value
from abkd_megatron.config.unsupported import ESTIMATE, check_features
from abkd_megatron.errors import AbkdError, ConfigError, HostError
from abkd_megatron.hosts.cache_job import record_layout
from abkd_megatron.teacher.layout import TeacherLayout
from abkd_megatron.tools.cache_estimate import CacheEstimate
from abkd_megatron.tools.dry_run import megatron_arguments
from abkd_megatron.tools.meta_cache import layout_read
from abkd_megatron.tools.meta_run import Account, measure, places_of
from abkd_megatron.tools.model_size import Flops, flops, parameters

GIB = 2**30
TENSOR_PARALLEL_UP_TO = 8  # ranks of a node
MICRO_BATCHES = (1, 2, 4)


@dataclass(frozen=True)
class RankEstimate:
    """Memory of one kind of rank."""

    name: str
    rank: int
    """The simulated rank."""
    account: Account


@dataclass(frozen=True)
class Alternative:
    """Another layout of the same job on the same number of ranks."""

    tensor_parallel: int
    pipeline_parallel: int
    micro_batch_size: int
    total: int | None
    """Peak bytes, the larger of the first and the last stage; None if it was not simulated."""
    why: str = ""
    """Reason why it was not simulated."""


@dataclass(frozen=True)
class Estimate:
    """Memory and FLOPs of a job."""

    device: str
    world_size: int
    layout: str
    student: str
    """Class and layer pattern."""
    teacher: str | None
    """Of all teachers; None for a cache."""
    parameters: int
    teacher_parameters: int
    gpu_memory: float
    """GiB per GPU."""
    ranks: tuple[RankEstimate, ...]
    flops: Flops
    alternatives: tuple[Alternative, ...] = ()
    cache: CacheEstimate | None = None
    """Of the job's samples; None with a `shared_vocab` or several teachers, for which there is no cache."""
    sampling: int | None = None
    """Bytes of keys and values per rank while a step's own text is sampled; None without `on_policy`."""
    decode: int | None = None
    """Bytes of weights that a rank reads per position of own text; None without it, or with experts."""

    @property
    def fullest(self) -> RankEstimate:
        """The rank with the highest peak."""
        return max(self.ranks, key=lambda rank: rank.account.total)


def estimate(
    config: Config,
    world_size: int | None = None,
    *,
    gpu_memory: float = 80.0,
    alternatives: bool = False,
    progress: Callable[[str], None] = lambda _: None,
) -> Estimate:
    """Estimate a `distill` job in child processes, without reading checkpoints or data.

    Args:
        config: with a teacher, or a cache, which need not exist: then it has the form that the section `cache` gives.
        world_size: ranks of the job; None as for `megatron_arguments`.
        gpu_memory: GiB per GPU; the fused head sizes its chunks by the free part.
        alternatives: whether to estimate other layouts on the same number of ranks; takes minutes.
        progress: called with a line of text per simulated rank or layout.

    Raises:
        ConfigError: the job would reject the configuration, or it needs data: latent attention, fp8, hidden losses.
        HostError: the simulation failed.
    """
    student, teacher = megatron_arguments(config, world_size)
    reads = config.distillation.cache is not None
    if teacher is None and not reads:
        raise ConfigError(
            "expected a teacher, got none; set teacher.load and the `teacher:` arguments, or distillation.cache"
        )
    teachers = [teacher, *_others(config, teacher, world_size)] if teacher is not None else []
    for who, args in (("student", student), *(("teacher", args) for args in teachers)):
        _check(config, who, args)
    with _Pool() as pool:
        measured = _Measured.of(pool, config, student, teacher, gpu_memory)
        kinds = kinds_of_ranks(student, teacher)
        futures = {name: measured.start(rank) for name, rank in kinds.items()}
        ranks = []
        for name, rank in kinds.items():
            progress(f"{name}: rank {rank}")
            ranks.append(RankEstimate(name, rank, _result(futures[name])))
        others = _alternatives(pool, config, student, gpu_memory, progress) if alternatives else ()
    tokens = config.distillation.tokens
    counted = flops(student, *teachers, every=(tokens.n or 1) if tokens is not None else 1)
    cache = None
    if config.distillation.shared_vocab is None and not config.teachers:
        layout = layout_read(config, student.vocab_size) if reads else record_layout(config, student.vocab_size)
        cache = CacheEstimate.of(student, layout, counted)
    on_policy = config.distillation.on_policy
    return Estimate(
        device=config.device,
        world_size=student.world_size,
        layout=_layout(student) + (f"; teacher {_layout(teacher)}" if teacher is not None else ""),
        student=model_name(student.hybrid_layer_pattern),
        teacher=" and ".join(model_name(args.hybrid_layer_pattern) for args in teachers) or None,
        parameters=parameters(student, student.padded_vocab_size),
        teacher_parameters=sum(parameters(args, student.padded_vocab_size) for args in teachers),
        gpu_memory=gpu_memory,
        ranks=tuple(ranks),
        flops=counted,
        cache=cache,
        sampling=kv_bytes(student, on_policy) if on_policy is not None else None,
        decode=decode_bytes(student) if on_policy is not None and not student.num_experts else None,
        alternatives=tuple(others),
    )


def kv_bytes(args: Namespace, on_policy: OnPolicy) -> int:
    """Return the bytes of keys and values that a rank of the student holds while it samples a step's own text.

    Args:
        args: Megatron's, validated, of the student.
        on_policy: whose texts are sampled.
    """
    layers = args.hybrid_layer_pattern.count("*") if args.hybrid_layer_pattern is not None else args.num_layers
    of_rank = -(-layers // args.pipeline_model_parallel_size)
    heads = args.num_query_groups if args.group_query_attention else args.num_attention_heads
    width = args.kv_channels * max(heads // args.tensor_model_parallel_size, 1)
    rows = args.global_batch_size // args.data_parallel_size
    length = on_policy.longest_prompt(args.seq_length) + on_policy.new_tokens
    return int(2 * of_rank * rows * length * width * args.params_dtype.itemsize)


def decode_bytes(args: Namespace) -> int:
    """Return the bytes of the student's weights that a rank reads for one position of all its texts.

    A pipeline stage has 1/PP of them and reads them for each of PP micro-batches. The embedding is looked up.

    Args:
        args: Megatron's, validated, of a student without experts.
    """
    embedding = args.padded_vocab_size * args.hidden_size * args.untie_embeddings_and_output_weights
    count = parameters(args, args.padded_vocab_size) - embedding
    return int(count // args.tensor_model_parallel_size * args.params_dtype.itemsize)


def _layout(args: Namespace) -> str:
    stages = args.virtual_pipeline_model_parallel_size
    return (
        f"TP {args.tensor_model_parallel_size} x PP {args.pipeline_model_parallel_size}"
        + (f" x VPP {stages}" if stages else "")
        + (f" x CP {args.context_parallel_size}" if args.context_parallel_size > 1 else "")
        + f" x DP {args.data_parallel_size}"
        + (" with SP" if args.sequence_parallel else "")
    )


def _others(config: Config, teacher: Namespace, world_size: int | None) -> list[Namespace]:
    """Return Megatron's arguments of the job's `teachers`, without those that share a model with another one."""
    kinds: list[tuple[Any, ...]] = [_kind(config, teacher)]
    for entry in config.teachers:
        if entry.cache is not None:
            continue
        of_one = config.with_teacher(entry)
        _, args = megatron_arguments(of_one, world_size)
        if args is not None and (kind := _kind(of_one, args)) not in kinds:
            kinds.append(kind)
    return [args for *_, args in kinds[1:]]


def _kind(config: Config, args: Namespace) -> tuple[Any, ...]:
    return config.teacher.load, config.teacher.ckpt_step, config.teacher.weights, args


def _check(config: Config, who: str, args: Namespace) -> None:
    if config.distillation.hidden_losses:
        raise ConfigError("hidden losses cannot be estimated: their ranks communicate; leave them out here")
    if config.distillation.cross_tokenizer is not None:
        raise ConfigError(
            "distillation.cross_tokenizer cannot be estimated: it needs text; leave it and the teacher's tokenizer out "
            "here, and head=materialized gives both models' logits at once, of which it holds one model's at a time"
        )
    check_features(args, who, ESTIMATE)
    if latent := sorted(set(args.hybrid_layer_pattern or "") & set("+D")):
        raise ConfigError(
            f"{who}: the layers {', '.join(latent)} (latent attention) of hybrid-layer-pattern "
            f"{args.hybrid_layer_pattern} cannot be estimated; leave them out here"
        )


# ---- memory


def kinds_of_ranks(student: Namespace, teacher: Namespace | None) -> dict[str, int]:
    """Return one rank per kind: {description: rank}.

    The kinds are the student's first stage, the middle ones (represented by the second, the fullest) and the last,
    combined with the teacher's stages there. If stages are uneven, as those of a HybridModel, each is a kind.

    Args:
        student: Megatron's validated arguments.
        teacher: the same; None for a cache.
    """
    teacher = teacher or student
    stages = student.pipeline_model_parallel_size
    sizes = teacher.tensor_model_parallel_size, teacher.pipeline_model_parallel_size
    uneven = (
        *(student.decoder_first_pipeline_num_layers, student.decoder_last_pipeline_num_layers),
        *(student.pipeline_model_parallel_layout, student.account_for_embedding_in_pipeline_split or None),
        *(student.account_for_loss_in_pipeline_split or None,),
        *(student.hybrid_layer_pattern, teacher.hybrid_layer_pattern),
    )
    chosen = set(range(stages)) if any(it is not None for it in uneven) else {0, min(1, stages - 1), stages - 1}
    places, found = places_of(student), dict[str, int]()
    for rank, place in enumerate(places):
        if place.tp or place.cp or place.pp not in chosen:
            continue
        layout = TeacherLayout(places, rank, *sizes, has_experts=bool(teacher.num_experts))
        name = f"stage {place.pp + 1} of {stages}"
        if place.pp == 1 and stages > 3 and len(chosen) < stages:
            name = f"stages 2 to {stages - 1} of {stages}"
        if not layout.matches_student:
            name += f", teacher's {layout.stage + 1} of {layout.pipeline_parallel}"
        found.setdefault(name, rank)
    return found


class _Pool(ProcessPoolExecutor):
    """Pool of processes that simulate one rank each, without a GPU, forked from a server with Megatron imported."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["abkd_megatron.tools.meta_run"])
        super().__init__(max_workers=os.cpu_count(), mp_context=context, max_tasks_per_child=1)

    def start(
        self, config: Config, world_size: int, rank: int, *, vocab_size: int, global_batch_size: int, memory: float
    ) -> Future:
        """Start `measure` in a process."""
        sizes = {"vocab_size": vocab_size, "global_batch_size": global_batch_size, "memory": memory}
        # Megatron warns at import if there is no GPU.
        quiet = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore::UserWarning"}
        with mock.patch.dict(os.environ, quiet):
            return self.submit(measure, config, world_size, rank, **sizes)  # type: ignore[arg-type]


@dataclass(frozen=True)
class _Measured:
    """A job whose ranks are simulated."""

    pool: _Pool
    config: Config
    student: Namespace
    memory: float
    num_replicas: int
    """Replicas of the teacher per sharing group; 0 if its layout is the student's."""

    @classmethod
    def of(
        cls, pool: _Pool, config: Config, student: Namespace, teacher: Namespace | None, memory: float
    ) -> "_Measured":
        """Create it from Megatron's arguments."""
        teacher = teacher or student
        sizes = teacher.tensor_model_parallel_size, teacher.pipeline_model_parallel_size
        layout = TeacherLayout(places_of(student), 0, *sizes, has_experts=bool(teacher.num_experts))
        return cls(pool, config, student, memory, 0 if layout.matches_student else layout.num_replicas)

    def start(self, rank: int) -> Future:
        """Start the simulation of a rank."""
        student, stages = self.student, self.student.pipeline_model_parallel_size
        of_micro_batch = student.micro_batch_size * student.data_parallel_size
        micro_batches = student.global_batch_size // of_micro_batch
        if student.virtual_pipeline_model_parallel_size:
            group = student.microbatch_group_size_per_vp_stage or stages
            enough = 3 * math.lcm(group, stages)
        else:
            # In-flight micro-batches of this stage in 1F1B, one steady-state step, and one micro-batch per replica.
            enough = stages - places_of(student)[rank].pp + 1 + self.num_replicas
        return self.pool.start(
            self.config,
            student.world_size,
            rank,
            vocab_size=student.vocab_size,
            global_batch_size=min(micro_batches, enough) * of_micro_batch,
            memory=self.memory,
        )


def _result(future: Future) -> Account:
    try:
        account = future.result()
    except AbkdError:
        raise
    except Exception as error:
        raise HostError(
            f"expected the job to run on the meta device, got {type(error).__name__}: "
            f"{' '.join(str(error).split())[:300]}; measure a real job instead"
        ) from error
    assert isinstance(account, Account)
    return account


def layouts(student: Namespace) -> list[tuple[int, int, int]]:
    """Return the layouts that fit the same number of ranks: (TP, PP, micro-batch size).

    Args:
        student: Megatron's validated arguments.
    """
    heads = math.gcd(student.num_attention_heads, student.num_query_groups or student.num_attention_heads)
    for letter, groups in (("M", "mamba_num_groups"), ("G", "linear_num_key_heads")):
        if letter in (student.hybrid_layer_pattern or ""):
            heads = math.gcd(heads, getattr(student, groups))
    found = []
    powers = [2**exponent for exponent in range(student.world_size.bit_length())]
    for tensor in powers:
        for stages in powers:
            ranks = tensor * stages * student.context_parallel_size
            fits = not heads % tensor and tensor <= TENSOR_PARALLEL_UP_TO and not student.num_layers % stages
            if not fits or student.world_size % ranks:
                continue
            of_rank = student.global_batch_size // (student.world_size // ranks)
            found += [(tensor, stages, size) for size in MICRO_BATCHES if of_rank and not of_rank % size]
    return found


def _alternatives(
    pool: _Pool, config: Config, student: Namespace, memory: float, progress: Callable[[str], None]
) -> list[Alternative]:
    """Estimate all `layouts`, in their order. A larger micro-batch is simulated only if the smaller one fits."""
    found: list[Alternative] = []
    waves: dict[int, list[tuple[int, int]]] = {}
    for tensor, stages, size in layouts(student):
        waves.setdefault(size, []).append((tensor, stages))
    given_up: dict[tuple[int, int], str] = {}
    for size, shapes in sorted(waves.items()):
        started = []
        for shape in shapes:
            if shape in given_up:
                found.append(Alternative(*shape, size, None, given_up[shape]))
                continue
            other = _with_layout(config, *shape, size)
            try:
                args, teacher = megatron_arguments(other, student.world_size)
                ranks = list(kinds_of_ranks(args, teacher).values())
            except AbkdError as error:
                given_up[shape] = f"rejected: {error}"
                found.append(Alternative(*shape, size, None, given_up[shape]))
                continue
            measured = _Measured.of(pool, other, args, teacher, memory)
            started.append((shape, [measured.start(rank) for rank in sorted({ranks[0], ranks[-1]})]))
        for shape, futures in started:
            progress(f"TP {shape[0]} x PP {shape[1]}, micro-batches of {size}")
            total = max(_result(future).total for future in futures)
            found.append(Alternative(*shape, size, total))
            if total > memory * GIB:
                given_up[shape] = "smaller micro-batches do not fit"
    return sorted(found, key=lambda it: (it.tensor_parallel, it.pipeline_parallel, it.micro_batch_size))


def _with_layout(config: Config, tensor: int, stages: int, micro_batch_size: int) -> Config:
    left_out = (
        *("num-layers-per-virtual-pipeline-stage", "num-virtual-stages-per-pipeline-rank"),
        *("microbatch-group-size-per-virtual-pipeline-stage", "decoder-first-pipeline-num-layers"),
        *("decoder-last-pipeline-num-layers", "pipeline-model-parallel-layout", "sequence-parallel"),
    )
    megatron = {key: _without_pipes(key, value) for key, value in config.megatron.items() if key not in left_out}
    teacher = {key: _without_pipes(key, value) for key, value in config.teacher.megatron.items()}
    megatron |= {
        "tensor-model-parallel-size": tensor,
        "pipeline-model-parallel-size": stages,
        "micro-batch-size": micro_batch_size,
    }
    if config.megatron.get("sequence-parallel") and tensor > 1:
        megatron["sequence-parallel"] = True
    others = [
        replace(entry, megatron={key: _without_pipes(key, value) for key, value in entry.megatron.items()})
        for entry in config.teachers
    ]
    return replace(config, megatron=megatron, teacher=replace(config.teacher, megatron=teacher), teachers=others)


def _without_pipes(key: str, value: Value) -> Value:
    """Return a setting; of a layer pattern, one whose layers Megatron divides over any number of stages."""
    if key not in ("hybrid-layer-pattern", "hybrid-override-pattern") or not isinstance(value, str):
        return value
    main = layers_and_pipes(value)
    return main.replace("|", "") + value[len(main) :]
