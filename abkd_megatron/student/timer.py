"""Timer of the teacher's passes that does not synchronize the host."""

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from abkd_megatron.student.report import NOTHING


class PassTimer:
    """Seconds per pass: wall clock on a CPU, a pair of CUDA events on a GPU.

    Events are read once both have happened, at the end of the pass or of a later one.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._pending: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()
        self._seconds, self._number = 0.0, 0
        self._mean: float | None = None

    @contextmanager
    def measure(self) -> Iterator[None]:
        """Measure the block as one pass, on the current stream."""
        if self._on_gpu:
            self._read()  # here too, or events pile up where nobody calls take()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            yield
            end.record()
            self._pending.append((begin, end))
        else:
            begun = time.perf_counter()
            yield
            self._add(time.perf_counter() - begun)

    def take(self) -> tuple[float, float]:
        """Return (seconds, passes) since the last call.

        If no pass has ended since: the last mean with a weight of `NOTHING`, which does not change a sum and avoids
        0/0. Only the very first pass is waited for.
        """
        if self._mean is None and self._pending:
            self._pending[0][1].synchronize()
        self._read()
        if not self._number:
            return (self._mean or 0.0) * NOTHING, NOTHING
        taken = self._seconds, float(self._number)
        self._mean = self._seconds / self._number
        self._seconds, self._number = 0.0, 0
        return taken

    def _read(self) -> None:
        while self._pending and self._pending[0][1].query():
            begin, end = self._pending.popleft()
            self._add(begin.elapsed_time(end) / 1000)

    def _add(self, seconds: float) -> None:
        self._seconds, self._number = self._seconds + seconds, self._number + 1
