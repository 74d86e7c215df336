"""The keys of a configuration, and the rules between them; importing it does not import megatron."""

import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from abkd_megatron.errors import ConfigError, brief, check_name
from abkd_megatron.kernels import CHOICES
from abkd_megatron.losses import Divergence, LogitLoss, LossTerm, WeightedSum, registry
from abkd_megatron.losses.hidden import HiddenLoss
from abkd_megatron.losses.objective import Objective, ScheduledObjective
from abkd_megatron.losses.schedule import Progress, Schedule
from abkd_megatron.losses.selection import TokenSelection
from abkd_megatron.vocab_parallel.execution import HEADS, Execution

logger = logging.getLogger(__name__)

type Scalar = str | int | float | bool | None
type Value = Scalar | list[Any]
Number = float | Schedule

DEVICES = ("cuda", "cpu")
# The keys of `teacher` that are not Megatron's.
TEACHER_KEYS = ("load", "ckpt-step", "declared", "expected-loss")
PREFLIGHT = ("teacher_checksums", "teacher_weights", "memory", "gradient", "batch", "teacher_loss")
ON_CHANGE = ("refuse", "warn")
SECTIONS = ("device", "megatron", "teacher", "distillation", "data", "compare")
LEAST_VOCAB_SIZE = 300

# Of a message about losses, which quotes names that are anyone's.
_MOST_CHARACTERS = 2000

# The keys of `distillation` that say which divergence and not how it is used.
_OF_DIVERGENCE = ("divergence", "alpha", "beta", "scale", "detach", "skew", "mixture", "detach_mixture", "losses")
# And how it is used: each may be wrong together with those before it.
_OF_OBJECTIVE = ("temperature", "temperature_squared", "lm_weight", "kd_weight", "shared_vocab", "tokens")
_OF_EXECUTION = ("chunk_tokens", "gradient_in_place", "diagnostics", "kernel", "head")
# What of `distillation` may be a schedule, and what a kernel has compiled in.
SCHEDULED = ("alpha", "beta", "scale", "skew", "mixture", "temperature", "kd_weight", "lm_weight")
_COMPILED_IN = {"triton": ("alpha", "beta", "scale"), "compiled": SCHEDULED[:6]}

# What `data.dir` supplies; beside it each of these would be a second answer to the same question.
_DATA_ARGUMENTS = (
    *("data-path", "train-data-path", "valid-data-path", "test-data-path", "split", "mock-data"),
    *("data-args-path", "per-split-data-args-path"),
    *("tokenizer-type", "tokenizer-model", "vocab-file", "merge-file"),
)


@dataclass(kw_only=True, slots=True)
class DistillationConfig:
    """The loss: ``kd_weight * divergence(teacher, student) + lm_weight * cross-entropy``.

    Each of `SCHEDULED` is a number or a schedule of one.
    """

    divergence: str = "alpha_beta"
    """A name of ``abkd_megatron.losses.registry`` (a logit loss with its defaults), or the dotted path of a subclass of
    Divergence or LogitLoss."""
    alpha: Number = 0.2
    """Alpha of the alpha-beta divergence."""
    beta: Number = 0.7
    """Beta of the alpha-beta divergence."""
    scale: Number = 1.0
    """Steepness of ToDi's weight between forward and reverse KL."""
    detach: bool = True
    """Take ToDi's weight as a constant in the gradient."""
    skew: Number = 0.1
    """Share of the other model in the mixture that skew forward and reverse KL compare with."""
    mixture: Number = 0.5
    """Share of the teacher in Jensen-Shannon's mixture."""
    detach_mixture: bool = False
    """Take skew reverse KL's mixture as a constant in the gradient."""
    losses: list[dict[str, Scalar]] = field(default_factory=list)
    """In place of `divergence`, terms to add up: each a `name`, a `weight` (1 if left out) and its parameters."""
    temperature: Number = 1.0
    """Divides both models' logits in the divergence; the cross-entropy stays at 1."""
    temperature_squared: bool = False
    """Multiply the divergence by the temperature squared, so that its gradient does not shrink with the temperature."""
    kd_weight: Number = 1.0
    """Weight of the divergence."""
    lm_weight: Number = 1.0
    """Weight of the cross-entropy with the data."""
    kernel: str = "auto"
    """How the loss is computed: ``auto`` (by device), ``eager``, ``compiled`` (torch.compile), ``cpp``, ``triton``."""
    head: str = "auto"
    """How logits are made: ``materialized``, ``fused`` with the loss a chunk of tokens at a time, or ``auto``."""
    chunk_tokens: int | None = None
    """Tokens of a chunk of the fused head; None sizes it to the device."""
    gradient_in_place: bool = False
    """Whether backward overwrites the student's logits with their gradient."""
    shared_vocab: int | None = None
    """Number of first token ids that mean the same to both models, whose vocabularies differ; None: they are one."""
    tokens: TokenSelection | None = None
    """The tokens whose divergence is trained; None: all of them."""
    diagnostics: bool = False
    """Whether validation also reports reverse KL, calibration, ToDi's weight and where the loss pushes."""
    hidden_losses: list[HiddenLoss] = field(default_factory=list)
    """Losses between layers: each a `student_layer`, a `teacher_layer`, a `loss` (``cosine`` or ``mse``), a `weight` (1
    if left out) and `projector` (true if left out)."""
    skip_preflight: list[str] = field(default_factory=list)
    """Checks before the first step to leave out: ``teacher_checksums``, ``teacher_weights``, ``memory``, ``gradient``,
    ``batch``, ``teacher_loss``."""
    on_change: str = "refuse"
    """What to do where a run would go on from a checkpoint of another teacher or loss: ``refuse``, or ``warn``."""

    def make_objective(self) -> ScheduledObjective:
        """Return the objective that these settings describe.

        Raises:
            ConfigError: as `make_divergence` and `ScheduledObjective`.
        """
        given: dict[str, Any] = {name: _first(getattr(self, name)) for name in _OF_OBJECTIVE}
        given |= {"logit_losses": self.make_logit_losses(), "hidden_losses": tuple(self.hidden_losses)}
        schedules = {name: it for name in SCHEDULED if isinstance(it := getattr(self, name), Schedule)}
        return ScheduledObjective(Objective(self.make_divergence(), **given), schedules)

    def make_execution(self) -> Execution:
        """Return how the objective is computed.

        Raises:
            ConfigError: as `Execution`.
        """
        given: dict[str, Any] = {name: getattr(self, name) for name in _OF_EXECUTION}
        return Execution(**given)

    def make_divergence(self) -> Divergence | None:
        """Return the divergence that these settings describe, of several terms their sum; schedules at their beginning.

        None if there are logit losses alone.

        Raises:
            ConfigError: as `build` and `WeightedSum`.
        """
        terms = [(weight, term) for weight, term in self._terms() if isinstance(term, Divergence)]
        if not self.losses and terms:
            return terms[0][1]
        return WeightedSum(terms) if terms else None

    def make_logit_losses(self) -> tuple[tuple[float, LogitLoss], ...]:
        """Return the logit losses that these settings describe, and their weights.

        Raises:
            ConfigError: as `build`.
        """
        return tuple((weight, term) for weight, term in self._terms() if isinstance(term, LogitLoss))

    def _terms(self) -> list[tuple[Any, LossTerm]]:
        if not self.losses:
            given = {name: _first(getattr(self, name)) for name in registry.parameters(self.divergence)}
            return [(1.0, registry.build(self.divergence, given))]
        terms = [{"name": "", "weight": 1.0, **term} for term in self.losses]
        return [(term.pop("weight"), registry.build(str(term.pop("name")), term)) for term in terms]

    def gliding(self, kernel: str) -> list[str]:
        """Return what `kernel` would have to be compiled anew for at every step."""
        given = {name: getattr(self, name) for name in _COMPILED_IN.get(kernel, ())}
        return [name for name, number in given.items() if isinstance(number, Schedule) and number.glides]


def _first(number: Any) -> Any:
    """Return a schedule's number at the first step, and anything else as it is."""
    return number(Progress()) if isinstance(number, Schedule) else number


@dataclass(kw_only=True, slots=True)
class DataConfig:
    """Text, and where it stands once prepared."""

    source: list[str] = field(default_factory=lambda: ["python"])
    """``python`` (the text that ships with Python), files, directories and globs."""
    dir: str | None = None
    """The prepared data set: ``prepare`` writes it, training reads it."""
    vocab_size: int = 2048
    """Pieces of the SentencePiece model."""
    held_out: float = 0.05
    """Share of the documents kept from training, half for validation and half for test."""


@dataclass(kw_only=True, slots=True)
class TeacherConfig:
    """The frozen teacher."""

    load: str | None = None
    """Its Megatron checkpoint."""
    ckpt_step: int | None = None
    """The iteration to load; None takes the checkpoint's latest."""
    declared: bool = False
    """Whether these settings are declared to be the teacher's where nothing saved with its weights describes it."""
    expected_loss: float | None = None
    """The teacher's cross entropy per token on the first step's batch as measured elsewhere, in nats."""
    megatron: dict[str, Value] = field(default_factory=dict)
    """Megatron arguments in which the teacher differs from the student."""


# The comparison that is made if none is described: settings in which a run differs, as on the command line.
_COMPARED = {
    "CE only": ["distillation.kd_weight=0", "distillation.lm_weight=1"],
    "forward KL": ["distillation.divergence=forward_kl"],
    "reverse KL": ["distillation.divergence=reverse_kl"],
    "Jensen-Shannon": ["distillation.divergence=jensen_shannon"],
    "skew reverse KL": ["distillation.divergence=skew_reverse_kl"],
    "alpha-beta 0.2, 0.7": ["distillation.divergence=alpha_beta", "distillation.alpha=0.2", "distillation.beta=0.7"],
    "alpha-beta 0.5, 0.5": ["distillation.divergence=alpha_beta", "distillation.alpha=0.5", "distillation.beta=0.5"],
    "alpha-beta 0.8, 0.3": ["distillation.divergence=alpha_beta", "distillation.alpha=0.8", "distillation.beta=0.3"],
    "ToDi": ["distillation.divergence=todi"],
}


@dataclass(kw_only=True, slots=True)
class CompareConfig:
    """Which students `compare` trains, and where."""

    out: str = "runs/compare"
    """The directory of all runs and of the results."""
    losses: dict[str, list[str]] = field(default_factory=lambda: dict(_COMPARED))
    """By name, in what a run differs: keys of `distillation`, or `section.key`."""
    seeds: list[int] = field(default_factory=lambda: [1, 2, 3, 4, 5])
    """`megatron.seed` of each run of a loss: initial weights and the order of batches."""
    at_once: int = 1
    """How many runs at a time."""
    launch: str | None = None
    """What starts a run's processes, such as `torchrun --standalone --nproc-per-node 8`; None: one process."""


@dataclass(kw_only=True, slots=True)
class Config:
    """One whole configuration."""

    device: str = "cuda"
    """``cuda``, or ``cpu`` for the stand-in."""
    megatron: dict[str, Value] = field(default_factory=dict)
    """Megatron arguments, keyed by option name without the leading dashes."""
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    """The ``teacher`` section."""
    distillation: DistillationConfig = field(default_factory=DistillationConfig)
    """The ``distillation`` section."""
    data: DataConfig = field(default_factory=DataConfig)
    """The ``data`` section."""
    compare: CompareConfig = field(default_factory=CompareConfig)
    """The ``compare`` section."""
    origins: dict[str, str] = field(default_factory=dict)
    """Where each ``section.key`` came from: default, device: NAME, FILE:LINE or command line."""

    def make_execution(self) -> Execution:
        """Return how the objective is computed on this device.

        Kernel `auto` becomes `eager` on a GPU where triton would be compiled for other numbers at every step.

        Raises:
            ConfigError: as `Execution`.
        """
        execution, gliding = self.distillation.make_execution(), self.distillation.gliding("triton")
        if execution.kernel == "auto" and self.device == "cuda" and gliding:
            logger.info("eager kernel: triton would be compiled at every step for another %s", ", ".join(gliding))
            return replace(execution, kernel="eager")
        return execution

    def check(self, job: str) -> None:
        """Reject the first of `problems`.

        Args:
            job: what the configuration is for: prepare, pretrain, distill or compare.

        Raises:
            ConfigError: naming the origin and the key.
        """
        for error in self.problems(job):
            raise error

    def problems(self, job: str) -> Iterator[ConfigError]:
        """Yield what is wrong: values out of range, missing ones, and those that exclude each other.

        Rules of the loss are where the loss is: what a constructor rejects is named by the key that led there.

        Args:
            job: as for `check`.
        """
        kd, data, compare, loss = self.distillation, self.data, self.compare, self.teacher.expected_loss
        names = {
            "device": ([self.device], DEVICES),
            "distillation.kernel": ([kd.kernel], CHOICES),
            "distillation.head": ([kd.head], HEADS),
            "distillation.skip_preflight": (kd.skip_preflight, PREFLIGHT),
            "distillation.on_change": ([kd.on_change], ON_CHANGE),
        }
        for key, (given, known) in names.items():
            for name in given:
                try:
                    check_name(name, known, self._origin(key), key)
                except ConfigError as error:
                    yield error
        gliding = ", ".join(kd.gliding(kd.kernel))
        on_cpu = "auto, eager or cpp on device: cpu (compilers of Python cannot look through the stand-in)"
        no_compiler = f"auto, eager or cpp while {gliding} glides: it would be compiled at every step"
        compiles = kd.kernel in _COMPILED_IN
        least = f"{LEAST_VOCAB_SIZE} or more (256 of them bytes)"
        once = len(set(compare.seeds)) == len(compare.seeds)
        rules = (
            ("teacher.expected-loss", loss is None or 0 < loss < math.inf, "a finite number above 0", loss),
            ("distillation.kernel", not (self.device == "cpu" and compiles), on_cpu, kd.kernel),
            ("distillation.kernel", not gliding, f"{no_compiler} (a piecewise one may jump)", kd.kernel),
            ("data.vocab_size", data.vocab_size >= LEAST_VOCAB_SIZE, least, data.vocab_size),
            ("data.held_out", 0 < data.held_out < 0.5, "a share between 0 and 0.5", data.held_out),
            ("data.source", bool(data.source), "at least one source", data.source),
            ("compare.seeds", bool(compare.seeds), "at least one", "none"),
            ("compare.losses", bool(compare.losses), "at least one", "none"),
            ("compare.seeds", once, "each seed once", compare.seeds),
            ("compare.at_once", compare.at_once >= 1, "1 or more", compare.at_once),
        )
        for key, holds, expected, got in rules:
            if not holds:
                yield self._error(key, f"expected {expected}, got {brief(str(got))}")
        yield from self._problems_of_losses(job)
        if job == "prepare" and not data.dir:
            yield ConfigError("data.dir: expected the directory to write, got nothing; set data.dir")
        if job == "distill" and not self.teacher.load:
            yield ConfigError(
                "teacher.load: expected the path of the teacher's Megatron checkpoint, got nothing; "
                "set teacher.load, or use `pretrain` to train without a teacher"
            )
        twice = [name for name in _DATA_ARGUMENTS if data.dir and self.megatron.get(name) not in (None, False)]
        if twice:
            named = ", ".join(f"megatron.{name} ({self._origin(f'megatron.{name}')})" for name in twice)
            yield ConfigError(
                f"data.dir ({self._origin('data.dir')}) supplies the data and the tokenizer, and so does {named}; "
                f"remove data.dir or remove {', '.join(twice)}"
            )

    def _problems_of_losses(self, job: str) -> Iterator[ConfigError]:
        """Yield what the loss rejects, set key by key, and parameters that no divergence takes."""
        kd, good = self.distillation, DistillationConfig()
        chosen, losses = ("losses", kd.losses) if kd.losses else ("divergence", [{"name": kd.divergence}])
        taken = () if kd.losses else registry.parameters(kd.divergence)
        keys = [chosen, *taken, *_OF_OBJECTIVE, "hidden_losses", *_OF_EXECUTION]
        keys = [key for key in keys if key == chosen or getattr(kd, key) != getattr(good, key)]
        if job != "distill" and any("." in str(term.get("name")) for term in losses):
            keys.remove(chosen)  # no other job imports someone's own
        named = {"head": kd.head in HEADS, "kernel": kd.kernel in CHOICES}  # of others it has been said
        keys = [key for key in keys if named.get(key, True)]
        wrong = []
        for key in keys:
            tried = replace(good, **{key: getattr(kd, key)})
            try:
                tried.make_execution().resolve(tried.make_objective())
                good = tried
            except ConfigError as error:
                wrong.append(key)
                yield self._error(f"distillation.{key}", brief(str(error), _MOST_CHARACTERS))
        beside = f"divergence: {kd.divergence}, which takes {', '.join(taken) or 'no parameters'} here"
        for name in self.without_effect() if chosen not in wrong else ():
            if self.is_given(name):
                expected = f"expected no value beside {'distillation.losses' if kd.losses else beside}"
                yield self._error(f"distillation.{name}", f"{expected}, got {getattr(kd, name)}")

    def _origin(self, key: str) -> str:
        return self.origins.get(key, "default")

    def _error(self, key: str, text: str) -> ConfigError:
        return ConfigError(f"{self._origin(key)}: {key}: {text}")

    def without_effect(self) -> list[str]:
        """Return the keys of `distillation` that the chosen divergence does not take."""
        kd = self.distillation
        taken = {"losses"} if kd.losses else {"divergence", "losses", *registry.parameters(kd.divergence)}
        return [name for name in _OF_DIVERGENCE if name not in taken]

    def is_given(self, name: str) -> bool:
        """Return whether that key of `distillation` is more than its default."""
        value, default = getattr(self.distillation, name), getattr(DistillationConfig(), name)
        return value != default or self._origin(f"distillation.{name}") != "default"

    def forget_divergence(self) -> None:
        """Take the divergence and its parameters back to their defaults."""
        for name in _OF_DIVERGENCE:
            setattr(self.distillation, name, getattr(DistillationConfig(), name))
            self.origins[f"distillation.{name}"] = "default"
