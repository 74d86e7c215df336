"""NCCL's and CUDA's rules over gloo: what would hang or corrupt on GPUs fails here, on CPU ranks.

`install` makes every process group that would be plain gloo one that keeps these rules; torch's and Megatron's code
runs on it unchanged.

- The first unbatched send or receive of a pair of ranks in a group connects the two, and blocks the host until the
  other one comes too. The first collective or batched message of a group does the same for all its ranks.
- A send of more than `EAGER_BYTES` completes when its receiver has posted the receive, not before.
- The n-th send of a pair meets the n-th receive, batched ones and unbatched ones apart; tags mean nothing. Their dtypes
  and sizes must be equal, else both ranks raise.
- `torch.cuda.synchronize`, and a stream's or an event's `synchronize`, wait for all open messages and asynchronous
  collectives of the rank.
- The collectives of a group must agree over its ranks in order, kind, dtype, size, reduction and root; a difference
  raises on all of them at once, with the stack of each. Asynchronous ones run in the background, in order.

Not imitated: that messages of one pair in one group run in the order in which they were issued, and streams that wait
for each other's kernels on the device (CUDA_DEVICE_MAX_CONNECTIONS=1). Groups asked for as gloo by name in `new_group`
stay gloo, as they would in a job on GPUs.
"""

import os
import sys
import threading
import zlib
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

EAGER_BYTES = int(os.environ.get("STRICT_EAGER_BYTES", "64"))
"""Messages up to so many bytes leave without a receiver; NCCL's buffers hold a few MiB, the models here less."""

EAGER_MESSAGES = 8
"""So many of them between two ranks."""

TIMEOUT = float(os.environ["STRICT_TIMEOUT"]) if "STRICT_TIMEOUT" in os.environ else None
"""Seconds after which a wait is an error at the latest; None for the group's own timeout."""

# Tags on the wire, by what they carry; batched messages have others.
_HELLO, _HEADER, _POSTED, _DATA = 1, 2, 3, 4
_BATCHED = 8

_DTYPES = (
    *(torch.float64, torch.float32, torch.bfloat16, torch.float16),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
)

# What carries collectives in torch.distributed's functions, by whichever names the installed torch has.
_COLLECTIVES = (
    *("allreduce", "allreduce_coalesced", "reduce", "broadcast", "barrier"),
    *("allgather", "allgather_coalesced", "allgather_into_tensor_coalesced", "_allgather_base"),
    *("all_gather_single", "all_gather_single_coalesced", "gather", "gather_single", "scatter"),
    *("reduce_scatter", "reduce_scatter_tensor_coalesced", "_reduce_scatter_base"),
    *("reduce_scatter_single", "reduce_scatter_single_coalesced", "alltoall", "alltoall_base", "all_to_all_single"),
)
# Ranks may give these different amounts.
_UNEVEN = ("alltoall", "alltoall_base", "all_to_all_single")
_INTO_TENSOR = ("_allgather_base", "all_gather_single")
_GATHERING = ("allgather", "allgather_coalesced")


# Files of which a stack says nothing.
_NOT_SHOWN = (__file__, f"{os.sep}torch{os.sep}", f"{os.sep}multiprocessing{os.sep}")


class StrictError(RuntimeError):
    """What NCCL or CUDA would not forgive."""


ISSUED: list[str] = []
"""The collectives that this rank has issued so far: "allgather", "allreduce" and so on."""

_open: dict[int, "_Message | Future"] = {}
"""Messages and collectives of this rank that nobody has seen complete."""

_state = threading.local()


def synchronize(*_: object) -> None:
    """Wait for everything that this rank has open, as torch.cuda.synchronize does."""
    for opened in list(_open.values()):
        if isinstance(opened, Future):
            opened.result()
        else:
            opened.finish("torch.cuda.synchronize()")


def open_messages() -> int:
    """How many messages of this rank nobody has seen complete."""
    return sum(isinstance(opened, _Message) for opened in _open.values())


def _stack() -> str:
    """Who calls, without this file and torch's own."""
    frame, lines = sys._getframe(1), []
    while frame is not None and len(lines) < 12:
        code = frame.f_code
        if code.co_filename.startswith(os.sep) and not any(part in code.co_filename for part in _NOT_SHOWN):
            lines.append(f"  {code.co_filename}:{frame.f_lineno} in {code.co_name}")
        frame = frame.f_back  # type: ignore[assignment]
    return "\n".join(lines)


@contextmanager
def _explained(what: str, stack: str) -> Iterator[None]:
    """Say of a wait that did not end what it was for."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, StrictError) or "Timed out" not in str(error):  # a rank has ended: gloo says so
            raise
        raise StrictError(f"{what}: {error}\n{stack}") from None


def _meta(tensor: torch.Tensor) -> torch.Tensor:
    return torch.tensor([_DTYPES.index(tensor.dtype), tensor.numel()], device="cpu")


def _named(meta: torch.Tensor) -> str:
    dtype, number = meta.tolist()
    return f"{number} x {_DTYPES[dtype]}"


class _Message(dist.Work):
    """A send or a receive that was issued."""

    def __init__(self, group: "StrictGroup", kind: str, peer: int, tensor: torch.Tensor, batched: bool) -> None:
        super().__init__()
        self.kind, self.tensor, self.meta, self.eager = kind, tensor, _meta(tensor), False
        self.group, self.wire, self.peer, self.shift = group, group.wire, peer, _BATCHED * batched
        self.what = f"rank {group.rank()} {kind} {peer} of the group {group.ranks}, {_named(self.meta)}"
        self.stack = _stack()
        self.done = False
        self.their_meta = torch.empty_like(self.meta)
        if kind == "sends to":
            self.eager = tensor.nbytes <= EAGER_BYTES
            # Cloned, since whoever has waited for it may go on and write into the tensor.
            group.keep(peer, self.wire.send([self.meta], peer, _HEADER + self.shift), self.meta)
            sent = tensor.clone()
            group.keep(peer, self.wire.send([sent], peer, _DATA + self.shift), sent)
            self.answer = self.wire.recv([self.their_meta], peer, _POSTED + self.shift)
        else:
            group.receives[peer, self.shift].append(self)
            group.keep(peer, self.wire.send([self.meta], peer, _POSTED + self.shift), self.meta)
            self.answer = self.wire.recv([self.their_meta], peer, _HEADER + self.shift)
        if not self.eager:
            _open[id(self)] = self

    def finish(self, why: str) -> None:
        """Block until it is over."""
        if self.done:
            return
        self.done = True
        if self.kind != "sends to":  # on NCCL the messages of a pair are over in their order, whichever is waited for
            before = self.group.receives[self.peer, self.shift]
            while before[0] is not self:
                before[0].finish(why)
            before.popleft()
        _open.pop(id(self), None)
        with _explained(f"{self.what}: not over in {why}", self.stack):
            self.answer.wait()
            if not torch.equal(self.meta, self.their_meta):
                raise StrictError(
                    f"{self.what}: the other end has {_named(self.their_meta)}; on NCCL this hangs, or leaves a tensor "
                    f"read as what it is not\n{self.stack}"
                )
            if self.kind != "sends to":
                self.wire.recv([self.tensor], self.peer, _DATA + self.shift).wait()

    def wait(self, timeout: timedelta = timedelta(0)) -> bool:
        """Return once it is over; of an eager send at once."""
        if not self.eager:
            self.finish("wait()")
        return True

    def is_completed(self) -> bool:
        """Only what was waited for is known to be over, as with gloo."""
        return self.done or self.eager


class StrictGroup(dist.ProcessGroup):
    """A process group over gloo that keeps the rules of this module."""

    def __init__(self, store: dist.Store, rank: int, size: int, timeout: timedelta, ranks: Sequence[int]) -> None:
        super().__init__(rank, size)
        self.timeout = timeout if TIMEOUT is None else min(timeout, timedelta(seconds=TIMEOUT))
        self.ranks = list(ranks) or list(range(size))
        self.wire = dist.ProcessGroupGloo(store, rank, size, self.timeout)
        self.whole = dist.ProcessGroup(store, rank, size)
        self.whole._set_default_backend(dist.ProcessGroup.BackendType.GLOO)
        self.whole._register_backend(torch.device("cpu"), dist.ProcessGroup.BackendType.GLOO, self.wire)
        self.connected = size == 1
        self.pairs: set[int] = set()
        self.number = 0
        self.eager_sends: dict[int, deque[_Message]] = {}
        self.kept: dict[int, deque[tuple[dist.Work, torch.Tensor]]] = {}
        self.receives: dict[tuple[int, int], deque[_Message]] = defaultdict(deque)
        self._thread: ThreadPoolExecutor | None = None
        self._pending: deque[Future] = deque()

    # What torch asks of a group.

    def getBackendName(self) -> str:
        return "gloo"

    def _get_backend(self, device: torch.device) -> Any:
        return self.wire

    def shutdown(self) -> None:
        if self._thread is not None:
            self._thread.shutdown(wait=False, cancel_futures=True)

    abort = shutdown

    def monitored_barrier(self, *args: Any, **kwargs: Any) -> Any:
        return self.whole.monitored_barrier(*args, **kwargs)

    # Messages.

    def send(self, tensors: list[torch.Tensor], peer: int, tag: int) -> dist.Work:
        message = self._message("sends to", tensors, peer)
        if message.eager:
            waiting = self.eager_sends.setdefault(peer, deque())
            waiting.append(message)
            if len(waiting) > EAGER_MESSAGES:
                waiting.popleft().finish("as many messages as leave without a receiver")
        return message

    def recv(self, tensors: list[torch.Tensor], peer: int, tag: int) -> dist.Work:
        return self._message("receives from", tensors, peer)

    def keep(self, peer: int, work: dist.Work, tensor: torch.Tensor) -> None:
        """Keep what is on the wire, which does not say by itself that it has left: some more messages will."""
        kept = self.kept.setdefault(peer, deque())
        kept.append((work, tensor))
        while len(kept) > 8 * EAGER_MESSAGES:
            kept.popleft()[0].wait()

    def recv_anysource(self, tensors: list[torch.Tensor], tag: int) -> dist.Work:
        raise StrictError("NCCL has no receive from any source")

    def _message(self, kind: str, tensors: list[torch.Tensor], peer: int) -> _Message:
        (tensor,) = tensors
        if getattr(_state, "batched", False):
            self._connect_all(f"the first batched message ({kind} {peer})")
        elif peer not in self.pairs:
            self.pairs.add(peer)
            here, there = torch.zeros(1, device="cpu"), torch.empty(1, device="cpu")
            what = f"rank {self.rank()} {kind} {peer} of the group {self.ranks} for the first time, without a batch"
            with _explained(f"{what}: NCCL connects the two here and now, and the other one did not come", _stack()):
                greeting = self.wire.send([here], peer, _HELLO)
                self.wire.recv([there], peer, _HELLO).wait()
                greeting.wait()
        return _Message(self, kind, peer, tensor, getattr(_state, "batched", False))

    # Collectives.

    def _connect_all(self, what: str) -> None:
        if self.connected:
            return
        self.connected = True
        with _explained(f"{what} in the group {self.ranks} connects all its ranks, and not all came", _stack()):
            self.wire.barrier().wait()

    def collective(self, name: str, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Run one, after a look at what the others run."""
        ISSUED.append("allgather" if name in _INTO_TENSOR else name)
        if self.size() == 1:
            return getattr(self.whole, name)(*args, **kwargs)
        self.number += 1
        said, stack = f"{self.number}: {_described(name, args, kwargs)}", _stack()
        self._connect_all(said)
        options = [it for it in (*args, *kwargs.values()) if hasattr(it, "asyncOp")]
        is_async = any(option.asyncOp for option in options)

        def run() -> Any:
            self._compare(said, stack)
            with _explained(f"collective {said} in the group {self.ranks}", stack):
                work = getattr(self.whole, name)(*args, **kwargs)
                if work is not None:
                    work.wait()

        while self._pending and self._pending[0].done():
            self._pending.popleft()
        if not is_async and not self._pending:
            run()
            return None
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix=f"strict {self.ranks}")
        future = self._thread.submit(run)
        if not is_async:
            future.result()
            return None
        self._pending.append(future)
        _open[id(future)] = future
        future.add_done_callback(lambda done: _open.pop(id(done), None) if done.exception() is None else None)
        return _Collective(future)

    def _compare(self, said: str, stack: str) -> None:
        mine = torch.tensor([zlib.crc32(said.encode())], device="cpu")
        theirs = [torch.empty_like(mine) for _ in self.ranks]
        with _explained(f"collective {said} in the group {self.ranks}: not all ranks came", stack):
            self.wire.allgather([theirs], [mine]).wait()
            if all(torch.equal(mine, it) for it in theirs):
                return
            text = f"{said}\n{stack}".encode()[:4096].ljust(4096)
            texts = [torch.empty(4096, dtype=torch.uint8, device="cpu") for _ in self.ranks]
            self.wire.allgather([texts], [torch.tensor(list(text), dtype=torch.uint8, device="cpu")]).wait()
        lines = [
            f"rank {r} runs {bytes(it.tolist()).decode().rstrip()}" for r, it in zip(self.ranks, texts, strict=True)
        ]
        raise StrictError("\n".join([f"the ranks of the group {self.ranks} run different collectives:", *lines]))


class _Collective(dist.Work):
    def __init__(self, future: Future) -> None:
        super().__init__()
        self.future = future

    def wait(self, timeout: timedelta = timedelta(0)) -> bool:
        self.future.result()
        return True

    def is_completed(self) -> bool:
        return self.future.done()

    def is_success(self) -> bool:
        return self.future.done() and self.future.exception() is None


def _described(name: str, args: tuple, kwargs: dict[str, Any]) -> str:
    """What has to be the same on every rank."""
    words = [name]
    for arg in (*args, *kwargs.values()):
        for key in ("reduceOp", "rootRank"):
            if hasattr(arg, key):
                value = getattr(arg, key)
                words.append(f"{key} {getattr(value, 'op', value)}")
    tensors = [_tensors_of(arg) for arg in args]
    if name in _UNEVEN:
        sizes = []
    elif name in _GATHERING:  # the inputs may be uneven, what comes out of them is not
        sizes = [sum(it.numel() for it in tensors[0])]
    elif name in ("gather", "gather_single", "scatter"):
        sizes = [sum(it.numel() for it in tensors[name != "scatter"])]  # the other list is the root's
    else:
        sizes = [sum(it.numel() for it in of) for of in tensors if of]
    dtypes = {str(it.dtype) for of in tensors for it in of}
    return " ".join([*words, *map(str, sizes), *sorted(dtypes)])


def _tensors_of(arg: object) -> list[torch.Tensor]:
    if isinstance(arg, torch.Tensor):
        return [arg]
    if isinstance(arg, list | tuple):
        return [tensor for item in arg for tensor in _tensors_of(item)]
    return []


def _collective(name: str) -> Callable[..., Any]:
    def run(self: StrictGroup, *args: Any, **kwargs: Any) -> Any:
        return self.collective(name, args, kwargs)

    return run


for _name in _COLLECTIVES:
    if hasattr(dist.ProcessGroup, _name):
        setattr(StrictGroup, _name, _collective(_name))


def _create(options: Any, _: object) -> StrictGroup:
    ranks = options.global_ranks_in_group
    return StrictGroup(options.store, options.group_rank, options.group_size, options.timeout, ranks)


def install() -> None:
    """Make gloo strict in this process; call it before torch.distributed is initialized."""
    if hasattr(dist.Backend, "STRICT"):
        return
    dist.Backend.register_backend("strict", _create, extended_api=True, devices=["cpu"])
    initialize, batch, name_of = dist.init_process_group, dist.batch_isend_irecv, dist.get_backend

    def init_process_group(backend: str | None = None, *args: Any, **kwargs: Any) -> None:
        initialize("strict" if backend == "gloo" else backend, *args, **kwargs)

    def batch_isend_irecv(operations: list[dist.P2POp]) -> list[dist.Work]:
        _state.batched = True
        try:
            return batch(operations)
        finally:
            _state.batched = False

    def get_backend(group: dist.ProcessGroup | None = None) -> str:
        name = name_of(group)
        return "gloo" if name == "strict" else name

    dist.get_backend = get_backend  # Megatron asks for it, and knows gloo alone to be on the CPU
    for module in (dist, distributed_c10d):
        module.init_process_group = init_process_group
        module.batch_isend_irecv = batch_isend_irecv
    _synchronize_on_the_cpu_backend()


def _synchronize_on_the_cpu_backend() -> None:
    """Let the stand-in for a GPU, once it is there, wait where a GPU does."""
    from abkd_megatron import cpu_backend

    install_cpu = cpu_backend.install

    def install_and_synchronize() -> None:
        install_cpu()
        torch.cuda.synchronize = synchronize

    cpu_backend.install = install_and_synchronize
    cpu_backend._Idle.synchronize = synchronize  # type: ignore[method-assign]
