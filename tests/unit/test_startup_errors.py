"""A rank that fails before torch.distributed is there ends the others by torchrun's store; a job that trains, none."""

import os
import time
from argparse import Namespace
from multiprocessing.connection import Connection
from pathlib import Path

import forked
import pytest
from torch.distributed import TCPStore

pytest.importorskip("megatron.training")

from abkd_megatron.errors import HostError


def be_rank(rank: int, port: int, out: str, ready: Connection) -> None:
    """Rank 0 fails; rank 1 waits, as in a collective; rank 2 has trained a step before, and rank 0 does not end it."""
    os.environ.update(RANK=str(rank), WORLD_SIZE="3", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    os.environ.update(TORCHELASTIC_USE_AGENT_STORE="True", TORCHELASTIC_RESTART_COUNT="1")
    from abkd_megatron.hosts import startup_errors as module

    module._SECONDS_TO_WAIT_FOR_RANKS = 4.0
    args = Namespace(curr_iteration=0, consumed_train_samples=0)
    if rank == 2:
        module.get_args = lambda: args
    errors = module.StartupErrors(lambda message: Path(out, str(rank)).write_text(message))
    try:
        with errors:
            time.sleep(1)
            args.consumed_train_samples = 8
            time.sleep(1)
            ready.send(rank)
            ready.recv()
            if rank == 0:
                raise HostError("expected A, got B")
            time.sleep(8)
    except HostError as error:
        errors.report(error)
        os._exit(2)
    assert rank == 2 and not errors._thread.is_alive()


def test_a_rank_that_waits_ends_with_the_message_of_the_one_that_failed(tmp_path: Path) -> None:
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    context = forked.context()
    pipes = [context.Pipe() for _ in range(3)]
    ranks = [
        context.Process(target=be_rank, args=(rank, store.port, str(tmp_path), there))
        for rank, (_, there) in enumerate(pipes)
    ]
    for process in ranks:
        process.start()
    for here, _ in pipes:
        here.recv()
    for here, _ in pipes:
        here.send("go")
    for process in ranks:
        process.join(60)
    assert [process.exitcode for process in ranks] == [2, 2, 0]
    said = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert said == {"0": "error: expected A, got B", "1": "error: expected A, got B (found on rank 0)"}
