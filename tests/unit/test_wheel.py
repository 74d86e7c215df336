"""The wheel has every file of the package, so an installation outside a checkout has its data."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_wheel_has_every_file_of_the_package(tmp_path: Path) -> None:
    source = tmp_path / "source"
    no_caches = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "abkd_megatron", source / "abkd_megatron", ignore=no_caches)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation", "-q", "-w", tmp_path]
    subprocess.run(command, cwd=source, check=True, timeout=300)
    (wheel,) = tmp_path.glob("*.whl")
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("abkd_megatron/")}
    files = {str(path.relative_to(ROOT)) for path in (ROOT / "abkd_megatron").rglob("*") if path.is_file()}
    assert packed == {name for name in files if "__pycache__" not in name}
