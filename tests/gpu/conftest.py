"""What the tests on a GPU share with others: the kernels' cases, and the comparison with fp64 of the acceptance run."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests/unit"), str(ROOT / "benchmarks")]
pytest.register_assert_rewrite("test_logit_losses")  # imported here before it is collected
