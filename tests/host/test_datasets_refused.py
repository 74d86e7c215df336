"""Datasets damaged or of another tokenizer end a job on every rank before its first step, and show in `check`."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from launch import launch
from matrix import check_refused, run_refused

# name: (job, what of the data, which file of it is spoilt and how, what the message must say)
CASES = {
    "index cut short": ("distill", "train", ".idx", "cut", r"train\.idx: expected \d+ bytes.* got \d+"),
    "tokens cut short": ("distill", "valid", ".bin", "cut", r"valid\.bin: expected \d+ bytes.*, got"),
    "index of another": ("pretrain", "test", ".idx", "other", r"test\.bin: expected \d+ bytes.*, got"),
    "tokens of another": ("distill", "train", ".bin", "ids", r"token ids of 0 to 399, got 400 at token"),
}


@pytest.fixture(scope="module")
def cases(workspace: Path, config: Path, teacher: Path) -> dict[str, list[str]]:
    """For each case a command line that names its own copy of the data, as Megatron's arguments do."""
    made, data = {}, workspace / "data"
    for name, (job, split, end, how, _) in CASES.items():
        root = workspace / f"spoilt {name}"
        shutil.copytree(data, root)
        file = root / f"{split}{end}"
        if how == "cut":
            file.write_bytes(file.read_bytes()[:-2])
        elif how == "other":
            shutil.copy(data / f"train{end}", file)
        else:
            ids = np.fromfile(file, np.uint16)
            ids[len(ids) // 2] = 400
            ids.tofile(file)
        given = {f"{of}-data-path": root / of for of in ("train", "valid", "test")}
        given |= {"tokenizer-type": "SentencePieceTokenizer", "tokenizer-model": data / "tokenizer.model"}
        settings = [f"megatron.{key}={value}" for key, value in given.items()]
        made[name] = [job, "--config", str(config), f"teacher.load={teacher}", "data.dir=null", *settings]
    return made


@pytest.fixture(scope="module")
def ended(cases: dict[str, list[str]], workspace: Path) -> list[dict[str, tuple[int, str]]]:
    return run_refused(cases, 2, workspace)


@pytest.mark.parametrize("name", CASES)
def test_every_rank_says_what_is_wrong(ended: list[dict[str, tuple[int, str]]], name: str) -> None:
    job, *_, message = CASES[name]
    check_refused(ended, name, job, message)
    assert "(found on rank 0)" not in ended[0][name][1] and "(found on rank 0)" in ended[1][name][1]


def test_check_says_the_same(cases: dict[str, list[str]], ended: object, workspace: Path) -> None:
    path = workspace / "checked-datasets.json"
    path.write_text(json.dumps({name: words for name, (_, *words) in cases.items()}))
    (rank,) = launch([Path(__file__).with_name("checked.py"), path], 1)
    assert rank.code == 0, rank.output[-6000:]
    found = json.loads(rank.output.splitlines()[-1])
    for name, (*_, message) in CASES.items():
        code, stdout, _ = found[name]
        said = " ".join(stdout.split())
        assert code == 2 and "1 rejected" in said, stdout
        assert re.search(rf"rejected datasets: .*{message}", said), stdout
