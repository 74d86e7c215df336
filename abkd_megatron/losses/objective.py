"""Training objective: cross entropy, divergence and further losses, with fixed or scheduled weights."""

from collections.abc import Iterator, Mapping
from dataclasses import KW_ONLY, dataclass, fields, is_dataclass, replace
from itertools import product
from typing import Any

from torch import Tensor

from abkd_megatron.errors import ConfigError
from abkd_megatron.losses.alpha_beta import AlphaBeta
from abkd_megatron.losses.base import Divergence, LogitLoss
from abkd_megatron.losses.chunks import ChunkLikelihood
from abkd_megatron.losses.combination import WeightedSum
from abkd_megatron.losses.hidden import HiddenLoss, reject_duplicate_pairs
from abkd_megatron.losses.mixed_sequences import SequenceMix
from abkd_megatron.losses.schedule import Progress, Schedule, both_zero
from abkd_megatron.losses.selection import TokenSelection
from abkd_megatron.losses.sources import SourceWeights, reject_duplicate_sources, weights_by_sequence
from abkd_megatron.validation import flag, positive_number, weight_number, whole_number

# Prefixes of "NAME loss" that are already in use.
_LOGGED = ("lm", "kd", "total", "teacher lm")


@dataclass(frozen=True)
class Objective:
    """Per-token training loss: lm_weight * CE + kd_weight * (D(teacher || student) + sum_i w_i L_i).

    L_i are logit losses; usually there are none.

    With `kd_weight` 0 the teacher is only monitored: the student trains on Megatron's own cross entropy, bitwise as
    without a teacher, and the divergence is logged. `hidden_losses` still train.
    """

    divergence: Divergence | None
    """None if there are only logit losses."""
    _: KW_ONLY
    temperature: float = 1.0
    """T: divides both models' logits in the divergence and the logit losses. Cross entropy and metrics use T = 1."""
    temperature_squared: bool = False
    """Multiply the divergence and the logit losses by T^2 (Hinton et al., arXiv 1503.02531), so that their gradient
    does not decrease as 1/T^2. The logged `kd loss` includes the factor."""
    kd_weight: float = 1.0
    lm_weight: float = 1.0
    shared_vocab: int | None = None
    """N, for vocabularies that share only the token ids 0 .. N - 1. The divergence and the metrics are restricted to
    these ids, with both distributions renormalized; the cross entropy uses the student's whole vocabulary. The teacher
    cannot read ids >= N: from the first such token of a sequence on, all terms but the cross entropy are 0. A label >=
    N has a teacher cross entropy of 0 and an ordinary divergence. None: the vocabularies are identical."""
    logit_losses: tuple[tuple[float, LogitLoss], ...] = ()
    """Pairs of a weight and a loss, each a separate pass over materialized logits. A loss over groups of tokens takes
    them from one sequence and, with context parallelism, from this rank's part of it."""
    tokens: TokenSelection | None = None
    """Tokens on which the divergence is trained. It is 0 at the others; the normalization still counts all tokens.
    None: all tokens."""
    hidden_losses: tuple[HiddenLoss, ...] = ()
    """Losses between layers, added with their own weights regardless of `kd_weight`; each pair of layers once."""
    sources: tuple[SourceWeights, ...] = ()
    """Weights of some datasets of a blend, in place of `kd_weight` and `lm_weight`. They multiply the losses of their
    tokens. The sum is still divided once, by the number of all counted tokens. Logged losses are unweighted, but the
    total."""

    mtp_weight: float = 0.0
    """Weight of the divergence of the student's multi-token predictions from what the teacher predicts at the shifted
    positions, a mean over the heads. 0: they learn from the text only."""

    mix: SequenceMix | None = None
    """Both models see mixed sequences in training, and the loss is the divergence alone. None: the sequences."""

    cross_tokenizer: ChunkLikelihood | None = None
    """The teacher has another tokenizer: the divergence is of the likelihoods of the chunks of text that both cut
    alike, at the last token of each. None: the tokenizers are the same, and it is of the next token."""

    def __post_init__(self) -> None:
        if self.divergence is None and not self.logit_losses:
            raise ConfigError("expected a divergence or logit_losses, got neither: give at least one")
        if self.divergence is not None and not isinstance(self.divergence, Divergence):
            raise ConfigError(f"expected a Divergence, got {self.divergence!r}: build one, such as AlphaBeta(0.2, 0.7)")
        self._set("logit_losses", self._checked_losses())
        self._set("temperature_squared", flag("Objective", "temperature_squared", self.temperature_squared))
        if self.shared_vocab is not None:
            self._set("shared_vocab", whole_number("Objective", "shared_vocab", self.shared_vocab, least=1))
        self._set("temperature", positive_number("Objective", "temperature", self.temperature))
        for name in ("kd_weight", "lm_weight", "mtp_weight"):
            self._set(name, weight_number("Objective", name, getattr(self, name)))
        if self.tokens is not None and not isinstance(self.tokens, TokenSelection):
            raise ConfigError(
                f"expected tokens to be a TokenSelection, got {self.tokens!r}: TokenSelection('every', n=4)"
            )
        if self.logit_losses and self.tokens is not None and self.tokens.by_position:
            raise ConfigError(
                f"expected no logit_losses with tokens selected by position ({self.tokens}), got "
                f"{', '.join(self.names_of_logit_losses)}: they need the teacher's logits at every token; select by "
                "teacher_entropy or disagreement, or remove the losses"
            )
        if self.estimators and self.shared_vocab is not None:
            raise ConfigError(
                f"{', '.join(self.estimators)}: expected no shared_vocab, since the student draws from its whole "
                f"vocabulary, got {self.shared_vocab}; remove one of them"
            )
        reject_duplicate_pairs(self.hidden_losses)
        if self.kd_weight == 0 and self.lm_weight == 0:
            raise ConfigError("kd_weight and lm_weight must not both be 0; raise one of them")
        reject_duplicate_sources(self.sources)
        if self.mix is not None:
            self._check_mix()
        if self.mtp_weight:
            self._check_ahead()
        if self.cross_tokenizer is not None:
            self._check_cross_tokenizer()

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    def _check_mix(self) -> None:
        """Reject what depends on the tokens of one sequence."""
        found = {
            "lm_weight above 0": self.lm_weight != 0,
            "sources": bool(self.sources),
            "shared_vocab": self.shared_vocab is not None,
        }
        for name, is_on in found.items():
            if is_on:
                raise ConfigError(
                    f"mix: expected the divergence alone, got {name}: a mixed sequence has no labels, ids or source of "
                    "its own; set lm_weight to 0 and leave the others out, or remove mix"
                )

    def _check_ahead(self) -> None:
        """Reject what the divergence of multi-token predictions does not follow."""
        found = {
            "no divergence": self.divergence is None,
            "shared_vocab": self.shared_vocab is not None,
            "tokens": self.tokens is not None,
            "sources": bool(self.sources),
        }
        for name, is_on in found.items():
            if is_on:
                raise ConfigError(f"mtp_weight: expected a divergence of all tokens, got {name}; remove one of them")

    def _check_cross_tokenizer(self) -> None:
        """Reject what compares the models token by token."""
        found = {
            f"the losses {', '.join(self.names_of_logit_losses)}": bool(self.logit_losses),
            f"temperature {self.temperature:g}": self.temperature != 1,
            "temperature_squared": self.temperature_squared,
            "shared_vocab": self.shared_vocab is not None,
            "tokens": self.tokens is not None,
            "hidden_losses": bool(self.hidden_losses),
            "mtp_weight": self.mtp_weight > 0,
            "mix": self.mix is not None,
        }
        for name, is_on in found.items():
            if is_on:
                raise ConfigError(
                    f"cross_tokenizer: expected only a divergence, of the likelihoods of chunks, got {name}, which is "
                    "of tokens that both models have; remove it (the temperature is that of cross_tokenizer)"
                )

    def _checked_losses(self) -> tuple[tuple[float, LogitLoss], ...]:
        checked = []
        for weight, loss in self.logit_losses:
            if not isinstance(loss, LogitLoss):
                raise ConfigError(f"expected pairs of a weight and a LogitLoss, got {loss!r}: build one, AdaptiveKL()")
            if loss.name in _LOGGED:
                raise ConfigError(
                    f"expected a loss name that is not in use, got {loss.name!r}: rename {type(loss).__name__}"
                )
            checked.append((positive_number(f"logit_losses, {loss}", "weight", weight), loss))
        return tuple(checked)

    @property
    def only_watches(self) -> bool:
        """True if no token trains on the teacher, so that Megatron's own cross entropy is trained."""
        return self.kd_weight == 0 and not any(of.kd_weight for of in self.sources)

    def weights(self, ids: Tensor | None) -> tuple[float | Tensor, float | Tensor]:
        """Return the weights of the divergence and the cross entropy: numbers, or [b] fp64 if there are `sources`.

        Args:
            ids: [b] int64, source of each sequence; None if not known.
        """
        weights = self.kd_weight, self.lm_weight
        if not self.sources or ids is None:
            return weights
        kd_weight, lm_weight = (
            weights_by_sequence(self.sources, name, default, ids)
            for name, default in zip(("kd_weight", "lm_weight"), weights, strict=True)
        )
        return kd_weight, lm_weight

    @property
    def distillation_scale(self) -> float:
        """Factor of the divergence and the logit losses: T^2 or 1."""
        return self.temperature**2 if self.temperature_squared else 1.0

    @property
    def effective_divergence(self) -> Divergence:
        """Divergence of the pass that yields cross entropy and metrics; forward KL if `divergence` is None."""
        return self.divergence if self.divergence is not None else AlphaBeta(1.0, 0.0)

    @property
    def names_of_logit_losses(self) -> tuple[str, ...]:
        """Names in the log, in order; repeated names become "NAME 2" and so on."""
        names = [loss.name for _, loss in self.logit_losses]
        before = [names[:index].count(name) for index, name in enumerate(names)]
        return tuple(f"{name} {count + 1}" if count else name for name, count in zip(names, before, strict=True))

    @property
    def estimators(self) -> tuple[str, ...]:
        """Names of the losses that estimate a divergence from tokens that the student drew."""
        return tuple(loss.name for _, loss in self.logit_losses if loss.estimates is not None)

    def on_data(self) -> "Objective":
        """Return the objective on text that the student did not draw: estimators are what they estimate."""
        if not self.estimators:
            return self
        terms = [(weight, loss.estimates) for weight, loss in self.logit_losses if loss.estimates is not None]
        if self.divergence is not None:
            terms.insert(0, (1.0, self.divergence))
        kept = tuple((weight, loss) for weight, loss in self.logit_losses if loss.estimates is None)
        return replace(self, divergence=WeightedSum(terms), logit_losses=kept)

    def shares_part_of(self, vocab_size: int) -> bool:
        """Return True if a student of this vocabulary size has tokens that the teacher cannot read."""
        return self.shared_vocab is not None and self.shared_vocab < vocab_size


_OF_OBJECTIVE = ("temperature", "kd_weight", "lm_weight")


@dataclass(frozen=True)
class ScheduledObjective:
    """Objective with numbers that change between steps; all micro-batches of a step use the same values.

    At steps with `kd_weight` 0 the student trains on Megatron's own cross entropy, which needs logits. ``head: auto``
    then means ``materialized`` at all steps, so that the first step shows the memory of the run.

    Raises:
        ConfigError: for a name that is not a number of the objective or its divergence, an invalid value, or a step at
            which kd_weight and lm_weight are both 0.
    """

    objective: Objective
    """Constant part; scheduled numbers in it are ignored."""
    schedules: Mapping[str, Schedule]
    """By name: temperature, kd_weight, lm_weight, or a parameter of the divergence such as alpha, beta, scale."""

    def __post_init__(self) -> None:
        divergence: Any = self.objective.divergence
        has = [item.name for item in fields(divergence)] if is_dataclass(divergence) else []
        known = [*_OF_OBJECTIVE, *(name for name in has if type(getattr(divergence, name)) is float)]
        for name, schedule in self.schedules.items():
            if name not in known:
                raise ConfigError(f"expected schedules of {', '.join(known)} with {divergence}, got one of {name}")
            for _, value in schedule.points:
                if name == "temperature" and value <= 0:
                    raise ConfigError(f"temperature must be above 0 at every step, got {value}")
                if name in ("kd_weight", "lm_weight") and value < 0:
                    raise ConfigError(f"{name} must be at least 0 at every step, got {value}")
                if name not in _OF_OBJECTIVE:
                    replace(divergence, **{name: value})
        kd_weight, lm_weight = (
            Schedule.of(self.schedules.get(name, getattr(self.objective, name))) for name in ("kd_weight", "lm_weight")
        )
        if self.objective.mix is not None and any(value for _, value in lm_weight.points):
            raise ConfigError(f"mix: expected lm_weight 0 at every step, got {lm_weight}; set it to 0, or remove mix")
        if self.objective.cross_tokenizer is not None and "temperature" in self.schedules:
            raise ConfigError("cross_tokenizer: expected no schedule of the temperature, got one; remove it")
        if nothing := both_zero(kd_weight, lm_weight):
            raise ConfigError(f"kd_weight and lm_weight must not both be 0, but are {nothing}; raise one of them")
        for of in self.objective.sources:
            of_kd = kd_weight if of.kd_weight is None else Schedule.of(of.kd_weight)
            of_lm = lm_weight if of.lm_weight is None else Schedule.of(of.lm_weight)
            if nothing := both_zero(of_kd, of_lm):
                raise ConfigError(
                    f"source {of.name}: kd_weight and lm_weight must not both be 0, but are {nothing}; raise one, or "
                    "leave the dataset out of the blend"
                )

    @property
    def reaches_no_kd(self) -> bool:
        """True if `kd_weight` is 0 at some step, which then trains on Megatron's own cross entropy."""
        if any(of.kd_weight for of in self.objective.sources):
            return False
        return Schedule.of(self.schedules.get("kd_weight", self.objective.kd_weight)).lowest == 0

    def divergences(self) -> Iterator[Divergence]:
        """Yield the divergence at the corners of the region that its scheduled parameters are in during the run.

        Values between corners are on the line between two points of the schedules if these have the same kind and
        counts, and else in the box of all points.
        """
        of = {name: schedule for name, schedule in self.schedules.items() if name not in _OF_OBJECTIVE}
        values = [[value for _, value in schedule.points] for schedule in of.values()]
        forms = {(schedule.kind, schedule.by, *(count for count, _ in schedule.points)) for schedule in of.values()}
        divergence: Any = self.objective.effective_divergence
        for corner in zip(*values, strict=True) if len(forms) == 1 else product(*values):
            yield replace(divergence, **dict(zip(of, corner, strict=True))) if of else divergence

    def values(self, progress: Progress) -> dict[str, float]:
        """Return the scheduled values."""
        return {name: schedule(progress) for name, schedule in self.schedules.items()}

    def at(self, progress: Progress) -> Objective:
        """Return the objective at the given progress."""
        values = self.values(progress)
        divergence: Any = self.objective.divergence
        if of_divergence := {name: value for name, value in values.items() if name not in _OF_OBJECTIVE}:
            divergence = replace(divergence, **of_divergence)
        of_objective: dict[str, Any] = {name: values[name] for name in _OF_OBJECTIVE if name in values}
        return replace(self.objective, divergence=divergence, **of_objective)
