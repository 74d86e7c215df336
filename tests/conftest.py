"""The tiers of the tests: `make test-fast` runs what is marked `fast`, `make test` all but what is marked `slow`.

All marks are set here. What is not slow shows every kind of thing once; what is slow shows it again, elsewhere: at four
ranks what two have shown, in a second layout of the same feature, on a second machine of the same kind.
"""

import os
import re
import sys
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import fields
from itertools import combinations
from pathlib import Path

import pytest

# What tests start as processes of their own is this checkout, whichever one is installed.
os.environ["PYTHONPATH"] = os.pathsep.join(
    [str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
)

# By a part of the test's id: why it can wait.
SLOW = {
    r"host/test_(estimate|scale|teacher_reads|soak)\.py": "numbers for the docs, held to them",
    r"host/test_(gpu_training_stages|no_network|uneven_ranks)\.py": "whole jobs around what smaller tests show",
    r"host/test_argument_audit\.py": "changes with Megatron's version",
    r"host/test_output_layer\.py::.*\[4\]": "four ranks",
    r"host/test_launch_scripts\.py::test_(slurm|two_nodes)": "another launcher",
    r"host/test_compare_job\.py::test_(what_was_interrupted|what_is_done|a_failing)": "compare, again",
    r"host/test_neutrality\.py::test_a_resumed_run.*\[plain\]": "the other optimizer",
    r"host/test_stand_in\.py::.*\[false\]": "the other format",
    r"host/test_fault_table\.py::test_fault\[(SIGKILL, (validation|the teacher|the backward|a save, when all|four)"
    r"|slow|SIGSTOP|raise, (the backward|the teacher|a save)|full disk, the first|SIGTERM, (before|validation)"
    r"|SIGTERM to)": "the same fault at another place",
    r"host/test_own_text\.py::test_(sampling_itself.*\[(tensor|data)|every_layout.*\[(pipe|data))": "another layout",
    r"host/test_mixed_sequences\.py::test_layouts_equal_one_rank\[(PP|DP 2, teacher PP)": "another layout",
    r"host/test_cross_tokenizer\.py::test_(layouts.*\[DP|a_watched|losses_are)": "in other files, too",
    r"host/test_teachers_by_source\.py::test_(layouts_equal_one_rank\[PP|a_cached.*\[[PD]P)": "another layout",
    r"host/test_teachers_by_source\.py::test_(losses_are|estimate)": "estimate and compare, again",
    r"host/test_gradient_variance\.py::test_in_every_layout\[[PD]P": "another layout",
    r"host/test_packed_data\.py::test_a_cache.*\[documents": "the other packed data",
    r"host/test_sequences\.py::.*\[4-(packed|variable)": "another layout",
    r"host/test_cached_students\.py::test_(estimate|losses_are)": "estimate and compare, again",
    r"host/test_matrix\.py::.*\[interleaved pipeline, [67] micro-batches": "another number of micro-batches",
    r"host/test_matrix\.py::.*timing-log-level: 2` \(PP 4( x VPP 2)? \(teacher": "another layout",
    r"host/test_matrix\.py::.*\(TP 2 x DP 2 \(teacher: TP 4\), other kind": "another layout",
    r"host/test_table_in_docs\.py": "needs every row",
    r"host/test_sharded_student\.py::test_(megatron_fsdp_trains|combined)": "of training loops other than ours",
    r"host/test_cluster_configs_train\.py::.*(64xH100|qwen25|qwen3_8b|llama32|in_bf16)": "another configuration",
    r"unit/test_docs_examples\.py::test_the_walk": "a walk-through of half a minute",
    r"unit/test_benchmark_head\.py::test_the_command_line": "a benchmark",
}
FAST = (
    r"tests/(unit/(?!test_(host_waits|gpu_acceptance|benchmark_|docs_examples))|distributed/"
    r"|host/test_(step|teacher_layout|hidden_distance|head_choice)\.py)"
)
_ROW = re.compile(r"^tests/host/test_matrix\.py::test_trains_as_on_one_rank\[(.*) \((.*)\)\d*\]$")


@pytest.fixture(autouse=True)
def the_stand_in_stays_out() -> Iterator[None]:
    """The stand-in for a GPU is for good, and would change what later tests of this process see."""
    yield
    cpu = sys.modules.get("abkd_megatron.cpu_backend")
    assert cpu is None or not cpu.is_installed(), "installed in pytest's own process: start another one for it"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    slow: dict[pytest.Item, str] = {}
    patterns = {re.compile(f"^tests/{pattern}"): why for pattern, why in SLOW.items()}
    layouts: dict[str, list[pytest.Item]] = {}
    products: dict[str, list[pytest.Item]] = {}
    for item in items:
        if (row := _ROW.search(item.nodeid)) is not None:
            layouts.setdefault(row[1], []).append(item)
        if "[" in item.name and {"ranks", "index"} <= item.callspec.params.keys():
            products.setdefault(item.nodeid.partition("[")[0], []).append(item)
        for pattern, why in patterns.items():
            if pattern.match(item.nodeid) is not None:
                slow[item] = why
    for of_feature in layouts.values():
        # The last one combines most; of a feature with many, the first one, too.
        slow |= dict.fromkeys(of_feature[len(of_feature) > 3 : -1], "another layout of the same feature")
    for of_test in products.values():
        slow |= dict.fromkeys(set(of_test) - _representatives(of_test), "each pair of its values is in another case")
    for item in items:
        if item in slow:
            item.add_marker(pytest.mark.slow(reason=slow[item]))
        elif re.match(FAST, item.nodeid) is not None and "ranks4" not in item.nodeid:
            item.add_marker(pytest.mark.fast)


def _representatives(items: Sequence[pytest.Item]) -> set[pytest.Item]:
    """Cases at one and two ranks with each pair of values that any of them has, and a dozen at four ranks."""
    few = [item for item in items if item.callspec.params["ranks"] < 4]
    four = [item for item in items if item.callspec.params["ranks"] == 4]
    return {few[at] for at in _cover([_values(item) for item in few])} | set(four[:: -(-len(four) // 12) or 1])


def _values(item: pytest.Item) -> tuple[Hashable, ...]:
    case = item.module.CASES[item.callspec.params["index"]]
    return (item.callspec.params["ranks"], *(str(getattr(case, field.name)) for field in fields(case)))


def _cover(rows: Sequence[tuple[Hashable, ...]]) -> set[int]:
    """Return the numbers of rows that have between them each pair of values, of two columns, that is in any row."""
    pairs = [set(combinations(enumerate(row), 2)) for row in rows]
    missing, found = set().union(*pairs), set()
    while missing:
        best = max(range(len(rows)), key=lambda at: len(pairs[at] & missing))
        missing -= pairs[best]
        found.add(best)
    return found
