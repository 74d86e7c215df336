"""Report on a configuration without running the job: settings, sizes and files.

Needs neither network nor GPU and writes nothing. `dry_run` builds Megatron's arguments; `preflight.rules` has the
checks. Files that are not on this machine are reported as absent.
"""

import importlib.util
import itertools
import os
from argparse import Action, Namespace
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from abkd_megatron import cpu_backend
from abkd_megatron.cache.dataset import Readers
from abkd_megatron.cache.store import CacheReader
from abkd_megatron.config.megatron_args import megatron_options, parse_model
from abkd_megatron.config.model_config import check_layers_here, model_config
from abkd_megatron.config.pattern import model_name
from abkd_megatron.config.schema import Config
from abkd_megatron.config.unsupported import JOB
from abkd_megatron.data.prepare import PreparedData
from abkd_megatron.errors import AbkdError, ConfigError, DataError, HostError
from abkd_megatron.preflight.rules import EARLY_CHECKS, Setup, Verdict
from abkd_megatron.teacher.args import open_teacher, other_teachers, teacher_arguments
from abkd_megatron.teacher.inherited import teacher_settings
from abkd_megatron.teacher.layout import RankCoords, TeacherLayout
from abkd_megatron.tools import dry_run
from abkd_megatron.tools.cache_hits import count_hits
from abkd_megatron.tools.tables import show

_STYLES = {"ok": "green", "warning": "yellow", "not here": "yellow", "rejected": "bold red"}
# Vocabulary size if the tokenizer cannot be loaded. A power of two is divisible by any layout.
_UNKNOWN_VOCABULARY = 2**17


@dataclass(frozen=True)
class Row:
    """One line of the report."""

    what: str
    found: str
    """Description, or the job's error message."""
    verdict: Verdict = Verdict.OK


def main(config: Config, world_size: int | None = None) -> int:
    """Print the report.

    Args:
        config: as loaded, unchecked.
        world_size: see `check`.

    Returns:
        Exit code: 2 if a check rejects the configuration, else 0.
    """
    rows = check(config, world_size)
    show(("what", "found", "verdict"), [(row.what, row.found, row.verdict.value) for row in rows], _STYLES)
    count = {verdict: sum(row.verdict is verdict for row in rows) for verdict in Verdict}
    warnings = f"{count[Verdict.WARNING]} warning, " if count[Verdict.WARNING] else ""
    print(f"\n{count[Verdict.OK]} ok, {warnings}{count[Verdict.ABSENT]} not here, {count[Verdict.REJECTED]} rejected")
    return 2 if count[Verdict.REJECTED] else 0


def check(config: Config, world_size: int | None = None) -> list[Row]:
    """Describe a configuration and run the checks of the phases `config` and `files`.

    After a failed check, independent checks still run.

    Args:
        config: as loaded, unchecked.
        world_size: ranks of the job; None for $WORLD_SIZE, or else the fewest that the layouts of both models allow.

    Collectives: none.
    """
    report = _Report(config)
    report.settings()
    report.machine()
    with report.at("data"):
        report.data()
    options = megatron_options()
    with report.at("job"):
        report.job(options, world_size)
    return report.rows


class _Report:
    """Rows of a report, in the order of a job."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.rows: list[Row] = []
        self._distills = bool(config.teacher.load or config.distillation.cache)
        self._setup = Setup(config=config, job="distill" if self._distills else "pretrain", dry_run=True)
        self._settings_are_good = True
        self._readers: dict[int, CacheReader] = {}
        self._data_is_here = True
        self._connections = os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS")

    def add(self, what: str, found: str, verdict: Verdict = Verdict.OK) -> None:
        self.rows.append(Row(what, found, verdict))

    @contextmanager
    def at(self, what: str) -> Iterator[None]:
        """Add a row if the block raises."""
        try:
            yield
        except AbkdError as error:
            self.add(what, str(error), Verdict.REJECTED)

    def settings(self) -> None:
        problems = list(self.config.problems(self._setup.job))
        for problem in problems:
            self.add("settings", str(problem), Verdict.REJECTED)
        self._settings_are_good = not problems
        if not problems:
            kind = "training with a teacher" if self._setup.job == "distill" else "training without a teacher"
            self.add("settings", f"{kind}; no conflicts")

    def machine(self) -> None:
        """Report hardware and packages that the job is assumed to have and this machine lacks."""
        if self.config.device == "cpu":
            return
        if cpu_backend.is_installed() or not torch.cuda.is_available():
            self.add("GPU", "none; an H100 is assumed", Verdict.ABSENT)
        if not dry_run.has_transformer_engine() and self.config.megatron.get("transformer-impl") != "local":
            self.add("TransformerEngine", f"none; {dry_run.TRANSFORMER_ENGINE} is assumed", Verdict.ABSENT)

    def data(self) -> None:
        directory = self.config.data.dir
        if directory is None:
            self._megatron_data()
        elif not Path(directory).expanduser().exists():
            self._data_is_here = False
            self.add("data", f"prepared data in {directory}: run `prepare`", Verdict.ABSENT)
        else:
            manifest = PreparedData.open(directory).manifest
            splits = ", ".join(f"{of['tokens']} {name}" for name, of in manifest["splits"].items())
            asked = manifest.get("vocab_size_asked")
            differs = f"; built for data.vocab_size {asked}" if asked not in (None, self.config.data.vocab_size) else ""
            self.add("data", f"tokens in {directory}: {splits}{differs}")

    def _megatron_data(self) -> None:
        """Report Megatron's indexed datasets. Their prefixes may be mixed with blend weights."""
        given = self.config.megatron
        names = ("data-path", "train-data-path", "valid-data-path", "test-data-path")
        words = [str(word) for name in names for word in _words(given.get(name))]
        prefixes = [word for word in words if not _is_number(word)]
        if not prefixes:
            source = "mock data" if given.get("mock-data") else "none given"
            files = given.get("data-args-path") or given.get("per-split-data-args-path")
            self.add("data", f"Megatron dataset: {files or source}")
            return
        ends = ("",) if given.get("sft") else (".bin", ".idx")
        missing = [prefix for prefix in prefixes if not all(Path(prefix + end).is_file() for end in ends)]
        if missing:
            self._data_is_here = False
            self.add("data", f"{', '.join(missing)}{': .bin and .idx' * (len(ends) > 1)}", Verdict.ABSENT)
        else:
            kind = "files of conversations" if given.get("sft") else "Megatron indexed datasets"
            self.add("data", f"{len(prefixes)} {kind}")

    def job(self, options: Mapping[str, Action], world_size: int | None) -> None:
        """Build Megatron's arguments for both models and run the checks."""
        config, setup = self.config, self._setup
        try:
            megatron = dry_run.arguments_with_data(config)
        except DataError:  # reported already
            megatron = dry_run.arguments_without_data(config)
        ranks = dry_run.ranks_of(config, megatron, world_size)
        if self._settings_are_good and self._distills:
            with self.at("loss"):
                setup.objective = config.distillation.make_objective().objective
                setup.execution = config.distillation.make_execution()
        with dry_run.as_in_a_job(config, ranks):
            self._models(megatron, options)
            if config.teacher.load is not None:
                if not Path(config.teacher.load).exists():
                    self.add("teacher's checkpoint", config.teacher.load, Verdict.ABSENT)
                else:
                    with self.at("teacher's checkpoint"):
                        setup.checkpoint = open_teacher(config, megatron)
            self._open_others(megatron)
            readers: Readers | None = self._readers or None
            if config.distillation.cache is not None:
                readers = self._cache(Path(config.distillation.cache).expanduser())
                setup.cache = readers.identity if readers is not None else None
            rejected = len(self._rejected)
            for rule in EARLY_CHECKS:
                with self.at(rule.name):
                    if (finding := rule.run(setup)) is not None:
                        self.add(rule.name, finding.text, finding.verdict)
            if readers is not None and len(self._rejected) == rejected:
                with self.at("samples in the cache"):
                    self._hits(readers)

    def _open_others(self, megatron: Mapping[str, Any]) -> None:
        """Add the job's `teachers`, whose checkpoints may not be here."""
        student = self._setup.student
        if not self._settings_are_good or student is None:
            return
        found = []
        with self.at("teachers"):
            for other in other_teachers(self.config, student):
                if other.cache is not None:
                    reader = self._cache(other.cache, other.name)
                    self._readers |= dict.fromkeys(other.sources, reader) if reader is not None else {}
                    found.append(replace(other, identity=reader.identity if reader is not None else None))
                    continue
                path = other.config.teacher.load or ""
                if not Path(path).exists():
                    self.add("teachers", f"{other.name}: {path}", Verdict.ABSENT)
                args, _ = other.arguments(megatron, student, JOB)
                self.add("teachers", f"{other.name}: {_model(args)}, layout: {_teachers_layout(student, args)}")
                checkpoint = other.checkpoint_here(megatron) if Path(path).exists() else None
                found.append(replace(other, args=args, checkpoint=checkpoint))
        self._setup.others = found
        if any(of.cache is not None and of.identity is None for of in found):
            self._readers = {}

    @property
    def _rejected(self) -> list[Row]:
        return [row for row in self.rows if row.verdict is Verdict.REJECTED]

    def _cache(self, directory: Path, whose: str = "") -> CacheReader | None:
        named = f"{whose}: " if whose else ""
        if not directory.exists():
            self.add("records", f"{named}{directory}: run `cache`", Verdict.ABSENT)
            return None
        reader = None
        with self.at("records"):
            reader = CacheReader(directory)
            self.add("records", f"{named}of {len(reader)} samples in {directory}")
        return reader

    def _hits(self, readers: Readers) -> None:
        """Count the samples of the job that have records, if its data is on this machine."""
        student, config = self._setup.student, self.config
        if student is None or self._setup.vocab_size is None or not self._data_is_here:
            return
        missing = Verdict.REJECTED if config.distillation.on_miss == "error" else Verdict.WARNING
        for hits in count_hits(student, readers, config.data.seed, config.validation):
            self.add("samples in the cache", hits.text, Verdict.OK if hits.found == hits.tried else missing)

    def _models(self, megatron: Mapping[str, Any], options: Mapping[str, Action]) -> None:
        config, setup = self.config, self._setup
        with self.at("student"):
            setup.student = student = dry_run.student_arguments(megatron)
            self.add("student", _model(student))
            self.add("ranks", _layout(student))
            self.add("batch", _batch(student))
        if setup.student is None:
            if dry_run.describes_teacher(config):
                with self.at("teacher"):
                    parse_model(teacher_settings(megatron, config.teacher.megatron, options), "teacher", JOB)
            return
        setup.vocab_size = self._vocabulary(student)
        if dry_run.describes_teacher(config):
            own_tokens = config.distillation.cross_tokenizer is not None
            with self.at("teacher"):
                teacher, _ = teacher_arguments(
                    megatron, config.teacher.megatron, student, JOB, cross_tokenizer=own_tokens
                )
                setup.teacher = teacher
                self.add("teacher", _model(teacher))
                self.add("teacher's layout", _teachers_layout(student, teacher))
        with self.at("Megatron's models"):
            dry_run.check_models(student, setup.teacher)
            self.add("Megatron's models", "configurations are valid")
            for who, args in (("student", student), ("teacher", setup.teacher)):
                if args is not None:
                    self._packages(args, who)
        self._environment(student)

    def _packages(self, args: Namespace, who: str) -> None:
        """Report packages of a HybridModel's layers that are not installed here."""
        try:
            check_layers_here(model_config(args), who)
        except HostError as error:
            self.add("packages", str(error), Verdict.ABSENT)

    def _vocabulary(self, args: Namespace) -> int | None:
        """Set the vocabulary size in `args`. Return it, or None if it is unknown."""
        try:
            why = dry_run.set_vocabulary(args)
        except (ConfigError, DataError) as error:
            self.add("tokenizer", str(error), Verdict.ABSENT if isinstance(error, DataError) else Verdict.REJECTED)
            dry_run.set_padded_vocabulary(args, _UNKNOWN_VOCABULARY)
            return None
        if why is not None:
            self.add("tokenizer", f"{why}; megatron.vocab-size is used", Verdict.ABSENT)
        elif args.tokenizer_type == "NullTokenizer" and self.config.data.dir is not None:
            self.add("tokenizer", f"data.vocab_size is used, {args.vocab_size} tokens", Verdict.ABSENT)
        else:
            self.add("tokenizer", f"{args.tokenizer_type} {args.tokenizer_model or ''}".strip())
        tensor = args.tensor_model_parallel_size
        share = f"{args.padded_vocab_size // tensor} per rank of TP {tensor}"
        self.add("vocabulary", f"{args.vocab_size} tokens, padded to {args.padded_vocab_size} columns: {share}")
        return int(args.vocab_size)

    def _environment(self, args: Namespace) -> None:
        """Report the requirements of Megatron's layers and collectives on GPUs."""
        if self.config.device == "cpu":
            return
        parallel = args.tensor_model_parallel_size > 1 or args.context_parallel_size > 1
        if parallel and self._connections != "1":
            found = "CUDA_DEVICE_MAX_CONNECTIONS=1, required for TP and CP on GPUs before Blackwell"
            self.add("environment", found, Verdict.ABSENT)
        if args.gradient_accumulation_fusion and not importlib.util.find_spec("fused_weight_gradient_mlp_cuda"):
            found = "NVIDIA apex, required by the output layer unless megatron.no-gradient-accumulation-fusion=true"
            self.add("apex", found, Verdict.ABSENT)


def _words(value: object) -> list[object]:
    if value is None:
        return []
    return list(value) if isinstance(value, list) else [value]


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def _model(args: Namespace) -> str:
    experts = f", {args.num_experts} experts" if args.num_experts else ""
    return (
        f"{model_name(args.hybrid_layer_pattern)}, {args.num_layers} layers, hidden size {args.hidden_size}, "
        f"{args.num_attention_heads} heads{experts}, {str(args.params_dtype).removeprefix('torch.')}, "
        f"sequence length {args.seq_length}"
    )


def _layout(args: Namespace) -> str:
    sizes = {
        "TP": args.tensor_model_parallel_size,
        "PP": args.pipeline_model_parallel_size,
        "CP": args.context_parallel_size,
        "DP": args.data_parallel_size,
    }
    shown = " x ".join(f"{name} {size}" for name, size in sizes.items() if size > 1) or "no parallelism"
    virtual = args.virtual_pipeline_model_parallel_size
    more = [f"{virtual} virtual stages per rank"] if virtual else []
    more += ["sequence parallel"] if args.sequence_parallel else []
    more += [f"EP {args.expert_model_parallel_size}"] if args.num_experts else []
    return ", ".join([f"{args.world_size}: {shown}", *more])


def _batch(args: Namespace) -> str:
    micro_batches = args.global_batch_size // (args.micro_batch_size * args.data_parallel_size)
    return (
        f"{args.global_batch_size} sequences per step, {args.global_batch_size * args.seq_length} tokens: "
        f"{micro_batches} micro-batches of {args.micro_batch_size} on each of {args.data_parallel_size} DP replicas"
    )


def _teachers_layout(student: Namespace, teacher: Namespace) -> str:
    sizes = (
        student.pipeline_model_parallel_size,
        student.data_parallel_size,
        student.context_parallel_size,
        student.tensor_model_parallel_size,
    )
    places = [RankCoords(*place) for place in itertools.product(*map(range, sizes))]
    tensor, pipeline = teacher.tensor_model_parallel_size, teacher.pipeline_model_parallel_size
    layout = TeacherLayout(places, 0, tensor, pipeline, has_experts=bool(teacher.num_experts))
    shown = "the student's"
    if not layout.matches_student:
        shown = f"TP {tensor} x PP {pipeline}: {layout.num_replicas} per {layout.num_dp_replicas} DP replicas"
    return f"{shown}, EP {teacher.expert_model_parallel_size}" if teacher.num_experts else shown
