"""Keys of the section `validation`. Does not import megatron."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from abkd_megatron.errors import brief

if TYPE_CHECKING:
    from abkd_megatron.config.schema import Config

# Numbers by which a checkpoint is best where they are lowest, without and with a teacher, and from a cache.
_LM, _KL = "lm loss", "kl to teacher"
_OF_CACHE = ("bucketed kl to teacher", "sampled kl to teacher")  # without draws, and with them
# Megatron's arguments that conflict with `sets`.
_CONFLICTS = ("valid-data-path", "test-data-path", "per-split-data-args-path", "mock-data", "sft")


@dataclass(kw_only=True, slots=True)
class ValidationConfig:
    """What a job validates on, and when."""

    sets: dict[str, str] = field(default_factory=dict)
    """{name: prefix} of indexed data sets. Each validation reads all their rows, once, in place of `eval-iters` batches
    of the validation split; the test split is not read."""
    rows: int | None = None
    """At most so many rows of each set; None for all."""
    at_start: bool = False
    """Validate once before the first step of a run."""
    best: str | None = None
    """Number that chooses the student to keep in `<save>/best`, where it is lowest: ``lm loss``, ``kl to teacher`` or,
    with a teacher cache, ``bucketed kl to teacher``; of one set after its name."""


def validation_problems(config: "Config", job: str) -> Iterator[tuple[str, str]]:
    """Yield (key, what was expected and found) of each setting of `validation` that is invalid.

    Args:
        config: of the job.
        job: see `Config.check`.
    """
    of, names = config.validation, list(config.validation.sets)
    if any(not name.strip() or not name.isprintable() or "/" in name for name in names):
        yield "validation.sets", f"expected names that can be printed, without '/', got {brief(', '.join(names))}"
    if of.rows is not None and of.rows < 1:
        yield "validation.rows", f"expected 1 or more, got {of.rows}"
    if of.rows is not None and not names:
        yield "validation.rows", "expected validation.sets as well, whose rows it limits, got none"
    if names and (given := [name for name in _CONFLICTS if config.megatron.get(name) not in (None, False)]):
        reason = "conversations have no number of rows" if given == ["sft"] else "the sets are in place of them"
        yield "validation.sets", f"expected none with {', '.join(given)}: {reason}; remove one of them"
    if job == "compare":
        for key in ("sets", "best"):
            if getattr(of, key):
                yield f"validation.{key}", "expected none in `compare`, which judges by the test split; remove it"
    if of.best is None or job not in ("pretrain", "distill"):
        return
    if not names:
        yield (
            "validation.best",
            "expected validation.sets as well: Megatron's own validation reads other rows each time, and its numbers "
            "cannot be compared; name a set",
        )
    if not config.megatron.get("save") or not config.megatron.get("eval-interval"):
        yield "validation.best", "expected megatron.save and megatron.eval-interval as well; set both"
    if config.megatron.get("ckpt-format", "torch_dist") != "torch_dist":
        yield "validation.best", f"expected ckpt-format torch_dist, got {config.megatron['ckpt-format']}"
    known = _numbers(config, job)
    if of.best not in [*known, *(f"{name} {number}" for name in names for number in known)]:
        expected = f"{' or '.join(known)}, also after the name of a set ({', '.join(names)})"
        yield "validation.best", f"expected {expected}, got {brief(of.best)}"


def _numbers(config: "Config", job: str) -> tuple[str, ...]:
    if job == "pretrain":
        return (_LM,)
    if config.distillation.cross_tokenizer is not None:
        return (_LM,)
    if config.distillation.cache is None:
        return (_LM, _KL)
    return (_LM, *_OF_CACHE) if config.distillation.expanded().temperature == 1.0 else (_LM,)
