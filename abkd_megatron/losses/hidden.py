"""Configuration of a loss between a student layer and a teacher layer; imports no torch."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from abkd_megatron.errors import ConfigError
from abkd_megatron.validation import flag, positive_number, whole_number

KINDS = ("cosine", "mse")


@dataclass(frozen=True)
class HiddenLoss:
    """Per-token distance between the outputs of a student layer and a teacher layer.

    With t the teacher's hidden state of size H, and s the student's (or W s if projected), ``mse`` is
    sum (s - t)^2 / H and ``cosine`` is 1 - <s, t> / (|s| |t|). Both are computed in fp32.

    Raises:
        ConfigError: for a layer below 1, an unknown loss or a weight not above 0.
    """

    student_layer: int
    """Layer number over the whole model, from 1. Its output is compared before any final norm."""
    teacher_layer: int
    loss: str
    """``cosine`` or ``mse``."""
    weight: float = 1.0
    projector: bool = True
    """Apply a learned matrix [teacher hidden size, student hidden size] to the student's hidden state. Required if the
    sizes differ."""

    def __post_init__(self) -> None:
        for name in ("student_layer", "teacher_layer"):
            object.__setattr__(self, name, whole_number("a hidden loss", name, getattr(self, name), least=1))
        if self.loss not in KINDS:
            raise ConfigError(f"expected loss to be one of {', '.join(KINDS)}, got {self.loss!r}")
        object.__setattr__(self, "weight", positive_number("a hidden loss", "weight", self.weight))
        object.__setattr__(self, "projector", flag("a hidden loss", "projector", self.projector))

    @property
    def pair(self) -> str:
        """Name of the projector: student layer, teacher layer."""
        return f"{self.student_layer}-{self.teacher_layer}"

    @property
    def name(self) -> str:
        """Name in the log."""
        return f"hidden loss {self.pair}"


def reject_duplicate_pairs(losses: Sequence[HiddenLoss]) -> None:
    """Reject two losses for one pair of layers: they would share a name and a projector.

    Raises:
        ConfigError: with the pair.
    """
    for pair, count in Counter(loss.pair for loss in losses).items():
        if count > 1:
            raise ConfigError(f"expected each pair of layers once, got {pair} {count} times; remove all but one")
