"""Runs `-m MODULE ARGUMENTS` as python does, with Megatron's checkpoint writer forked.

Megatron's own starts a process that imports torch anew, for longer than most jobs here take.
"""

import runpy
import sys

from megatron.core.dist_checkpointing.strategies.filesystem_async import get_write_results_queue

if __name__ == "__main__":
    get_write_results_queue("fork")
    sys.argv = sys.argv[2:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
