"""Point-to-point messages of the teacher, and the one moment at which they may leave.

NCCL connects two ranks in their first message and blocks the host of each until the other one comes; a send that
exceeds NCCL's buffers occupies the device until its receiver has posted; and Megatron synchronizes the device in many
places. `Channel` therefore connects every pair when it is made, and `Outbox` holds what goes to a later pipeline stage
until Megatron itself sends the student's activation there.
"""

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer import TransformerConfig

Link = tuple[int, int]
"""Global ranks: (from, to)."""


def new_group(ranks: Sequence[int], timeout: timedelta) -> dist.ProcessGroup | None:
    """Make one group for each set of ranks that the ranks of the job ask for, and return this rank's.

    Args:
        ranks: global ranks of the wanted group; the same on each of them. Their order is the order of the group. Empty
            for no group.
        timeout: of its collectives and messages (torch does not inherit it).

    Collectives: one all_gather_object, and one new group per set, over the whole job.
    """
    wanted: list[tuple[int, ...]] = [()] * dist.get_world_size()
    dist.all_gather_object(wanted, tuple(ranks))
    return new_group_of(wanted, ranks, timeout)


def new_group_of(
    wanted: Iterable[tuple[int, ...]], ranks: Sequence[int], timeout: timedelta
) -> dist.ProcessGroup | None:
    """`new_group` where every rank already knows which sets are asked for.

    Args:
        wanted: global ranks of each group, the same on every rank; duplicates are one group.
        ranks: this rank's group.
        timeout: as in `new_group`.

    Collectives: one new group per set, over the whole job.
    """
    # Every rank must create every group, in the same order. Sorted ranks would renumber the stages of a teacher whose
    # pipeline does not run along rising ranks (--use-tp-pp-dp-mapping).
    groups = {of: dist.new_group(of, timeout=timeout, sort_ranks=False) for of in sorted(set(wanted)) if of}
    group = groups.get(tuple(ranks))
    assert group is None or isinstance(group, dist.ProcessGroup)  # what new_group gives to the ranks in it
    return group


class Channel:
    """Carries tensors between ranks of a group that nothing else uses, so they are never mistaken for Megatron's.

    On one link the n-th receive takes the n-th send. A send is started and not waited for; what is under way is kept
    alive until it has left. Both ends must agree on dtype and shape; `send` checks what the receiver was told to expect
    (`expected`), because a mismatch hangs NCCL or reads one dtype as another.

    Every link is connected here, in an order that is the same on all ranks: a first message later on would block the
    host of a stage until the next stage sends or receives, which it may only do after this stage's activation.

    Args:
        group: of all ranks on these links.
        links: (from, to) in global ranks, all that will ever be used, the same on every rank of the group. Links in
            both directions between two ranks need two channels: NCCL runs the messages of a pair in one order.
        device: of the tensors.
        max_in_flight: sends on this rank that may be open; beyond that a send waits for the oldest one. Choose it so
            large that the oldest one has always been received, see `TeacherRunner`.

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
        """Start to receive the next tensor that global rank `source` sends here: the work to wait for, the tensor."""
        received = torch.empty(tuple(shape), dtype=dtype, device=self._device)
        work = dist.irecv(received, src=source, group=self._group)
        assert work is not None
        return work, received

    def receive(self, shape: Sequence[int], dtype: torch.dtype, source: int) -> torch.Tensor:
        """Return the next tensor that global rank `source` sends here."""
        work, received = self.post(shape, dtype, source)
        work.wait()
        return received

    def send(self, tensor: torch.Tensor, to: int, expected: tuple[Sequence[int], torch.dtype] | None = None) -> None:
        """Start sending to global rank `to`.

        Args:
            tensor: must not be written to until it has left.
            to: global rank.
            expected: shape and dtype with which the other end receives.

        Raises:
            RuntimeError: the tensor is not as expected.
        """
        if expected is not None and (tuple(tensor.shape), tensor.dtype) != (tuple(expected[0]), expected[1]):
            raise RuntimeError(
                f"the teacher's message from rank {dist.get_rank()} to rank {to}: expected {list(expected[0])} "
                f"{expected[1]}, got {list(tensor.shape)} {tensor.dtype}; the teacher's layers changed the dtype or "
                "shape of hidden states"
            )
        while self._in_flight and (self._in_flight[0][0].is_completed() or len(self._in_flight) >= self._max_in_flight):
            self._in_flight.popleft()[0].wait()
        tensor = tensor.contiguous()
        work = dist.isend(tensor, dst=to, group=self._group)
        assert work is not None
        self._in_flight.append((work, tensor))

    @property
    def num_in_flight(self) -> int:
        """Sends started here that are not known to have arrived."""
        return len(self._in_flight)

    def drain(self) -> None:
        """Wait until every message has left. Only between steps: within one it can wait forever."""
        while self._in_flight:
            self._in_flight.popleft()[0].wait()


class Outbox:
    """Holds messages to later pipeline stages until Megatron sends the student's activation of the same micro-batch.

    Why not at once: stage i would have a send open that stage i + 1 receives only after it has the student's
    activation. Between the two Megatron may synchronize the device (`timing-log-level: 2`: when a timer of the forward
    pass stops and when the one of the send starts), and would wait for this send, forever.

    Why not later: `send_forward_recv_backward` blocks until stage i + 1 has run the micro-batch that needs the message.

    So a message is posted within Megatron's own send (`send_forward`, `send_forward_recv_backward`,
    `send_forward_recv_forward`, `send_forward_backward_recv_forward_backward`), after its timer has started and before
    its P2P operations. The stage that receives posts in its forward step, right after the Megatron receive that these
    operations meet. A synchronization after the send (`batch_p2p_sync`, the timer's stop) then waits for nothing that
    Megatron's own send does not wait for: no circle, and no wait for a stage further down, since messages that go
    further travel stage by stage (`TeacherLayout.route`).

    The only sign of that moment is Megatron's timer, looked up in ``config.timers`` by name; Megatron looks it up at
    every log level. `watch` puts an object of the same interface in its place.

    Where Megatron synchronizes between its own receive and the forward step that it is for, the receiver has to post
    within Megatron's receive, too: `on_receive` is called there, before Megatron's own operations. See
    `TeacherRunner._post_ahead` for when.

    Args:
        config: the student's, in which Megatron keeps its timers.
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
        """Of Megatron's timers: at 2, those of passes and messages synchronize the device."""
        return getattr(self._config.timers, "_log_level", 0)

    def watch(self) -> None:
        """See Megatron's next send, whatever timers it has set since the last call; None is as good."""
        if self._watched is None or self._config.timers is not self._watched:
            self._config.timers = self._watched = _WatchedTimers(self._config.timers, self._started)

    def unwatch(self) -> None:
        """Give Megatron its timers back."""
        if self._watched is not None and self._config.timers is self._watched:
            self._config.timers = self._watched.timers

    def _started(self, name: str) -> None:
        if name in self._RECEIVES:
            self._on_receive(name)
        if name in self._SENDS:
            self.release()

    def add(self, send: Callable[[], None]) -> None:
        """Have it called when the student's activation leaves."""
        self._waiting.append(send)

    def release(self) -> None:
        """Send what waits, in order."""
        while self._waiting:
            self._waiting.popleft()()


class _WatchedTimers:
    """Megatron's timers, or none, with a call whenever one of them has started."""

    # Without arguments it does nothing: Megatron Bridge writes a config's objects as YAML by their class.
    def __init__(self, timers: Any = None, started: Callable[[str], None] = lambda name: None) -> None:
        self.timers, self._started = timers, started

    def __call__(self, name: str, *args: Any, **kwargs: Any) -> Any:
        timer = self.timers(name, *args, **kwargs) if self.timers is not None else None
        return _WatchedTimer(timer, partial(self._started, name))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.timers, name)

    def __deepcopy__(self, memo: Any) -> "_WatchedTimers":
        return self  # a copied config is no other pipeline, and process groups cannot be copied


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
    """Send and receive among ranks that do so at the same time, in any direction; returns when all has arrived.

    Args:
        sends: (tensor, to global rank).
        receives: (tensor to be filled, from global rank).
        group: of all of them, which has had a collective: NCCL wants every rank of a group in its first call.
    """
    operations = [dist.P2POp(dist.isend, tensor, to, group) for tensor, to in sends]
    operations += [dist.P2POp(dist.irecv, tensor, source, group) for tensor, source in receives]
    for work in dist.batch_isend_irecv(operations) if operations else ():
        work.wait()
