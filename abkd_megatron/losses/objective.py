"""What the student is trained on."""

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, fields, is_dataclass, replace
from typing import Any

from abkd_megatron.errors import ConfigError
from abkd_megatron.losses.alpha_beta import AlphaBeta
from abkd_megatron.losses.base import Divergence, LogitLoss
from abkd_megatron.losses.hidden import HiddenLoss, refuse_twins
from abkd_megatron.losses.schedule import Progress, Schedule, both_zero
from abkd_megatron.losses.selection import TokenSelection
from abkd_megatron.validation import flag, positive_number, weight_number, whole_number

# What "NAME loss" stands for already.
_LOGGED = ("lm", "kd", "total", "teacher lm")


@dataclass(frozen=True)
class Objective:
    """What the student is trained on, per token: lm_weight * CE + kd_weight * (D(teacher || student) + sum w_i L_i).

    L_i are logit losses, which are no sums over the vocabulary of terms of one column each; mostly there are none.

    A `kd_weight` of 0 only watches: the student trains on Megatron's own cross entropy, bit for bit as without a
    teacher, and the divergence is reported. (Unless there are `hidden_losses`, which train nevertheless.)
    """

    divergence: Divergence | None
    """None if there are only logit losses."""
    _: KW_ONLY
    temperature: float = 1.0
    """T: divides both models' logits in the divergence and the logit losses. The cross entropy and the metrics stay at
    temperature 1."""
    temperature_squared: bool = False
    """Multiply the divergence and the logit losses by T^2, as Hinton et al. (arXiv 1503.02531) do, so that their
    gradient does not fall off as 1/T^2. `kd loss` is logged with the factor."""
    kd_weight: float = 1.0
    lm_weight: float = 1.0
    shared_vocab: int | None = None
    """N, where the models' vocabularies differ but ids 0 .. N - 1 are the same tokens to both. The divergence and the
    metrics are then over these alone, each model's distribution renormalized; the cross entropy stays over the
    student's whole vocabulary. Where the student has more than N tokens the teacher cannot read the others: from the
    first of them in a sequence on, all but the cross entropy is 0. A label of N or above has a teacher's cross entropy
    of 0 and a divergence like any other. None: the vocabularies are one."""
    logit_losses: tuple[tuple[float, LogitLoss], ...] = ()
    """Pairs of a weight and a loss, each a pass of its own over logits that exist. Those of several tokens together
    take these from one sequence, and of it from what this rank holds with context parallelism."""
    tokens: TokenSelection | None = None
    """The tokens whose divergence is trained; it is 0 at the others, and still divided by the number of all. None: all
    of them."""
    hidden_losses: tuple[HiddenLoss, ...] = ()
    """Losses between layers, added with their own weights, whatever `kd_weight` is; each pair of layers once."""

    def __post_init__(self) -> None:
        if self.divergence is None and not self.logit_losses:
            raise ConfigError("expected a divergence or logit_losses, got neither: there is nothing to distill with")
        if self.divergence is not None and not isinstance(self.divergence, Divergence):
            raise ConfigError(f"expected a Divergence, got {self.divergence!r}: build one, AlphaBeta(0.2, 0.7)")
        self._set("logit_losses", self._checked_losses())
        self._set("temperature_squared", flag("Objective", "temperature_squared", self.temperature_squared))
        if self.shared_vocab is not None:
            self._set("shared_vocab", whole_number("Objective", "shared_vocab", self.shared_vocab, least=1))
        self._set("temperature", positive_number("Objective", "temperature", self.temperature))
        for name in ("kd_weight", "lm_weight"):
            self._set(name, weight_number("Objective", name, getattr(self, name)))
        if self.tokens is not None and not isinstance(self.tokens, TokenSelection):
            raise ConfigError(
                f"expected tokens to be a TokenSelection, got {self.tokens!r}: TokenSelection('every', n=4)"
            )
        if self.logit_losses and self.tokens is not None and self.tokens.by_position:
            raise ConfigError(
                f"a selection by position ({self.tokens}) spares the teacher logits that "
                f"{', '.join(self.names_of_logit_losses)} take; select by what the models say, or leave these out"
            )
        refuse_twins(self.hidden_losses)
        if self.kd_weight == 0 and self.lm_weight == 0:
            raise ConfigError("kd_weight and lm_weight are both 0, so there is nothing to train on; raise one of them")

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    def _checked_losses(self) -> tuple[tuple[float, LogitLoss], ...]:
        checked = []
        for weight, loss in self.logit_losses:
            if not isinstance(loss, LogitLoss):
                raise ConfigError(f"expected pairs of a weight and a LogitLoss, got {loss!r}: build one, AdaptiveKL()")
            if loss.name in _LOGGED:
                raise ConfigError(
                    f"a loss named {loss.name!r} is logged already; give {type(loss).__name__} another name"
                )
            checked.append((positive_number(f"logit_losses, {loss}", "weight", weight), loss))
        return tuple(checked)

    @property
    def distillation_scale(self) -> float:
        """The factor of the divergence and the logit losses: T^2 or 1."""
        return self.temperature**2 if self.temperature_squared else 1.0

    @property
    def effective_divergence(self) -> Divergence:
        """What the pass that yields the cross entropy and the metrics is over: forward KL if there is no divergence."""
        return self.divergence if self.divergence is not None else AlphaBeta(1.0, 0.0)

    @property
    def names_of_logit_losses(self) -> tuple[str, ...]:
        """In their order; of one name the second is "NAME 2", and so on."""
        names = [loss.name for _, loss in self.logit_losses]
        before = [names[:index].count(name) for index, name in enumerate(names)]
        return tuple(f"{name} {count + 1}" if count else name for name, count in zip(names, before, strict=True))

    def shares_part_of(self, vocab_size: int) -> bool:
        """Whether a student of that many tokens has some that the teacher does not know."""
        return self.shared_vocab is not None and self.shared_vocab < vocab_size


_OF_OBJECTIVE = ("temperature", "kd_weight", "lm_weight")


@dataclass(frozen=True)
class ScheduledObjective:
    """An objective of which some numbers change from step to step; within one, all micro-batches have the same.

    Where a schedule takes `kd_weight` to 0 the student trains on Megatron's own cross entropy, of logits. ``head:
    auto`` is then ``materialized`` at all steps: what memory the run takes shows in the first.

    The compiled and the triton kernel have the divergence's numbers compiled in: with those they suit schedules that
    jump, not ones that glide.

    Raises:
        ConfigError: for a name that neither the objective nor its divergence has as a number, a value that either
            refuses, or a step at which there is nothing to train on.
    """

    objective: Objective
    """What does not change; of what does, the number here is not used."""
    schedules: Mapping[str, Schedule]
    """By name: temperature, kd_weight, lm_weight, and any number of the divergence: alpha, beta, scale."""

    def __post_init__(self) -> None:
        divergence: Any = self.objective.divergence
        has = [item.name for item in fields(divergence)] if is_dataclass(divergence) else []
        known = [*_OF_OBJECTIVE, *(name for name in has if type(getattr(divergence, name)) is float)]
        for name, schedule in self.schedules.items():
            if name not in known:
                raise ConfigError(f"expected schedules of {', '.join(known)} with {divergence}, got one of {name}")
            for _, value in schedule.points:
                if name == "temperature" and value <= 0:
                    raise ConfigError(f"temperature must be positive at every step, got {value}")
                if name in ("kd_weight", "lm_weight") and value < 0:
                    raise ConfigError(f"{name} must be at least 0 at every step, got {value}")
                if name not in _OF_OBJECTIVE:
                    replace(divergence, **{name: value})
        kd_weight, lm_weight = (
            Schedule.of(self.schedules.get(name, getattr(self.objective, name))) for name in ("kd_weight", "lm_weight")
        )
        if nothing := both_zero(kd_weight, lm_weight):
            raise ConfigError(f"kd_weight and lm_weight are both 0 {nothing}, so there is nothing to train on")

    @property
    def reaches_no_kd(self) -> bool:
        """Whether `kd_weight` is 0 at some step, which then trains on Megatron's own cross entropy."""
        return Schedule.of(self.schedules.get("kd_weight", self.objective.kd_weight)).lowest == 0

    def values(self, progress: Progress) -> dict[str, float]:
        """What changes, at that progress."""
        return {name: schedule(progress) for name, schedule in self.schedules.items()}

    def at(self, progress: Progress) -> Objective:
        """The objective at that progress."""
        values = self.values(progress)
        divergence: Any = self.objective.divergence
        if of_divergence := {name: value for name, value in values.items() if name not in _OF_OBJECTIVE}:
            divergence = replace(divergence, **of_divergence)
        of_objective: dict[str, Any] = {name: values[name] for name in _OF_OBJECTIVE if name in values}
        return replace(self.objective, divergence=divergence, **of_objective)
