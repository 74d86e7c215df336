"""Point-to-point messages of the teacher, ordered so that they cannot deadlock with Megatron's.

NCCL connects two ranks at their first message and blocks both until the other arrives. A send larger than NCCL's
buffers occupies the device until the receive is posted. Megatron synchronizes the device in many places. `Channel`
therefore connects all pairs at construction, and `Outbox` holds messages to later pipeline stages until Megatron sends
the student's activation.
"""

import inspect
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer import TransformerConfig

from abkd_megatron.errors import HostError

Link = tuple[int, int]
"""Global ranks (source, destination)."""


def new_group(ranks: Sequence[int], timeout: timedelta) -> dist.ProcessGroup | None:
    """Create a group for each set of ranks that some rank requests; return this rank's.

    Args:
        ranks: global ranks of the group, in group order; identical on each of them. Empty for no group.
        timeout: of its collectives and messages, which torch does not inherit.

    Raises:
        HostError: on every rank, if this torch cannot create a group in an order that is not rising.

    Collectives: one all_gather_object and one new group per set, over the whole job.
    """
    wanted: list[tuple[int, ...]] = [()] * dist.get_world_size()
    dist.all_gather_object(wanted, tuple(ranks))
    return new_group_of(wanted, ranks, timeout)


def new_group_of(
    wanted: Iterable[tuple[int, ...]], ranks: Sequence[int], timeout: timedelta
) -> dist.ProcessGroup | None:
    """Create groups like `new_group`, from sets that every rank already knows.

    Args:
        wanted: global ranks of each group, identical on every rank; duplicates are one group.
        ranks: this rank's group.
        timeout: see `new_group`.

    Collectives: one new group per set, over the whole job.
    """
    # Every rank must create every group, in the same order.
    groups = {of: _new_group_in_order(of, timeout) for of in sorted(set(wanted)) if of}
    group = groups.get(tuple(ranks))
    assert group is None or isinstance(group, dist.ProcessGroup)  # new_group's type for ranks in the group
    return group


def _new_group_in_order(ranks: tuple[int, ...], timeout: timedelta) -> object:
    """Create a group with these ranks in this order.

    torch sorts them by default, which would renumber the teacher's stages if its pipeline does not run along rising
    ranks (--use-tp-pp-dp-mapping). Older versions of torch always do.
    """
    if list(ranks) == sorted(ranks):
        return dist.new_group(ranks, timeout=timeout)
    if "sort_ranks" not in inspect.signature(dist.new_group).parameters:
        raise HostError(
            f"the teacher's layout needs a process group of the ranks {list(ranks)} in this order, which torch "
            f"{torch.__version__} cannot create: use a later torch, or drop use-tp-pp-dp-mapping or the teacher's own "
            "layout"
        )
    return dist.new_group(ranks, timeout=timeout, sort_ranks=False)


class Channel:
    """Point-to-point tensor transport in a group that Megatron does not use, so that messages cannot be confused.

    The n-th receive on a link matches the n-th send. A send is asynchronous; its tensor is kept until it has left. Both
    ends must agree on dtype and shape. `send` checks them against the receiver's expectation, because a mismatch hangs
    NCCL or reinterprets the bytes.

    The constructor connects all links, in the same order on all ranks. A later first message would block a stage until
    the next stage sends or receives, which may depend on this stage's activation.

    Args:
        group: all ranks on these links.
        links: all (source, destination) in global ranks that will be used; identical on every rank of the group. Use
            two channels for links in both directions: NCCL runs the messages of a pair in one order.
        device: of the tensors.
        max_in_flight: sends that may be pending on this rank; a further send waits for the oldest. It must be large
            enough that the oldest has always been received, see `TeacherRunner`.

    Collectives: one message per link.
    """

    def __init__(
        self, group: dist.ProcessGroup, links: Iterable[Link], device: torch.device, max_in_flight: int
    ) -> None:
        self._group, self._device, self._max_in_flight = group, device, max_in_flight
        self._in_flight: deque[tuple[dist.Work, torch.Tensor]] = deque()
        rank = dist.get_rank()
        for source, to in sorted(set(links)):
            if rank == source:
                self.send(torch.zeros(1, device=device), to)
                self.drain()
            elif rank == to:
                self.receive((1,), torch.float32, source)

    def post(self, shape: Sequence[int], dtype: torch.dtype, source: int) -> tuple[dist.Work, torch.Tensor]:
        """Start to receive the next tensor from global rank `source`; return the work to wait for and the tensor."""
        received = torch.empty(tuple(shape), dtype=dtype, device=self._device)
        work = dist.irecv(received, src=source, group=self._group)
        assert work is not None
        return work, received

    def receive(self, shape: Sequence[int], dtype: torch.dtype, source: int) -> torch.Tensor:
        """Receive the next tensor from global rank `source`."""
        work, received = self.post(shape, dtype, source)
        work.wait()
        return received

    def send(self, tensor: torch.Tensor, to: int, expected: tuple[Sequence[int], torch.dtype] | None = None) -> None:
        """Start to send to global rank `to`.

        Args:
            tensor: must not be modified until it has left.
            to: global rank.
            expected: shape and dtype that the receiver expects.

        Raises:
            RuntimeError: for another shape or dtype.
        """
        if expected is not None and (tuple(tensor.shape), tensor.dtype) != (tuple(expected[0]), expected[1]):
            raise RuntimeError(
                f"message of the teacher from rank {dist.get_rank()} to rank {to}: expected {list(expected[0])} "
                f"{expected[1]}, got {list(tensor.shape)} {tensor.dtype}; use teacher layers that keep dtype and shape "
                "of hidden states"
            )
        while self._in_flight and (self._in_flight[0][0].is_completed() or len(self._in_flight) >= self._max_in_flight):
            self._in_flight.popleft()[0].wait()
        tensor = tensor.contiguous()
        work = dist.isend(tensor, dst=to, group=self._group)
        assert work is not None
        self._in_flight.append((work, tensor))

    @property
    def num_in_flight(self) -> int:
        """Number of sends from this rank that are not known to be complete."""
        return len(self._in_flight)

    def drain(self) -> None:
        """Wait for all sends. Call it only between steps: within one it can deadlock."""
        while self._in_flight:
            self._in_flight.popleft()[0].wait()


class Outbox:
    """Queue of messages to later pipeline stages, released when Megatron sends the micro-batch's student activation.

    Sending earlier can deadlock. Stage i would have a send pending that stage i + 1 receives only after the student's
    activation. In between, Megatron may synchronize the device (`timing-log-level: 2`, at the stop of the forward timer
    and the start of the send timer), and would wait for this send forever. Sending later can deadlock, too:
    `send_forward_recv_backward` blocks until stage i + 1 has run the micro-batch that needs the message.

    A message is therefore posted within Megatron's send (`send_forward`, `send_forward_recv_backward`,
    `send_forward_recv_forward`, `send_forward_backward_recv_forward_backward`), after the start of its timer and before
    its P2P operations. The receiving stage posts in its forward step, right after the Megatron receive that matches
    these operations. A synchronization after the send (`batch_p2p_sync`, the timer's stop) then waits for nothing more
    than Megatron's send does. Messages to further stages are relayed stage by stage (`TeacherLayout.route`), so there
    is no wait for a later stage either.

    The only hook at that moment is Megatron's timer, which it looks up in ``config.timers`` by name at every log level.
    `watch` replaces ``config.timers`` by an object with the same interface.

    If Megatron synchronizes between its receive and the forward step that uses it, the receiver must also post within
    Megatron's receive. `on_receive` is called there, before Megatron's operations; see `TeacherRunner.post_ahead`.

    Args:
        config: the student's, which has Megatron's timers.
        on_receive: called with the timer's name at the start of every call that may receive an activation.
    """

    _SENDS = (
        *("forward-send", "forward-send-backward-recv", "forward-send-forward-recv"),
        "forward-backward-send-forward-backward-recv",
    )
    _RECEIVES = (
        *("forward-recv", "backward-send-forward-recv", "forward-send-forward-recv"),
        "forward-backward-send-forward-backward-recv",
    )

    def __init__(self, config: TransformerConfig, on_receive: Callable[[str], None]) -> None:
        self._config, self._on_receive = config, on_receive
        self._waiting: deque[Callable[[], None]] = deque()
        self._watched: _WatchedTimers | None = None

    @property
    def log_level(self) -> int:
        """Log level of Megatron's timers; at 2 the timers of passes and messages synchronize the device."""
        return getattr(self._config.timers, "_log_level", 0)

    def watch(self) -> None:
        """Intercept Megatron's timers, which it may have replaced since the last call; they may be None."""
        if self._watched is None or self._config.timers is not self._watched:
            self._config.timers = self._watched = _WatchedTimers(self._config.timers, self._started)

    def unwatch(self) -> None:
        """Restore Megatron's timers."""
        if self._watched is not None and self._config.timers is self._watched:
            self._config.timers = self._watched.timers

    def _started(self, name: str) -> None:
        if name in self._RECEIVES:
            self._on_receive(name)
        if name in self._SENDS:
            self.release()

    def add(self, send: Callable[[], None]) -> None:
        """Queue a send until the student's activation leaves."""
        self._waiting.append(send)

    def release(self) -> None:
        """Run the queued sends, in order."""
        while self._waiting:
            self._waiting.popleft()()


class _WatchedTimers:
    """Megatron's timers, or none, with a callback whenever a timer starts."""

    # Valid without arguments, because Megatron Bridge serializes a config's objects to YAML by their class.
    def __init__(self, timers: Any = None, started: Callable[[str], None] = lambda name: None) -> None:
        self.timers, self._started = timers, started

    def __call__(self, name: str, *args: Any, **kwargs: Any) -> Any:
        timer = self.timers(name, *args, **kwargs) if self.timers is not None else None
        return _WatchedTimer(timer, partial(self._started, name))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.timers, name)

    def __deepcopy__(self, memo: Any) -> "_WatchedTimers":
        return self  # a copied config has the same pipeline, and process groups cannot be copied


class _WatchedTimer:
    def __init__(self, timer: Any, started: Callable[[], None]) -> None:
        self._timer, self._started = timer, started

    def start(self, *args: Any, **kwargs: Any) -> None:
        if self._timer is not None:
            self._timer.start(*args, **kwargs)
        self._started()

    def stop(self, *args: Any, **kwargs: Any) -> None:
        if self._timer is not None:
            self._timer.stop(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._timer, name)


def batched_p2p(
    sends: Sequence[tuple[torch.Tensor, int]],
    receives: Sequence[tuple[torch.Tensor, int]],
    group: dist.ProcessGroup,
) -> None:
    """Exchange tensors among ranks that call this at the same time, in any direction; wait until all have arrived.

    Args:
        sends: (tensor, destination global rank).
        receives: (tensor to fill, source global rank).
        group: all these ranks; it must have run a collective, as NCCL needs every rank in a group's first call.
    """
    operations = [dist.P2POp(dist.isend, tensor, to, group) for tensor, to in sends]
    operations += [dist.P2POp(dist.irecv, tensor, source, group) for tensor, source in receives]
    for work in dist.batch_isend_irecv(operations) if operations else ():
        work.wait()
