"""The divergences and the vocabulary-parallel engine know torch alone.

Proves: importing them, or the package's front door, imports no Megatron; and their sources name nothing but
torch, the standard library and each other (divergences never the engine).
"""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import abkd_megatron

PACKAGE = Path(abkd_megatron.__file__).parent
# What every room may use.
_COMMON = {"abkd_megatron.arguments", "abkd_megatron.errors", "abkd_megatron.tensors"}
ALLOWED = {
    "divergences": _COMMON | {"abkd_megatron.divergences"},
    "logit_losses": _COMMON | {"abkd_megatron.divergences", "abkd_megatron.logit_losses"},
    "kernels": _COMMON | {"abkd_megatron.divergences", "abkd_megatron.kernels"},
    "vocab_parallel": _COMMON
    | {
        "abkd_megatron.divergences",
        "abkd_megatron.kernels",
        "abkd_megatron.logit_losses",
        "abkd_megatron.vocab_parallel",
    },
}


@pytest.mark.parametrize(
    "statement", ["import abkd_megatron.divergences", "import abkd_megatron, abkd_megatron.vocab_parallel"]
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
            assert node.level == 0, f"{source}: a relative import hides where the arrow points"
            modules.add(node.module)
    return modules


@pytest.mark.parametrize("room", ALLOWED)
def test_arrows_point_down(room):
    sources = sorted((PACKAGE / room).rglob("*.py"))
    assert sources
    for source in sources:
        for module in imported_modules(source):
            top = module.partition(".")[0]
            if top == "abkd_megatron":
                assert ".".join(module.split(".")[:2]) in ALLOWED[room], f"{source} imports {module}"
            else:
                known = {"torch", "triton"} if room == "kernels" else {"torch"}
                assert top in known or top in sys.stdlib_module_names, f"{source} imports {module}"
