"""The documents: tables of results, keys of the configuration, quoted messages, links and anchors."""

import ast
import json
import re
from dataclasses import fields
from functools import cache
from pathlib import Path
from statistics import mean

import pytest
from pages import DOCS, PAGES, ROOT

from abkd_megatron.config.cache import CacheConfig
from abkd_megatron.config.rollouts import GenerateConfig
from abkd_megatron.config.schema import CompareConfig, DataConfig, DistillationConfig, TeacherConfig
from abkd_megatron.config.validation import ValidationConfig
from abkd_megatron.losses.registry import DIVERGENCES, LOGIT_LOSSES, parameters
from abkd_megatron.tools.comparison import differences, recommend, summarize, table

RESULTS = json.loads((DOCS / "comparison.json").read_text())


def between(page: Path, mark: str) -> list[list[str]]:
    """Return the cells of the table between two marks, without its head."""
    _, opening, rest = page.read_text().partition(f"<!-- {mark} -->\n")
    text, closing, _ = rest.partition(f"\n<!-- /{mark} -->")
    assert opening and closing, f"{page.name} has lost its marks"
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in text.splitlines()[2:]]


def test_the_comparison_shows_its_results() -> None:
    summary = summarize(RESULTS["runs"], list(RESULTS["summary"])[:-1])
    assert summary == RESULTS["summary"]
    assert table(summary) in (DOCS / "comparison.md").read_text()
    assert recommend(RESULTS["runs"]) == RESULTS["recommendation"] in (DOCS / "comparison.md").read_text()
    assert differences(RESULTS["runs"]) == RESULTS["differences"]
    seeds = {run["seed"] for run in RESULTS["runs"]}
    assert len(seeds) >= 5 and len(RESULTS["runs"]) == len(seeds) * (len(summary) - 1)
    assert (DOCS / "comparison.png").stat().st_size > 50_000


def test_concepts_quotes_the_comparison() -> None:
    text = (DOCS / "concepts.md").read_text()
    quoted = re.findall(r"^\| ([\w ,.-]+) \| (\d\.\d{3}) \| (\d\.\d{3}) \|$", text, re.MULTILINE)
    assert len(quoted) == 7
    found = [line.strip("| ").split(" | ") for line in table(RESULTS["summary"]).splitlines()]
    for name, *numbers in quoted:
        (row,) = [row for row in found if row[0] == name]
        assert [cell.split()[0] for cell in (row[1], row[3])] == numbers
    assert [row[1] for row in quoted] == sorted(row[1] for row in quoted)


def test_concepts_shows_a_run_that_was() -> None:
    runs = [run["validation"] for run in RESULTS["runs"] if run["loss"] == "forward KL"]
    shown = between(DOCS / "concepts.md", "healthy")
    assert len(shown) == 6
    for name, *numbers in shown:
        assert numbers == [f"{mean(run[step][name.strip('`')] for run in runs):.2f}" for step in runs[0]]


def test_readme_shows_tested_layouts() -> None:
    """Every layout in README's table is one that a row of docs/parallelism.md has trained."""
    tested = {
        place for _, where, found in between(DOCS / "parallelism.md", "matrix") for place in where.split(", ") if found
    }
    short = between(ROOT / "README.md", "short matrix")
    assert len(short) >= 9 and all(len(row) == 3 for row in short)
    for feature, where, _ in short:
        if where != "no":
            assert set(where.split(", ")) <= tested, feature


@cache
def sections_of_configuration() -> dict[str, str]:
    parts = re.split(r"^## (\w+)$", (DOCS / "configuration.md").read_text(), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def keys(section: str) -> dict[str, str]:
    """Return the rows of a section's first table, by key."""
    text = sections_of_configuration()[section].partition("\n### ")[0]
    found = {}
    for line in re.findall(r"^\| `.*$", text, re.MULTILINE):
        for key in re.findall(r"`([\w-]+)`", line.split(" | ")[0]):
            assert key not in found, key
            found[key] = line
    return found


@pytest.mark.parametrize(
    ("section", "kind"),
    [
        ("distillation", DistillationConfig),
        ("data", DataConfig),
        ("validation", ValidationConfig),
        ("cache", CacheConfig),
        ("generate", GenerateConfig),
        ("compare", CompareConfig),
    ],
)
def test_every_key_is_there_with_its_default(section: str, kind: type) -> None:
    documented, made = keys(section), kind()
    assert documented.keys() == {item.name for item in fields(kind)}
    for name, line in documented.items():
        value = getattr(made, name)
        if isinstance(value, int | float | str):
            shown = str(value).lower() if isinstance(value, bool) else str(value)
            assert shown in re.split(r"[ ,`]+", line.split(" | ")[1]), line


def test_the_teachers_keys_are_there() -> None:
    documented = keys("teacher")
    assert {key.replace("-", "_") for key in documented} == {item.name for item in fields(TeacherConfig)} - {"megatron"}


def test_every_loss_is_there_with_its_parameters() -> None:
    text = sections_of_configuration()["distillation"]
    for title, known in (("Divergences", DIVERGENCES), ("Logit losses", LOGIT_LOSSES)):
        part = text.partition(f"\n### {title}\n")[2].partition("\n### ")[0]
        lines = {name: line for line in part.splitlines() for name in re.findall(r"`(\w+)`", line.split(" | ")[0])}
        assert known.keys() <= lines.keys(), title
        for name in known:
            for parameter in parameters(name):
                assert f"`{parameter}`" in lines[name], name


@cache
def strings() -> list[str]:
    """Return every string in the sources but docstrings, with U+2026 for interpolated values."""
    found = []
    for file in (ROOT / "abkd_megatron").rglob("*.py"):
        nodes = list(ast.walk(ast.parse(file.read_text())))
        docstrings = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
        for node in nodes:
            if isinstance(node, ast.JoinedStr):
                parts = (part.value if isinstance(part, ast.Constant) else "\u2026" for part in node.values)
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
                found.append(node.value)
    return found


def messages() -> list[str]:
    """Return the messages that docs/troubleshooting.md quotes in first cells."""
    before, _, _ = (DOCS / "troubleshooting.md").read_text().partition("\n## Wrong numbers")
    cells = re.findall(r"^\| (`.*?) \| ", before, re.MULTILINE)
    return [message for cell in cells for message in re.findall(r"`(.+?)`", cell)]


def test_quoted_messages_are_in_the_sources() -> None:
    """One list of all stale quotes, because a reader searches the page for what a job printed."""
    quoted = messages()
    assert len(quoted) >= 30 and len(set(quoted)) == len(quoted)
    stale = {one for one in quoted for piece in one.split("...") if not any(piece.strip() in it for it in strings())}
    assert not stale


def rooms() -> list[tuple[str, str]]:
    """Return the rows of CONTRIBUTING's table of rooms: a path, and the text on it."""
    rows = re.findall(r"^\| (`[a-z_]+(?:/|\.py)`.*?) \| (.*) \|$", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE)
    return [(path, text) for paths, text in rows for path in re.findall(r"`(.+?)`", paths)]


@pytest.mark.parametrize(("path", "text"), rooms(), ids=[path for path, _ in rooms()])
def test_a_room_has_the_named_modules(path: str, text: str) -> None:
    place = ROOT / "abkd_megatron" / path
    assert place.exists()
    if path.endswith("/"):
        modules = {file.stem for file in place.iterdir()}
        assert set(re.findall(r"`([a-z_]+)`", text)) <= modules


def test_every_room_is_in_contributing() -> None:
    package = {
        file.name for file in (ROOT / "abkd_megatron").iterdir() if not file.name.startswith(("__init", "__pyc"))
    }
    assert {path.rstrip("/") for path, _ in rooms()} == package - {"py.typed"}


def anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub makes from headings."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


LINKS = [
    (page, target)
    for page in PAGES
    for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL))
    if not target.startswith("https://")
]


@pytest.mark.parametrize(("page", "target"), LINKS, ids=[f"{page.name}: {target}" for page, target in LINKS])
def test_a_link_leads_somewhere(page: Path, target: str) -> None:
    path, _, anchor = target.partition("#")
    there = (page.parent / path).resolve() if path else page
    assert there.exists()
    assert not anchor or anchor in anchors(there)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_tables_have_a_header(page: Path) -> None:
    heads = re.findall(r"^(\|.*)\n\|(?: ?-+ ?\|)+$", page.read_text(), re.MULTILINE)
    assert not [head for head in heads if not all(cell.strip() for cell in head.strip("|").split("|"))]


def test_every_page_is_in_the_contents() -> None:
    named = set(re.findall(r"\]\(([\w-]+\.md)\)", (DOCS / "README.md").read_text()))
    assert named >= {page.name for page in DOCS.glob("*.md")} - {"README.md"}
