"""Combined 1F1B, which runs a plan of the model's layers in place of its forward."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from abkd_megatron.errors import ConfigError
from abkd_megatron.losses.objective import Objective
from abkd_megatron.teacher.model import Model, takes_output_processor


class PlannedForward:
    """Runs the teacher where a plan of a micro-batch is built, and its head in the plan's last node.

    A forward of the model, as in validation, is not changed.

    Args:
        model: a GPTModel of one pipeline stage, whose `build_schedule_plan` is replaced on the instance.
        run_teacher: called with (model, args, kwargs) of a micro-batch.
        context_of: called after it with (args, kwargs); returns what `process` gets as `context`, or None.
        process: the head, see `process_output`.
    """

    def __init__(
        self,
        model: Model,
        run_teacher: Callable[[Model, tuple, dict[str, Any]], None],
        context_of: Callable[[tuple, dict[str, Any]], Any],
        process: Callable[..., Tensor],
    ) -> None:
        self._model, self._build = model, model.build_schedule_plan
        self._run_teacher, self._context_of, self._process = run_teacher, context_of, process
        self._signature = inspect.signature(self._build)
        model.build_schedule_plan = self._with_teacher

    def remove(self) -> None:
        """Leave the model as it was."""
        del self._model.build_schedule_plan

    def _with_teacher(self, *args: Any, **kwargs: Any) -> Any:
        batch = dict(self._signature.bind_partial(*args, **kwargs).arguments)
        self._run_teacher(self._model, (), batch)
        if (context := self._context_of((), batch)) is not None:
            batch |= {"output_processor": self._process, "output_processor_context": context}
        return self._build(**batch)


def is_planned(model: Model) -> bool:
    """Return whether Megatron trains the model by plans."""
    return bool(model.config.overlap_moe_expert_parallel_comm)


def check_planned(
    chunks: Sequence[Model], objective: Objective, pg_collection: ProcessGroupCollection, num_teachers: int
) -> None:
    """Reject combined 1F1B with what was not run with it.

    Args:
        chunks: this rank's chunks of the student.
        objective: of the job.
        pg_collection: the student's process groups; `tp`, `pp` and `cp` are used.
        num_teachers: different ones.

    Raises:
        ConfigError: naming what it does not go with.
    """
    model = chunks[0]
    if not is_planned(model):
        return
    sizes = {name: group.size() for name in ("tp", "pp", "cp") if (group := getattr(pg_collection, name, None))}
    found = {
        **{f"{name.upper()} {size}": size > 1 for name, size in sizes.items()},
        "a HybridModel": not takes_output_processor(model),
        "delay_wgrad_compute": bool(model.config.delay_wgrad_compute),
        "multi-token prediction": bool(model.config.mtp_num_layers),
        "hidden_losses": bool(objective.hidden_losses),
        "mix": objective.mix is not None,
        "cross_tokenizer": objective.cross_tokenizer is not None,
        "several teachers": num_teachers > 1,
    }
    for name, is_on in found.items():
        if is_on:
            raise ConfigError(
                "student: combined 1F1B is supported on one pipeline stage of a GPTModel and with losses on logits, "
                f"got {name}; remove it, or overlap-moe-expert-parallel-comm"
            )
