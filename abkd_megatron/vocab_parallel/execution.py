"""Execution options of a loss: how it is computed, not which loss it is."""

from dataclasses import dataclass, replace

from abkd_megatron import kernels
from abkd_megatron.errors import ConfigError
from abkd_megatron.losses.objective import Objective, ScheduledObjective
from abkd_megatron.validation import flag, whole_number

HEADS = ("auto", "fused", "materialized")


@dataclass(frozen=True, kw_only=True)
class Execution:
    """Execution options of an objective. They do not change what is trained.

    Raises:
        ConfigError: for an unknown head or kernel, or a chunk of less than one token.
    """

    head: str = "auto"
    """LM head: ``materialized`` uses Megatron's output layers; ``fused`` computes logits and loss per chunk of tokens;
    ``auto`` is fused where the output layers allow it and it saves memory."""
    chunk_tokens: int | None = None
    """Tokens per chunk of the fused head. None: sized to the device and its memory."""
    gradient_in_place: bool = False
    """Overwrite the student's logits with their gradient in backward. Megatron does not read them again; a custom hook
    on the output layer might. The fused head always does so."""
    kernel: str | None = None
    """One of `kernels.CHOICES`. None: the process's choice, set by `kernels.use`."""
    diagnostics: bool = False
    """Compute `vocab_parallel.diagnostics` in validation. Validation then materializes logits whatever `head` is;
    training does not change."""

    def __post_init__(self) -> None:
        if self.head not in HEADS:
            raise ConfigError(f"expected head to be one of {', '.join(HEADS)}, got {self.head!r}")
        if self.kernel is not None and self.kernel not in kernels.CHOICES:
            raise ConfigError(f"expected kernel to be one of {', '.join(kernels.CHOICES)}, got {self.kernel!r}")
        for name in ("gradient_in_place", "diagnostics"):
            object.__setattr__(self, name, flag("Execution", name, getattr(self, name)))
        if self.chunk_tokens is not None:
            chunk_tokens = whole_number("Execution", "chunk_tokens", self.chunk_tokens, least=1)
            object.__setattr__(self, "chunk_tokens", chunk_tokens)

    def resolve(self, objective: Objective | ScheduledObjective) -> "Execution":
        """Return the options for this objective: ``materialized`` if some step needs Megatron's own loss.

        Raises:
            ConfigError: for ``fused`` with an objective that needs logits.
        """
        scheduled = objective if isinstance(objective, ScheduledObjective) else ScheduledObjective(objective, {})
        objective = scheduled.objective
        if self.head == "fused" and objective.logit_losses:
            raise ConfigError(
                f"head: fused has no logits for {', '.join(objective.names_of_logit_losses)}; set head: auto, or "
                "use only divergences"
            )
        if not scheduled.reaches_no_kd:
            return self
        if self.head == "fused":
            raise ConfigError(
                "head: fused has no logits for Megatron's own cross entropy, which kd_weight 0 trains on; set head: "
                "auto, or a kd_weight above 0 at every step"
            )
        # If kd_weight is scheduled, the first step then shows the memory of the run.
        return replace(self, head="materialized") if "kd_weight" in scheduled.schedules else self
