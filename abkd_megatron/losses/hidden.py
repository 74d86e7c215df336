"""A loss between one layer of the student and one of the teacher: what a user says of it; no torch."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from abkd_megatron.errors import ConfigError
from abkd_megatron.validation import flag, positive_number, whole_number

KINDS = ("cosine", "mse")


@dataclass(frozen=True)
class HiddenLoss:
    """The distance of the hidden states behind two layers, per token.

    With t the teacher's hidden state, H numbers, and s the student's or, projected, W s:
    ``mse`` is sum (s - t)^2 / H, ``cosine`` is 1 - <s, t> / (|s| |t|), both in fp32.

    Raises:
        ConfigError: for a layer below 1, an unknown loss or a weight that is not above 0.
    """

    student_layer: int
    """Counted over the whole model, from 1; what is compared is the layer's output, before any final norm."""
    teacher_layer: int
    loss: str
    """``cosine`` or ``mse``."""
    weight: float = 1.0
    projector: bool = True
    """Whether the student's hidden state goes through a learned matrix [teacher's hidden size, student's], which needs
    no equal sizes."""

    def __post_init__(self) -> None:
        for name in ("student_layer", "teacher_layer"):
            object.__setattr__(self, name, whole_number("a hidden loss", name, getattr(self, name), least=1))
        if self.loss not in KINDS:
            raise ConfigError(f"expected loss to be one of {', '.join(KINDS)}, got {self.loss!r}")
        object.__setattr__(self, "weight", positive_number("a hidden loss", "weight", self.weight))
        object.__setattr__(self, "projector", flag("a hidden loss", "projector", self.projector))

    @property
    def pair(self) -> str:
        """Both layers, student's first: the name of the projector."""
        return f"{self.student_layer}-{self.teacher_layer}"

    @property
    def name(self) -> str:
        """What it is logged under."""
        return f"hidden loss {self.pair}"


def refuse_twins(losses: Sequence[HiddenLoss]) -> None:
    """Refuse two losses of one pair of layers, for they would have one name and one projector.

    Raises:
        ConfigError: naming the pair.
    """
    for pair, count in Counter(loss.pair for loss in losses).items():
        if count > 1:
            raise ConfigError(f"expected each pair of layers once, got {pair} {count} times; remove all but one")
