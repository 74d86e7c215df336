"""Errors before the first training step: the same message and exit code 2 on every rank.

If only one rank fails, the others wait in a collective that it never joins. So it writes its message to
torch.distributed's store. A thread on each rank polls the store until the first step is done, and ends its rank when a
message is there.
"""

import itertools
import json
import multiprocessing
import os
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist
from megatron.training import get_args
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

from abkd_megatron.errors import AbkdError
from abkd_megatron.hosts.crash_report import describe_startup_error

_POLL_SECONDS = 0.5
_POLLS_PER_SECOND = 2000  # of all ranks together, since there is one store
# A rank that fails in this time reports its own error; often all ranks have the same.
_GRACE_SECONDS = 2.0
_SECONDS_TO_WAIT_FOR_RANKS = 15.0

# One process may run several jobs with one store.
_jobs = itertools.count()


class StartupErrors:
    """Context that ends this rank with another rank's startup error, until the first training step is done.

    It prints the other rank's message and exits with code 2. A rank that was killed writes no message. If rank 0 hosts
    the store, and not torchrun, messages are possible only after torch.distributed is initialized.

    Args:
        show: prints a message.
        debug: whether to print the traceback, not write it to a file.
    """

    def __init__(self, show: Callable[[str], None], *, debug: bool = False) -> None:
        self._show = show
        self._debug = debug
        self._key = f"abkd_megatron/error/{next(_jobs)}"
        self._left = threading.Event()
        self._reporting = threading.Lock()
        self._thread = threading.Thread(target=self._poll, name="startup errors", daemon=True)

    def __enter__(self) -> "StartupErrors":
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        with self._reporting:  # the thread holds it forever once it reports, since it ends the process
            self._left.set()
        self._thread.join(_interval())

    def report(self, error: BaseException) -> None:
        """Print the error and send it to the other ranks, which end with the same message.

        An `AbkdError` is printed as it is. For any other error all ranks print the message of the first rank that
        reports, whose traceback is written to a new file: in megatron.save if possible, else in the system's folder
        for temporary files. Call it after leaving the context.

        Args:
            error: as caught.

        Collectives: none. Waits up to 15 s for the other ranks to report, because the launcher, or the end of the
        store's host, would end them first.
        """
        if self._debug:
            traceback.print_exception(error)
        rank, store = _rank(), None
        with suppress(Exception):  # the store's host may have ended
            store = _store()
        message, file = str(error), None
        if not isinstance(error, AbkdError):
            message = describe_startup_error(error)
            file = None if self._debug else _write_traceback(error, rank)
            message += f"; the traceback is {f'in {file}' if file else 'above'}"
        first, reported = rank, message
        if store is not None:
            with suppress(Exception):
                first, reported = json.loads(store.compare_set(self._key, "", json.dumps([rank, message])))
        if first != rank and not isinstance(error, AbkdError):
            message = f"{reported} (found on rank {first})"
            if file is not None:
                file.unlink()
        self._show(f"error: {message}")
        if store is not None:
            self._wait_for_all(store)

    def _poll(self) -> None:
        store, trained = None, None
        while not self._left.wait(_interval()):
            if trained is not None and _samples() != trained:
                return  # a step is done, with all ranks
            trained = _samples()
            with suppress(Exception):  # the store's host has ended
                store = store or _store()
                if store is not None and store.check([self._key]):
                    self._left.wait(_GRACE_SECONDS)
                    with self._reporting:
                        if not self._left.is_set():
                            self._end(store)
                    return

    def _end(self, store: Store) -> None:
        """End the process. The main thread waits for the rank that failed."""
        rank, message = json.loads(store.get(self._key))
        found = "" if "(found on rank " in message else f" (found on rank {rank})"
        self._show(f"error: {message}{found}")
        self._wait_for_all(store)
        for child in multiprocessing.active_children():  # such as Megatron's checkpoint writer
            child.kill()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(2)

    def _wait_for_all(self, store: Store) -> None:
        """Wait until all ranks have reported. Rank 0, which may host the store, waits until none uses it any more."""
        until, size = time.monotonic() + _SECONDS_TO_WAIT_FOR_RANKS, _size()
        with suppress(Exception):
            for phase, ranks in (("reported", size), ("done", 1 if _rank() else size)):
                count = store.add(f"{self._key}/{phase}", 1)
                while count < ranks and time.monotonic() < until:
                    time.sleep(_interval() / 10)
                    count = store.add(f"{self._key}/{phase}", 0)


def _size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


def _interval() -> float:
    return max(_POLL_SECONDS, _size() / _POLLS_PER_SECOND)


def _store() -> Store | None:
    """Return a separate connection to the job's store: a connection is blocked while another thread waits in it."""
    if _size() == 1:
        return None
    timeout = timedelta(seconds=_SECONDS_TO_WAIT_FOR_RANKS)
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":  # torchrun's, which exists from the beginning
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        return PrefixStore(f"abkd_megatron/attempt_{attempt}", TCPStore(host, port, is_master=False, timeout=timeout))
    if not dist.is_initialized():
        return None
    store = dist.distributed_c10d._get_default_store().clone()
    store.set_timeout(timeout)
    return store


def _samples() -> int | None:
    """Return the number of samples trained on; None before Megatron starts to train."""
    with suppress(AssertionError):  # Megatron has not read its arguments yet
        args = get_args()
        if hasattr(args, "curr_iteration"):
            return int(args.consumed_train_samples)
    return None


def _write_traceback(error: BaseException, rank: int) -> Path | None:
    """Write the traceback to a file; if that is not possible, print it and return None."""
    text = "".join(traceback.format_exception(error))
    folders = [tempfile.gettempdir()]
    with suppress(AssertionError):
        folders.insert(0, get_args().save or folders[0])
    for folder in folders:
        with suppress(OSError):
            descriptor, name = tempfile.mkstemp(".txt", f"traceback-rank-{rank}-", folder)
            with os.fdopen(descriptor, "w") as file:
                file.write(text)
            return Path(name)
    print(text, file=sys.stderr)
    return None
