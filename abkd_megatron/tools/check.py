"""Looking at a configuration without running it: every rule, size and file that a job would meet before its first step.

Nothing is written, no network is used and no GPU is needed; what is looked at is Megatron's own view of the
configuration, see `dry_run`. What a file that is not on this machine would have shown is left open and said.
"""

import importlib.util
import itertools
import os
from argparse import Action, Namespace
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.training.checkpointing import checkpoint_exists

import abkd_megatron.kernels as kernels
from abkd_megatron import cpu_backend
from abkd_megatron.config.megatron_args import megatron_options, parse_model
from abkd_megatron.config.model_config import model_config
from abkd_megatron.config.schema import Config
from abkd_megatron.config.stages import layers_of_stages
from abkd_megatron.config.unsupported import JOB
from abkd_megatron.data.indexed import check_datasets, prefixes_of
from abkd_megatron.data.prepare import PreparedData
from abkd_megatron.errors import AbkdError, ConfigError, DataError
from abkd_megatron.hosts.add_teacher import absent_projectors
from abkd_megatron.hosts.run_record import check_resumed, record
from abkd_megatron.hosts.student_checkpoint import check_save, check_student, mixed_events, only_writer
from abkd_megatron.losses.objective import Objective
from abkd_megatron.student.hidden import Layers, check_layers
from abkd_megatron.student.plan import check_fused, obstacles_of, try_kernel
from abkd_megatron.student.supported import check_shared_vocab, check_tokens
from abkd_megatron.teacher.args import check_teacher, open_teacher, teacher_arguments
from abkd_megatron.teacher.checkpoint import TeacherCheckpoint
from abkd_megatron.teacher.inherited import teacher_settings
from abkd_megatron.teacher.layout import RankCoords, TeacherLayout
from abkd_megatron.tools import dry_run
from abkd_megatron.tools.tables import show

OK, ABSENT, REFUSED = "ok", "not here", "refused"
_STYLES = {OK: "green", ABSENT: "yellow", REFUSED: "bold red"}
# Where the tokenizer cannot be loaded: so many tokens, a power of two that any layout divides.
_UNKNOWN_VOCABULARY = 2**17


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    what: str
    """Its name."""
    found: str
    """What there is; of what is refused, the job's own message."""
    verdict: str
    """`OK`, `ABSENT` (not on this machine, so not looked at) or `REFUSED`."""


def main(config: Config, world_size: int | None = None) -> int:
    """Print what is found of a configuration.

    Args:
        config: as loaded; need not have been checked.
        world_size: as `check` takes it.

    Returns:
        0, or 2 if anything is refused.
    """
    findings = check(config, world_size)
    show(("what", "found", "verdict"), [(it.what, it.found, it.verdict) for it in findings], _STYLES)
    count = {verdict: sum(it.verdict == verdict for it in findings) for verdict in (OK, ABSENT, REFUSED)}
    print(f"\n{count[OK]} ok, {count[ABSENT]} not here, {count[REFUSED]} refused")
    return 2 if count[REFUSED] else 0


def check(config: Config, world_size: int | None = None) -> list[Finding]:
    """Look at everything that can be looked at without running the job.

    What is refused does not keep the rest from being looked at, unless that cannot be known without it.

    Args:
        config: as loaded; need not have been checked.
        world_size: ranks of the job; None takes $WORLD_SIZE, or else the fewest that the layouts of both models allow.

    Returns:
        What was found, in the order in which a job meets it.

    Collectives: none.
    """
    look = _Look(config)
    look.settings()
    look.machine()
    with look.at("data"):
        look.data()
    options = megatron_options()
    with look.at("job"):
        look.models(options, world_size)
    return look.findings


class _Look:
    """One look at a configuration, and what it has found so far."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.findings: list[Finding] = []
        self._settings_are_good = True
        self._connections = os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS")

    def add(self, what: str, found: str, verdict: str = OK) -> None:
        self.findings.append(Finding(what, found, verdict))

    @contextmanager
    def at(self, what: str) -> Iterator[None]:
        """Take what the block refuses as a finding, and go on behind it."""
        try:
            yield
        except AbkdError as error:
            self.add(what, str(error), REFUSED)

    def settings(self) -> None:
        job = "distill" if self.config.teacher.load else "pretrain"
        problems = list(self.config.problems(job))
        for problem in problems:
            self.add("settings", str(problem), REFUSED)
        self._settings_are_good = not problems
        if not problems:
            kind = "a student with its teacher" if job == "distill" else "training without a teacher"
            self.add("settings", f"{kind}; no value excludes another")

    def machine(self) -> None:
        """What the job is taken to have and this machine has not."""
        if self.config.device == "cpu":
            return
        if cpu_backend.is_installed() or not torch.cuda.is_available():
            self.add("GPU", "none; looked at as on an H100", ABSENT)
        if not dry_run.has_transformer_engine() and self.config.megatron.get("transformer-impl") != "local":
            version = dry_run.TRANSFORMER_ENGINE
            self.add("TransformerEngine", f"none; looked at as with {version}", ABSENT)

    def data(self) -> None:
        directory = self.config.data.dir
        if directory is None:
            self._megatrons_data()
        elif not Path(directory).expanduser().exists():
            self.add("data", f"prepared data in {directory}: `prepare` writes them", ABSENT)
        else:
            manifest = PreparedData.open(directory).manifest
            splits = ", ".join(f"{of['tokens']} {name}" for name, of in manifest["splits"].items())
            asked = manifest.get("vocab_size_asked")
            beside = f"; made for data.vocab_size {asked}" if asked not in (None, self.config.data.vocab_size) else ""
            self.add("data", f"tokens in {directory}: {splits}{beside}")

    def _megatrons_data(self) -> None:
        """Prefixes of indexed datasets, among them weights of a blend."""
        given = self.config.megatron
        names = ("data-path", "train-data-path", "valid-data-path", "test-data-path")
        words = [str(word) for name in names for word in _words(given.get(name))]
        prefixes = [word for word in words if not _is_number(word)]
        if not prefixes:
            said = "mock data" if given.get("mock-data") else "none is named"
            files = given.get("data-args-path") or given.get("per-split-data-args-path")
            self.add("data", f"Megatron's: {files or said}")
            return
        missing = [prefix for prefix in prefixes if not all(Path(prefix + end).is_file() for end in (".bin", ".idx"))]
        if missing:
            self.add("data", f"{', '.join(missing)}: with .bin and .idx", ABSENT)
        else:
            self.add("data", f"{len(prefixes)} indexed datasets of Megatron's")

    def _datasets(self, args: Namespace, vocab_size: int | None) -> None:
        """Of those that are here; that others are not has been said."""
        here = [it for it in prefixes_of(args) if all(Path(it + end).is_file() for end in (".bin", ".idx"))]
        if here:
            count = sum(tokens.count for tokens in check_datasets(here, vocab_size).values())
            known = f"ids below {vocab_size}" if vocab_size is not None else "ids of an unknown vocabulary"
            self.add(
                "datasets", f"{len(here)} of the expected sizes, {count} tokens; in samples: index entries, {known}"
            )

    def models(self, options: Mapping[str, Action], world_size: int | None) -> None:
        config = self.config
        try:
            megatron = dry_run.arguments_with_data(config)
        except DataError:  # it has been said; go on as if there were none yet
            megatron = dry_run.arguments_without_data(config)
        ranks = dry_run.ranks_of(config, megatron, world_size)
        objective = self._objective()
        with dry_run.as_in_a_job(config, ranks):
            student = None
            with self.at("student"):
                student = dry_run.student_arguments(megatron)
                self.add("student", _model(student))
                self.add("ranks", _layout(student))
                self.add("batch", _batch(student))
            teacher, knows = None, False
            if student is not None:
                knows = self._vocabulary(student)
                with self.at("datasets"):
                    self._datasets(student, student.vocab_size if knows else None)
                teacher = self._teacher(student, megatron)
                can_be_made = False
                with self.at("Megatron's models"):
                    dry_run.check_models(student, teacher)
                    self.add("Megatron's models", "their configurations can be made")
                    can_be_made = True
                self._environment(student)
                self._begins_with(student)
                with self.at("save folder"):
                    self._saves_to(student)
                if objective is not None and teacher is not None:
                    self._objective_of(objective, student, knows)
                    if objective.hidden_losses and can_be_made:
                        with self.at("hidden losses"):
                            self._hidden(objective, student, teacher)
            elif dry_run.describes_teacher(config):
                with self.at("teacher"):
                    parse_model(teacher_settings(megatron, config.teacher.megatron, options), "teacher", JOB)
            if config.teacher.load is not None:
                with self.at("teacher's checkpoint"):
                    self._checkpoint(config.teacher.load, megatron, student, teacher, knows)

    def _teacher(self, student: Namespace, megatron: Mapping[str, Any]) -> Namespace | None:
        if not dry_run.describes_teacher(self.config):
            return None
        own = self.config.teacher.megatron
        with self.at("teacher"):
            teacher, _ = teacher_arguments(megatron, own, student, JOB)
            self.add("teacher", _model(teacher))
            self.add("teacher's layout", _teachers_layout(student, teacher))
            return teacher
        return None

    def _objective(self) -> Objective | None:
        if not self._settings_are_good or not self.config.teacher.load:
            return None
        with self.at("loss"):
            return self.config.distillation.make_objective().objective
        return None

    def _vocabulary(self, args: Namespace) -> bool:
        """Set it; returns whether its size is known."""
        try:
            why = dry_run.set_vocabulary(args)
        except (ConfigError, DataError) as error:
            self.add("tokenizer", str(error), ABSENT if isinstance(error, DataError) else REFUSED)
            dry_run.set_padded_vocabulary(args, _UNKNOWN_VOCABULARY)
            return False
        if why is not None:
            self.add("tokenizer", f"{why}; megatron.vocab-size serves", ABSENT)
        elif args.tokenizer_type == "NullTokenizer" and self.config.data.dir is not None:
            self.add("tokenizer", f"taken to have data.vocab_size, {args.vocab_size} tokens", ABSENT)
        else:
            self.add("tokenizer", f"{args.tokenizer_type} {args.tokenizer_model or ''}".strip())
        tensor = args.tensor_model_parallel_size
        share = f"{args.padded_vocab_size // tensor} on each of TP {tensor}"
        self.add("vocabulary", f"{args.vocab_size} tokens, padded to {args.padded_vocab_size} columns: {share}")
        return True

    def _environment(self, args: Namespace) -> None:
        """What Megatron's layers and collectives ask of the machine of a job on GPUs."""
        if self.config.device == "cpu":
            return
        parallel = args.tensor_model_parallel_size > 1 or args.context_parallel_size > 1
        if parallel and self._connections != "1":
            found = "CUDA_DEVICE_MAX_CONNECTIONS=1, which Megatron needs for TP and CP on GPUs before Blackwell"
            self.add("environment", found, ABSENT)
        if args.gradient_accumulation_fusion and not importlib.util.find_spec("fused_weight_gradient_mlp_cuda"):
            found = "NVIDIA's apex, which the output layer needs unless megatron.no-gradient-accumulation-fusion=true"
            self.add("apex", found, ABSENT)

    def _begins_with(self, args: Namespace) -> None:
        for name in ("load", "pretrained_checkpoint"):
            path = getattr(args, name)
            if path is None:
                continue
            if checkpoint_exists(path):
                with self.at("student's checkpoint"):
                    other = check_student(args)
                    self.add("student's checkpoint", f"in {path}" + (f", of another model: {other}" if other else ""))
            else:
                self.add("student's checkpoint", f"none in {path}", ABSENT)

    def _saves_to(self, args: Namespace) -> None:
        if args.save is None:
            return
        check_save(args)
        with only_writer(args, asks=True):
            self.add("save folder", args.save)
        if (mixed := mixed_events(args)) is not None:
            self.add("event files", f"WARNING: {mixed}")

    def _objective_of(self, objective: Objective, student: Namespace, knows: bool) -> None:
        """What a job refuses of the loss once it has built the models."""
        with self.at("loss"):
            if knows:
                check_shared_vocab(objective, student.vocab_size, student.context_parallel_size)
                check_tokens(objective, student.vocab_size)
                check_fused(self.config.make_execution(), obstacles_of(objective, student.vocab_size))
            self.add("loss", str(objective.divergence or ", ".join(objective.names_of_logit_losses)))
        if self.config.device == "cpu":
            with self.at("kernel"):
                with kernels.using(self.config.make_execution().kernel):
                    try_kernel(objective, torch.empty(0, dtype=student.params_dtype))
                self.add("kernel", f"{self.config.distillation.kernel}: tried")

    def _hidden(self, objective: Objective, student: Namespace, teacher: Namespace) -> None:
        absent_projectors(student, objective.hidden_losses)
        if student.pipeline_model_parallel_layout or teacher.pipeline_model_parallel_layout:
            self.add("hidden losses", "where the layers lie of a pipeline-model-parallel-layout, the job sees", ABSENT)
            return
        layout = [(of.tensor_model_parallel_size, of.pipeline_model_parallel_size) for of in (student, teacher)]
        beside = layout[0] == layout[1] and student.sequence_parallel == teacher.sequence_parallel
        stages = {}
        if beside:
            ours, theirs = (layers_of_stages(model_config(args).transformer) for args in (student, teacher))
            stages = {stage: Layers(stage, ours[stage], theirs[stage]) for stage in range(layout[0][1])}
        sizes = (student.hidden_size, teacher.hidden_size)
        check_layers(objective.hidden_losses, stages, beside=beside, sizes=sizes)
        self.add("hidden losses", ", ".join(loss.name for loss in objective.hidden_losses))

    def _checkpoint(
        self,
        load: str,
        megatron: Mapping[str, Any],
        student: Namespace | None,
        teacher: Namespace | None,
        knows: bool,
    ) -> None:
        if not Path(load).exists():
            self.add("teacher's checkpoint", load, ABSENT)
            return
        checkpoint = open_teacher(self.config, megatron)
        if student is None or teacher is None:
            self.add("teacher's checkpoint", f"{checkpoint.directory}: whole; whether of the model described is open")
            return
        size = student.vocab_size
        if not knows:  # of its vocabulary there is nothing to compare with but its own
            described = checkpoint.described
            size = (getattr(described.args, "vocab_size", None) if described is not None else None) or size
        compared = check_teacher(self.config, checkpoint, teacher, size)
        self.add(
            "teacher's checkpoint", f"{checkpoint.directory}: whole, and of the model described (compared: {compared})"
        )
        with self.at("teacher's tokenizer"):
            self._same_tokenizer(student, checkpoint)
        with self.at("going on"):
            changed = check_resumed(student, record(self.config, checkpoint), self.config.distillation.on_change)
            if changed is not None:
                self.add("going on", changed, ABSENT)

    def _same_tokenizer(self, student: Namespace, checkpoint: TeacherCheckpoint) -> None:
        """Two vocabularies may have the same size; of its tokenizer a checkpoint may have no more than the path."""
        if self.config.distillation.shared_vocab is not None:
            return
        theirs, ours = checkpoint.tokenizer, student.tokenizer_model
        if theirs is None or ours is None:
            return
        if not checkpoint.check_tokenizer(ours):
            missing = ", ".join(path for path in (theirs, ours) if not Path(path).exists())
            self.add("teacher's tokenizer", f"{missing or theirs}: whether both are one is not looked at", ABSENT)
            return
        self.add("teacher's tokenizer", "the student's")


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
        f"{args.num_layers} layers of {args.hidden_size}, {args.num_attention_heads} heads{experts}, "
        f"{str(args.params_dtype).removeprefix('torch.')}, sequences of {args.seq_length}"
    )


def _layout(args: Namespace) -> str:
    sizes = {
        "TP": args.tensor_model_parallel_size,
        "PP": args.pipeline_model_parallel_size,
        "CP": args.context_parallel_size,
        "DP": args.data_parallel_size,
    }
    shown = " x ".join(f"{name} {size}" for name, size in sizes.items() if size > 1) or "one of each group"
    virtual = args.virtual_pipeline_model_parallel_size
    more = [f"{virtual} virtual stages a rank"] if virtual else []
    more += ["sequence parallel"] if args.sequence_parallel else []
    more += [f"EP {args.expert_model_parallel_size}"] if args.num_experts else []
    return ", ".join([f"{args.world_size}: {shown}", *more])


def _batch(args: Namespace) -> str:
    micro_batches = args.global_batch_size // (args.micro_batch_size * args.data_parallel_size)
    return (
        f"{args.global_batch_size} sequences a step, {args.global_batch_size * args.seq_length} tokens: on each of DP "
        f"{args.data_parallel_size} {micro_batches} micro-batches of {args.micro_batch_size}"
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
    if not layout.is_students:
        shown = f"TP {tensor} x PP {pipeline}: {layout.replicas} of it over each {layout.neighbors} of DP"
    return f"{shown}, EP {teacher.expert_model_parallel_size}" if teacher.num_experts else shown
