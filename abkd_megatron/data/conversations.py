"""Checks of conversations, the data of Megatron's `sft`."""

import json
from collections.abc import Iterable
from pathlib import Path

from abkd_megatron.errors import DataError

ROLES = ("system", "user", "assistant", "tool")


def check_conversations(paths: Iterable[str]) -> None:
    """Check that files of conversations exist, and the first line of each.

    Args:
        paths: JSON Lines files. Every line has "messages", a list of {"role": one of `ROLES`, "content": text}.

    Raises:
        DataError: with the file, and what is wrong.
    """
    for path in paths:
        try:
            with Path(path).open(encoding="utf-8") as file:
                line = next((line for line in file if line.strip()), None)
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(
                f"{path}: expected a JSON Lines file of conversations, got {error}; correct data-path"
            ) from error
        if line is None:
            raise DataError(f"{path}: expected conversations, got an empty file; correct data-path")
        try:
            messages = json.loads(line)["messages"]
            roles = [(message["role"], message["content"])[0] for message in messages]
        except (ValueError, LookupError, TypeError) as error:
            raise DataError(
                f'{path}: expected lines {{"messages": [{{"role": ..., "content": ...}}, ...]}}, got '
                f"{line[:80].strip()}; convert it"
            ) from error
        others = sorted({str(role) for role in roles} - set(ROLES))
        if others:
            raise DataError(f"{path}: expected the roles {', '.join(ROLES)}, got {', '.join(others)}; rename them")
