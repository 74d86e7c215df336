"""Several teachers of one student, of which each data source has one.

Legend: s sequence, b micro-batch, H hidden size of a teacher.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from abkd_megatron.errors import ConfigError
from abkd_megatron.teacher.build import Teacher
from abkd_megatron.teacher.output_layer import OutputLayers, TeacherOutput


@dataclass(frozen=True)
class Teachers:
    """Teachers by data source; one that is given several times is run once.

    Raises:
        ConfigError: for a source of two teachers, or teachers of different dtypes.
    """

    default: Teacher
    """Of the sequences of all other sources, and of unknown ones."""
    of_sources: tuple[tuple[tuple[int, ...], Teacher], ...] = ()
    """Pairs of sources and their teacher. A source is a dataset's position in its blend, from 0."""
    cached: tuple[int, ...] = ()
    """Sources whose teacher is a cache, which is no model here: the records come with each micro-batch."""

    def __post_init__(self) -> None:
        sources = [*self.cached, *(source for of_one, _ in self.of_sources for source in of_one)]
        if twice := sorted({source for source in sources if sources.count(source) > 1}):
            raise ConfigError(f"expected one teacher per source, got several of source {twice[0]}; remove all but one")
        dtypes = {teacher.model.config.params_dtype for teacher in self.distinct}
        if len(dtypes) > 1:
            raise ConfigError(
                f"expected teachers of one dtype, got {', '.join(sorted(map(str, dtypes)))}: their logits are compared "
                "in one tensor; give all of them the same bf16 or fp16"
            )

    @cached_property
    def distinct(self) -> tuple[Teacher, ...]:
        """Every teacher once, the default first."""
        found = [self.default]
        for _, teacher in self.of_sources:
            if not any(teacher is other for other in found):
                found.append(teacher)
        return tuple(found)

    @property
    def names(self) -> list[str]:
        """Names of the `distinct` teachers in messages."""
        names = ["the teacher"]
        for teacher in self.distinct[1:]:
            sources = sorted(source for of_one, other in self.of_sources if other is teacher for source in of_one)
            names.append(f"the teacher of {_listed(sources)}")
        return names

    @property
    def name_of_cached(self) -> str:
        """Name of the `cached` teachers in messages."""
        return f"the cached teacher of {_listed(sorted(self.cached))}"

    @property
    def count(self) -> int:
        """Number of teachers of different sequences; all `cached` ones count as one."""
        return len(self.distinct) + bool(self.cached)

    def numbers(self, sources: Tensor) -> Tensor:
        """Return the teachers of sequences, [b] int64, as positions in `distinct`; those of `cached` are after them.

        Args:
            sources: [b] int64, the dataset of each sequence.
        """
        numbers = torch.zeros_like(sources)
        for source, number in self._number_of.items():
            numbers = torch.where(sources == source, number, numbers)
        return numbers

    def needed(self, sources: Iterable[int]) -> list[int]:
        """Return the positions in `distinct` of the teachers of some sequences, without duplicates and `cached` ones.

        Args:
            sources: the dataset of each sequence, on the host.
        """
        return sorted({self._number_of.get(source, 0) for source in sources if source not in self.cached})

    @cached_property
    def _number_of(self) -> dict[int, int]:
        """Positions in `distinct` by source."""
        places = {id(teacher): number for number, teacher in enumerate(self.distinct)}
        found = {source: places[id(teacher)] for of_one, teacher in self.of_sources for source in of_one}
        return found | dict.fromkeys(self.cached, len(self.distinct))

    def output(self, hidden_states: Mapping[int, Tensor], numbers: Tensor | None) -> TeacherOutput | None:
        """Return the output layers applied to the last hidden states of a micro-batch; None if no teacher has run.

        Args:
            hidden_states: [s, b, H] or this rank's part, of the teachers that have run, by position in `distinct`.
            numbers: [b], see `numbers`; None with one teacher.
        """
        parts = tuple(self.distinct[number].output_layer(hidden) for number, hidden in hidden_states.items())
        if len(parts) < 2:
            return parts[0] if parts else None
        assert numbers is not None
        return OutputLayers(parts, tuple(hidden_states), numbers)


def _listed(sources: Sequence[int]) -> str:
    return f"{'sources' if len(sources) > 1 else 'source'} {', '.join(map(str, sources))}"
