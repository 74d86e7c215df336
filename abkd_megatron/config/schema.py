"""What a configuration holds, and what no single value of it shows to be wrong.

Reading and writing it is `config_file`'s. Importing this module does not import megatron.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import MISSING, dataclass, field, fields
from typing import Any

from abkd_megatron.errors import ConfigError, brief, check_name
from abkd_megatron.losses import Divergence, LogitLoss, LossTerm, WeightedSum, registry
from abkd_megatron.losses.hidden import HiddenLoss, refuse_twins
from abkd_megatron.losses.registry import build
from abkd_megatron.losses.schedule import Progress, Schedule, both_zero
from abkd_megatron.losses.selection import TokenSelection
from abkd_megatron.validation import finite_number

type Scalar = str | int | float | bool | None
type Value = Scalar | list[Any]
Number = float | Schedule

DEVICES = ("cuda", "cpu")
HEADS = ("auto", "fused", "materialized")
KERNELS = ("auto", "eager", "compiled", "cpp", "triton")
# The keys of `teacher` that are not Megatron's.
TEACHER_KEYS = ("load", "ckpt-step", "declared", "expected-loss")
PREFLIGHT = ("teacher_checksums", "teacher_weights", "memory", "gradient", "batch", "teacher_loss")
ON_CHANGE = ("refuse", "warn")
SECTIONS = ("device", "megatron", "teacher", "distillation", "data", "compare")

# Of a message about losses, which quotes names that are anyone's.
_MOST_CHARACTERS = 2000

# The keys of `distillation` that say which divergence and not how it is used.
_OF_DIVERGENCE = ("divergence", "alpha", "beta", "scale", "detach", "skew", "mixture", "detach_mixture", "losses")

# What of `distillation` may be a schedule, and what a kernel has compiled in.
LEAST_VOCAB_SIZE = 300

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
    hidden_losses: list[dict[str, Scalar]] = field(default_factory=list)
    """Losses between layers: each a `student_layer`, a `teacher_layer`, a `loss` (``cosine`` or ``mse``), a `weight` (1
    if left out) and `projector` (true if left out)."""
    skip_preflight: list[str] = field(default_factory=list)
    """Checks before the first step to leave out: ``teacher_checksums``, ``teacher_weights``, ``memory``, ``gradient``,
    ``batch``, ``teacher_loss``."""
    on_change: str = "refuse"
    """What to do where a run would go on from a checkpoint of another teacher or loss: ``refuse``, or ``warn``."""

    def make_divergence(self) -> Divergence | None:
        """The divergence that these settings describe, of several terms their sum; with schedules, at their beginning.

        None if there are logit losses alone.

        Raises:
            ConfigError: as `build` and `WeightedSum`.
        """
        terms = [(weight, term) for weight, term in self._terms() if isinstance(term, Divergence)]
        if not self.losses and terms:
            return terms[0][1]
        return WeightedSum(terms) if terms else None

    def make_logit_losses(self) -> tuple[tuple[float, LogitLoss], ...]:
        """The logit losses that these settings describe, and their weights.

        Raises:
            ConfigError: as `build`, and for a weight that is not a finite number above 0.
        """
        found = []
        for given, term in self._terms():
            if isinstance(term, LogitLoss):
                weight = finite_number(term.name, "weight", given)
                if weight <= 0.0:
                    raise ConfigError(f"{term.name}: expected a weight above 0, got {weight}: leave a term of 0 out")
                found.append((weight, term))
        return tuple(found)

    def _terms(self) -> list[tuple[Any, LossTerm]]:
        if not self.losses:
            given = {name: getattr(self, name) for name in registry.parameters(self.divergence)}
            first = {name: it(Progress()) if isinstance(it, Schedule) else it for name, it in given.items()}
            return [(1.0, build(self.divergence, first))]
        terms: list[tuple[Any, LossTerm]] = []
        for term in self.losses:
            settings = {"weight": 1.0, **term}
            name, weight = settings.pop("name", ""), settings.pop("weight")
            terms.append((weight, build(str(name), settings)))
        return terms

    def make_hidden_losses(self) -> tuple[HiddenLoss, ...]:
        """The losses between layers.

        Raises:
            ConfigError: for an unknown or missing key, a value that `HiddenLoss` refuses, or a pair given twice.
        """
        known = {item.name: item.default is MISSING for item in fields(HiddenLoss)}
        losses = []
        for number, term in enumerate(self.hidden_losses, 1):
            for key in term:
                check_name(key, known, f"entry {number}", "key")
            if missing := [key for key, needed in known.items() if needed and key not in term]:
                raise ConfigError(f"entry {number}: expected {', '.join(missing)} as well")
            # A whole number reads as a float here, where nothing says what it is for.
            whole = {key: int(of) for key, of in term.items() if isinstance(of, float) and of.is_integer()}
            given: dict[str, Any] = {**term, **{key: of for key, of in whole.items() if key.endswith("layer")}}
            try:
                losses.append(HiddenLoss(**given))
            except ConfigError as error:
                raise ConfigError(f"entry {number}: {error}") from error
        refuse_twins(losses)
        return tuple(losses)

    def gliding(self, kernel: str) -> list[str]:
        """What `kernel` would have to be compiled anew for at every step."""
        names = _COMPILED_IN.get(kernel, ())
        return [name for name in names if Schedule.of(getattr(self, name)).glides]


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

    def check(self, job: str) -> None:
        """Check what no single value shows.

        Args:
            job: what the configuration is for: prepare, pretrain, distill or compare.

        Raises:
            ConfigError: the first of `problems`.
        """
        for error in self.problems(job):
            raise error

    def problems(self, job: str) -> Iterator[ConfigError]:
        """What no single value shows: values out of range, missing ones, and those that exclude each other.

        Args:
            job: as for `check`.
        """
        kd, data = self.distillation, self.data

        def origin(key: str) -> str:
            return self.origins.get(key, "default")

        def require(holds: bool, key: str, expected: str, got: object) -> Iterator[ConfigError]:
            if not holds:
                yield ConfigError(f"{origin(key)}: {key}: expected {expected}, got {brief(str(got))}")

        def require_name(name: object, known: Iterable[str], key: str) -> Iterator[ConfigError]:
            try:
                check_name(name, known, origin(key), key)
            except ConfigError as error:
                yield error

        yield from require_name(self.device, DEVICES, "device")
        is_finite = True
        expected = self.teacher.expected_loss
        yield from require(
            expected is None or (math.isfinite(expected) and expected > 0),
            "teacher.expected-loss",
            "a finite number above 0",
            expected,
        )
        for section, values in (("distillation", kd), ("data", data)):
            for item in fields(values):
                value = getattr(values, item.name)
                finite = not isinstance(value, float) or math.isfinite(value)
                is_finite = is_finite and finite
                yield from require(finite, f"{section}.{item.name}", "a finite number", value)
        yield from require_name(kd.kernel, KERNELS, "distillation.kernel")
        yield from require_name(kd.head, HEADS, "distillation.head")
        for name in kd.skip_preflight:
            yield from require_name(name, PREFLIGHT, "distillation.skip_preflight")
        yield from require_name(kd.on_change, ON_CHANGE, "distillation.on_change")
        yield from require(
            kd.chunk_tokens is None or kd.chunk_tokens >= 1, "distillation.chunk_tokens", "1 or more", kd.chunk_tokens
        )
        yield from require(
            kd.shared_vocab is None or kd.shared_vocab >= 1, "distillation.shared_vocab", "1 or more", kd.shared_vocab
        )
        number = {name: Schedule.of(getattr(kd, name)) for name in SCHEDULED}
        yield from require(
            kd.head != "fused" or number["kd_weight"].lowest != 0,
            "distillation.head",
            "auto or materialized with kd_weight 0, which trains on Megatron's own cross entropy",
            kd.head,
        )
        yield from require(
            self.device != "cpu" or kd.kernel in ("auto", "eager", "cpp") or kd.kernel not in KERNELS,
            "distillation.kernel",
            "auto, eager or cpp on device: cpu (compilers of Python cannot look through the stand-in)",
            kd.kernel,
        )
        gliding = ", ".join(kd.gliding(kd.kernel))
        yield from require(
            not gliding,
            "distillation.kernel",
            f"auto, eager or cpp while {gliding} glides: it would be compiled at every step (a piecewise one may jump)",
            kd.kernel,
        )
        positive = number["temperature"].lowest > 0
        yield from require(positive, "distillation.temperature", "a number above 0", kd.temperature)
        for name in ("scale", "kd_weight", "lm_weight"):
            yield from require(
                number[name].lowest >= 0, f"distillation.{name}", "a number not below 0", getattr(kd, name)
            )
        for name in ("skew", "mixture"):
            within = all(0 < value < 1 for _, value in number[name].points)
            yield from require(
                within, f"distillation.{name}", "a share between 0 and 1, both excluded", getattr(kd, name)
            )
        yield from self._problems_of_losses(job, is_finite)
        nothing = both_zero(number["kd_weight"], number["lm_weight"])
        yield from require(
            nothing is None, "distillation.kd_weight", "kd_weight or lm_weight above 0", f"0 for both {nothing}"
        )
        yield from require(
            data.vocab_size >= LEAST_VOCAB_SIZE,
            "data.vocab_size",
            f"{LEAST_VOCAB_SIZE} or more (256 of them bytes)",
            data.vocab_size,
        )
        yield from require(0 < data.held_out < 0.5, "data.held_out", "a share between 0 and 0.5", data.held_out)
        yield from require(bool(data.source), "data.source", "at least one source", data.source)

        for name in ("seeds", "losses"):
            yield from require(bool(getattr(self.compare, name)), f"compare.{name}", "at least one", "none")
        once = len(set(self.compare.seeds)) == len(self.compare.seeds)
        yield from require(once, "compare.seeds", "each seed once", self.compare.seeds)
        yield from require(self.compare.at_once >= 1, "compare.at_once", "1 or more", self.compare.at_once)

        if job == "prepare" and not data.dir:
            yield ConfigError("data.dir: expected the directory to write, got nothing; set data.dir")
        if job == "distill" and not self.teacher.load:
            yield ConfigError(
                "teacher.load: expected the path of the teacher's Megatron checkpoint, got nothing; "
                "set teacher.load, or use `pretrain` to train without a teacher"
            )
        if data.dir:
            twice = [name for name in _DATA_ARGUMENTS if self.megatron.get(name) not in (None, False)]
            if twice:
                named = ", ".join(f"megatron.{n} ({self.origins.get(f'megatron.{n}', '?')})" for n in twice)
                yield ConfigError(
                    f"data.dir ({self.origins.get('data.dir', '?')}) supplies the data and the tokenizer, "
                    f"and so does {named}; remove data.dir or remove {', '.join(twice)}"
                )

    def _problems_of_losses(self, job: str, is_finite: bool) -> Iterator[ConfigError]:
        """Of the divergence, of the losses in its place or beside it, and of parameters that none of them takes."""
        kd = self.distillation
        chosen = "losses" if kd.losses else "divergence"
        names = [term.get("name") for term in kd.losses] or [kd.divergence]
        is_known = True
        # No other job imports someone's own; of a number that is not finite it has been said.
        if is_finite and (job == "distill" or not any("." in str(name) for name in names)):
            logit_losses: tuple[tuple[float, LogitLoss], ...] = ()
            try:
                kd.make_divergence()
                logit_losses = kd.make_logit_losses()
            except ConfigError as error:
                is_known = False
                origin = self.origins.get(f"distillation.{chosen}", "default")
                yield ConfigError(f"{origin}: distillation.{chosen}: {brief(str(error), _MOST_CHARACTERS)}")
            if kd.head == "fused" and logit_losses:
                origin = self.origins.get("distillation.head", "default")
                yield ConfigError(
                    f"{origin}: distillation.head: expected auto or materialized with "
                    f"{', '.join(loss.name for _, loss in logit_losses)}, a loss of logits that exist, got {kd.head}"
                )
        try:
            kd.make_hidden_losses()
        except ConfigError as error:
            origin = self.origins.get("distillation.hidden_losses", "default")
            yield ConfigError(f"{origin}: distillation.hidden_losses: {brief(str(error), _MOST_CHARACTERS)}")
        for name in self.without_effect() if is_known and is_finite else ():
            if self.is_given(name):
                taken = ", ".join(registry.parameters(kd.divergence)) or "no parameters"
                beside = (
                    "distillation.losses" if kd.losses else f"divergence: {kd.divergence}, which takes {taken} here"
                )
                origin = self.origins.get(f"distillation.{name}", "default")
                yield ConfigError(
                    f"{origin}: distillation.{name}: expected no value beside {beside}, got {getattr(kd, name)}"
                )

    def without_effect(self) -> list[str]:
        """The keys of `distillation` that the chosen divergence does not take."""
        kd = self.distillation
        taken = {"losses"} if kd.losses else {"divergence", "losses", *registry.parameters(kd.divergence)}
        return [name for name in _OF_DIVERGENCE if name not in taken]

    def is_given(self, name: str) -> bool:
        """Whether that key of `distillation` is more than its default."""
        value, default = getattr(self.distillation, name), getattr(DistillationConfig(), name)
        return value != default or self.origins.get(f"distillation.{name}", "default") != "default"

    def forget_divergence(self) -> None:
        """Take the divergence and its parameters back to their defaults."""
        for name in _OF_DIVERGENCE:
            setattr(self.distillation, name, getattr(DistillationConfig(), name))
            self.origins[f"distillation.{name}"] = "default"
