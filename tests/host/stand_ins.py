"""Runs a program with tests/stand_ins in place of mamba-ssm, einops and flash-linear-attention: stand_ins.py PROGRAM...

Megatron looks for them when it is imported, which the process that ranks are forked from has done.
"""

import importlib
import os
import runpy
import sys
from collections.abc import Mapping
from pathlib import Path

HERE = Path(__file__).parents[1] / "stand_ins"
OPTIONS = ("hybrid-layer-pattern", "teacher.hybrid-layer-pattern")


def program_for(settings: Mapping[str, object]) -> list[Path]:
    """Return the words before a program, where layers of these settings need a package that is not installed."""
    patterns = "".join(str(settings.get(name, "")) for name in OPTIONS)
    return [Path(__file__)] if set(patterns) & set("MG") else []


def use() -> None:
    """Let Megatron find the packages."""
    sys.path.insert(0, str(HERE))
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(HERE), os.environ.get("PYTHONPATH"))))
    for name in ("mamba_context_parallel", "mamba_mixer", "gated_delta_net.common", "gated_delta_net.gdn"):
        importlib.reload(importlib.import_module(f"megatron.core.ssm.{name}"))
    importlib.reload(importlib.import_module("megatron.core.ssm.gated_delta_net"))


if __name__ == "__main__":
    sys.argv = sys.argv[1:]
    use()
    if sys.argv[0] == "-m":
        sys.argv = sys.argv[1:]
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        sys.path.insert(0, str(Path(sys.argv[0]).parent))
        runpy.run_path(sys.argv[0], run_name="__main__")
