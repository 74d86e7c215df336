"""Python on the pages: it compiles, marked blocks run, and the walk-through passes its own tests."""

import ast
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pages import PAGES, ROOT

BLOCK = re.compile(r"^(?:<!-- ([^>\n]+) -->\n)?```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
BLOCKS = [(page.name, mark, text) for page in PAGES for mark, text in BLOCK.findall(page.read_text())]
RUN = [(page, text) for page, mark, text in BLOCKS if mark == "runs"]


@pytest.mark.parametrize(("page", "mark", "text"), BLOCKS, ids=[f"{page}: {text[:40]}" for page, _, text in BLOCKS])
def test_python_compiles(page: str, mark: str, text: str) -> None:
    compile(text, page, "exec")


@pytest.mark.parametrize(("page", "text"), RUN, ids=[page for page, _ in RUN])
def test_what_is_marked_runs(page: str, text: str) -> None:
    exec(compile(text, page, "exec"), {})


IMPORTED = sorted(
    {
        (page, node.module, it.name)
        for page, _, text in BLOCKS
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("abkd_megatron")
        for it in node.names
    }
)


@pytest.mark.parametrize(("page", "module", "name"), IMPORTED)
def test_an_import_resolves(page: str, module: str, name: str) -> None:
    if module == "abkd_megatron.hosts.bridge":
        pytest.importorskip("megatron.bridge")
    assert hasattr(importlib.import_module(module), name)


def test_something_runs() -> None:
    assert RUN


def test_the_first_example_runs() -> None:
    (first,) = (text for page, _, text in BLOCKS if page == "README.md" and "vocab_parallel_divergence" in text)
    names: dict[str, Any] = {}
    exec(compile(first, "README.md", "exec"), names)
    assert names["loss"].shape == names["todi"].shape == (2, 16)
    assert names["student_logits"].grad.abs().sum() > 0


def test_the_walk_through_passes_its_own_tests(tmp_path: Path) -> None:
    files = {mark.removeprefix("file: "): text for _, mark, text in BLOCKS if mark.startswith("file: ")}
    assert files.keys() == {"le_cam.py", "test_le_cam.py", "entropy_gap.py", "test_entropy_gap.py"}
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    places = os.pathsep.join(map(str, (tmp_path, ROOT, ROOT / "tests/distributed")))
    ended = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", tmp_path],
        env={**os.environ, "PYTHONPATH": places},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stdout[-4000:] + ended.stderr[-2000:]
    assert re.search(r"\b11 passed", ended.stdout), ended.stdout[-500:]
