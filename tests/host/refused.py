"""Runs many command lines one after another on every rank and tells how each ended: python refused.py CASES.json.

CASES.json holds {name: [arguments of abkd_megatron]}. The last line of stdout is {name: [exit code, stderr]}.
"""

import contextlib
import io
import json
import sys
from pathlib import Path


def main() -> None:
    import torch.distributed as dist
    from megatron.core.num_microbatches_calculator import destroy_num_microbatches_calculator
    from megatron.training.global_vars import destroy_global_vars

    from abkd_megatron.__main__ import main as command_line

    ended = {}
    for name, arguments in json.loads(Path(sys.argv[1]).read_text()).items():
        stderr = io.StringIO()
        with contextlib.redirect_stderr(stderr):
            code = command_line(arguments)
        ended[name] = [code, stderr.getvalue()]
        # As if the process had ended: Megatron's arguments and the process group would be kept otherwise.
        destroy_global_vars()
        destroy_num_microbatches_calculator()
        if dist.is_initialized():
            dist.destroy_process_group()
    print("\n" + json.dumps(ended), flush=True)


if __name__ == "__main__":
    main()
