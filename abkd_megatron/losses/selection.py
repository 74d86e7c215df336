"""Selection of the tokens to distill, by properties of a token or its sequence: independent of micro-batch and rank.

Legend: s sequence, b micro-batch.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from abkd_megatron.errors import ConfigError, check_name
from abkd_megatron.validation import finite_number, positive_number, whole_number

KEYS = {"every": ("n",), "teacher_entropy": ("at_least", "at_most", "quantile"), "disagreement": ("kl_at_least",)}
"""Keys of each kind of selection."""


@dataclass(frozen=True)
class TokenSelection:
    """Tokens on which the divergence is trained; the cross entropy is trained on all tokens.

    - ``every``: positions n - 1, 2n - 1, ... of a sequence, counted from 0. The teacher's LM head skips all others.
    - ``teacher_entropy``: tokens at which the teacher's entropy is within bounds or, with `quantile`, within a range of
      ranks among the counted tokens of its sequence. `quantile` [0.15, 1.0] leaves out the 15 % that the teacher is
      surest of.
    - ``disagreement``: tokens at which the most likely next tokens of the two models differ or, with `kl_at_least`,
      at which the forward KL is at least that.

    Bounds are in nats, at temperature 1, and compared in the precision of the loss (at least fp32). A token within
    rounding of a bound may be selected in one parallel layout and not in another.

    A quantile is taken per sequence (a row of the micro-batch; packed sequences of one row together), not per
    micro-batch or step. Tensor, pipeline and data parallelism and the micro-batch size do not split a row, and context
    parallelism only divides its tokens, so all layouts and a resumed run rank the same tokens. A threshold over the
    step would need the entropies of all micro-batches before the first loss, or a state that lags behind the teacher's
    text and has to be saved.

    Raises:
        ConfigError: for a kind not in `KEYS`, invalid or missing numbers, or bounds that exclude every token.
    """

    select: str
    n: int | None = None
    """At least 2."""
    at_least: float | None = None
    """Nats."""
    at_most: float | None = None
    """Nats."""
    kl_at_least: float | None = None
    """Nats."""
    quantile: list[float] | None = None
    """[low, high] with 0 <= low < high <= 1: of n counted tokens those of rank r, low n <= r < high n, counted from 0
    in ascending order."""

    def __post_init__(self) -> None:
        check_name(self.select, KEYS, "a selection of tokens", "select")
        known = KEYS[self.select]
        for name in ("n", "at_least", "at_most", "kl_at_least"):
            value = getattr(self, name)
            if value is None:
                continue
            if name not in known:
                raise ConfigError(
                    f"expected no {name} with select: {self.select}, which takes {', '.join(known)}, got {value}; "
                    "remove it"
                )
            checked: float = (
                self._checked_n(value)
                if name == "n"
                else positive_number(f"select: {self.select}", name, value, "it is in nats; or leave it out")
            )
            object.__setattr__(self, name, checked)
        if self.select == "every" and self.n is None:
            self._checked_n(None)
        if self.quantile is not None:
            self._check_quantile(self.quantile)
        elif self.select == "teacher_entropy":
            if self.at_least is None and self.at_most is None:
                raise ConfigError(
                    "expected at_least or at_most (or quantile) with select: teacher_entropy, got neither; give one"
                )
            if self.at_least is not None and self.at_most is not None and self.at_least > self.at_most:
                raise ConfigError(
                    f"expected at_least <= at_most, got {self.at_least} and {self.at_most}, which select no token; "
                    "swap them"
                )

    def _check_quantile(self, quantile: list[float]) -> None:
        if self.select != "teacher_entropy":
            known = ", ".join(KEYS[self.select])
            raise ConfigError(f"expected no quantile with select: {self.select}, which takes {known}; remove it")
        if self.at_least is not None or self.at_most is not None:
            raise ConfigError("expected a quantile or at_least and at_most, got both; remove one")
        if not isinstance(quantile, list | tuple) or len(quantile) != 2:
            raise ConfigError(f"expected quantile to be [low, high], got {quantile!r}; for example [0.15, 1.0]")
        low, high = (finite_number("select: teacher_entropy", "quantile", bound) for bound in quantile)
        if not 0.0 <= low < high <= 1.0:
            raise ConfigError(f"expected quantile [low, high] with 0 <= low < high <= 1, got [{low}, {high}]")
        object.__setattr__(self, "quantile", [low, high])

    @staticmethod
    def _checked_n(n: object) -> int:
        remedy = "leave the selection out to distill on every token"
        return whole_number("select: every", "n", n, least=2, remedy=remedy)

    def __str__(self) -> str:
        return ", ".join(f"{name}: {value}" for name, value in self.described().items())

    @property
    def by_position(self) -> bool:
        """True if the selection is known before the teacher's logits, which then skip the other tokens."""
        return self.select == "every"

    @property
    def by_rank(self) -> bool:
        """True if a token is selected by its rank among the tokens of its sequence."""
        return self.quantile is not None

    def described(self) -> dict[str, str | int | float | list[float]]:
        """Return the keys that were given, with their values."""
        given = {name: getattr(self, name) for name in ("select", *KEYS[self.select])}
        return {name: value for name, value in given.items() if value is not None}

    def at(self, positions: Tensor) -> Tensor:
        """Select by position: `positions` int64 from 0, result bool of that shape."""
        assert self.n is not None
        return positions % self.n == self.n - 1

    def ranked(self, entropy: Tensor, counted: Tensor | None, group: dist.ProcessGroup | None) -> Tensor:
        """Select by `quantile`.

        Args:
            entropy: [s, b], of this rank's tokens; NaN is not selected.
            counted: [s, b] bool; None for all. The others are neither ranked nor selected.
            group: the context-parallel group, over which sequences are split; None for whole sequences.

        Returns:
            [s, b] bool. Equal entropies are ranked in the order of the tokens, rank by rank of the group.

        Collectives: one all-gather of [s, b] in a group of several ranks.
        """
        assert self.quantile is not None
        keys = entropy if counted is None else torch.where(counted, entropy, torch.inf)
        every, begin = keys, 0
        if group is not None and group.size() > 1:
            every = keys.new_empty(group.size() * len(keys), *keys.shape[1:])
            dist.all_gather_into_tensor(every, keys.contiguous(), group=group)
            begin = group.rank() * len(keys)
        number = (every < torch.inf).sum(0, dtype=torch.float64)
        places = torch.arange(len(every), device=keys.device).unsqueeze(-1).expand_as(every)
        rank = torch.empty_like(places).scatter_(0, every.argsort(dim=0, stable=True), places)
        rank = rank[begin : begin + len(keys)]
        low, high = self.quantile
        return (rank >= low * number) & (rank < high * number) & (keys < torch.inf)

    def of(self, metrics: Mapping[str, Tensor]) -> Tensor:
        """Select by `metrics`: bool, of their shape. NaN is never selected."""
        if self.select == "disagreement":
            if self.kl_at_least is None:
                return metrics["top-1 agreement"] == 0.0
            return metrics["kl to teacher"] >= self.kl_at_least
        entropy = metrics["teacher entropy"]
        selected = entropy == entropy
        if self.at_least is not None:
            selected = selected & (entropy >= self.at_least)
        if self.at_most is not None:
            selected = selected & (entropy <= self.at_most)
        return selected


def positions_here(length: int, ends: Tensor | None, rank: int, size: int) -> Tensor:
    """Return the position of each of this rank's tokens in its sequence, for Megatron's context-parallel layout.

    A sequence is split into 2 * size equal chunks; rank r holds chunks r and 2 * size - 1 - r.

    Args:
        length: of the row on this rank.
        ends: [sequences + 1] ints, boundaries of the sequences packed into the row over all ranks, starting with 0
            (Megatron's cu_seqlens); None for one sequence. Tokens after the last boundary form one more sequence.
        rank: in the context-parallel group.
        size: of the context-parallel group.

    Returns:
        [length] int64, on the device of `ends` (CPU if None).
    """
    if ends is None:
        ends = torch.tensor([0, length * size], device="cpu")
    ends = ends.long()
    here = torch.arange(length, device=ends.device)
    begins = ends // size
    sequence = torch.searchsorted(begins, here, right=True) - 1
    offset = here - begins[sequence]
    if size == 1:
        return offset
    whole = torch.cat([ends.diff(), (length * size - ends[-1:]).clamp_min(0)])[sequence]
    chunk = whole // (2 * size)
    return torch.where(offset < chunk, rank * chunk + offset, (2 * size - 2 - rank) * chunk + offset)
