"""No argument that Megatron takes is lost on its way into what our job builds; by hand: python argument_audit.py."""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from pathlib import Path

import argument_audit
import pytest


@cache
def found(config: Path) -> dict[str, list[str]]:
    # In a process of its own, which gets the stand-in for a GPU for good.
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(argument_audit.main, str(config)).result()


def test_a_difference_is_seen(config: Path) -> None:
    assert any("rotary_percent" in line for line in found(config)["planted"])


@pytest.mark.parametrize("kind", ["differs", "without effect", "models"])
def test_no_argument_is_lost(config: Path, kind: str) -> None:
    assert not found(config)[kind]
