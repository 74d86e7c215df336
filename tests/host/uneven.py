"""The command line on ranks that differ: python uneven.py ARGUMENTS.

Each rank has its own free memory, its own GPU (the last one a smaller one) and its own clock; and whoever makes a
tensor on CUDA before Megatron has chosen the device is named at the end of the output. The job takes itself to be on a
GPU (`device=cuda`), which is the CPU stand-in.
"""

import os
import sys
import time
import traceback
from datetime import timedelta
from types import SimpleNamespace

import torch
from torch.overrides import TorchFunctionMode

from abkd_megatron import cpu_backend

# Of one rank's chunk in the test: [V/TP] logits of two models in fp32, twice.
OF_TOKEN = 2 * 56 * 4 * 2
TOO_EARLY: list[str] = []


class Recorder(TorchFunctionMode):
    """Notes who makes tensors on CUDA."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        asked, result = [*args, *(kwargs or {}).values()], func(*args, **(kwargs or {}))
        # Megatron asks for properties of a device, which makes no context on it.
        if isinstance(result, torch.Tensor) and any(
            isinstance(it, str | torch.device) and str(it).startswith("cuda") for it in asked
        ):
            TOO_EARLY.append("".join(traceback.format_stack(limit=6)[:-1]))
        return result


def main() -> None:
    rank = int(os.environ["RANK"])
    cpu_backend.install()
    cpu_backend.init_process_group(timedelta(minutes=3))
    from abkd_megatron.__main__ import main as command_line
    from abkd_megatron.hosts import megatron_lm
    from abkd_megatron.student import plan

    memory = 64 * OF_TOKEN * (130 if rank else 300)
    torch.cuda.mem_get_info = lambda *_: (memory // (rank + 2), memory)
    on_gpu = plan.automatic_chunk_tokens
    plan.automatic_chunk_tokens = lambda _, of_token: on_gpu(SimpleNamespace(type="cuda"), of_token)
    now = time.time
    time.time = lambda: now() + 3600 * rank

    recorder, pretrain = Recorder(), megatron_lm.pretrain

    def pretrain_where_a_gpu_is_chosen(*args, **kwargs):
        recorder.__exit__(None, None, None)
        return pretrain(*args, **kwargs)

    megatron_lm.pretrain = pretrain_where_a_gpu_is_chosen
    recorder.__enter__()
    try:
        sys.exit(command_line(sys.argv[1:]))
    finally:
        print("TOO EARLY", len(TOO_EARLY), *TOO_EARLY, flush=True)


if __name__ == "__main__":
    main()
