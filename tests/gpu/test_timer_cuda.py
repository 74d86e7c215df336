"""On a GPU the teacher's passes are timed, and reported, without the host waiting for the device."""

import pytest
import torch

from abkd_megatron.student.report import TEACHER_SECONDS, LossChecks, Report, masked_loss
from abkd_megatron.student.timer import PassTimer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


def test_passes_are_timed_without_waiting() -> None:
    stopwatch, mask = PassTimer(torch.device("cuda")), torch.ones(1, 4, device="cuda")
    weight = torch.randn(4096, 4096, device="cuda")
    for _ in range(3):
        weight @ weight
    torch.cuda.synchronize()

    def run() -> None:
        with stopwatch.measure():
            for _ in range(50):
                weight @ weight

    run()
    first, number = stopwatch.take()  # waits: it is the first
    assert number == 1 and 1e-5 < first < 10
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(4):
            run()
            *_, logged = masked_loss(
                mask,
                mask,
                Report({}, scheduled={"alpha": 0.5}, teacher_seconds=stopwatch.take),
                LossChecks(nan=False),
            )
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    seconds, passes = logged[TEACHER_SECONDS].tolist()
    assert seconds / passes == pytest.approx(first, rel=0.8)
    seconds, passes = stopwatch.take()
    assert passes >= 1 and seconds / passes == pytest.approx(first, rel=0.8)
