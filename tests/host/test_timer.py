"""The teacher's time: what is known without waiting; a GPU's events are played by some that happen when told to."""

import pytest
import torch

from abkd_megatron.student.report import TEACHER_SECONDS, LossChecks, Report, masked_loss
from abkd_megatron.student.timer import PassTimer


class Event:
    """Happens at a second of its own; how far the queue is, all have in common."""

    now = 0.0
    waited = 0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        Event.queue += 1.0
        self.at = Event.queue

    def query(self) -> bool:
        return self.at <= Event.now

    def synchronize(self) -> None:
        Event.waited += 1
        Event.now = max(Event.now, self.at)

    def elapsed_time(self, other: "Event") -> float:
        assert self.query() and other.query()
        return 1000 * (other.at - self.at)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> PassTimer:
    monkeypatch.setattr(torch.cuda, "Event", Event)
    Event.now, Event.waited, Event.queue = 0.0, 0, 0.0
    return PassTimer(torch.device("cuda"))


def measure(stopwatch: PassTimer, seconds: float = 1.0) -> None:
    with stopwatch.measure():
        Event.queue += seconds - 1.0


def mean(*pairs: tuple[float, float]) -> float:
    """As Megatron takes it, in fp32."""
    total = torch.tensor(pairs).sum(dim=0)
    return (total[0] / total[1]).item()


def test_only_the_first_pass_of_all_is_waited_for(gpu: PassTimer) -> None:
    measure(gpu, 2.0)
    assert gpu.take() == (2.0, 1.0) and Event.waited == 1
    for _ in range(3):
        measure(gpu, 4.0)
        assert mean(gpu.take()) == pytest.approx(2.0), "as before, as long as nothing else is known"
    Event.now = Event.queue
    assert gpu.take() == (12.0, 3.0)
    assert Event.waited == 1


def test_what_is_not_known_yet_weighs_nothing_beside_what_is(gpu: PassTimer) -> None:
    measure(gpu, 2.0)
    known = gpu.take()
    measure(gpu, 8.0)
    unknown = gpu.take()
    Event.now = Event.queue
    assert mean(known, unknown) == 2.0
    assert mean(unknown, gpu.take()) == 8.0


def test_what_nobody_takes_does_not_pile_up(gpu: PassTimer) -> None:
    for _ in range(5):
        measure(gpu)
        Event.now = Event.queue
    assert len(gpu._pending) == 1
    assert gpu.take() == (5.0, 5.0) and Event.waited == 1


def test_a_failed_pass_is_none(gpu: PassTimer) -> None:
    with pytest.raises(ValueError, match="failed"), gpu.measure():
        raise ValueError("failed")
    assert gpu.take() == (0.0, pytest.approx(0.0)) and not gpu._pending


def test_on_a_cpu_it_is_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([10.0, 10.5, 20.0, 21.0])
    monkeypatch.setattr("abkd_megatron.student.timer.time.perf_counter", lambda: next(times))
    stopwatch = PassTimer(torch.device("cpu"))
    for _ in range(2):
        with stopwatch.measure():
            pass
    assert stopwatch.take() == (1.5, 2.0)
    assert mean(stopwatch.take()) == pytest.approx(0.75)


def test_it_is_logged_as_a_mean_over_passes() -> None:
    mask = torch.ones(1, 4)
    (*_, sums), (*_, without) = (
        masked_loss(mask, mask, Report({}, teacher_seconds=taken), LossChecks(nan=False))
        for taken in (lambda: (1.5, 3.0), lambda: None)
    )
    assert sums[TEACHER_SECONDS].tolist() == [1.5, 3.0]
    assert sums.keys() - without.keys() == {TEACHER_SECONDS}
