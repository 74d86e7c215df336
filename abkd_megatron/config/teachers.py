"""Keys of the list `teachers`: teachers of some data sources. Does not import megatron."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from abkd_megatron.config.schema import Config, Value

TEACHER_WEIGHTS = ("device", "int8", "host")
# Keys of an entry that are not Megatron arguments.
ENTRY_KEYS = ("sources", "load", "ckpt-step", "declared", "weights", "cache")


@dataclass(frozen=True, kw_only=True)
class SourceTeacher:
    """The teacher of some datasets of a blend."""

    sources: tuple[int | str, ...] = ()
    """Positions of the datasets in the list of their split, from 0, or their path prefixes."""
    load: str | None = None
    """Path of its Megatron checkpoint."""
    ckpt_step: int | None = None
    """Iteration to load; None for the latest."""
    declared: bool = False
    """See `TeacherConfig`."""
    weights: str | None = None
    """See `TeacherConfig`; None as in the section `teacher`."""
    cache: str | None = None
    """Directory of its cache, from which students train in place of `load`: the `cache.dir` of the job `cache`."""
    megatron: "dict[str, Value]" = field(default_factory=dict)
    """Megatron arguments in which it differs from the section `teacher`."""

    @property
    def name(self) -> str:
        """Its sources, for messages."""
        return f"teacher of {'source' if len(self.sources) == 1 else 'sources'} {', '.join(map(str, self.sources))}"

    def described(self) -> dict[str, Any]:
        """Return the keys that were given, with their values."""
        plain = SourceTeacher()
        names = {key: key.replace("-", "_") for key in ENTRY_KEYS}
        given = {key: getattr(self, name) for key, name in names.items() if getattr(self, name) != getattr(plain, name)}
        return {**given, "sources": list(self.sources), **self.megatron}


def reads_cache(config: "Config") -> bool:
    """Return whether a student trains from a cache, of all its samples or of some datasets."""
    return config.distillation.cache is not None or any(entry.cache for entry in config.teachers)


def teachers_problems(config: "Config", job: str) -> Iterator[tuple[str, str]]:
    """Yield (key, what was expected and found) of each setting of several teachers that is invalid.

    Args:
        config: of the job.
        job: see `Config.check`.
    """
    if not config.teachers:
        return
    for entry in config.teachers:
        if not entry.sources:
            yield (
                "teachers",
                f"expected sources of each teacher, got none of {entry.load or entry.cache}; give their positions or "
                "paths",
            )
        if bool(entry.load) == bool(entry.cache):
            yield (
                "teachers",
                f"{entry.name}: expected load, the path of its Megatron checkpoint, or cache, the directory of its "
                f"records, got {'both' if entry.load else 'neither'}; give one of them",
            )
        given = [key for key in entry.described() if key not in ("sources", "load", "cache")]
        if entry.cache and given:
            yield (
                "teachers",
                f"{entry.name}: expected no more keys than sources and cache, since a cache is no model, got "
                f"{', '.join(given)}; remove them",
            )
        if entry.weights not in (None, *TEACHER_WEIGHTS):
            yield "teachers", f"{entry.name}: expected weights {', '.join(TEACHER_WEIGHTS)}, got {entry.weights!r}"
    for source, count in Counter(source for entry in config.teachers for source in entry.sources).items():
        if count > 1:
            yield "teachers", f"expected one teacher per source, got {count} entries for {source}; remove all but one"
    if job == "cache":
        yield "teachers", "expected none in the job `cache`, which is of one teacher; remove the list"
    kd = config.distillation
    found = {
        "distillation.cache": (kd.cache is not None, "it is of one teacher; a teacher of the list may have a cache"),
        "distillation.hidden_losses": (bool(kd.hidden_losses), "their layers are of one teacher"),
        "distillation.mix": (kd.mix is not None, "a mixed sequence is of no dataset"),
        "distillation.mtp_weight": (bool(kd.mtp_weight), "multi-token prediction follows one teacher"),
        "distillation.on_policy": (kd.on_policy is not None, "the student's own text is of no dataset"),
        "teacher.expected-loss": (config.teacher.expected_loss is not None, "a batch is of several teachers"),
    }
    if kd.diagnostics and kd.cache is None and reads_cache(config):
        yield (
            "distillation.diagnostics",
            "expected false with a cache in the list `teachers`: diagnostics need every teacher's logits",
        )
    for key, (is_given, why) in found.items():
        if is_given:
            yield key, f"expected none with the list `teachers`, since {why}; remove one of them"
