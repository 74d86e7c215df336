"""The strict transport lets through what NCCL does, and nothing that only gloo forgives."""

import re
import time
from collections.abc import Callable
from datetime import timedelta
from functools import cache
from typing import Any

import pytest
import strict
import torch
import torch.distributed as dist
from harness import run_distributed

from abkd_megatron.teacher.channel import Channel, new_group

RANKS = 3
BIG = strict.EAGER_BYTES  # numbers of four bytes
PATIENCE = timedelta(seconds=3)


def other(rank: int) -> int:
    return 1 - rank


def first_message_without_its_receiver(group: Any, rank: int) -> None:
    if rank == 0:
        dist.isend(torch.ones(1), 1, group=group)


def first_message_met(group: Any, rank: int) -> None:
    if rank == 0:
        dist.isend(torch.ones(1), 1, group=group).wait()
    if rank == 1:
        time.sleep(0.5)
        received = torch.empty(1)
        dist.irecv(received, 0, group=group).wait()
        assert received == 1


def first_batch_of_some_ranks(group: Any, rank: int) -> None:
    if rank < 2:
        operation = dist.isend if rank == 0 else dist.irecv
        dist.batch_isend_irecv([dist.P2POp(operation, torch.ones(1), other(rank), group)])[0].wait()


def connected(group: Any) -> Channel:
    return Channel(group, [(0, 1)], torch.device("cpu"), 64)


def large_send_nobody_receives(group: Any, rank: int) -> None:
    channel = connected(group)
    if rank == 0:
        channel.send(torch.ones(BIG), 1)  # returns
        channel.drain()


def small_sends_nobody_has_received_yet(group: Any, rank: int) -> None:
    channel = connected(group)
    if rank == 0:
        for _ in range(strict.EAGER_MESSAGES):
            channel.send(torch.ones(1), 1)
        strict.synchronize()
        channel.drain()
    dist.barrier()
    if rank == 1:
        for _ in range(strict.EAGER_MESSAGES):
            channel.receive((1,), torch.float32, 0)


def synchronized_with_an_open_send(group: Any, rank: int) -> None:
    channel = connected(group)
    if rank == 0:
        channel.send(torch.ones(BIG), 1)
        strict.synchronize()


def synchronized_with_a_send_that_is_posted(group: Any, rank: int) -> None:
    channel = connected(group)
    if rank == 0:
        channel.send(torch.arange(BIG), 1)
        strict.synchronize()
        assert strict.open_messages() == 0
    if rank == 1:
        work, received = channel.post((BIG,), torch.int64, 0)
        dist.barrier()  # rank 0 comes here only when it has synchronized: what is posted is enough
        work.wait()
        assert torch.equal(received, torch.arange(BIG))
    else:
        dist.barrier()


def waited_for_in_another_order(group: Any, rank: int) -> None:
    channel = connected(group)
    for size in (BIG, 2 * BIG):  # the second time they differ in size
        if rank == 0:
            channel.send(torch.zeros(BIG), 1)
            channel.send(torch.ones(size), 1)
            channel.drain()
        if rank == 1:
            first, zeros = channel.post((BIG,), torch.float32, 0)
            second, ones = channel.post((size,), torch.float32, 0)
            second.wait()
            assert torch.equal(zeros, torch.zeros(BIG)) and torch.equal(ones, torch.ones(size))
            first.wait()


def another_dtype(group: Any, rank: int) -> None:
    channel = connected(group)
    if rank == 0:
        channel.send(torch.ones(BIG), 1)
        channel.drain()
    if rank == 1:
        channel.receive((BIG,), torch.bfloat16, 0)


def another_size(group: Any, rank: int) -> None:
    channel = connected(group)
    if rank == 0:
        channel.send(torch.ones(BIG), 1)
        channel.drain()
    if rank == 1:
        channel.receive((BIG + 1,), torch.float32, 0)


def sent_as_nobody_expects_it(group: Any, rank: int) -> None:
    channel = connected(group)
    if rank == 0:
        channel.send(torch.ones(BIG), 1, ((BIG,), torch.bfloat16))


def other_collectives(group: Any, rank: int) -> None:
    if rank == 0:
        dist.all_reduce(torch.ones(3), group=group)
    else:
        dist.broadcast(torch.ones(3), 1, group=group)


def other_sizes(group: Any, rank: int) -> None:
    dist.all_reduce(torch.ones(3 + rank // 2), group=group)


def other_sizes_in_the_background(group: Any, rank: int) -> None:
    dist.all_reduce(torch.ones(1), group=group)
    dist.all_reduce(torch.ones(3 + rank // 2), group=group, async_op=True).wait()


def other_order(group: Any, rank: int) -> None:
    works = [
        dist.all_reduce(torch.ones(1), op, group=group, async_op=True)
        for op in ((dist.ReduceOp.SUM, dist.ReduceOp.MAX) if rank else (dist.ReduceOp.MAX, dist.ReduceOp.SUM))
    ]
    for work in works:
        work.wait()


def what_is_right(group: Any, rank: int) -> None:
    total = torch.full((3,), float(rank))
    first = dist.all_reduce(total, group=group, async_op=True)
    gathered = torch.empty(3, 2)
    second = dist.all_gather([*gathered], torch.full((2,), float(rank)), group=group, async_op=True)
    objects = [None] * RANKS
    second.wait()
    first.wait()
    dist.all_gather_object(objects, {"rank": rank}, group=group)
    assert objects == [{"rank": other} for other in range(RANKS)]
    assert total.tolist() == [3.0] * 3
    assert gathered[:, 0].tolist() == [0.0, 1.0, 2.0]
    received = torch.empty(5)
    following, before = (rank + 1) % RANKS, (rank - 1) % RANKS
    operations = [
        dist.P2POp(dist.isend, torch.full((5,), float(rank)), following, group),
        dist.P2POp(dist.irecv, received, before, group),
    ]
    for work in dist.batch_isend_irecv(operations):
        work.wait()
    assert received.tolist() == [float(before)] * 5


CASES: dict[Callable, tuple[str | None, tuple[int, ...]]] = {
    # what it says of the fault, and the ranks that raise
    first_message_without_its_receiver: ("NCCL connects the two here and now", (0,)),
    first_message_met: (None, ()),
    first_batch_of_some_ranks: ("connects all its ranks", (0, 1)),
    large_send_nobody_receives: ("not over in wait", (0,)),
    small_sends_nobody_has_received_yet: (None, ()),
    synchronized_with_an_open_send: ("not over in torch.cuda.synchronize", (0,)),
    synchronized_with_a_send_that_is_posted: (None, ()),
    waited_for_in_another_order: (None, ()),
    another_dtype: (f"the other end has {BIG} x torch", (0, 1)),
    another_size: ("the other end has", (0, 1)),
    sent_as_nobody_expects_it: ("expected .* torch.bfloat16, got .* torch.float32", (0,)),
    other_collectives: (
        "(?s)rank 0 runs .*allreduce.*in other_coll.*rank 1 runs .*broadcast.*in other_coll",
        (0, 1, 2),
    ),
    other_sizes: ("(?s)different collectives.* 3 torch.float32.* 4 torch.float32", (0, 1, 2)),
    other_sizes_in_the_background: ("different collectives", (0, 1, 2)),
    other_order: ("different collectives", (0, 1, 2)),
    what_is_right: (None, ()),
}


def run_cases(rank: int, world_size: int) -> dict[str, str]:
    """What each case raised on this rank."""
    found = {}
    for case in CASES:
        group = new_group(range(world_size), PATIENCE)
        try:
            case(group, rank)
        except RuntimeError as error:
            found[case.__name__] = f"{type(error).__name__}: {error}"
        strict._open.clear()
        dist.barrier()
    return found


@cache
def found() -> list[dict[str, str]]:
    return run_distributed(run_cases, RANKS, timeout_seconds=400)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_what_only_gloo_forgives_raises(case: Callable) -> None:
    message, ranks = CASES[case]
    raised = {rank: of[case.__name__] for rank, of in enumerate(found()) if case.__name__ in of}
    assert tuple(raised) == ranks, raised
    for text in raised.values():
        assert message is not None
        assert re.search(message, text), text
