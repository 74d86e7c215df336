"""Runs many command lines one after another on every rank and tells how each ended: python refused.py CASES.json.

CASES.json holds {name: [arguments of abkd_megatron, or a script and its arguments]}; words NAME=VALUE in front of them
are set in the environment, NAME= is taken from it. The last line of stdout is {name: [exit code, stderr]}; of a script
the error that left it is in stderr.
"""

import contextlib
import io
import json
import os
import sys
import time
import traceback
from pathlib import Path

from ports import free_port

# What a case may change in the environment.
LAUNCH = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def main() -> None:
    import torch.distributed as dist
    from megatron.core import mpu
    from megatron.core.num_microbatches_calculator import destroy_num_microbatches_calculator
    from megatron.core.rerun_state_machine import destroy_rerun_state_machine
    from megatron.training.global_vars import destroy_global_vars

    from abkd_megatron import cpu_backend
    from abkd_megatron.__main__ import main as command_line
    from abkd_megatron.errors import AbkdError

    def script(arguments):
        try:
            return cpu_backend.main(arguments)
        except AbkdError as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
            return 1

    def run(arguments):
        try:
            return script(arguments) if arguments[0].endswith(".py") else command_line(arguments)
        except SystemExit as end:  # argparse's, or Megatron's
            return end.code or 0
        except Exception:  # as Python would end, but the next case is still to come
            traceback.print_exc()
            return 1

    ended, path = {}, sys.argv[1]  # a script has a command line of its own
    job = f"{path}.{os.environ['MASTER_PORT']}"
    for number, (name, arguments) in enumerate(json.loads(Path(path).read_text()).items()):
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":  # torchrun's store is where it is
            os.environ["MASTER_PORT"] = new_port(f"{job}.{number}.port")
        before = dict(os.environ)
        while "=" in arguments[0]:
            variable, _, value = arguments.pop(0).partition("=")
            os.environ[variable] = value
            if not value:
                del os.environ[variable]
        print(f"case {number}: {name}", flush=True)  # the last of them, where this hangs
        stderr = io.StringIO()
        with contextlib.redirect_stderr(stderr):
            code = run(arguments)
        ended[name] = [code, stderr.getvalue()]
        os.environ.update({variable: before[variable] for variable in LAUNCH})
        # As if the process had ended: Megatron's arguments and the process groups would be kept otherwise.
        destroy_global_vars()
        destroy_rerun_state_machine()
        destroy_num_microbatches_calculator()
        if dist.is_initialized():
            dist.barrier()  # a case may end on one rank before another has joined
            mpu.destroy_model_parallel()
            dist.destroy_process_group()
        wait_for_all(f"{job}.{number}")
    print("\n" + json.dumps(ended), flush=True)


def new_port(file: str) -> str:
    """One for each case: the store of the case before may still be listening to its own."""
    if os.environ["RANK"] == "0":
        Path(f"{file}.part").write_text(str(free_port()))
        Path(f"{file}.part").rename(file)
    while not Path(file).exists():
        time.sleep(0.01)
    return Path(file).read_text()


def wait_for_all(case: str) -> None:
    """A barrier for when there is no process group: who goes ahead would join that of the case before once more."""
    Path(f"{case}.{os.environ['RANK']}").touch()
    while not all(Path(f"{case}.{rank}").exists() for rank in range(int(os.environ["WORLD_SIZE"]))):
        time.sleep(0.01)


if __name__ == "__main__":
    main()
