"""Knowledge distillation inside Megatron-Core training.

Names are imported when they are first used: the losses need torch only, the rest needs megatron-core.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from abkd_megatron.hosts.script import add_kd_arguments, distill
    from abkd_megatron.hosts.script_cache import cached
    from abkd_megatron.losses.alpha_beta import AlphaBeta
    from abkd_megatron.losses.hidden import HiddenLoss
    from abkd_megatron.losses.objective import Objective, ScheduledObjective
    from abkd_megatron.losses.schedule import Progress, Schedule
    from abkd_megatron.losses.selection import TokenSelection
    from abkd_megatron.losses.todi import ToDi
    from abkd_megatron.student.attach import Attachment, attach
    from abkd_megatron.student.projectors import add_projectors
    from abkd_megatron.teacher.build import Teacher, build_teacher
    from abkd_megatron.teacher.checkpoint import TeacherCheckpoint
    from abkd_megatron.vocab_parallel.execution import Execution
    from abkd_megatron.vocab_parallel.logits import vocab_parallel_divergence

__version__ = "0.1.0"

_HOMES = {
    "AlphaBeta": "losses.alpha_beta",
    "Attachment": "student.attach",
    "Execution": "vocab_parallel.execution",
    "HiddenLoss": "losses.hidden",
    "Objective": "losses.objective",
    "Progress": "losses.schedule",
    "Schedule": "losses.schedule",
    "ScheduledObjective": "losses.objective",
    "Teacher": "teacher.build",
    "TeacherCheckpoint": "teacher.checkpoint",
    "ToDi": "losses.todi",
    "TokenSelection": "losses.selection",
    "add_kd_arguments": "hosts.script",
    "add_projectors": "student.projectors",
    "attach": "student.attach",
    "build_teacher": "teacher.build",
    "cached": "hosts.script_cache",
    "distill": "hosts.script",
    "vocab_parallel_divergence": "vocab_parallel.logits",
}

__all__ = [
    "AlphaBeta",
    "Attachment",
    "Execution",
    "HiddenLoss",
    "Objective",
    "Progress",
    "Schedule",
    "ScheduledObjective",
    "Teacher",
    "TeacherCheckpoint",
    "ToDi",
    "TokenSelection",
    "__version__",
    "add_kd_arguments",
    "add_projectors",
    "attach",
    "build_teacher",
    "cached",
    "distill",
    "vocab_parallel_divergence",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
