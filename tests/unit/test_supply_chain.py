"""What is installed with the package has a license that docs/security.md lists."""

import importlib.metadata
import re

from packaging.requirements import Requirement
from pages import DOCS, ROOT


def runtime() -> dict[str, importlib.metadata.Distribution]:
    """The installed distributions that `pip install` of this package with `plots` brings: {name: of it}."""
    setup = (ROOT / "setup.py").read_text()
    requires = re.search(r"install_requires=\[(.*?)\n    \]", setup, re.DOTALL)
    plots = re.search(r"^plots = \[(.*)\]$", setup, re.MULTILINE)
    assert requires is not None and plots is not None
    waiting = [Requirement(text) for text in re.findall(r'^ +"(.+)",$', requires[1], re.MULTILINE)]
    assert len(waiting) == 7
    waiting += [Requirement(text) for text in re.findall(r'"(.+?)"', plots[1])]
    assert {it.name for it in waiting} >= {"torch", "plotly", "jinja2", "tensorboard", "matplotlib"}
    found: dict[str, importlib.metadata.Distribution] = {}
    seen: set[tuple[str, str]] = set()
    while waiting:
        wanted = waiting.pop()
        name = re.sub(r"[-_.]+", "-", wanted.name).lower()
        for extra in ["", *wanted.extras]:
            if (name, extra) in seen:
                continue
            seen.add((name, extra))
            try:
                found[name] = importlib.metadata.distribution(name)
            except importlib.metadata.PackageNotFoundError:  # of another machine's build of torch
                continue
            for text in found[name].requires or []:
                needs = Requirement(text)
                if needs.marker is None or needs.marker.evaluate({"extra": extra}):
                    waiting.append(needs)
    return found


PERMISSIVE = {
    "Apache-2.0": r"Apache",
    "MIT": r"\bMIT\b",
    "BSD": r"BSD",
    "ISC": r"\bISC",
    "PSF-2.0": r"PSF|Python Software Foundation",
    "Zlib": r"Zlib",
    "CC0-1.0": r"CC0",
    "BSL-1.0": r"BSL-1",
    "CNRI-Python": r"CNRI",
}
OTHERS = {"MPL-2.0": r"MPL|Mozilla", "NVIDIA's own": r"NVIDIA|Other/Proprietary"}
# Without a word of it in their metadata.
NOT_STATED = {"cuda-toolkit": "NVIDIA's own"}


def stated(distribution: importlib.metadata.Distribution) -> str:
    """What a distribution's metadata state as its license: an expression, or classifiers and the line of a field."""
    about = distribution.metadata
    if expressions := about.get_all("License-Expression", []):
        return expressions[0]
    classifiers = [it.rpartition(" :: ")[2] for it in about.get_all("Classifier", []) if it.startswith("License")]
    return "; ".join([*classifiers, *(text.partition("\n")[0] for text in about.get_all("License", []))])


def licenses(name: str, distribution: importlib.metadata.Distribution) -> set[str]:
    """The names in docs/security.md for what it states."""
    text = stated(distribution) or NOT_STATED.get(name, "")
    found = {license for license, spelling in {**PERMISSIVE, **OTHERS}.items() if re.search(spelling, text)}
    assert found and not re.search(r"GPL|Commons Clause|SSPL|BUSL", text), f"{name} states {text!r} as its license"
    return found


def listed() -> dict[str, set[str]]:
    table = (DOCS / "security.md").read_text().partition("<!-- licenses -->\n")[2].partition("\n<!-- /licenses -->")[0]
    rows = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in table.splitlines()[2:]]
    return {name: set(row[0].split(", ")) for row in rows for name in row[1].split(", ")}


def test_licenses_are_as_the_page_says() -> None:
    """What a later resolution brings beside them has to be permissive."""
    found = {name: licenses(name, distribution) for name, distribution in runtime().items()}
    assert {"torch", "numpy", "pyyaml", "rich", "narwhals"} <= found.keys()
    known = listed()
    wrong = {name: sorted(of) for name, of in found.items() if name in known and known[name] != of}
    assert not wrong, f"docs/security.md says otherwise than the metadata: {wrong}"
    new = {name: sorted(of) for name, of in found.items() if name not in known and not of <= PERMISSIVE.keys()}
    assert not new, f"to be looked at, and listed in docs/security.md: {new}"
