"""The teacher beside the student: built, attached, run, and turned into a loss."""

from abkd_megatron.distillation.attach import Attachment, attach
from abkd_megatron.distillation.checkpoint import TeacherCheckpoint
from abkd_megatron.distillation.hidden import add_projectors
from abkd_megatron.distillation.objective import Objective, ScheduledObjective
from abkd_megatron.distillation.teacher import Teacher, build_teacher
from abkd_megatron.hidden_loss import HiddenLoss
from abkd_megatron.schedule import Progress, Schedule
from abkd_megatron.selection import TokenSelection

__all__ = [
    "Attachment",
    "HiddenLoss",
    "Objective",
    "Progress",
    "Schedule",
    "ScheduledObjective",
    "Teacher",
    "TeacherCheckpoint",
    "TokenSelection",
    "add_projectors",
    "attach",
    "build_teacher",
]
