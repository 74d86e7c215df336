"""Counts of prose habits in the package, the docs, README and CONTRIBUTING: `python tests/prose.py [CHECKOUT ...]`.

A measure, not a gate. One column per checkout; without arguments, this one.
"""

import ast
import re
import sys
from pathlib import Path

HABITS = {
    "beside": r"\bbesides?\b",
    "alone": r"\balone\b",
    "told, tell(s)": r"\b(?:told|tells?|telling)\b",
    "lie, lies": r"\b(?:lie|lies|lying)\b",
    "a token, a rank, a chunk (for per)": r"(?:numbers?|loss|losses|bytes|times?|steps?|MiB|memory|once|one|FLOPs) "
    r"an? (?:token|rank|chunk|step|logit|micro-batch|GPU)\b",
    "neighbour": r"\bneighbours?\b",
    "distil, distils": r"\bdistils?\b",
    "refuse(d, s), refusal": r"\brefus(?:e|es|ed|al|als|ing)\b",
    "likewise": r"\blikewise\b",
    "those of, that of": r"\b(?:those|that) of\b",
    "seen": r"\bseen\b",
    "of one's own, of your own": r"\b(?:one's|your|its|their) own\b",
    "-ise for -ize": r"\b(?:material|normal|initial|serial|minim|quant)is(?:e|es|ed|ing|ation)\b",
}
OPENING = re.compile(r"(?:What|Whether|How|Which)\b")
DOCSTRINGS = "docstrings: What, Whether, How, Which"


def sources(root: Path) -> list[Path]:
    """Return the files that are counted."""
    pages = [root / "README.md", root / "CONTRIBUTING.md", *sorted((root / "docs").glob("*.md"))]
    return [*pages, *sorted((root / "abkd_megatron").rglob("*.py"))]


def docstrings(tree: ast.AST) -> list[str]:
    """Return all docstrings, those below fields of classes included."""
    found = [node.value for node in ast.walk(tree) if isinstance(node, ast.Expr)]
    return [value.value for value in found if isinstance(value, ast.Constant) and isinstance(value.value, str)]


def count(root: Path) -> dict[str, int]:
    """Count every habit in one checkout, and the words of its Markdown."""
    texts = {file: file.read_text() for file in sources(root)}
    everything = "\n".join(texts.values())
    found = {name: len(re.findall(pattern, everything, re.IGNORECASE)) for name, pattern in HABITS.items()}
    python = [docstrings(ast.parse(text)) for file, text in texts.items() if file.suffix == ".py"]
    found[DOCSTRINGS] = sum(bool(OPENING.match(text)) for of_file in python for text in of_file)
    markdown = [*root.glob("*.md"), *root.glob("docs/*.md"), *root.glob("examples/*.md")]
    found["words of Markdown"] = sum(len(file.read_text().split()) for file in markdown)
    return found


def main(checkouts: list[str]) -> None:
    """Print one row per habit."""
    roots = [Path(name) for name in checkouts] or [Path(__file__).resolve().parents[1]]
    columns = [count(root) for root in roots]
    for name in columns[0]:
        print(f"{name:<38}" + "".join(f"{column[name]:>9,}" for column in columns))


if __name__ == "__main__":
    main(sys.argv[1:])
