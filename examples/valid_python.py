"""A reward for `distillation.on_policy.reward`: whether added lines are Python statements (docs/on_policy.md)."""

import ast
from collections.abc import Sequence


def reward(prompts: Sequence[str], texts: Sequence[str]) -> list[float]:
    """Return the share of a text's complete lines that are Python statements by themselves, 0 without one.

    The first line continues the prompt and the last one may be cut off, so neither counts. A comment is no statement:
    with a reward for it a model learns to write comments only.
    """
    return [_share(text.split("\n")[1:-1]) for text in texts]


def _share(lines: Sequence[str]) -> float:
    written = [line.strip() for line in lines if line.strip()]
    return sum(map(_is_statement, written)) / len(written) if written else 0.0


def _is_statement(line: str) -> bool:
    try:
        return bool(ast.parse(f"{line} pass" if line.endswith(":") else line).body)
    except (SyntaxError, ValueError):
        return False
