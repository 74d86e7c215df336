"""Runs many command lines one after another on every rank and tells how each ended: python refused.py CASES.json.

CASES.json holds {name: [arguments of abkd_megatron, or a script and its arguments]}. The last line of stdout is
{name: [exit code, stderr]}; of a script the error that left it is in stderr.
"""

import contextlib
import io
import json
import os
import sys
import time
from pathlib import Path


def main() -> None:
    import torch.distributed as dist
    from megatron.core.num_microbatches_calculator import destroy_num_microbatches_calculator
    from megatron.training.global_vars import destroy_global_vars

    from abkd_megatron import cpu
    from abkd_megatron.__main__ import main as command_line
    from abkd_megatron.errors import AbkdError

    def script(arguments):
        try:
            return cpu.main(arguments)
        except AbkdError as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
            return 1

    ended, path = {}, sys.argv[1]  # a script has a command line of its own
    for number, (name, arguments) in enumerate(json.loads(Path(path).read_text()).items()):
        stderr = io.StringIO()
        with contextlib.redirect_stderr(stderr):
            code = script(arguments) if arguments[0].endswith(".py") else command_line(arguments)
        ended[name] = [code, stderr.getvalue()]
        # As if the process had ended: Megatron's arguments and the process group would be kept otherwise.
        destroy_global_vars()
        destroy_num_microbatches_calculator()
        if dist.is_initialized():
            dist.barrier()  # a case may end on one rank before another has joined
            dist.destroy_process_group()
        wait_for_all(f"{path}.{os.environ['MASTER_PORT']}.{number}")
    print("\n" + json.dumps(ended), flush=True)


def wait_for_all(case: str) -> None:
    """A barrier for when there is no process group: who goes ahead would join that of the case before once more."""
    Path(f"{case}.{os.environ['RANK']}").touch()
    while not all(Path(f"{case}.{rank}").exists() for rank in range(int(os.environ["WORLD_SIZE"]))):
        time.sleep(0.01)


if __name__ == "__main__":
    main()
