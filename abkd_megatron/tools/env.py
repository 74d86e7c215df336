"""Report of installed dependencies, their purpose, and how to install missing ones.

Packages are found by their metadata. Megatron is not imported; torch is imported only if it is installed.
"""

import importlib.metadata
import importlib.util
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass

from abkd_megatron.errors import HostError
from abkd_megatron.hosts.launch import unrelated_apex
from abkd_megatron.tools.tables import show

OK, ABSENT, MISSING, WRONG = "ok", "not here", "missing", "wrong"
_STYLES = {OK: "green", ABSENT: "yellow", MISSING: "bold red", WRONG: "bold red"}


@dataclass(frozen=True)
class Part:
    """One dependency."""

    name: str
    """Its official name."""
    purpose: str
    """The features that need it."""
    found: str
    """Its version or a description; empty if it is absent."""
    verdict: str
    """`OK`, `ABSENT` or `WRONG`."""
    remedy: str = ""
    """How to install or fix it; empty if it is `OK`."""
    required: bool = False
    """Whether every job needs it."""


def main() -> int:
    """Print the report.

    Returns:
        Exit code: 2 if a required dependency is missing, or a package is installed that jobs reject; else 0.
    """
    parts = list(look())
    rows = [
        (part.name, part.found, part.purpose, part.remedy, MISSING if _is_missing(part) else part.verdict)
        for part in parts
    ]
    show(("part", "found", "needed for", "how to install", "verdict"), rows, _STYLES)
    wrong = [part.name for part in parts if part.verdict == WRONG or _is_missing(part)]
    print(f"\nmissing or wrong: {', '.join(wrong)}" if wrong else "\nall required parts are installed")
    return 2 if wrong else 0


def _is_missing(part: Part) -> bool:
    return part.required and part.verdict == ABSENT


def look() -> Iterator[Part]:
    """Yield all parts, in installation order."""
    yield _python()
    yield _ourselves()
    yield _package("torch", "everything", required=True)
    yield from _of_torch()
    yield _package("megatron-core", "pretrain, distill, compare", required=True, remedy="pip install '{requirement}'")
    yield _package("sentencepiece", "prepare; SentencePiece tokenizers", required=True)
    yield _package("PyYAML", "configuration files", required=True)
    yield _package("psutil", "Megatron's checkpoint writer, which hangs without it", required=True)
    yield _package("rich", "tables on a terminal", required=True)
    yield _package(
        "transformer-engine",
        "device: cuda by Megatron's default, fp8; without it megatron.transformer-impl=local",
        remedy="pip install --no-build-isolation 'transformer-engine[pytorch]', on a machine with CUDA",
    )
    yield _apex()
    yield _package("triton", "the triton kernel of the losses, on GPUs", remedy="comes with CUDA builds of torch")
    yield _compiler()
    for name, purpose in (
        ("tensorboard", "megatron.tensorboard-dir, report"),
        ("plotly", "report"),
        ("jinja2", "report"),
        ("matplotlib", "figures of compare and estimate"),
    ):
        yield _package(name, purpose, remedy="pip install 'abkd-megatron[plots]'")
    yield _package(
        "megatron-bridge",
        "checkpoints from and to Hugging Face",
        remedy="pip install 'abkd-megatron[bridge]', on a machine with CUDA",
    )


def need_plots(job: str, *packages: str) -> None:
    """Check that packages of the extra `plots` are installed.

    Raises:
        HostError: with the names of the missing packages.
    """
    if missing := [package for package in packages if importlib.util.find_spec(package) is None]:
        raise HostError(f"{job}: expected {', '.join(missing)}, found none; pip install 'abkd-megatron[plots]'")


def need_rouge() -> None:
    """Check that the package of the extra `rouge` is installed.

    Raises:
        HostError: it is not.
    """
    if importlib.util.find_spec("rouge_score") is None:
        raise HostError("rouge: expected the package rouge-score, found none; pip install 'abkd-megatron[rouge]'")


def _python() -> Part:
    version = platform.python_version()
    good = sys.version_info >= (3, 12)
    return Part("Python", "everything", version, OK if good else WRONG, "" if good else "install 3.12 or newer", True)


def _ourselves() -> Part:
    from abkd_megatron import __version__

    purpose = "supported versions of the other packages"
    try:
        importlib.metadata.version("abkd-megatron")
    except importlib.metadata.PackageNotFoundError:
        return Part("abkd-megatron", purpose, f"{__version__}, not installed", ABSENT, "pip install -e .")
    return Part("abkd-megatron", purpose, __version__, OK)


def _package(name: str, purpose: str, *, remedy: str = "pip install '{requirement}'", required: bool = False) -> Part:
    requirement = _requirement(name)
    remedy = remedy.format(requirement=requirement)
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return Part(name, purpose, "", ABSENT, remedy, required)
    limits = re.sub(r"^[\w.-]+(\[.*\])?", "", requirement)
    if not _within(version, requirement):
        return Part(name, purpose, f"{version}, supported {limits}", WRONG, remedy, required)
    return Part(name, purpose, f"{version}, supported {limits}" if limits else version, OK, required=required)


def _requirement(name: str) -> str:
    """Return the requirement on a package from this package's metadata, without markers; its name if there is none."""
    try:
        ours = importlib.metadata.requires("abkd-megatron") or []
    except importlib.metadata.PackageNotFoundError:  # run from a checkout that is not installed
        ours = []
    for line in ours:
        requirement = line.partition(";")[0].strip()
        if re.split(r"[\[<>=!~ ]", requirement)[0].lower() == name.lower():
            return requirement
    return name


def _within(version: str, requirement: str) -> bool:
    try:
        from packaging.requirements import Requirement
    except ImportError:
        return True
    return Requirement(requirement).specifier.contains(version, prereleases=True)


def _of_torch() -> Iterator[Part]:
    """Yield CUDA, NCCL and the GPUs, as torch finds them."""
    gpu = "device: cuda"
    try:
        import torch

        cuda, gpus = torch.version.cuda, [torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())]
        nccl = ".".join(map(str, torch.cuda.nccl.version())) if cuda else ""
    except ImportError as error:
        if importlib.util.find_spec("torch"):
            yield Part("torch, imported", "everything", f"{error}", WRONG, "install it again", True)
        return
    build = "a CUDA build of torch: https://pytorch.org/get-started/locally"
    yield Part("CUDA", gpu, cuda or "", OK if cuda else ABSENT, "" if cuda else build)
    yield Part("NCCL", "several GPUs", nccl, OK if nccl else ABSENT, "" if nccl else build)
    shown = ", ".join(f"{gpus.count(name)} x {name}" for name in dict.fromkeys(gpus))
    yield Part("GPU", gpu, shown, OK if gpus else ABSENT, "" if gpus else "a machine with an NVIDIA GPU and its driver")


def _apex() -> Part:
    purpose = "Megatron's default on GPUs; without it megatron.no-gradient-accumulation-fusion=true"
    source = "from https://github.com/NVIDIA/apex, or with the NGC images of PyTorch; not from PyPI"
    if unrelated_apex():
        found = "not NVIDIA's but an unrelated package from PyPI, which Megatron would import by mistake"
        return Part("NVIDIA apex", purpose, found, WRONG, "pip uninstall apex")
    if importlib.util.find_spec("apex"):
        try:
            version = importlib.metadata.version("apex")
        except importlib.metadata.PackageNotFoundError:
            version = "of unknown version"
        return Part("NVIDIA apex", purpose, version, OK)
    return Part("NVIDIA apex", purpose, "", ABSENT, source)


def _compiler() -> Part:
    purpose, remedy = "the cpp kernel of the losses, on CPUs", "install g++ or clang++, or set CXX"
    try:
        from abkd_megatron.kernels import cpp
    except ImportError:  # torch is not here
        return Part("C++ compiler", purpose, "", ABSENT, remedy)
    command = cpp.compiler()
    if not command or not shutil.which(command[0]):
        return Part("C++ compiler", purpose, "", ABSENT, remedy)
    said = subprocess.run([*command, "--version"], capture_output=True, text=True, check=False).stdout
    return Part("C++ compiler", purpose, (said.splitlines() or [command[0]])[0], OK)
