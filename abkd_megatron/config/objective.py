"""The objective and its execution, as the `distillation` section describes them."""

import logging

from abkd_megatron.config.schema import SCHEDULED, Config, DistillationConfig
from abkd_megatron.losses.objective import Objective, ScheduledObjective
from abkd_megatron.losses.schedule import Progress, Schedule
from abkd_megatron.vocab_parallel.execution import Execution

logger = logging.getLogger(__name__)


def make_objective(config: DistillationConfig) -> ScheduledObjective:
    """Build the objective.

    Raises:
        ConfigError: as `Objective` and `ScheduledObjective`.
    """
    given = {name: getattr(config, name) for name in SCHEDULED}
    first = {name: Schedule.of(number)(Progress()) for name, number in given.items()}
    objective = Objective(
        config.make_divergence(),
        temperature=first["temperature"],
        temperature_squared=config.temperature_squared,
        kd_weight=first["kd_weight"],
        lm_weight=first["lm_weight"],
        shared_vocab=config.shared_vocab,
        logit_losses=config.make_logit_losses(),
        tokens=config.tokens,
        hidden_losses=config.make_hidden_losses(),
    )
    return ScheduledObjective(objective, {name: it for name, it in given.items() if isinstance(it, Schedule)})


def make_execution(config: Config) -> Execution:
    """Build the execution.

    Kernel `auto` becomes `eager` on a GPU where triton would be compiled for other numbers at every step.
    """
    kd = config.distillation
    kernel = kd.kernel
    if kernel == "auto" and config.device == "cuda" and (gliding := kd.gliding("triton")):
        logger.info("eager kernel: triton would be compiled at every step for another %s", ", ".join(gliding))
        kernel = "eager"
    return Execution(
        head=kd.head,
        chunk_tokens=kd.chunk_tokens,
        gradient_in_place=kd.gradient_in_place,
        kernel=kernel,
        diagnostics=kd.diagnostics,
    )
