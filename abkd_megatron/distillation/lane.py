"""The teacher's own way from pipeline stage to pipeline stage."""

from collections import deque
from collections.abc import Sequence
from datetime import timedelta

import torch
import torch.distributed as dist


class Lane:
    """Carries the teacher's hidden states one pipeline stage further, beside Megatron's own traffic.

    It has a process group of its own, so its messages can never be taken for the student's. A send is started and not
    waited for: the next stage posts its receive only once it has the student's activations, which this stage sends
    after its forward step has returned, so waiting here would never end. Tensors in flight are kept alive until they
    have left; with one forward and one backward in turn (1F1B) at most one per pipeline stage is under way.

    Args:
        pipeline_ranks: global ranks of this rank's pipeline, in stage order; the same call on every rank of the job.
        timeout: after which a message that does not come is an error (torch does not inherit it from the job).

    Collectives: making it creates one group per pipeline of the job. `send` and `receive`: one message each.
    """

    def __init__(self, pipeline_ranks: Sequence[int], timeout: timedelta) -> None:
        pipelines: list[tuple[int, ...]] = [()] * dist.get_world_size()
        dist.all_gather_object(pipelines, tuple(pipeline_ranks))
        # Every rank must create every group, in the same order.
        groups = {ranks: dist.new_group(ranks, timeout=timeout) for ranks in sorted(set(pipelines))}
        group = groups[tuple(pipeline_ranks)]
        assert isinstance(group, dist.ProcessGroup)  # what new_group gives to the ranks in it
        self._group = group
        stage = list(pipeline_ranks).index(dist.get_rank())
        self._previous = pipeline_ranks[stage - 1] if stage > 0 else None
        self._next = pipeline_ranks[stage + 1] if stage + 1 < len(pipeline_ranks) else None
        self._in_flight: deque[tuple[dist.Work, torch.Tensor]] = deque()

    def receive(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """Return the hidden states the previous stage sent for this micro-batch."""
        hidden = torch.empty(tuple(shape), dtype=dtype, device=device)
        request = dist.irecv(hidden, src=self._previous, group=self._group)
        assert request is not None
        request.wait()
        return hidden

    def send(self, hidden: torch.Tensor) -> None:
        """Start sending `hidden` to the next stage; returns at once."""
        while self._in_flight and self._in_flight[0][0].is_completed():
            self._in_flight.popleft()[0].wait()
        hidden = hidden.contiguous()
        request = dist.isend(hidden, dst=self._next, group=self._group)
        assert request is not None
        self._in_flight.append((request, hidden))

    @property
    def num_in_flight(self) -> int:
        """Messages started here and not known to have arrived."""
        return len(self._in_flight)

    def drain(self) -> None:
        """Wait until every message has left. Only between steps: within one it can wait for ever."""
        while self._in_flight:
            self._in_flight.popleft()[0].wait()
