"""Predicted time of every loss on an H100, without a GPU: ``python benchmarks/roofline.py``.

Per kernel the larger of two bounds: its bytes at 3.0 TB/s of memory, and its instructions at the rate at which 132
multiprocessors of 4 schedulers issue them, at 1.755 GHz. Latencies, barriers and hosts come on top: a launch costs a
host about 4 us, which hides behind earlier work if that is longer.

Of our kernels, instructions are counted in the binaries compiled for sm_90, on the path that most columns take
(tests/unit/sass.py; where a record reads its rows twice, without the search for the maxima), and launches in Triton's
interpreter (tests/unit/launches.py), collectives included. Their bytes follow from the passes. Of the peers, bytes are
those of the tensors that their operations read and write, and instructions those of their kernels' loops.

Writes benchmarks/results/roofline.json and prints the table of docs/costs.md. Takes two minutes.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).with_name("results") / "roofline.json"

TOKENS, VOCAB = 8192, 128256
BYTES_PER_SECOND = 3.0e12
INSTRUCTIONS_PER_SECOND = 132 * 4 * 32 * 1.755e9

# Names in the tests' tables: of the binaries, of the launches; and whether the record reads logits twice.
OURS = {
    "alpha-beta (0.2, 0.7)": ("ab(0.2,0.7)", "ab(0.2,0.7)", 1),
    "forward KL": ("ab(1,0)", "ab(0.2,0.7)", 1),
    "reverse KL": ("ab(0,1)", "ab(0.2,0.7)", 1),
    "alpha-beta (1.2, -0.3)": ("ab(1.2,-0.3)", "ab(1.2,-0.3)", 2),
    "ToDi": ("todi", "todi", 1),
    "Jensen-Shannon": ("js", "js", 1),
    "skew forward KL": ("skew", "js", 1),
    "skew reverse KL": ("skew reverse", "js", 1),
    "total variation": ("tv", "js", 1),
    "sum of three": ("sum", "sum", 1),
}
# (name, bytes per logit forward and backward, instructions per logit, how the bytes were found). bf16 logits.
PEERS = (
    ("ModelOpt 0.47 forward KL, TP 1", 126, None, "counted"),
    ("ModelOpt 0.47 forward KL, TP > 1", 198, None, "counted"),
    ("Megatron cross entropy, one tensor", 56, None, "counted"),
    ("Megatron fused cross entropy, one tensor", 30, None, "by reading"),
    ("TransformerEngine cross entropy, one tensor", 16, 29, "by reading"),
    ("Liger vocab-parallel cross entropy, one tensor", 22, 32, "by reading"),
    ("Liger cross entropy, one tensor, TP 1 only", 6, 21, "by reading"),
    ("Liger KL with both log-softmaxes, TP 1 only", 22, None, "by reading"),
)


def seconds(of_bytes: float, instructions: float | None, logits: float) -> float:
    """Predict a kernel's time from bytes and instructions per logit."""
    by_memory = of_bytes * logits / BYTES_PER_SECOND
    return max(by_memory, (instructions or 0.0) * logits / INSTRUCTIONS_PER_SECOND)


def kernels_of(row: dict[str, Any]) -> Iterator[tuple[float, float]]:
    """Yield bytes and instructions per logit of each kernel of one of our losses."""
    for which, instructions in row["instructions"].items():
        yield row["bytes"][which], instructions


def predicted(row: dict[str, Any], logits: float) -> float:
    """Predict the seconds of one of our losses, forward and backward, for this number of logits on a rank."""
    return sum(seconds(of_bytes, instructions, logits) for of_bytes, instructions in kernels_of(row))


# By the name that benchmarks/loss.py has for it; without labels a record takes less.
_MEASURED = {
    "ours, triton: alpha-beta + CE + metrics": "alpha-beta (0.2, 0.7)",
    "ours, triton: the same, in place": "alpha-beta (0.2, 0.7)",
}


def predicted_of(name: str, logits: float) -> float | None:
    """Predict the seconds of a contestant of benchmarks/loss.py; None if it is not in the table."""
    if name not in _MEASURED:
        return None
    return predicted(json.loads(RESULTS.read_text())[_MEASURED[name]], logits)


def run(test: str, *arguments: str, **environment: str) -> Any:
    """Return what a mode of a test file prints, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        given = {**os.environ, "PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": folder, **environment}
        command = [sys.executable, "-W", "ignore", str(ROOT / "tests" / "unit" / test), *arguments]
        done = subprocess.run(command, env=given, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def count() -> dict[str, dict[str, Any]]:
    """Return bytes and instructions per logit by kernel, and launches by number of ranks, of each of our losses."""
    names = sorted({binary for binary, *_ in OURS.values()})
    variant = ["bfloat16", 1.0, 1]
    binaries = run("test_triton.py", "compiled", json.dumps([90, names, [variant]]))
    launches = run("test_triton_merge.py", "launches", TRITON_INTERPRET="1")
    found = {}
    for name, (binary, launched, reads) in OURS.items():
        instructions = {}
        for which in ("record", "exact record", "second record", "gradient"):
            case = binaries.get(f"{binary}, bfloat16, T=1.0, labels=1, {which}")
            redoes = which == "exact record" and reads == 1  # only rows that are not finite
            if case is not None and not redoes:
                instructions[which] = case["instructions"] / case["columns"]
        of_bytes = {
            which: 6 if which == "gradient" else 4 * (reads if which == "exact record" else 1) for which in instructions
        }
        counted = {ranks: launches[f"{launched}, {ranks}"][0] for ranks in (1, 2, 8)}
        found[name] = {"bytes": of_bytes, "instructions": instructions, "launches": counted}
    return found


def table(rows: dict[str, dict[str, Any]]) -> list[str]:
    """Return the Markdown rows of docs/costs.md."""
    logits = TOKENS * VOCAB
    lines = [
        "| loss, forward and backward | bytes per logit | instructions per logit | launches at TP 1, TP 8 | ms at TP 1 "
        "| ms at TP 8 |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        one, eight = (" + ".join(map(str, row["launches"][ranks])) for ranks in ("1", "8"))
        instructions = " + ".join(f"{it:.0f}" for it in row["instructions"].values())
        times = [f"{predicted(row, logits / ranks) * 1e3:.2f}" for ranks in (1, 8)]
        lines.append(
            f"| {name} | {sum(row['bytes'].values())} | {instructions} | {one}, {eight} | {times[0]} | {times[1]} |"
        )
    for name, of_bytes, of_instructions, how in PEERS:
        times = [f"{seconds(of_bytes, of_instructions, logits / ranks) * 1e3:.2f}" for ranks in (1, 8)]
        if name.endswith("TP 1") or name.endswith("TP 1 only"):
            times[1] = "-"
        if name.endswith("TP > 1"):
            times[0] = "-"
        shown = of_instructions or "-"
        lines.append(f"| {name} | {of_bytes} ({how}) | {shown} | - | {times[0]} | {times[1]} |")
    return lines


def main() -> None:
    """Count, write and print."""
    rows = json.loads(json.dumps(count()))
    RESULTS.write_text(json.dumps(rows, indent=1) + "\n")
    print("\n".join(table(rows)))


if __name__ == "__main__":
    main()
