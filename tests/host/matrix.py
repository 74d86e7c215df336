"""Layouts that are trained with a teacher: the rows of the table in docs/parallelism.md.

Every row trains one student for three steps from one checkpoint and is compared with the same training on one rank, or
ends with a message. The table is rendered from what the tests have found, so that it cannot claim more than they saw.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from launch import ROOT, Rank, launch

TABLE = ROOT / "docs/parallelism.md"
LOSSES = ("lm loss", "kd loss", "total loss", "teacher lm loss", "teacher entropy", "student entropy")
# Differences and counts, in which bf16 leaves no digits.
EXACT_ONLY = ("kl to teacher", "top-1 agreement")

# Settings without a section are Megatron's.
Settings = Mapping[str, object]

TP = {"tensor-model-parallel-size": 2}
PP = {"pipeline-model-parallel-size": 2}
DP = {"use-distributed-optimizer": "true", "overlap-grad-reduce": "true"}
GATHER = {"overlap-param-gather": "true"}
FUSED = {"distillation.head": "fused", "distillation.chunk_tokens": 24}  # 24 does not divide a micro-batch
FULL_RECOMPUTATION = {
    "recompute-granularity": "full",
    "recompute-method": "uniform",
    "recompute-num-layers": 1,
}
SELECTIVE_RECOMPUTATION = {"recompute-granularity": "selective"}
TP_PP_DP = {"use-tp-pp-dp-mapping": "true"}
BF16 = {"bf16": "true", "accumulate-allreduce-grads-in-fp32": "true"}
LAYOUT = {
    "TP": "tensor-model-parallel-size",
    "PP": "pipeline-model-parallel-size",
    "EP": "expert-model-parallel-size",
}

PP4 = {"pipeline-model-parallel-size": 4}
# Every timer of a forward and backward pass then synchronizes the device.
TIMED = {"timing-log-level": 2}
VPP = {**PP, "num-layers-per-virtual-pipeline-stage": 1}
SP = TP | {"sequence-parallel": "true"}
EP = {"expert-model-parallel-size": 2}
MOE = {
    "num-experts": 4,
    "moe-router-topk": 2,
    "moe-token-dispatcher-type": "alltoall",
    "moe-router-load-balancing-type": "none",
}
# A teacher after eight steps says much the same of every token, unless it began with more to say.
VARIED = {"init-method-std": 0.3}
HIDDEN_LOSSES = {
    "distillation.hidden_losses": "[{student_layer: 1, teacher_layer: 2, loss: mse, weight: 0.5}, "
    "{student_layer: 1, teacher_layer: 1, loss: cosine}, {student_layer: 2, teacher_layer: 4, loss: cosine, weight: 2}]"
}
# The layers of a GPTModel with 2 layers, one layer each. It starts from the GPTModel's checkpoint.
LIKE_GPT = {"hybrid-layer-pattern": "*-*-", "num-layers": "null", "no-load-optim": "true"}
# The same of the teacher, which has 4.
TEACHER_LIKE_GPT = {"teacher.hybrid-layer-pattern": "*-*-*-*-", "teacher.num-layers": "null"}
MAMBA = {
    "hybrid-layer-pattern": "M-*-",
    "num-layers": "null",
    "mamba-state-dim": 8,
    "mamba-head-dim": 16,
    "mamba-num-groups": 2,
}
MAMBA_AND_DELTA = MAMBA | {
    "hybrid-layer-pattern": "M-*-G-*-",
    "linear-key-head-dim": 16,
    "linear-value-head-dim": 16,
    "linear-num-key-heads": 2,
    "linear-num-value-heads": 2,
}
UNTIED, TIED = ({"untie-embeddings-and-output-weights": how} for how in ("true", "false"))


def group_of(micro_batches: int) -> Settings:
    """How many micro-batches go through one virtual stage before the next."""
    return {"microbatch-group-size-per-virtual-pipeline-stage": micro_batches}


def of_teacher(settings: Settings) -> Settings:
    return {f"teacher.{name}": value for name, value in settings.items()}


@dataclass(frozen=True)
class Reference:
    """A training on one rank that rows are compared with."""

    student: Settings = field(default_factory=dict)
    """What its student is made with, too; without it is the one that most share. The same for the teacher."""
    teacher: Settings = field(default_factory=dict)
    beside: Settings = field(default_factory=dict)
    """What it is only trained with."""
    reports: tuple[str, ...] = ()
    """What it logs that others do not."""


REFERENCES: dict[str, Reference] = {
    "default": Reference(),
    "tied": Reference(student=TIED, beside=of_teacher(UNTIED)),
    # Ends of documents do not count, so micro-batches differ in how many tokens do.
    "uneven": Reference(beside={"eod-mask-loss": "true"}),
    "uneven, per token": Reference(beside={"eod-mask-loss": "true", "calculate-per-token-loss": "true"}),
    **{
        f"{batches} micro-batches": Reference(student={"num-layers": 4}, beside={"global-batch-size": 2 * batches})
        for batches in (6, 7, 8)
    },
    "8 layers": Reference(student={"num-layers": 8}, beside={"global-batch-size": 16}),
    "6 layers": Reference(student={"num-layers": 6}, beside={"teacher.num-layers": 4}),
    "MTP": Reference(
        student={"mtp-num-layers": 1},
        beside={"distillation.mtp_weight": 0.5},
        reports=("mtp 1 kd loss",),
    ),
    "MoE": Reference(student=MOE, beside={"teacher.num-experts": "null"}),
    "dense of MoE": Reference(teacher=MOE),
    "MoE of MoE": Reference(student=MOE, teacher=MOE),
    "MuP": Reference(
        student={"use-mup": "true", "mup-base-hidden-size": 16, "mup-embedding-mult": 1.5},
        beside={"teacher.use-mup": "false"},
    ),
    "Mamba": Reference(student=MAMBA),
    "Mamba of Mamba": Reference(student=MAMBA, teacher=MAMBA_AND_DELTA),
    "Mamba teacher": Reference(teacher=MAMBA_AND_DELTA),
    "hybrid with MTP": Reference(
        student={"hybrid-layer-pattern": "*-*-/*-", "num-layers": "null"},
        beside={"distillation.mtp_weight": 0.5},
        reports=("mtp 1 kd loss",),
    ),
    "hidden losses of Mamba": Reference(
        student=MAMBA,
        teacher=MAMBA_AND_DELTA,
        beside={
            "distillation.hidden_losses": "[{student_layer: 1, teacher_layer: 1, loss: mse, weight: 0.5}, "
            "{student_layer: 2, teacher_layer: 3, loss: cosine}, {student_layer: 4, teacher_layer: 8, loss: cosine}]",
            "eod-mask-loss": "true",
        },
        reports=("hidden loss 1-1", "hidden loss 2-3", "hidden loss 4-8"),
    ),
    "other kind": Reference(
        teacher={
            "num-attention-heads": 8,
            "position-embedding-type": "learned_absolute",
            "normalization": "LayerNorm",
            "swiglu": "false",
            "disable-bias-linear": "false",
            **TIED,
        }
    ),
    "losses": Reference(
        beside={"distillation.losses": "[{name: jensen_shannon, mixture: 0.3}, {name: skew_reverse_kl, weight: 0.5}]"}
    ),
    "logit losses": Reference(
        beside={
            "distillation.losses": "[{name: akl}, {name: sinkhorn, weight: 0.5, group: 8}, {name: alpha_beta, "
            "alpha: 0.2, beta: 0.7, weight: 0.5}]"
        },
        reports=("akl loss", "sinkhorn loss"),
    ),
    "schedules": Reference(
        student={"num-layers": 4},
        beside={
            "distillation.alpha": "{schedule: cosine, from: 0.5, to: 0.2, end: 3}",
            "distillation.temperature": "{schedule: piecewise, points: [[0, 4.0], [512, 2.0]], by: tokens}",
            "distillation.kd_weight": "{schedule: linear, from: 1.0, to: 0.2, end: 16, by: samples}",
        },
    ),
    **{
        f"hidden losses{name}": Reference(
            beside={**HIDDEN_LOSSES, "eod-mask-loss": "true", **settings},
            reports=("hidden loss 1-2", "hidden loss 1-1", "hidden loss 2-4"),
        )
        for name, settings in {"": {}, ", per token": {"calculate-per-token-loss": "true"}}.items()
    },
    # Layers 1 and 3 of the student, 1 and 2 of the teacher lie on the first of two stages.
    "hidden losses, 4 layers": Reference(
        student={"num-layers": 4},
        beside={
            "distillation.hidden_losses": "[{student_layer: 1, teacher_layer: 2, loss: mse}, "
            "{student_layer: 3, teacher_layer: 1, loss: cosine, weight: 2}, "
            "{student_layer: 2, teacher_layer: 3, loss: cosine}, {student_layer: 4, teacher_layer: 4, loss: mse}]",
            "eod-mask-loss": "true",
        },
        reports=("hidden loss 1-2", "hidden loss 3-1", "hidden loss 2-3", "hidden loss 4-4"),
    ),
    "bf16 teacher": Reference(beside={"teacher.bf16": "true"}),
    # Where ends of documents do not count, the share of counted tokens that is selected differs between micro-batches.
    **{
        name: Reference(
            teacher=teacher,
            beside={
                "eod-mask-loss": "true",
                "calculate-per-token-loss": "true",
                "distillation.divergence": "forward_kl",
                "distillation.tokens": how,
            },
        )
        for name, teacher, how in (
            ("every third token", {}, "{select: every, n: 3}"),
            ("surest tokens left out", VARIED, "{select: teacher_entropy, quantile: [0.3, 1.0]}"),
            ("unsure teacher", VARIED, "{select: teacher_entropy, at_least: 4.5, at_most: 4.6}"),
            ("other top-1", {}, "{select: disagreement}"),
            ("other by KL", VARIED, "{select: disagreement, kl_at_least: 1.1}"),
        )
    },
}


@dataclass(frozen=True, eq=False)
class Row:
    feature: str
    num_ranks: int
    settings: Settings
    reference: str = "default"
    refused: str | None = None
    """What the message must say, as a regular expression; None for what must train."""

    @property
    def where(self) -> str:
        sizes = {name: int(str(self.settings.get(key, 1))) for name, key in LAYOUT.items()}
        sizes["DP"] = self.num_ranks // (sizes["TP"] * sizes["PP"])
        segments = str(self.settings.get("hybrid-layer-pattern", "")).count("|") + 1
        if segments > sizes["PP"]:
            sizes["VPP"] = segments // sizes["PP"]
        if "num-layers-per-virtual-pipeline-stage" in self.settings:
            sizes["VPP"] = int(str(REFERENCES[self.reference].student["num-layers"])) // sizes["PP"]
        here = " x ".join(f"{name} {size}" for name, size in sizes.items() if size > 1) or "1 rank"
        here += " with SP" * ("sequence-parallel" in self.settings)
        own = [f"{name} {self.settings[k]}" for name, key in LAYOUT.items() if (k := f"teacher.{key}") in self.settings]
        return f"{here} (teacher: {' x '.join(own)})" if own else here

    @property
    def is_compared_with_gpt(self) -> bool:
        """Whether the student is a HybridModel, and the one of its reference a GPTModel."""
        pattern = "hybrid-layer-pattern"
        return pattern in self.settings and pattern not in REFERENCES[self.reference].student

    @property
    def tolerance(self) -> str:
        return "2e-2" if "bf16" in self.settings else "1e-4"

    @property
    def names(self) -> tuple[str, ...]:
        """What is compared: the training steps, and both validations at their end."""
        reported = (*LOSSES, *REFERENCES[self.reference].reports)
        reported += () if "bf16" in self.settings else EXACT_ONLY
        if "distillation.tokens" in REFERENCES[self.reference].beside:
            reported = (*reported, "selected tokens")
        return ("grad-norm", *reported, *(f"{name} validation" for name in reported))

    def __str__(self) -> str:
        return f"{self.feature} ({self.where}, {self.reference})"


def teacher(*, tensor: int | None = None, pipeline: int | None = None) -> Settings:
    """Its own layout."""
    sizes = {"tensor-model-parallel-size": tensor, "pipeline-model-parallel-size": pipeline}
    return of_teacher({name: size for name, size in sizes.items() if size is not None})


OWN = "independent teacher parallelism"
SYNCHRONIZED = "the device synchronized around every pass and message, `timing-log-level: 2`"
DIFFERS = "teacher of another kind: heads, positions, norm, activation, biases, tied embeddings"
TO_HYBRID = "HybridModel `*-` student of a GPTModel, compared with a GPTModel student"
BOTH_HYBRID = "HybridModel `*-` student and teacher, compared with two GPTModels"
FROM_HYBRID = "GPTModel student of a HybridModel `*-`, compared with two GPTModels"
MAMBA_PAIRS = "HybridModel with Mamba, gated delta net and attention layers"
HIDDEN = "losses between layers, with projectors"
ACCUMULATION = "gradient accumulation: micro-batches of 1 and 4 in place of 2"

# Rows of one feature and one result make one line of the table.
ROWS = [
    Row("tensor parallel", 2, TP),
    Row("tensor and sequence parallel", 2, SP),
    Row("tensor and sequence parallel", 4, SP | PP | FUSED),
    Row("pipeline parallel, 1F1B", 2, PP),
    Row("pipeline parallel, 1F1B", 4, TP | PP),
    Row("interleaved pipeline, 8 micro-batches", 2, VPP, "8 micro-batches"),
    Row("interleaved pipeline, 8 micro-batches", 4, VPP | SP | FUSED, "8 micro-batches"),
    Row("interleaved pipeline, 6 micro-batches, also in groups of 3", 2, VPP, "6 micro-batches"),
    Row("interleaved pipeline, 6 micro-batches, also in groups of 3", 2, VPP | group_of(3), "6 micro-batches"),
    Row("interleaved pipeline, 7 micro-batches in groups of 4", 2, VPP | group_of(4), "7 micro-batches"),
    Row("interleaved pipeline, three virtual stages", 2, VPP, "6 layers"),
    Row(
        "uneven pipeline stages, given by number or layout",
        2,
        PP | {"decoder-first-pipeline-num-layers": 2},
        "6 layers",
    ),
    Row(
        "uneven pipeline stages, given by number or layout",
        2,
        PP | {"pipeline-model-parallel-layout": "Et|tt|tt|tL"},
        "6 layers",
    ),
    Row("data parallel, distributed optimizer, overlapped gradient reduction", 2, DP),
    Row("data parallel, distributed optimizer, overlapped gradient reduction", 4, TP | DP),
    Row("expert parallel, dense teacher", 2, EP, "MoE"),
    Row("expert parallel, dense teacher", 2, SP, "MoE"),
    Row("expert parallel, dense teacher", 2, PP, "MoE"),
    Row("expert parallel, MoE teacher, dense student", 2, of_teacher(EP), "dense of MoE"),
    Row(
        "expert parallel, MoE teacher, dense student",
        4,
        SP | of_teacher(EP | {"expert-tensor-parallel-size": 1}),
        "dense of MoE",
    ),
    Row("expert parallel, both MoE", 2, EP | DP, "MoE of MoE"),
    Row("expert parallel, both MoE", 2, EP | of_teacher({"expert-model-parallel-size": 1}), "MoE of MoE"),
    Row(OWN, 2, teacher(tensor=2)),
    Row(OWN, 2, DP | teacher(pipeline=2)),
    Row(OWN, 2, PP | teacher(pipeline=1)),
    Row(OWN, 2, VPP | teacher(pipeline=1) | FUSED, "8 micro-batches"),
    Row(OWN, 4, SP | teacher(tensor=4) | FUSED),
    Row(OWN, 4, TP | teacher(tensor=4), "other kind"),
    Row(OWN, 4, PP | teacher(tensor=2, pipeline=1)),
    Row(OWN, 4, PP | teacher(pipeline=4)),
    Row(SYNCHRONIZED, 2, PP | TIMED),
    Row(SYNCHRONIZED, 4, PP4 | TIMED, "8 micro-batches"),
    Row(SYNCHRONIZED, 2, VPP | TIMED, "8 micro-batches"),
    Row(SYNCHRONIZED, 4, VPP | PP4 | TIMED, "8 layers"),
    Row(SYNCHRONIZED, 2, PP | TIMED | teacher(pipeline=1)),
    Row(SYNCHRONIZED, 4, PP4 | TIMED | teacher(pipeline=1), "8 micro-batches"),
    Row(SYNCHRONIZED, 4, VPP | PP4 | TIMED | teacher(pipeline=2), "8 layers"),
    Row(SYNCHRONIZED, 4, PP | TIMED | teacher(pipeline=4)),
    Row(DIFFERS, 2, TP, "other kind"),
    Row(DIFFERS, 2, PP, "other kind"),
    Row("teacher in bf16, student in fp32", 2, PP, "bf16 teacher"),
    Row("teacher padded for more columns", 2, TP | of_teacher({"make-vocab-size-divisible-by": 1024})),
    Row("multi-token prediction (student)", 2, TP, "MTP"),
    Row("multi-token prediction (student)", 2, PP | FUSED, "MTP"),
    Row("MuP's scale on logits", 2, TP, "MuP"),
    Row("MuP's scale on logits", 2, PP | FUSED, "MuP"),
    Row("tied embeddings", 2, PP, "tied"),
    Row("tied embeddings", 4, TP | PP | FUSED, "tied"),
    Row(ACCUMULATION, 1, {"micro-batch-size": 1}),
    Row(ACCUMULATION, 1, {"micro-batch-size": 4}),
    Row("uneven micro-batches, averaged per micro-batch", 2, DP, "uneven"),
    Row("uneven micro-batches, `calculate-per-token-loss`", 1, {"micro-batch-size": 4}, "uneven, per token"),
    Row("uneven micro-batches, `calculate-per-token-loss`", 2, DP, "uneven, per token"),
    Row("full recomputation", 4, TP | PP | FULL_RECOMPUTATION),
    Row("selective recomputation", 1, SELECTIVE_RECOMPUTATION),
    Row("bf16 with fp32 gradient accumulation, compared with fp32", 4, TP | PP | BF16),
    Row("ranks in the order tp-pp-dp", 4, PP | TP_PP_DP),
    Row("ranks in the order tp-pp-dp", 4, PP | TP_PP_DP | teacher(pipeline=4)),
    Row("ranks in the order tp-pp-dp", 4, TP | TP_PP_DP | teacher(tensor=4)),
    Row("fused LM head", 1, FUSED),
    Row("fused LM head", 2, TP | FUSED),
    Row("fused LM head", 2, PP | FUSED),
    Row("fused LM head", 2, DP | FUSED),
    Row("fused LM head, `overlap-param-gather`", 2, DP | GATHER | FUSED),
    Row("fused LM head, `overlap-param-gather`", 4, TP | DP | GATHER | FUSED, "tied"),
    Row("a weighted sum of divergences", 4, TP | PP | FUSED, "losses"),
    Row("logit losses with a divergence", 4, TP | PP, "logit losses"),
    Row("schedules by iteration, samples and tokens", 2, DP, "schedules"),
    Row("schedules by iteration, samples and tokens", 2, VPP, "schedules"),
    *(
        Row(f"divergence on some tokens, {how}", num_ranks, settings, reference)
        for how, reference in (
            ("`every`", "every third token"),
            ("`teacher_entropy`", "unsure teacher"),
            ("`teacher_entropy` by `quantile`", "surest tokens left out"),
            ("`disagreement`", "other top-1"),
            ("`disagreement`", "other by KL"),
        )
        for num_ranks, settings in ((4, SP | PP), (2, DP | FUSED))
    ),
    Row("divergence on some tokens, `teacher_entropy` by `quantile`", 2, SP | FUSED, "surest tokens left out"),
    Row(HIDDEN, 2, SP, "hidden losses"),
    Row(HIDDEN, 2, PP, "hidden losses"),
    Row(HIDDEN, 2, PP | FULL_RECOMPUTATION, "hidden losses, per token"),
    Row(HIDDEN, 4, SP | PP | FUSED, "hidden losses, per token"),
    Row(HIDDEN, 2, DP | {"overlap-param-gather": "true"}, "hidden losses, per token"),
    Row(HIDDEN, 2, VPP, "hidden losses, 4 layers"),
    Row(HIDDEN, 4, TP | VPP | FULL_RECOMPUTATION, "hidden losses, 4 layers"),
    Row(TO_HYBRID, 1, LIKE_GPT),
    Row(TO_HYBRID, 2, LIKE_GPT | TP),
    Row(TO_HYBRID, 2, LIKE_GPT | SP | FUSED),
    Row(TO_HYBRID, 2, LIKE_GPT | PP | FULL_RECOMPUTATION),
    Row(TO_HYBRID, 2, LIKE_GPT | PP | {"hybrid-layer-pattern": "*-|*-"} | FUSED),
    Row(TO_HYBRID, 2, LIKE_GPT | PP | {"hybrid-layer-pattern": "*-|*-|*-|*-"} | FUSED, "8 micro-batches"),
    Row(TO_HYBRID, 2, LIKE_GPT | DP | FUSED),
    Row(TO_HYBRID, 2, LIKE_GPT | DP | GATHER | FUSED),
    Row(TO_HYBRID, 2, LIKE_GPT | EP | {"hybrid-layer-pattern": "*E*E"}, "MoE"),
    Row(TO_HYBRID, 2, LIKE_GPT | TP, "tied"),
    Row(TO_HYBRID, 2, LIKE_GPT | PP | FUSED, "tied"),
    Row(TO_HYBRID, 2, LIKE_GPT | PP | FUSED, "MuP"),
    Row(TO_HYBRID, 4, LIKE_GPT | TP | PP | FUSED),
    Row(TO_HYBRID, 4, LIKE_GPT | TP | PP | BF16),
    Row(BOTH_HYBRID, 1, LIKE_GPT | TEACHER_LIKE_GPT),
    Row(BOTH_HYBRID, 2, LIKE_GPT | TEACHER_LIKE_GPT | TP),
    Row(BOTH_HYBRID, 2, LIKE_GPT | TEACHER_LIKE_GPT | PP | {"teacher.hybrid-layer-pattern": "*-*|-*-*-"} | FUSED),
    Row(BOTH_HYBRID, 2, LIKE_GPT | TEACHER_LIKE_GPT | DP | teacher(tensor=2)),
    Row(BOTH_HYBRID, 2, LIKE_GPT | TEACHER_LIKE_GPT | DP | teacher(pipeline=2) | FUSED),
    Row(FROM_HYBRID, 1, TEACHER_LIKE_GPT),
    Row(FROM_HYBRID, 2, TEACHER_LIKE_GPT | PP),
    Row(
        FROM_HYBRID,
        2,
        TEACHER_LIKE_GPT | {"teacher.hybrid-layer-pattern": "*E*E*E*E"} | of_teacher(EP),
        "dense of MoE",
    ),
    Row(FROM_HYBRID, 4, TEACHER_LIKE_GPT | PP | teacher(pipeline=4)),
    Row("multi-token prediction (HybridModel student)", 2, TP, "hybrid with MTP"),
    Row("multi-token prediction (HybridModel student)", 2, PP | FUSED, "hybrid with MTP"),
    Row(f"{MAMBA_PAIRS}, GPTModel teacher", 2, TP, "Mamba"),
    Row(f"{MAMBA_PAIRS}, GPTModel teacher", 2, PP | {"hybrid-layer-pattern": "M-|*-"} | FUSED, "Mamba"),
    Row(f"{MAMBA_PAIRS}, GPTModel student", 2, TP, "Mamba teacher"),
    Row(f"{MAMBA_PAIRS}, GPTModel student", 2, PP, "Mamba teacher"),
    Row(f"{MAMBA_PAIRS}, both", 2, SP, "Mamba of Mamba"),
    Row(f"{MAMBA_PAIRS}, both", 2, PP | {"teacher.hybrid-layer-pattern": "M-*|-G-*-"} | FUSED, "Mamba of Mamba"),
    Row(f"{MAMBA_PAIRS}, both", 2, DP | teacher(tensor=2), "Mamba of Mamba"),
    Row(f"{MAMBA_PAIRS}, both", 4, TP | PP | FUSED, "Mamba of Mamba"),
    Row(f"{HIDDEN}, of Mamba and other layers", 2, SP, "hidden losses of Mamba"),
    Row(f"{HIDDEN}, of Mamba and other layers", 2, PP | FULL_RECOMPUTATION, "hidden losses of Mamba"),
    Row(
        "teacher's tensor parallelism no multiple of the student's",
        2,
        TP | teacher(tensor=1),
        refused="teacher.tensor-model-parallel-size: expected a multiple of the student's 2, got 1",
    ),
    Row(
        "independent teacher parallelism with experts",
        2,
        teacher(tensor=2),
        "dense of MoE",
        refused="teacher with experts must have the student's tensor and pipeline parallelism",
    ),
    Row(
        "virtual stages of the teacher", 2, {"teacher.num-virtual-stages-per-pipeline-rank": 2}, refused="does not have"
    ),
    Row(
        "multi-token prediction (teacher)",
        2,
        {"teacher.mtp-num-layers": 1},
        refused="no loss here uses",
    ),
    Row(
        "multi-token prediction on a separate stage, `mtp-standalone`",
        2,
        {"mtp-num-layers": 1, "mtp-standalone": "true"},
        refused="exchange shapes first, which synchronizes",
    ),
    Row(
        "combined 1F1B, `overlap-moe-expert-parallel-comm`",
        2,
        {"overlap-moe-expert-parallel-comm": "true"},
        refused="combined 1F1B.*schedule plan",
    ),
    Row("CUDA graphs", 2, {"cuda-graph-impl": "local"}, refused="CUDA graph.*replay"),
    Row(
        "packed data with Megatron's own attention",
        2,
        {"sft": "true"},
        refused="attention that keeps packed sequences apart",
    ),
    Row(
        "hybrid context parallelism",
        2,
        {"hybrid-context-parallel": "true"},
        refused="hybrid context parallelism is not supported",
    ),
    Row("Megatron FSDP", 2, {"use-megatron-fsdp": "true"}, refused="Megatron FSDP.*fsdp_dtensor"),
    Row("torch FSDP2", 2, {"use-torch-fsdp2": "true"}, refused="torch FSDP2.*shards"),
    # The last one, since it is found when Megatron has built the models.
    Row(
        "losses between layers of different stages",
        2,
        PP | {"distillation.hidden_losses": "[{student_layer: 2, teacher_layer: 2, loss: mse}]"},
        refused="student's 2 on stage 1 and the teacher's 2 on stage 0; give one of the teacher's layers on stage 1",
    ),
]


def overrides(settings: Settings) -> dict[str, object]:
    """`settings` for the command line."""
    return {key if "." in key else f"megatron.{key}": value for key, value in settings.items()}


def run_refused(cases: Mapping[str, Sequence[str]], num_ranks: int, folder: Path) -> list[dict[str, tuple[int, str]]]:
    """How each of these command lines ended on each rank of one job: its exit code and what it said on stderr."""
    path = folder / f"refused-{num_ranks}.json"
    path.write_text(json.dumps(cases))
    seconds = 120 + 15 * len(cases)  # a second each, on a machine of its own
    ranks = launch([Path(__file__).with_name("refused.py"), path], num_ranks, timeout_seconds=seconds)
    for rank in ranks:
        assert rank.code == 0, rank.output[-6000:]
    return [json.loads(rank.output.splitlines()[-1]) for rank in ranks]


def check_refused(ended: Sequence[Mapping[str, tuple[int, str]]], name: str, job: str, wanted: str) -> str:
    """The error of this command line, after a look at how it ended on every rank."""
    for number, rank in enumerate(ended):
        code, message = rank[name]
        assert code == 2
        _, error, after = message.partition(f"[rank {number}] abkd-megatron {job}: error: ")
        assert error, message
        assert re.search(wanted, message, re.DOTALL), message
        assert "Traceback" not in message
    return after.strip()


def check_log(ranks: Sequence[Rank], settings: Settings) -> None:
    """The last rank, which prints Megatron's log, and no other says how the head works; it also names the kernel."""
    said = f"abkd_megatron: LM head {settings['distillation.head']}"
    assert [rank.output.count(said) for rank in ranks] == [0] * (len(ranks) - 1) + [1], ranks[-1].output[-6000:]
    assert ranks[-1].output.count(" kernel (chosen by device)") == 1
    for said in ("LM head ", " kernel (chosen by device)", "waited here"):
        assert not any(said in rank.output for rank in ranks[:-1]), said


# What the tests of this session have found, in the order of the table: {(feature, where): result}.
RESULTS: dict[tuple[str, str], str] = {}


@contextmanager
def recorded(feature: str, where: str, result: str) -> Iterator[None]:
    """Record `result` if the block ends well, and has done so in every other case of this feature and place."""
    before = RESULTS.get((feature, where), result)
    RESULTS[feature, where] = "failed"
    yield
    RESULTS[feature, where] = before


def render(results: Mapping[tuple[str, str], str]) -> str:
    """Return the table of results."""
    places: dict[tuple[str, str], list[str]] = {}
    for (feature, where), found in results.items():
        places.setdefault((feature, found), []).append("" if found.startswith("refused") else where)
    lines = [
        f"| {feature} | {', '.join(where)} | {found.replace('refused: ', 'rejected: ')} |"
        for (feature, found), where in places.items()
    ]
    return "\n".join(["| feature | tested layouts | result |", "|---|---|---|", *lines])


def replace_table(document: str, table: str) -> str:
    """The document with `table` between its two marks."""
    before, opening, rest = document.partition("<!-- matrix -->\n")
    _, closing, after = rest.partition("\n<!-- /matrix -->")
    assert opening and closing, f"{TABLE.name} has lost its marks"
    return before + opening + table + closing + after
