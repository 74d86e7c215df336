"""The teacher beside the student: built, attached, run, and turned into a loss."""

from abkd_megatron.distillation.attach import Attachment, attach
from abkd_megatron.distillation.objective import Objective
from abkd_megatron.distillation.teacher import TeacherCheckpoint, build_teacher

__all__ = ["Attachment", "Objective", "TeacherCheckpoint", "attach", "build_teacher"]
