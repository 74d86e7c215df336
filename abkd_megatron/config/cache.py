"""Keys of the section `cache`, and the rules of a teacher cache. Does not import megatron."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from abkd_megatron.losses.schedule import Schedule

if TYPE_CHECKING:
    from abkd_megatron.config.schema import Config

PRECISIONS = ("fp16", "fp32")
ON_MISS = ("error", "lm")
DEFAULT_TOP_K = 64


@dataclass(kw_only=True, slots=True)
class CacheConfig:
    """The teacher cache that the job `cache` writes."""

    dir: str | None = None
    """Directory of the cache; an existing one of the same teacher and form is extended."""
    top_k: int | None = None
    """Log-probabilities kept per token; None for 64, or for as many as `bytes_per_token` holds."""
    bytes_per_token: int | None = None
    """Largest size of a token's record, in place of `top_k`."""
    draws: int = 0
    """Tokens drawn per token from those that are not kept, by their probability."""
    precision: str = "fp16"
    """Of the log-probabilities: ``fp16`` or ``fp32``."""
    sources: list[str] = field(default_factory=list)
    """Positions or path prefixes of the datasets of a blend whose samples are written; none for all samples."""
    shard_mib: int = 256
    """Size of a file in MiB. Every writing rank holds one in memory, and loses it if it is killed."""


def cache_problems(config: "Config", job: str) -> Iterator[tuple[str, str]]:
    """Yield (key, what was expected and found) of each setting of a cache that is invalid.

    Args:
        config: of the job.
        job: see `Config.check`.
    """
    cache, kd = config.cache, config.distillation.expanded()
    if cache.precision not in PRECISIONS:
        yield "cache.precision", f"expected {' or '.join(PRECISIONS)}, got {cache.precision!r}"
    for name in ("top_k", "bytes_per_token", "shard_mib"):
        number = getattr(cache, name)
        if number is not None and number < 1:
            yield f"cache.{name}", f"expected 1 or more, got {number}"
    if cache.draws < 0:
        yield "cache.draws", f"expected 0 or more, got {cache.draws}"
    if cache.top_k is not None and cache.bytes_per_token is not None:
        yield "cache.bytes_per_token", f"expected it or cache.top_k, got both ({cache.top_k}); remove one"
    if kd.on_miss not in ON_MISS:
        yield "distillation.on_miss", f"expected {' or '.join(ON_MISS)}, got {kd.on_miss!r}"
    if job == "distill" and kd.cache is not None:
        yield from _problems_of_reading(config)
    if job != "cache":
        return
    if kd.cache is not None:
        yield "distillation.cache", f"expected cache.dir for the job `cache`, got {kd.cache}; remove it"
    if not cache.dir:
        yield "cache.dir", "expected an output directory, got none; set it"
    if isinstance(kd.temperature, Schedule):
        yield (
            "distillation.temperature",
            f"expected one number, since a cache is of one temperature, got {kd.temperature}; remove the schedule",
        )
    if config.teacher.weights == "int8":
        yield (
            "teacher.weights",
            "expected device or host, since a cache is known by the teacher's checkpoint, got int8; change it",
        )
    if kd.shared_vocab is not None:
        yield (
            "distillation.shared_vocab",
            f"expected none, since a cache is of one vocabulary, got {kd.shared_vocab}; use a live teacher",
        )


def _problems_of_reading(config: "Config") -> Iterator[tuple[str, str]]:
    """Yield what conflicts with a cache in place of a teacher."""
    teacher = config.teacher
    given = [f"teacher.{name}" for name in teacher.megatron]
    given += [
        f"teacher.{name.replace('_', '-')}" for name in ("load", "ckpt_step") if getattr(teacher, name) is not None
    ]
    given += ["teacher.declared"] if teacher.declared else []
    given += ["teacher.weights"] if teacher.weights != "device" else []
    if given:
        yield (
            "distillation.cache",
            f"expected a cache or a live teacher, got both: {', '.join(given)}; a cache has its own teacher: remove "
            "the section `teacher`, or distillation.cache",
        )
    if config.distillation.diagnostics:
        yield (
            "distillation.diagnostics",
            "expected false with distillation.cache: diagnostics need the teacher's logits",
        )
