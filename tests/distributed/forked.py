"""A server process with torch and Megatron imported, from which the ranks of all tests are forked.

Importing Megatron takes a process longer than most of the jobs here.
"""

import multiprocessing
import os
from functools import cache
from multiprocessing import forkserver
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parents[2]


@cache
def context() -> multiprocessing.context.BaseContext:
    """Return the context whose processes are forked from the server, which ends with this process."""
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(["preload"])
    # torch reads the number of threads when it is imported.
    places = os.pathsep.join(str(ROOT / place) for place in (".", "tests/distributed", "tests/host"))
    # Nothing here needs the network, and Hugging Face's client reads whether it may when it is imported, too.
    preset = {"OMP_NUM_THREADS": "1", "PYTHONPATH": places, "HF_HUB_OFFLINE": "1"}
    with mock.patch.dict(os.environ, preset):
        forkserver.ensure_running()
    return found
