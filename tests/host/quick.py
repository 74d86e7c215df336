"""Runs `-m MODULE ARGUMENTS` as python does, but saves checkpoints without a process for asynchronous ones.

Megatron's own imports torch anew, for longer than most jobs here take.
"""

import queue
import runpy
import sys

from megatron.core.dist_checkpointing.strategies import filesystem_async

if __name__ == "__main__":
    filesystem_async._results_queue = queue.Queue()
    sys.argv = sys.argv[2:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
