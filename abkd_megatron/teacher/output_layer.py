"""Last hidden states and output layer of a model, from which the loss computes logits.

Legend: s sequence, b micro-batch, h hidden size, V/TP vocabulary columns of a rank.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeAlias

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from torch import Tensor


@dataclass(frozen=True)
class OutputLayer:
    """A model's last hidden states, with the layer and weight that map them to logits."""

    hidden_states: Tensor
    """[s, b, h]; [s/TP, b, h] with sequence parallelism."""
    layer: torch.nn.Module
    tied_weight: Tensor | None
    """[V/TP, h] if the output layer shares the embedding's weight."""
    scale_logits: Callable[[Tensor], Tensor]

    @property
    def weight(self) -> Tensor:
        """[V/TP, h]."""
        if self.tied_weight is not None:
            return self.tied_weight
        assert isinstance(self.layer.weight, Tensor)
        return self.layer.weight

    def logits(self) -> Tensor:
        """Compute logits, [s, b, V/TP], as Megatron does."""
        return self.scale_logits(self.layer(self.hidden_states, weight=self.tied_weight)[0])

    def logits_of(self, rows: Tensor, tp_group: dist.ProcessGroup) -> Tensor:
        """Compute logits, [n, V/TP], of the tokens `rows`, [n] indices of the s * b, without gradient.

        Collectives: with sequence parallelism two all-gathers of hidden states, of all tokens and of these.
        """
        hidden_states = self.whole_hidden_states(tp_group).detach().flatten(0, 1)[rows]
        if len(rows) == 0:
            return hidden_states.new_empty(0, self.weight.shape[0])
        if getattr(self.layer, "sequence_parallel", False):  # the layer all-gathers equal parts; pass this rank's
            filled = torch.nn.functional.pad(hidden_states, (0, 0, 0, -len(rows) % tp_group.size()))
            hidden_states = filled.chunk(tp_group.size())[tp_group.rank()].contiguous()
        logits: Tensor = self.layer(hidden_states.unsqueeze(1), weight=self.tied_weight)[0]
        return self.scale_logits(logits)[: len(rows), 0]

    def whole_hidden_states(self, tp_group: dist.ProcessGroup) -> Tensor:
        """Return all hidden states, [s, b, h]; backward sums their partial gradients over the ranks (and scatters)."""
        if getattr(self.layer, "sequence_parallel", False):
            gathered: Tensor = gather_from_sequence_parallel_region(self.hidden_states, group=tp_group)
            return gathered
        copied: Tensor = copy_to_tensor_model_parallel_region(self.hidden_states, group=tp_group)
        return copied

    def named_hidden_states(self, who: str) -> dict[str, Tensor]:
        """Return the hidden states by a name that starts with `who`."""
        return {f"{who} hidden states": self.hidden_states}

    def operands(self, tp_group: dist.ProcessGroup) -> list[tuple[Tensor, Tensor, float]]:
        """Return hidden states [s, b, h], weight [V/TP, h] and scale, whose product are the logits; see `OutputLayers`.

        Collectives: with sequence parallelism one all-gather.
        """
        return [(self.whole_hidden_states(tp_group), self.weight, self.scale())]

    def scale(self) -> float:
        """Return the factor of the logits (MuP)."""
        return float(self.scale_logits(torch.ones((), dtype=torch.float64, device="cpu")))


@dataclass(frozen=True)
class OutputLayers:
    """Output layers of several teachers, of which each sequence of a micro-batch has one. For no gradient."""

    parts: tuple[OutputLayer, ...]
    """Of each teacher, for all sequences."""
    teachers: tuple[int, ...]
    """The number of each part's teacher."""
    numbers: Tensor
    """[b] int64, the number of each sequence's teacher."""

    def logits(self) -> Tensor:
        """Compute logits, [s, b, V/TP], each sequence's from its own teacher. Those of one more teacher exist."""
        logits = self.parts[0].logits()
        for number, part in zip(self.teachers[1:], self.parts[1:], strict=True):
            torch.where((self.numbers == number).unsqueeze(-1), part.logits(), logits, out=logits)
        return logits

    def logits_of(self, rows: Tensor, tp_group: dist.ProcessGroup) -> Tensor:
        """Compute logits, [n, V/TP], see `OutputLayer.logits_of`.

        Collectives: those of each output layer.
        """
        numbers = self.numbers[rows % len(self.numbers)].unsqueeze(-1)
        logits = self.parts[0].logits_of(rows, tp_group)
        for number, part in zip(self.teachers[1:], self.parts[1:], strict=True):
            logits = torch.where(numbers == number, part.logits_of(rows, tp_group), logits)
        return logits

    def named_hidden_states(self, who: str) -> dict[str, Tensor]:
        """Return each teacher's hidden states by a name that starts with `who`."""
        return {f"{who} {number} hidden states": part.hidden_states for number, part in self._numbered()}

    def operands(self, tp_group: dist.ProcessGroup) -> list[tuple[Tensor, Tensor, float]]:
        """Return hidden states, weight and scale of each teacher; the sum of their products are the logits.

        Hidden states are 0 in the sequences of other teachers.

        Collectives: with sequence parallelism one all-gather per teacher.
        """
        found = []
        for number, part in self._numbered():
            hidden = part.whole_hidden_states(tp_group)
            own = torch.where((self.numbers == number).unsqueeze(-1), hidden, 0.0)
            found.append((own, part.weight, part.scale()))
        return found

    def _numbered(self) -> Iterator[tuple[int, OutputLayer]]:
        return zip(self.teachers, self.parts, strict=True)


TeacherOutput: TypeAlias = OutputLayer | OutputLayers  # noqa: UP040 (isinstance takes no `type`)
