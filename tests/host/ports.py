"""Ports for jobs that run at the same time as others."""

import random
import socket
from contextlib import suppress


def free_port() -> int:
    """Return a port below those that a system gives to connections, one of which could take it before the job does."""
    numbers = random.SystemRandom()
    while True:
        port = numbers.randrange(10_000, 32_000)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
