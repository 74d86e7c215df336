"""ROUGE-L of the students of a comparison: a job `rouge` per finished run."""

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any

from abkd_megatron.config.load import render
from abkd_megatron.config.schema import SECTIONS, Config
from abkd_megatron.config.yaml import flow
from abkd_megatron.tools.compare_jobs import Job, check_checkpoint

DRAWS = ("greedy", "sampled")
_NUMBERS = ("rouge_prompts", "prompt_tokens", "new_tokens")


@dataclass(frozen=True)
class Continuations(Job):
    """Continuations of held-out text by a run's student."""

    _: KW_ONLY
    of: tuple[str, int]
    """Loss and seed of the run."""

    def measure(self) -> dict[str, Any]:
        """Return what the job has written."""
        found: dict[str, Any] = json.loads((self.directory / "rouge.json").read_text())
        return found


def continuations(
    name: str,
    of: tuple[str, int],
    directory: Path,
    overrides: Sequence[str],
    load: Callable[[Sequence[str]], Config],
) -> Continuations:
    """Return the job that continues held-out text with a run's student.

    Args:
        name: of the run.
        of: its loss and seed.
        directory: of the run, which has a checkpoint.
        overrides: of the run's configuration.
        load: function that returns the comparison's configuration with further overrides.

    Raises:
        ConfigError: there is no checkpoint.
    """
    checkpoints = directory / "checkpoints"
    check_checkpoint(checkpoints, "compare.rouge_prompts")
    numbers = load(overrides).compare
    here = directory / "-".join(["rouge", *(str(getattr(numbers, name)) for name in _NUMBERS)])
    config = load([*overrides, f"megatron.load={checkpoints}", "megatron.ckpt-step=null", f"compare.out={here}"])
    config.check("rouge")
    # Losses and seeds of the comparison, which may be extended, are not of this job.
    own = {"out": str(here), **{name: getattr(numbers, name) for name in _NUMBERS}}
    sections = [section for section in SECTIONS if section != "compare"]
    text = f"{render(config, sections, origins=False)}compare: {flow(own)}\n"
    return Continuations(f"{name}, continuations", here, text, "rouge", of=of)


def table(runs: Sequence[Mapping[str, Any]]) -> str:
    """Return ROUGE-L as Markdown, means over the seeds; empty if there are no continuations.

    Args:
        runs: of results.json, with the results of `Continuations` as ``rouge``.
    """
    lines, counts = [], set()
    for loss in dict.fromkeys(run["loss"] for run in runs):
        of_loss = [run["rouge"] for run in runs if run["loss"] == loss and "rouge" in run]
        if of_loss:
            counts |= {it["prompts"] for it in of_loss}
            cells = [_cell([it[draw]["rougeL"] for it in of_loss]) for draw in DRAWS]
            lines.append("| " + " | ".join([loss, *cells]) + " |")
    if not lines:
        return ""
    note = (
        f"F-measure of continuations of {max(counts)} held-out prompts against the text; mean over seeds ± standard "
        "deviation."
    )
    return "\n".join(["| ROUGE-L | greedy | sampled |", "|---|---|---|", *lines, "", note, ""])


def _cell(values: Sequence[float]) -> str:
    spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.4f}{spread}"
