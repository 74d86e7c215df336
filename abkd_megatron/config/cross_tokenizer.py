"""Rules of a teacher with another tokenizer. Does not import megatron."""

from argparse import Namespace
from collections.abc import Iterator
from typing import TYPE_CHECKING

from abkd_megatron.errors import ConfigError

if TYPE_CHECKING:
    from abkd_megatron.config.schema import Config

_KEY = "distillation.cross_tokenizer"


def cross_tokenizer_problems(config: "Config", job: str) -> Iterator[tuple[str, str]]:
    """Yield (key, what was expected and found) of each setting that does not fit a teacher with another tokenizer.

    Args:
        config: of the job.
        job: see `Config.check`.
    """
    kd = config.distillation
    if kd.cross_tokenizer is None:
        return
    if job == "cache":
        yield _KEY, f"expected none in the job `{job}`, which compares tokens that both models have; remove it"
    given = {name.replace("_", "-") for name, value in config.teacher.megatron.items() if value is not None}
    if job == "distill" and kd.cache is None and "tokenizer-model" not in given:
        yield _KEY, "expected teacher.tokenizer-model as well, the teacher's tokenizer, got none; set it"
    found = {
        "teachers": (bool(config.teachers), "their tokens are the student's"),
        "distillation.cache": (kd.cache is not None, "a cache has records of the student's tokens"),
        "distillation.on_policy": (kd.on_policy is not None, "own text is not aligned"),
        "teacher.weights: int8": (
            config.teacher.weights == "int8",
            "its rounding is measured on tokens of both models",
        ),
        "distillation.gradient_in_place": (kd.gradient_in_place, "the logits are read by two terms"),
        "distillation.diagnostics": (kd.diagnostics, "they compare the models token by token"),
        "distillation.head: fused": (kd.head == "fused", "a chunk's weight is known only after all of its tokens"),
    }
    for name, (is_on, why) in found.items():
        if is_on:
            yield _KEY, f"expected no {name}: {why}; remove one of them"


def check_cross_tokenizer(student: Namespace, teacher: Namespace) -> None:
    """Reject layouts and data for which texts are not aligned.

    Args:
        student: Megatron's validated arguments.
        teacher: the same.

    Raises:
        ConfigError: naming the argument.
    """

    def rejected(name: str, expected: str, got: object, remedy: str) -> ConfigError:
        return ConfigError(f"{_KEY}: expected {name} {expected}, got {got}; {remedy}")

    for who, args in (("megatron", student), ("teacher", teacher)):
        for name in ("pipeline_model_parallel_size", "context_parallel_size"):
            if (size := getattr(args, name)) > 1:
                remedy = "use tensor and data parallelism, which are supported"
                raise rejected(f"{who}.{name.replace('_', '-')}", "1", size, remedy)
    tensor, theirs = student.tensor_model_parallel_size, teacher.tensor_model_parallel_size
    if tensor != theirs:
        remedy = "remove the teacher's tensor parallelism"
        raise rejected("teacher.tensor-model-parallel-size", f"{tensor}, the student's", theirs, remedy)
    if student.sequence_parallel != teacher.sequence_parallel:
        remedy = "remove it from `teacher:`"
        raise rejected("teacher.sequence-parallel", "as the student's", teacher.sequence_parallel, remedy)
    for name in ("sft", "dataloader_inter_document_masking", "reset_position_ids", "reset_attention_mask", "mock_data"):
        if getattr(student, name):
            remedy = "remove it: a row is one sequence of text, which the teacher reads as the student does"
            raise rejected(f"megatron.{name.replace('_', '-')}", "off", "it", remedy)
    if student.mtp_num_layers:
        raise rejected("megatron.mtp-num-layers", "none", student.mtp_num_layers, "remove it")
