"""The teacher beside the student: built, attached, run, and turned into a loss."""

from abkd_megatron.distillation.attach import Attachment, attach
from abkd_megatron.distillation.objective import Objective
from abkd_megatron.distillation.teacher import Teacher, TeacherCheckpoint, build_teacher

__all__ = ["Attachment", "Objective", "Teacher", "TeacherCheckpoint", "attach", "build_teacher"]
