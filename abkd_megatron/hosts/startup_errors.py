"""One message and exit code 2 on every rank for what is raised before the first training step, on whichever rank.

A rank that fails alone leaves the others in a collective that it never joins. Here it tells them by torch.distributed's
store, and a thread on each rank, which looks there until the first step is done, ends those that would wait.
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
from abkd_megatron.hosts.crash_report import before_the_first_step

_SECONDS_BETWEEN_LOOKS = 0.5
_LOOKS_A_SECOND = 2000  # of all ranks together: there is one store
# A rank that fails by itself in this time speaks for itself, as all do where they have the same fault.
_SECONDS_TO_SPEAK = 2.0
_SECONDS_TO_WAIT_FOR_OTHERS = 15.0

# A store may serve several jobs of one process, one after another.
_jobs = itertools.count()


class OneVoice:
    """Entered, it listens for a message of another rank until the first training step is done, or it is left.

    A rank that hears one says it, too, and ends with exit code 2. Nothing is heard from a rank that was killed, nor
    before torch.distributed is initialized where rank 0 hosts its store; torchrun mostly does.

    Args:
        say: prints a message.
        debug: print the traceback as well, in place of writing it to a file.
    """

    def __init__(self, say: Callable[[str], None], *, debug: bool = False) -> None:
        self._say = say
        self._debug = debug
        self._key = f"abkd_megatron/said/{next(_jobs)}"
        self._left = threading.Event()
        self._mouth = threading.Lock()
        self._thread = threading.Thread(target=self._listen, name="one voice", daemon=True)

    def __enter__(self) -> "OneVoice":
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        with self._mouth:  # held for good by the thread if that has begun to speak: it ends the process
            self._left.set()
        self._thread.join(_interval())

    def speak(self, error: BaseException) -> None:
        """Say why this rank ends before the first step, and see that the others end with the same message.

        Of an `AbkdError` that is its own text. Of any other error it is what the first rank to speak says, and the
        traceback of that rank goes to a new file: in megatron.save where that can be written, else in the system's
        folder for temporary files. To be called when this is left.

        Collectives: none. Waits for other ranks to say it, for 15 s at most: who ends first takes the others along,
        by the launcher or as the host of the store.
        """
        if self._debug:
            traceback.print_exception(error)
        rank, store = _rank(), None
        with suppress(Exception):  # whoever hosts the store may have been the first to go
            store = _store()
        message, file = str(error), None
        if not isinstance(error, AbkdError):
            message = before_the_first_step(error)
            file = None if self._debug else _written(error, rank)
            message += f"; the traceback is {f'in {file}' if file else 'above'}"
        first, said = rank, message
        if store is not None:
            with suppress(Exception):
                first, said = json.loads(store.compare_set(self._key, "", json.dumps([rank, message])))
        if first != rank and not isinstance(error, AbkdError):
            message = f"{said} (found on rank {first})"
            if file is not None:
                file.unlink()
        self._say(f"error: {message}")
        if store is not None:
            self._wait_for_all(store)

    def _listen(self) -> None:
        store, trained = None, None
        while not self._left.wait(_interval()):
            if trained is not None and _samples() != trained:
                return  # a step is done, in which all ranks took part
            trained = _samples()
            with suppress(Exception):  # a store that is gone has nothing more to say
                store = store or _store()
                if store is not None and store.check([self._key]):
                    self._left.wait(_SECONDS_TO_SPEAK)
                    with self._mouth:
                        if not self._left.is_set():
                            self._end(store)
                    return

    def _end(self, store: Store) -> None:
        """In place of the main thread, which waits for the rank that spoke."""
        rank, message = json.loads(store.get(self._key))
        found = "" if "(found on rank " in message else f" (found on rank {rank})"
        self._say(f"error: {message}{found}")
        self._wait_for_all(store)
        for child in multiprocessing.active_children():  # such as Megatron's writer of checkpoints
            child.kill()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(2)

    def _wait_for_all(self, store: Store) -> None:
        """Until all have spoken; rank 0, which may host the store, until none looks there any more."""
        until, size = time.monotonic() + _SECONDS_TO_WAIT_FOR_OTHERS, _size()
        with suppress(Exception):
            for phase, ranks in (("spoken", size), ("gone", 1 if _rank() else size)):
                count = store.add(f"{self._key}/{phase}", 1)
                while count < ranks and time.monotonic() < until:
                    time.sleep(_interval() / 10)
                    count = store.add(f"{self._key}/{phase}", 0)


def _size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


def _interval() -> float:
    return max(_SECONDS_BETWEEN_LOOKS, _size() / _LOOKS_A_SECOND)


def _store() -> Store | None:
    """A connection of its own to the store of the job: whoever waits in another one holds that."""
    if _size() == 1:
        return None
    patience = timedelta(seconds=_SECONDS_TO_WAIT_FOR_OTHERS)
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":  # torchrun's, which is there from the beginning
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        return PrefixStore(f"abkd_megatron/attempt_{attempt}", TCPStore(host, port, is_master=False, timeout=patience))
    if not dist.is_initialized():
        return None
    store = dist.distributed_c10d._get_default_store().clone()
    store.set_timeout(patience)
    return store


def _samples() -> int | None:
    """What was trained on so far; None before Megatron begins to train."""
    with suppress(AssertionError):  # Megatron has not read its arguments yet
        args = get_args()
        if hasattr(args, "curr_iteration"):
            return int(args.consumed_train_samples)
    return None


def _written(error: BaseException, rank: int) -> Path | None:
    """The traceback's file; None where none can be written, and the traceback was printed."""
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
