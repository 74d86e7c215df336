"""Imports point down between all rooms, and the losses need torch only."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import abkd_megatron

PACKAGE = Path(abkd_megatron.__file__).parent
# From the lowest room to the highest; a module directly in the package is a room of its own.
ROOMS = (
    *("errors", "validation", "tensors", "losses", "kernels", "vocab_parallel", "local_hybrid_spec"),
    *(
        "config",
        "cpu_backend",
        "data",
        "cache",
        "teacher",
        "rollouts",
        "student",
        "preflight",
        "hosts",
        "tools",
        "__main__",
    ),
)
TORCH_ONLY = ("errors", "validation", "tensors", "losses", "kernels", "vocab_parallel")


@pytest.mark.parametrize(
    "statement", ["import abkd_megatron.losses", "import abkd_megatron, abkd_megatron.vocab_parallel"]
)
def test_importing_does_not_import_megatron(statement):
    code = f"{statement}; import sys; print([m for m in sys.modules if m.partition('.')[0] == 'megatron'])"
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=PACKAGE.parent,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[]"


def imported_modules(source: Path) -> set[str]:
    modules = set()
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{source}: expected an absolute import"
            modules |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return modules


def sources(room: str) -> list[Path]:
    return sorted((PACKAGE / room).rglob("*.py")) or [PACKAGE / f"{room}.py"]


def test_every_module_is_in_a_room():
    found = {path for room in ROOMS for path in sources(room)}
    assert found | {PACKAGE / "__init__.py"} == set(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("room", ROOMS)
def test_imports_point_down(room):
    allowed = ROOMS[: ROOMS.index(room) + 1]
    for source in sources(room):
        for module in imported_modules(source):
            top, *rest = module.split(".")
            if top == "abkd_megatron" and rest:
                assert rest[0] in allowed or rest == ["__version__"], f"{source} imports {module}"
            elif room in TORCH_ONLY and top != "abkd_megatron":
                known = {"torch", "triton"} if room == "kernels" else {"torch"}
                assert top in known or top in sys.stdlib_module_names, f"{source} imports {module}"


def test_one_module_imports_the_classes_of_models() -> None:
    """Megatron-Core 0.19 deprecates GPTModel, and a later release may lack it."""
    users = {
        str(source.relative_to(PACKAGE))
        for source in PACKAGE.rglob("*.py")
        if any(module.split(".")[-1] in ("GPTModel", "HybridModel") for module in imported_modules(source))
    }
    assert users == {"teacher/model.py"}
