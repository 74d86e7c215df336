"""Which tests `make test` leaves to `make test-full`: they are marked `slow`, all of them here.

What stays shows every kind of thing once. What goes shows it again, elsewhere: at four ranks what two have shown, in a
second layout of the same feature, on a second machine of the same kind.
"""

import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# What tests start as processes of their own is this checkout, whichever one is installed.
os.environ["PYTHONPATH"] = os.pathsep.join(
    [str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
)

# By a part of the test's id: why it can wait.
SLOW = {
    r"distributed/test_(vocab_parallel|sharded_logit_losses|shared_columns|selection)\.py::.*\[(ranks4|.*-4\])": (
        "at four ranks what two have shown; a dozen cases stay"
    ),
    r"host/test_(estimate|scale|teacher_reads|soak)\.py": "numbers for the docs, held to them",
    r"host/test_(gpu_training_stages|no_network|uneven_ranks)\.py": "whole jobs around what smaller tests show",
    r"host/test_output_layer\.py::.*\[4\]": "four ranks",
    r"host/test_launch_scripts\.py::test_slurm": "another launcher",
    r"host/test_compare_job\.py::test_(what_was_interrupted|what_is_done|a_failing)": "compare, again",
    r"host/test_neutrality\.py::test_a_resumed_run.*\[plain\]": "the other optimizer",
    r"host/test_stand_in\.py::.*\[false\]": "the other format",
    r"host/test_fault_table\.py::test_fault\[(SIGKILL, (validation|the teacher|the backward|a save, when all|four)"
    r"|slow|SIGSTOP|raise, (the backward|the teacher|a save)|full disk, the first|SIGTERM, (before|validation)"
    r"|SIGTERM to)": "the same fault at another place",
    r"host/test_fault_table\.py::test_the_table": "needs every row",
    r"host/test_table_in_docs\.py": "needs every row",
    r"host/test_cluster_configs_train\.py::.*(64xH100|qwen25)": "another configuration",
    r"unit/test_docs_examples\.py::test_the_walk": "a walk-through of half a minute",
    r"unit/test_benchmark_head\.py::test_the_command_line": "a benchmark",
}
_ROW = re.compile(r"^tests/host/test_matrix\.py::test_trains_as_on_one_rank\[(.*) \((.*)\)\d*\]$")


@pytest.fixture(autouse=True)
def the_stand_in_stays_out() -> Iterator[None]:
    """The stand-in for a GPU is for good, and would change what later tests of this process see."""
    yield
    cpu = sys.modules.get("abkd_megatron.cpu_backend")
    assert cpu is None or not cpu.is_installed(), "installed in pytest's own process: start another one for it"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    patterns = {re.compile(f"^tests/{pattern}"): why for pattern, why in SLOW.items()}
    layouts: dict[str, list[pytest.Item]] = {}
    for item in items:
        if (row := _ROW.search(item.nodeid)) is not None:
            layouts.setdefault(row[1], []).append(item)
        for pattern, why in patterns.items():
            if pattern.match(item.nodeid) is not None:
                item.add_marker(pytest.mark.slow(reason=why))
    for of_feature in layouts.values():
        # The last one combines most; of a feature with many, the first one, too.
        for item in of_feature[len(of_feature) > 3 : -1]:
            item.add_marker(pytest.mark.slow(reason="another layout of the same feature"))
