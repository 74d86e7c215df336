"""What the student is trained on."""

import math
from dataclasses import dataclass

from abkd_megatron.divergences import Divergence
from abkd_megatron.errors import ConfigError

HEADS = ("auto", "fused", "materialised")


@dataclass(frozen=True)
class Objective:
    """What the student is trained on, per token: lm_weight * CE + kd_weight * D(teacher || student).

    A `kd_weight` of 0 only watches: the student trains on Megatron's own cross entropy, bit for bit as without a
    teacher, and the divergence is reported.
    """

    divergence: Divergence
    temperature: float = 1.0
    """Divides both models' logits inside the divergence. The cross entropy and the metrics stay at 1; the divergence
    is not multiplied by temperature^2."""
    kd_weight: float = 1.0
    lm_weight: float = 1.0
    head: str = "auto"
    """How logits are made: ``materialised``, by Megatron's output layers; ``fused``, a chunk of tokens at a time and
    never all of them; ``auto``, fused where the output layers allow it and memory is saved."""
    chunk_tokens: int | None = None
    """Tokens of a chunk of the fused head; None chooses by device and free memory."""
    gradient_in_place: bool = False
    """Whether backward overwrites the student's logits with their gradient. Nothing of Megatron reads them again; a
    hook of the user's on the output layer might. The fused head does so anyway."""
    shared_vocab: int | None = None
    """N, where the models' vocabularies differ but ids 0 .. N - 1 are the same tokens to both. The divergence and the
    metrics are then over these alone, each model's distribution renormalised; the cross entropy stays over the
    student's whole vocabulary. Where the student has more than N tokens the teacher cannot read the others: from the
    first of them in a sequence on, all but the cross entropy is 0. A label of N or above has a teacher's cross entropy
    of 0 and a divergence like any other. None: the vocabularies are one."""

    def __post_init__(self) -> None:
        if self.head not in HEADS:
            raise ConfigError(f"expected head to be one of {', '.join(HEADS)}, got {self.head!r}")
        if self.chunk_tokens is not None and self.chunk_tokens < 1:
            raise ConfigError(f"expected chunk_tokens to be at least 1, got {self.chunk_tokens}; or leave it out")
        if self.shared_vocab is not None and self.shared_vocab < 1:
            raise ConfigError(f"expected shared_vocab to be at least 1, got {self.shared_vocab}; or leave it out")
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise ConfigError(f"temperature must be a positive number, got {self.temperature}")
        for name in ("kd_weight", "lm_weight"):
            weight = getattr(self, name)
            if not (math.isfinite(weight) and weight >= 0):
                raise ConfigError(f"{name} must be a number of at least 0, got {weight}")
        if self.head == "fused" and self.kd_weight == 0:
            raise ConfigError(
                "head: fused has no logits for Megatron's own cross entropy, which kd_weight 0 trains on; "
                "give head: auto"
            )
        if self.kd_weight == 0 and self.lm_weight == 0:
            raise ConfigError("kd_weight and lm_weight are both 0, so there is nothing to train on; raise one of them")

    def shares_part_of(self, vocab_size: int) -> bool:
        """Whether a student of that many tokens has some that the teacher does not know."""
        return self.shared_vocab is not None and self.shared_vocab < vocab_size
