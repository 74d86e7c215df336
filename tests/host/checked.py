"""Runs many command lines of `abkd-megatron check` one after another: python checked.py CASES.json.

CASES.json holds {name: [words behind `check`]}; they run in its folder, whose runs/ no demo has filled. The last line
of stdout is {name: [exit code, stdout, stderr]}.
"""

import contextlib
import io
import json
import os
import sys
from pathlib import Path


def main() -> None:
    from abkd_megatron.__main__ import main as command_line

    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):  # as on a machine where no job runs
        os.environ.pop(name, None)
    cases = Path(sys.argv[1])
    os.chdir(cases.parent)
    ended = {}
    for name, words in json.loads(cases.read_text()).items():
        before = dict(os.environ)
        with contextlib.redirect_stdout(io.StringIO()) as stdout, contextlib.redirect_stderr(io.StringIO()) as stderr:
            code = command_line(["check", *words])
        changed = {key for key in before.keys() | os.environ.keys() if before.get(key) != os.environ.get(key)}
        assert changed <= {"CUDA_DEVICE_MAX_CONNECTIONS", "HF_HUB_OFFLINE"}, (
            f"{name}: the environment was changed: {changed}"
        )
        ended[name] = [code, stdout.getvalue(), stderr.getvalue()]
    print("\n" + json.dumps(ended), flush=True)


if __name__ == "__main__":
    main()
