"""Tensors from rank to rank beside Megatron's own traffic."""

from collections import deque
from collections.abc import Iterable, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist


def new_group(ranks: Sequence[int], timeout: timedelta) -> dist.ProcessGroup | None:
    """Make one group of each set of ranks that the ranks of the job ask for, and return this rank's.

    Args:
        ranks: global ranks of the wanted group, in order, the same on each of them; none asks for no group.
        timeout: after which a collective or a message that does not come is an error (torch does not inherit it).

    Collectives: one all_gather_object and one new group a set, over the whole job.
    """
    wanted: list[tuple[int, ...]] = [()] * dist.get_world_size()
    dist.all_gather_object(wanted, tuple(ranks))
    return new_group_of(wanted, ranks, timeout)


def new_group_of(
    wanted: Iterable[tuple[int, ...]], ranks: Sequence[int], timeout: timedelta
) -> dist.ProcessGroup | None:
    """`new_group`, where every rank knows already which sets are asked for.

    Args:
        wanted: global ranks of each of the groups, alike on every rank; twice the same is one group.
        ranks: of this rank's.
        timeout: see there.

    Collectives: one new group a set, over the whole job.
    """
    # Every rank must create every group, in the same order.
    groups = {of: dist.new_group(of, timeout=timeout) for of in sorted(set(wanted)) if of}
    group = groups.get(tuple(ranks))
    assert group is None or isinstance(group, dist.ProcessGroup)  # what new_group gives to the ranks in it
    return group


class Lane:
    """Carries tensors forward, from rank to rank of a group of its own, so they can never be taken for the student's.

    A send is started and not waited for: the next stage posts its receive only once it has the student's activations,
    which this stage sends after its forward step has returned, so waiting here would never end. Tensors in flight are
    kept alive until they have left; with one forward and one backward in turn (1F1B) at most one per pipeline stage is
    under way. Of two ranks only one ever sends to the other.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        self._in_flight: deque[tuple[dist.Work, torch.Tensor]] = deque()

    def receive(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device, source: int) -> torch.Tensor:
        """Return the next tensor that global rank `source` sent here."""
        received = torch.empty(tuple(shape), dtype=dtype, device=device)
        request = dist.irecv(received, src=source, group=self._group)
        assert request is not None
        request.wait()
        return received

    def send(self, tensor: torch.Tensor, to: int) -> None:
        """Start sending to global rank `to`; returns at once."""
        while self._in_flight and self._in_flight[0][0].is_completed():
            self._in_flight.popleft()[0].wait()
        tensor = tensor.contiguous()
        request = dist.isend(tensor, dst=to, group=self._group)
        assert request is not None
        self._in_flight.append((request, tensor))

    @property
    def num_in_flight(self) -> int:
        """Messages started here and not known to have arrived."""
        return len(self._in_flight)

    def drain(self) -> None:
        """Wait until every message has left. Only between steps: within one it can wait for ever."""
        while self._in_flight:
            self._in_flight.popleft()[0].wait()


def exchange(
    sends: Sequence[tuple[torch.Tensor, int]],
    receives: Sequence[tuple[torch.Tensor, int]],
    group: dist.ProcessGroup,
) -> None:
    """Send and receive among ranks that do so at the same time, in any direction; returns when all has arrived.

    Args:
        sends: (tensor, to global rank).
        receives: (tensor to be filled, from global rank).
        group: of all of them.
    """
    operations = [dist.P2POp(dist.isend, tensor, to, group) for tensor, to in sends]
    operations += [dist.P2POp(dist.irecv, tensor, source, group) for tensor, source in receives]
    for request in dist.batch_isend_irecv(operations) if operations else ():
        request.wait()
