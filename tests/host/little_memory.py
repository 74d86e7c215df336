"""The command line where next to no memory is free: python little_memory.py ARGUMENTS."""

import sys
from types import SimpleNamespace
from unittest import mock

import psutil

from abkd_megatron.__main__ import main

if __name__ == "__main__":
    with mock.patch.object(psutil, "virtual_memory", lambda: SimpleNamespace(available=100_000)):
        sys.exit(main(sys.argv[1:]))
