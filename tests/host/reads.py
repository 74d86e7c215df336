"""Runs a job of the command line and writes what it reads of a folder: python reads.py FOLDER OUT JOB WORDS.

OUT/RANK.json holds {a file's name: [times opened, [[offset, bytes read there], ...]]}.
"""

import builtins
import io
import json
import os
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

FOUND: dict[str, list] = defaultdict(lambda: [0, []])
OPEN = io.open


class Counted(io.FileIO):
    """A file whose bytes are written down as they are read."""

    def __init__(self, path: str) -> None:
        super().__init__(path, "rb")
        self._found = FOUND[Path(path).name]
        self._found[0] += 1

    def readinto(self, buffer: Any) -> int | None:
        place, number = self.tell(), super().readinto(buffer)
        self._found[1].append([place, number or 0])
        return number

    def readall(self) -> bytes:
        place, content = self.tell(), super().readall()
        self._found[1].append([place, len(content)])
        return content


def counting(folder: str) -> Any:
    def call(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if isinstance(file, (str, os.PathLike)) and os.fspath(file).startswith(folder) and mode == "rb":
            return io.BufferedReader(Counted(os.fspath(file)), 512)
        return OPEN(file, mode, *args, **kwargs)

    return call


def main() -> int:
    builtins.open = io.open = counting(sys.argv[1])
    from abkd_megatron.__main__ import main as command_line

    code = command_line(sys.argv[3:])
    Path(sys.argv[2], f"{os.environ['RANK']}.json").write_text(json.dumps(FOUND))
    return code


if __name__ == "__main__":
    sys.exit(main())
