"""Keys of the section `compare`, and their rules. Does not import megatron."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from abkd_megatron.errors import brief

if TYPE_CHECKING:
    from abkd_megatron.config.schema import Config

# Default comparison: {name: overrides}.
_COMPARED = {
    "CE only": ["distillation.kd_weight=0", "distillation.lm_weight=1"],
    "forward KL": ["distillation.divergence=forward_kl"],
    "reverse KL": ["distillation.divergence=reverse_kl"],
    "Jensen-Shannon": ["distillation.divergence=jensen_shannon"],
    "skew reverse KL": ["distillation.divergence=skew_reverse_kl"],
    "alpha-beta 0.2, 0.7": ["distillation.divergence=alpha_beta", "distillation.alpha=0.2", "distillation.beta=0.7"],
    "alpha-beta 0.5, 0.5": ["distillation.divergence=alpha_beta", "distillation.alpha=0.5", "distillation.beta=0.5"],
    "alpha-beta 0.8, 0.3": ["distillation.divergence=alpha_beta", "distillation.alpha=0.8", "distillation.beta=0.3"],
    "ToDi": ["distillation.divergence=todi"],
}


@dataclass(kw_only=True, slots=True)
class CompareConfig:
    """Settings of `compare`."""

    out: str = "runs/compare"
    """Directory of runs and results."""
    losses: dict[str, list[str]] = field(default_factory=lambda: dict(_COMPARED))
    """{name: overrides}, where the overrides are keys of `distillation` or `section.key`."""
    seeds: list[int] = field(default_factory=lambda: [1, 2, 3, 4, 5])
    """Values of `megatron.seed`: initial weights and order of the text. One run per loss and seed; one `data.seed`."""
    at_once: int = 1
    """Number of concurrent runs."""
    gradient_batches: int = 0
    """Batches from which the variance of the gradient is measured at the start and the end of each run; 0 for none."""
    rouge_prompts: int = 0
    """Held-out prompts that each student continues, scored by ROUGE-L against the text; 0 for none."""
    prompt_tokens: int = 32
    """Tokens of each of these prompts; of conversations, at most."""
    new_tokens: int = 64
    """Tokens of a continuation, at most."""
    launch: str | None = None
    """Launcher of a run, such as `torchrun --standalone --nproc-per-node 8`; None for one process."""


def compare_problems(config: "Config", job: str) -> Iterator[tuple[str, str]]:
    """Yield (key, what was expected and found) of each setting of a comparison that is invalid.

    Args:
        config: of the job.
        job: see `Config.check`.
    """
    of, length = config.compare, config.megatron.get("seq-length")
    tokens, batches = of.prompt_tokens + of.new_tokens, of.gradient_batches
    is_long = bool(of.rouge_prompts) and isinstance(length, int) and tokens > length
    # Megatron reads conversations in the order of their file.
    same_runs = job == "compare" and bool(config.megatron.get("sft") and config.megatron.get("load"))
    packs_documents = bool(config.megatron.get("dataloader-inter-document-masking"))
    rules = (
        ("seeds", bool(of.seeds), "at least one", "none"),
        ("losses", bool(of.losses), "at least one", "none"),
        ("seeds", len(set(of.seeds)) == len(of.seeds), "each seed once", of.seeds),
        (
            "seeds",
            not (same_runs and len(set(of.seeds)) > 1),
            "one, because conversations have one order and all runs start from megatron.load",
            of.seeds,
        ),
        ("at_once", of.at_once >= 1, "1 or more", of.at_once),
        ("gradient_batches", batches >= 0 and batches != 1, "0, or 2 or more", batches),
        ("rouge_prompts", of.rouge_prompts >= (job == "rouge"), "a number of prompts", of.rouge_prompts),
        ("rouge_prompts", not (of.rouge_prompts and packs_documents), "0 with packed documents", of.rouge_prompts),
        ("prompt_tokens", of.prompt_tokens >= 1, "1 or more", of.prompt_tokens),
        ("new_tokens", of.new_tokens >= 1, "1 or more", of.new_tokens),
        ("new_tokens", not is_long, f"at most seq-length {length} with prompt_tokens", tokens),
    )
    for name, holds, expected, got in rules:
        if not holds:
            yield f"compare.{name}", f"expected {expected}, got {brief(str(got))}"
