"""The teacher beside the student: built, attached, run, and turned into a loss."""

from abkd_megatron.distillation.attach import Attachment, attach
from abkd_megatron.distillation.objective import Objective, ScheduledObjective
from abkd_megatron.distillation.teacher import Teacher, TeacherCheckpoint, build_teacher
from abkd_megatron.schedule import Progress, Schedule
from abkd_megatron.selection import TokenSelection

__all__ = [
    "Attachment",
    "Objective",
    "Progress",
    "Schedule",
    "ScheduledObjective",
    "Teacher",
    "TeacherCheckpoint",
    "TokenSelection",
    "attach",
    "build_teacher",
]
