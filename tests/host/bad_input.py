"""What a user gives wrongly, and what the message has to name.

In settings and files `{workspace}` is the folder of all that the tests make, `{other}` data of a vocabulary of another
size.
"""

import json
import re
import shutil
from pathlib import Path
from typing import NamedTuple

from launch import ROOT
from test_preflight import edited, zero

PIPELINE = "megatron.pipeline-model-parallel-size=2"
NO_JOB = ("RANK=", "WORLD_SIZE=", "MASTER_ADDR=", "MASTER_PORT=")


class Case(NamedTuple):
    """One thing that is wrong."""

    group: str
    job: str
    settings: list[str]
    """What the command line has beside a good configuration and a good teacher."""
    message: str
    """What must be said: a regular expression."""
    how: str = ""
    """What was done beside that, in words."""


CASES: dict[str, Case] = {
    # config
    "unknown key": Case("config", "distill", ["distillation.alhpa=0.3"], r"alhpa.*alpha"),
    "unknown Megatron argument": Case("config", "distill", ["megatron.num-layer=3"], r"num-layer.*num-layers"),
    "alpha is no number": Case("config", "distill", ["distillation.alpha=much"], r"alpha.*much"),
    "alpha is NaN": Case("config", "distill", ["distillation.alpha=nan"], r"alpha.*nan"),
    "temperature 0": Case("config", "distill", ["distillation.temperature=0"], r"temperature.*0"),
    "both weights 0": Case(
        "config", "distill", ["distillation.kd_weight=0", "distillation.lm_weight=0"], r"kd_weight.*lm_weight"
    ),
    "no teacher": Case("config", "distill", ["teacher.load=null"], r"teacher\.load"),
    "missing teacher": Case("checkpoint", "distill", ["teacher.load={workspace}/nowhere"], r"nowhere.*no such folder"),
    "empty teacher": Case(
        "checkpoint",
        "distill",
        ["teacher.load={workspace}/empty"],
        r"latest_checkpointed_iteration\.txt",
        "an empty folder",
    ),
    "truncated teacher": Case(
        "checkpoint",
        "distill",
        ["teacher.load={workspace}/truncated"],
        r"damaged.*should hold \d+ bytes",
        "the last 1000 bytes of a file cut off",
    ),
    "teacher without its index": Case(
        "checkpoint", "distill", ["teacher.load={workspace}/headless"], r"index.*cannot be read", "`.metadata` removed"
    ),
    "wrong-size teacher": Case(
        "checkpoint", "distill", ["teacher.hidden-size=64"], r"hidden-size: the checkpoint has 48.* 64"
    ),
    "teacher with other heads": Case(
        "checkpoint", "distill", ["teacher.num-attention-heads=2"], r"num-attention-heads.*4.*2"
    ),
    "teacher of another vocabulary": Case("checkpoint", "distill", ["data.dir={other}"], r"400.*420.*shared_vocab=N"),
    "more shared than the teacher has": Case(
        "checkpoint",
        "distill",
        ["data.dir={other}", "distillation.shared_vocab=401"],
        r"shared_vocab is 401; the teacher.* 400 tokens, the student one of 420; give at most the smaller",
    ),
    "unknown selection": Case(
        "config",
        "distill",
        ["distillation.tokens={{select: evry, n: 2}}"],
        r"distillation.tokens.*'evry'; did you mean 'every'",
    ),
    "selection that takes every token": Case(
        "config",
        "distill",
        ["distillation.tokens={{select: every, n: 1}}"],
        r"tokens.*1",
    ),
    "selection over a part of the vocabulary": Case(
        "config",
        "distill",
        ["distillation.shared_vocab=399", "distillation.tokens={{select: every, n: 2}}"],
        r"2.*shared_vocab.*399.*400",
    ),
    "student layers do not divide": Case(
        "config",
        "distill",
        ["megatron.pipeline-model-parallel-size=2", "megatron.num-layers=3"],
        r"3.*2",
    ),
    "teacher layers do not divide": Case(
        "config",
        "distill",
        ["megatron.pipeline-model-parallel-size=2", "teacher.num-layers=5"],
        r"teacher.*5.*2",
    ),
    "more student layers on the first stage than there are": Case(
        "config",
        "distill",
        [PIPELINE, "megatron.num-layers=4", "megatron.decoder-first-pipeline-num-layers=5"],
        r"student: expected each of 4 layers on one pipeline stage, got layers 5, 0",
    ),
    "more teacher layers on the last stage than there are": Case(
        "config",
        "distill",
        [PIPELINE, "teacher.decoder-last-pipeline-num-layers=5"],
        r"teacher.*4.*0.*5",
    ),
    "layers that Megatron would freeze elsewhere": Case(
        "config", "distill", ["megatron.freeze-all-layers=true"], r"freeze-all-layers"
    ),
    "another group for all-gathers": Case(
        "config", "pretrain", ["megatron.create-all-gather-group=true"], r"create-all-gather-group"
    ),
    "logits saved beside a teacher": Case(
        "config", "distill", ["megatron.logits-save-dir={workspace}/logits"], r"remove logits-save-dir"
    ),
    "validation on all data": Case("config", "distill", ["megatron.full-validation=true"], r"remove full-validation"),
    "another data loader": Case("config", "distill", ["megatron.dataloader-type=external"], r"remove dataloader-type"),
    "saving in the background on a CPU": Case(
        "config", "pretrain", ["megatron.async-save=true", "megatron.save={workspace}/async"], r"remove async-save"
    ),
    "a hybrid model by its old name, without the kernels of Mamba": Case(
        "config", "pretrain", ["megatron.hybrid-override-pattern=M-*-"], r"student.*M.*package mamba-ssm"
    ),
    "a hybrid model without the kernels of gated delta nets": Case(
        "config", "pretrain", ["megatron.hybrid-layer-pattern=*-G-"], r"student.*G.*package flash-linear-attention"
    ),
    "a hybrid model without TransformerEngine": Case(
        "config",
        "pretrain",
        ["megatron.hybrid-layer-pattern=*-*-", "megatron.transformer-impl=transformer_engine"],
        r"student.*TransformerEngine.*transformer-impl=local",
    ),
    "a hybrid teacher without the kernels of Mamba": Case(
        "config", "distill", ["teacher.hybrid-layer-pattern=M-*-"], r"teacher.*M.*package mamba-ssm"
    ),
    "a hybrid model with scaled rotary embeddings": Case(
        "config",
        "pretrain",
        ["megatron.hybrid-layer-pattern=*-*-", "megatron.use-rope-scaling=true"],
        r"student: use-rope-scaling .*hybrid-layer-pattern",
    ),
    "a hybrid model with interleaved rotary embeddings": Case(
        "config",
        "pretrain",
        ["megatron.hybrid-layer-pattern=*-*-", "megatron.rotary-interleaved=true"],
        r"student: rotary-interleaved .*hybrid-layer-pattern",
    ),
    "a hybrid model with a setting of another number of layers": Case(
        "config", "pretrain", ["megatron.hybrid-layer-pattern=*-*", PIPELINE], r"3 layers.*2 pipeline stages"
    ),
    "a hybrid teacher with virtual stages": Case(
        "config", "distill", ["teacher.hybrid-layer-pattern=*-*-|*-*-"], r"teacher: virtual .*1 segments.*got 2"
    ),
    "a hybrid teacher with multi-token prediction": Case(
        "config", "distill", ["teacher.hybrid-layer-pattern=*-*-*-*-/*-"], r"teacher: multi-token.* \*-\*-\*-\*- \("
    ),
    "a hybrid teacher of another number of layers": Case(
        "checkpoint", "distill", ["teacher.hybrid-layer-pattern=*-*-"], r"num-layers: the checkpoint has 4.* 2"
    ),
    "a hybrid teacher with a layer that is not in the checkpoint": Case(
        "checkpoint", "distill", ["teacher.hybrid-layer-pattern=*-*-*-*-*"], r"teacher: a GPTModel's checkpoint.*equal"
    ),
    "a teacher without layers": Case(
        "config",
        "distill",
        ["megatron.hybrid-layer-pattern=*-*-", "teacher.num-layers=null"],
        r"teacher\.hybrid-layer-pattern.*teacher\.num-layers",
    ),
    "a hybrid student with a transformer's optimizer": Case(
        "checkpoint",
        "pretrain",
        ["megatron.hybrid-layer-pattern=*-*-", "megatron.load={workspace}/student", "megatron.finetune=true"],
        r"GPTModel's.*megatron\.no-load-optim=true",
    ),
    "a hybrid student with layers that are not in the checkpoint": Case(
        "checkpoint",
        "pretrain",
        [
            "megatron.hybrid-layer-pattern=*-*-*-",
            "megatron.load={workspace}/student",
            "megatron.no-load-optim=true",
        ],
        r"num-layers: the checkpoint has 2.* 3",
    ),
    "groups of queries without their switch": Case(
        "config", "pretrain", ["megatron.num-query-groups=2"], r"num-query-groups.*2.*group-query"
    ),
    "a batch size that grows by an option that is not read": Case(
        "config",
        "pretrain",
        ["megatron.rampup-batch-size=[8,8,64]"],
        r"rampup-batch-size.*step-batch-size-schedule",
    ),
    "teacher that cannot split the vocabulary": Case(
        "config",
        "distill",
        ["megatron.make-vocab-size-divisible-by=401", "teacher.tensor-model-parallel-size=2"],
        r"401.*2.*tensor-parallel.*make-vocab-size-divisible-by.*2",
    ),
    "teacher that cannot split the sequence": Case(
        "config",
        "distill",
        ["megatron.seq-length=31", "teacher.tensor-model-parallel-size=2", "teacher.sequence-parallel=true"],
        r"31.*2.*tensor-parallel.*sequence-parallel=false",
    ),
    "teacher with attention masks in a layout of its own": Case(
        "config",
        "distill",
        ["megatron.no-create-attention-mask-in-dataloader=false", "teacher.tensor-model-parallel-size=2"],
        r"megatron.no-create-attention-mask-in-dataloader=true",
    ),
    "teacher over more ranks than there are": Case(
        "config",
        "distill",
        [
            "megatron.pipeline-model-parallel-size=2",
            "teacher.tensor-model-parallel-size=2",
            "teacher.pipeline-model-parallel-size=1",
        ],
        r"2.*data-parallel.*1",
    ),
    "teacher of another tokenizer": Case("checkpoint", "distill", ["data.dir={workspace}/other-text"], r"other-text"),
    "data not prepared": Case("data", "distill", ["data.dir={workspace}/unprepared"], r"unprepared.*prepare"),
    "Megatron's own refusal": Case("config", "pretrain", ["megatron.fp16=true", "megatron.bf16=true"], r"args.bf16"),
    "heads that do not divide the hidden size": Case(
        "config",
        "pretrain",
        ["megatron.num-attention-heads=5"],
        r"hidden-size.*32.*5.*kv-channels",
    ),
    "heads that tensor parallelism does not divide": Case(
        "config",
        "distill",
        ["megatron.tensor-model-parallel-size=2", "megatron.num-attention-heads=1"],
        r"1.*2.*tensor-parallel",
    ),
    "ranks that the layout does not divide": Case(
        "config",
        "pretrain",
        ["megatron.tensor-model-parallel-size=3"],
        r"3.*tensor-parallel.*3.*2",
    ),
    "batch that does not divide": Case(
        "config",
        "pretrain",
        ["megatron.global-batch-size=7"],
        r"global-batch-size 7 does not divide into micro-batches of 2 on 2 data-parallel ranks; use a multiple of 4",
    ),
    "micro-batch of nothing": Case("config", "pretrain", ["megatron.micro-batch-size=0"], r"micro-batch-size is 0"),
    "divergence of a module that is not there": Case(
        "config", "distill", ["distillation.divergence=nowhere.Mine"], r"divergence"
    ),
    "divergence that its module does not have": Case(
        "config", "distill", ["distillation.divergence=json.Mine"], r"json.Mine"
    ),
    "class that is no divergence": Case(
        "config", "distill", ["distillation.divergence=json.JSONDecoder"], r"JSONDecoder"
    ),
    "term of weight 0": Case(
        "config", "distill", ["distillation.losses=[{{name: todi, weight: 0}}]"], r"weight above 0, got 0"
    ),
    "parameter of another loss": Case(
        "config", "distill", ["distillation.losses=[{{name: todi, alpha: 0.2}}]"], r"alpha"
    ),
    "shared vocabulary larger than any": Case(
        "config", "distill", ["distillation.shared_vocab=401"], r"shared_vocab.*401.*teacher.*400"
    ),
    "tracker that names no iteration": Case(
        "checkpoint",
        "distill",
        ["teacher.load={workspace}/tracker"],
        r"last",
        "`latest_checkpointed_iteration.txt` says `last`",
    ),
    "iteration that is not there": Case("checkpoint", "distill", ["teacher.ckpt-step=5"], r"5.*teacher.*ckpt-step"),
    "teacher in the older format": Case(
        "checkpoint",
        "distill",
        ["teacher.load={workspace}/older"],
        r"torch_dist.*teacher.*--ckpt-convert-format",
        "`mp_rank_00/model_optim_rng.pt` in the iteration's folder",
    ),
    "teacher of Hugging Face": Case(
        "checkpoint",
        "distill",
        ["teacher.load={workspace}/hugging-face"],
        r"found one of Hugging Face; convert it",
        "`config.json` and `model.safetensors` in the folder",
    ),
    "teacher's file missing": Case(
        "checkpoint",
        "distill",
        ["teacher.load={workspace}/incomplete"],
        r"should hold \d+ bytes and is missing",
        "one of its `.distcp` removed",
    ),
    "student's checkpoint missing": Case(
        "checkpoint",
        "distill",
        ["megatron.load={workspace}/nowhere"],
        r"megatron.load",
    ),
    "student's checkpoint of Hugging Face": Case(
        "checkpoint",
        "pretrain",
        ["megatron.load={workspace}/hugging-face"],
        r"found one of Hugging Face, which has to be converted",
    ),
    "student's iteration missing": Case(
        "checkpoint",
        "pretrain",
        ["megatron.load={workspace}/student", "megatron.ckpt-step=5"],
        r"iter_0000005.*megatron.ckpt-step",
    ),
    "student's tracker names no iteration": Case(
        "checkpoint",
        "pretrain",
        ["megatron.load={workspace}/tracker"],
        r"last.*megatron.ckpt-step",
        "`latest_checkpointed_iteration.txt` says `last`",
    ),
    "student's checkpoint cut off": Case(
        "checkpoint",
        "pretrain",
        ["megatron.load={workspace}/truncated"],
        r"the student's checkpoint is damaged",
        "the last 1000 bytes of a file cut off",
    ),
    "student's checkpoint of another size": Case(
        "checkpoint",
        "pretrain",
        ["megatron.load={workspace}/teacher"],
        r"num-layers.*4.*2",
    ),
    "data without their index": Case(
        "data",
        "pretrain",
        ["data.dir={workspace}/data-without-index"],
        r"expected the file train.idx, got none",
        "`train.idx` removed",
    ),
    "data without their tokenizer": Case(
        "data",
        "pretrain",
        ["data.dir={workspace}/data-without-tokenizer"],
        r"tokenizer.model",
        "`tokenizer.model` removed",
    ),
    "data with another tokenizer": Case(
        "data",
        "pretrain",
        ["data.dir={workspace}/data-with-another"],
        r"sha256",
        "another `tokenizer.model` in its place",
    ),
    "data cut off": Case(
        "data",
        "pretrain",
        ["data.dir={workspace}/data-cut"],
        r"train.bin.*\d+",
        "the last 10 bytes of `train.bin` cut off",
    ),
    "data with a garbled manifest": Case(
        "data",
        "pretrain",
        ["data.dir={workspace}/data-garbled"],
        r"manifest.json",
        "`manifest.json` is `{{`",
    ),
    "folder that holds other things": Case("data", "pretrain", ["data.dir={workspace}/empty"], r"manifest.json"),
    "data given twice": Case("data", "pretrain", ["megatron.mock-data=true"], r"mock-data"),
    "save folder that is a file": Case(
        "environment",
        "distill",
        ["megatron.save={workspace}/file", "megatron.save-interval=1"],
        r"megatron.save",
    ),
    "save folder that cannot be made": Case(
        "environment",
        "pretrain",
        ["megatron.save=/proc/run", "megatron.save-interval=1"],
        r"megatron.save",
    ),
    "TensorBoard folder in a file": Case(
        "environment",
        "pretrain",
        ["megatron.tensorboard-dir={workspace}/file/logs"],
        r"megatron.tensorboard-dir",
    ),
    # From here on what is found when Megatron has built the models.
    "teacher of zeros": Case(
        "checkpoint",
        "distill",
        ["teacher.load={workspace}/zeros"],
        r"expected trained weights of the teacher, got nothing but zeros",
        "every tensor set to 0",
    ),
    "warm-up as long as the training": Case(
        "config",
        "pretrain",
        ["megatron.lr-warmup-iters=5"],
        r"lr_warmup_steps.*self.lr_decay_steps.*lr-warmup-iters.*5.*train-iters.*5",
    ),
    "warm-up as a share of 1": Case(
        "config", "pretrain", ["megatron.lr-warmup-fraction=1.0"], r"lr-warmup-fraction is 1.0"
    ),
    "WSD without its decay": Case(
        "config",
        "pretrain",
        ["megatron.lr-decay-style=WSD"],
        r"lr-wsd-decay-iters.*lr-wsd-decay-samples",
    ),
    "weight decay that falls": Case(
        "config",
        "pretrain",
        [
            "megatron.start-weight-decay=0.1",
            "megatron.end-weight-decay=0.01",
            "megatron.weight-decay-incr-style=linear",
        ],
        r"start-weight-decay.*0.1.*end-weight-decay.*0.01",
    ),
    "no learning rate": Case("config", "pretrain", ["megatron.lr=null"], r"megatron.lr"),
    "no length of the training": Case(
        "config",
        "pretrain",
        ["megatron.train-iters=null"],
        r"megatron.train-iters.*megatron.train-samples",
    ),
    "moments of Adam in fp16": Case(
        "config",
        "pretrain",
        ["megatron.exp-avg-dtype=fp16"],
        r"exp_avg_dtype.*fp32.*precision-aware.*optimizer",
    ),
    "main gradients in bf16": Case("config", "pretrain", ["megatron.main-grads-dtype=bf16"], r"main_grads_dtype.*fp32"),
    "gradient buffer for parameters in MXFP8": Case(
        "config",
        "pretrain",
        ["megatron.reuse-grad-buf-for-mxfp8-param-ag=true"],
        r"MXFP8",
    ),
    "mode that Megatron's parser takes and its loop does not": Case(
        "config",
        "pretrain",
        ["megatron.rerun-mode=report_stats"],
        r"validate_results.*report_determinism_stats.*report_stats",
    ),
    "several validation sets": Case(
        "config",
        "pretrain",
        ["megatron.multiple-validation-sets=true"],
        r"full-validation.*multiple-validation-sets",
    ),
    "optimizer whose package is not there": Case(
        "environment",
        "pretrain",
        ["megatron.optimizer=lion", "megatron.save={workspace}/lion", "megatron.save-interval=1"],
        r"emerging-optimizers.*/lion/traceback-rank-",
    ),
    "second run into a folder of checkpoints": Case(
        "checkpoint",
        "pretrain",
        ["megatron.save={workspace}/student", "megatron.save-interval=1"],
        r"megatron.save.*1.*megatron.load=.*/student",
    ),
    "folder of checkpoints that are begun with": Case(
        "checkpoint",
        "pretrain",
        [
            "megatron.load={workspace}/student",
            "megatron.finetune=true",
            "megatron.save={workspace}/student",
            "megatron.save-interval=1",
        ],
        r"megatron.load=.*/student.*megatron.finetune",
    ),
    "folder of the teacher's checkpoints": Case(
        "checkpoint",
        "distill",
        ["megatron.load={workspace}/student", "megatron.save={workspace}/teacher", "megatron.save-interval=1"],
        r"expected a folder without checkpoints, or the folder from which this run resumes.*step 8",
    ),
    "folder that another job writes to": Case(
        "checkpoint",
        "pretrain",
        ["megatron.save={workspace}/locked", "megatron.save-interval=1"],
        r"expected a folder that no other job writes to.*\(process .* on .*since .*\); wait for its end",
        "another job runs",
    ),
    "resumed with another train-iters": Case(
        "checkpoint",
        "pretrain",
        ["megatron.load={workspace}/student", "megatron.train-iters=9"],
        r"megatron.override-opt_param-scheduler=true",
    ),
    "fused head over a part of the vocabulary": Case(
        "config",
        "distill",
        ["megatron.pipeline-model-parallel-size=2", "distillation.shared_vocab=399", "distillation.head=fused"],
        r"head.*shared_vocab.*399.*400",
    ),
}

# As one process, no configuration beside what is given; the file is written before.
ALONE: dict[str, Case] = {
    "job misspelt": Case("config", "distl", ["config.yaml"], r"distl.*distill"),
    "no such job": Case("config", "finetune", [], r"finetune"),
    "no such file": Case(
        "config",
        "show-config",
        ["{workspace}/nowhere.yaml"],
        r"nowhere.yaml.*YAML",
    ),
    "folder in place of a file": Case("config", "show-config", ["{workspace}"], r"YAML"),
    "setting in two words": Case("config", "show-config", ["megatron.num-layers", "4"], r"section.key=value"),
    "setting with dashes": Case(
        "config", "show-config", ["--distillation.alpha=0.3"], r"unrecognized arguments: --distillation.alpha"
    ),
    "setting without a section": Case("config", "show-config", ["alpha=0.3"], r"section.key=value"),
    "misspelt section": Case("config", "show-config", ["distilation.alpha=0.3"], r"distillation"),
    "unknown device": Case("config", "show-config", ["device=gpu"], r"device.*gpu"),
    "list for a number": Case("config", "show-config", ["distillation.alpha=[1,2]"], r"\['1.*2'\]"),
    "nothing for a number": Case(
        "config", "show-config", ["distillation.scale=null"], r"expected a finite number, got nothing"
    ),
    "infinite weight": Case(
        "config", "show-config", ["distillation.kd_weight=inf"], r"expected a finite number, got 'inf'"
    ),
    "yes for true": Case("config", "show-config", ["megatron.swiglu=yes"], r"yes"),
    "fraction for a whole number": Case("config", "show-config", ["megatron.num-layers=2.5"], r"2.5"),
    "choice that Megatron does not have": Case(
        "config", "show-config", ["megatron.position-embedding-type=ropes"], r"did you mean 'rope'"
    ),
    "schedule that ends before it starts": Case(
        "config",
        "show-config",
        ["distillation.alpha={{schedule: linear, from: 1, to: 0, start: 5, end: 3}}"],
        r"in order, got \[5, 3\]",
    ),
    "schedule without an end": Case(
        "config", "show-config", ["distillation.alpha={{schedule: linear, from: 1}}"], r"distillation.alpha.*\bend\b"
    ),
    "unknown schedule": Case(
        "config",
        "show-config",
        ["distillation.alpha={{schedule: linar, from: 1, to: 0, end: 3}}"],
        r"did you mean 'linear'",
    ),
    "schedule by epochs": Case(
        "config",
        "show-config",
        ["distillation.alpha={{schedule: linear, from: 1, to: 0, end: 3, by: epochs}}"],
        r"known: iteration, samples, tokens",
    ),
    "negative weight": Case(
        "config", "pretrain", ["device=cpu", "distillation.lm_weight=-1"], r"distillation.lm_weight.*-1"
    ),
    "unknown divergence": Case(
        "config", "pretrain", ["device=cpu", "distillation.divergence=forward_k1"], r"did you mean 'forward_kl'"
    ),
    "unknown kernel": Case("config", "pretrain", ["device=cpu", "distillation.kernel=tritn"], r"did you mean 'triton'"),
    "unknown head": Case("config", "pretrain", ["device=cpu", "distillation.head=fusd"], r"did you mean 'fused'"),
    "unknown check to skip": Case(
        "config",
        "pretrain",
        ["device=cpu", "distillation.skip_preflight=[teacher_weight]"],
        r"teacher_weights",
    ),
    "unknown answer to a change": Case(
        "config", "pretrain", ["device=cpu", "distillation.on_change=wrn"], r"did you mean 'warn'"
    ),
    "chunks of no token": Case(
        "config", "pretrain", ["device=cpu", "distillation.chunk_tokens=0"], r"distillation.chunk_tokens.*0"
    ),
    "share none of the vocabulary": Case(
        "config", "pretrain", ["device=cpu", "distillation.shared_vocab=0"], r"distillation.shared_vocab.*0"
    ),
    "number of ranks that is none": Case("config", "check", ["--world-size", "0"], r"--world-size.*0.*0"),
    "GPU of no memory": Case("config", "estimate", ["--gpu-memory", "-1"], r"--gpu-memory.*0.*-1"),
    "seed twice": Case("config", "compare", ["device=cpu", "compare.seeds=[1,1]"], r"expected each seed once"),
    "launcher that is not there": Case(
        "config",
        "compare",
        ["{config}", "teacher.load={teacher}", "compare.launch=torchrn"],
        r"compare.launch.*torchrn",
    ),
    "comparison into a file": Case(
        "config",
        "compare",
        ["{config}", "teacher.load={teacher}", "compare.out={workspace}/file"],
        r"compare.out",
    ),
    "report of nothing": Case("data", "report", ["{workspace}/empty"], r"expected TensorBoard event files, found none"),
    "text that is not UTF-8": Case(
        "data",
        "prepare",
        ["data.dir={workspace}/new", "data.source=[{workspace}/latin.txt]"],
        r"latin.txt.*UTF-8",
    ),
    "empty text": Case(
        "data",
        "prepare",
        ["data.dir={workspace}/new", "data.source=[{workspace}/empty.txt]"],
        r"expected documents in each of",
    ),
    "one document": Case(
        "data",
        "prepare",
        ["data.dir={workspace}/new", "data.source=[{workspace}/one.txt]"],
        r"1.*data.held_out.*\S+.*data.source",
    ),
    "no such text": Case(
        "data",
        "prepare",
        ["data.dir={workspace}/new", "data.source=[{workspace}/nowhere.txt]"],
        r"got nothing to read; check the path",
    ),
    "lines without `text`": Case(
        "data",
        "prepare",
        ["data.dir={workspace}/new", "data.source=[{workspace}/content.jsonl]"],
        r"content.jsonl:1",
    ),
    "line that is no JSON": Case(
        "data",
        "prepare",
        ["data.dir={workspace}/new", "data.source=[{workspace}/broken.jsonl]"],
        r"broken.jsonl:2",
    ),
    "no source": Case(
        "data", "prepare", ["data.dir={workspace}/new", "data.source=[]"], r"expected at least one source"
    ),
    "vocabulary smaller than the bytes": Case(
        "data", "prepare", ["data.dir={workspace}/new", "data.vocab_size=10"], r"expected 300 or more"
    ),
    "all held out": Case("data", "prepare", ["data.dir={workspace}/new", "data.held_out=1"], r"0.*0.5"),
    "no folder to write": Case("data", "prepare", ["device=cpu"], r"expected an output directory"),
    "folder of other data": Case(
        "data",
        "prepare",
        ["{config}", "data.vocab_size=410"],
        r"data.*vocab_size_asked.*410.*400",
    ),
    "folder that cannot be made": Case(
        "environment",
        "prepare",
        ["{config}", "data.dir={workspace}/file/data"],
        r"expected a writable directory",
    ),
    "GPU asked for where there is none": Case(
        "environment", "pretrain", ["{config}", "device=cuda"], r"expected an NVIDIA GPU, found none; set `device: cpu`"
    ),
    "triton kernel without a GPU": Case(
        "environment",
        "distill",
        ["{config}", "teacher.load={teacher}", "distillation.kernel=triton"],
        r"device",
    ),
    "RANK that is no number": Case(
        "environment",
        "pretrain",
        ["{config}"],
        r"RANK.*WORLD_SIZE.*RANK=first.*WORLD_SIZE=2",
        "`RANK=first WORLD_SIZE=2`",
    ),
    "WORLD_SIZE without RANK": Case(
        "environment",
        "pretrain",
        ["{config}"],
        r"RANK.*WORLD_SIZE=2",
        "`WORLD_SIZE=2`",
    ),
    "RANK beyond WORLD_SIZE": Case(
        "environment",
        "pretrain",
        ["{config}"],
        r"RANK.*WORLD_SIZE.*RANK=2.*WORLD_SIZE=2",
        "`RANK=2 WORLD_SIZE=2`",
    ),
    "ranks that do not know where to meet": Case(
        "environment",
        "pretrain",
        ["{config}"],
        r"MASTER_ADDR.*MASTER_PORT.*RANK=0.*WORLD_SIZE=2",
        "`RANK=0 WORLD_SIZE=2`",
    ),
}

# Files of a configuration, for `show-config`.
FILES: dict[str, tuple[bytes, str]] = {
    "empty file": (b"", r"got an empty file; write"),
    "list of sections": (b"- device\n- cpu\n", r"got a list; write"),
    "brackets that do not close": (b"distillation: [alpha\n", r"YAML"),
    "tab": (b"distillation:\n\talpha: 0.3\n", r"indent with spaces"),
    "key twice": (b"distillation:\n  alpha: 0.3\n  alpha: 0.4\n", r"alpha.*2.*3"),
    "section twice": (b"distillation:\n  alpha: 0.3\ndistillation:\n  beta: 0.4\n", r"distillation"),
    "not UTF-8": (b"data:\n  dir: caf\xe9\n", r"YAML.*UTF-8"),
    "unknown section": (
        b"distilation:\n  alpha: 0.3\n",
        r"1.*distilation.*distillation",
    ),
    "value in place of a section": (b"distillation: 0.3\n", r"0.3"),
    "two documents": (b"device: cpu\n---\ndevice: cpu\n", r"expected a single document"),
}

# Of the Python API: an expression, the exception, what must be said.
TENSORS: dict[str, tuple[str, str, str]] = {
    "logits of two shapes": (
        "vocab_parallel_divergence(randn(2, 8), randn(2, 9), ToDi())",
        "ConfigError",
        r"one shape",
    ),
    "whole numbers for logits": (
        "vocab_parallel_divergence(randn(2, 8).int(), randn(2, 8), ToDi())",
        "ConfigError",
        r"torch.int32",
    ),
    "temperature of 0": (
        "vocab_parallel_divergence(randn(2, 8), randn(2, 8), ToDi(), temperature=0)",
        "ConfigError",
        r"temperature.*0.*0",
    ),
    "temperature that is NaN": (
        "vocab_parallel_divergence(randn(2, 8), randn(2, 8), ToDi(), temperature=nan)",
        "ConfigError",
        r"temperature.*0.*nan",
    ),
    "name for a divergence": (
        "vocab_parallel_divergence(randn(2, 8), randn(2, 8), 'todi')",
        "ConfigError",
        r"expected a Divergence",
    ),
    "vocabulary larger than the logits": (
        "vocab_parallel_divergence(randn(2, 8), randn(2, 8), ToDi(), vocab_size=9)",
        "ConfigError",
        r"9",
    ),
    "gradient in place of a leaf": (
        "vocab_parallel_divergence(randn(2, 8, requires_grad=True), randn(2, 8), ToDi(), gradient_in_place=True)",
        "ConfigError",
        r"got a leaf",
    ),
    "labels of another shape": (
        "vocab_parallel_distillation(randn(2, 8), randn(2, 8), ToDi(), zeros(3).long(), VocabShard.megatron(8))",
        "ConfigError",
        r"\[2\]",
    ),
    "labels that are no whole numbers": (
        "vocab_parallel_distillation(randn(2, 8), randn(2, 8), ToDi(), zeros(2), VocabShard.megatron(8))",
        "ConfigError",
        r"dtype torch.int64",
    ),
    "shard wider than the logits": (
        "vocab_parallel_distillation(randn(2, 8), randn(2, 8), ToDi(), zeros(2).long(), VocabShard.megatron(9))",
        "ConfigError",
        r"at least 9 columns",
    ),
    "selection of another shape": (
        "vocab_parallel_distillation(randn(2, 8), randn(2, 8), ToDi(), zeros(2).long(), "
        "VocabShard.megatron(8), selected=zeros(3).bool())",
        "ConfigError",
        r"selection of shape \[2\]",
    ),
    "alpha that is NaN": ("AlphaBeta(nan, 0.7)", "ConfigError", r"nan"),
    "objective that weighs nothing": ("Objective(ToDi(), kd_weight=0.0, lm_weight=0.0)", "ConfigError", r"0"),
    "selection of every 0th token": ("TokenSelection('every', n=0)", "ConfigError", r"at least 2"),
}


def spoil(workspace: Path, teacher: Path, data: Path) -> None:
    """Make the folders and files that the cases name, beside those of the fixture `spoilt`."""
    step = "iter_0000008"
    for name in ("tracker", "older", "incomplete"):
        shutil.copytree(teacher, workspace / name)
    (workspace / "tracker/latest_checkpointed_iteration.txt").write_text("last\n")
    shutil.rmtree(workspace / "older" / step)
    (workspace / "older" / step / "mp_rank_00").mkdir(parents=True)
    (workspace / "older" / step / "mp_rank_00/model_optim_rng.pt").write_bytes(b"")
    max((workspace / "incomplete").rglob("*.distcp")).unlink()
    (workspace / "hugging-face").mkdir()
    (workspace / "hugging-face/config.json").write_text(json.dumps({"model_type": "llama"}))
    (workspace / "hugging-face/model.safetensors").write_bytes(b"")
    edited(teacher, workspace / "zeros", zero)
    for name in ("without-index", "without-tokenizer", "with-another", "cut", "garbled"):
        shutil.copytree(data, workspace / f"data-{name}")
    (workspace / "data-without-index/train.idx").unlink()
    (workspace / "data-without-tokenizer/tokenizer.model").unlink()
    (workspace / "data-with-another/tokenizer.model").write_bytes(b"another")
    tokens = workspace / "data-cut/train.bin"
    tokens.write_bytes(tokens.read_bytes()[:-10])
    (workspace / "data-garbled/manifest.json").write_text("{")
    (workspace / "file").write_text("a file")
    (workspace / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    (workspace / "empty.txt").write_text("")
    (workspace / "one.txt").write_text("one document\n")
    (workspace / "content.jsonl").write_text('{"content": "a"}\n')
    (workspace / "broken.jsonl").write_text('{"text": "a"}\n{"text": \n')
    for name, (content, _) in FILES.items():
        file_of(workspace, name).write_bytes(content)


def file_of(workspace: Path, name: str) -> Path:
    return workspace / f"{name.replace(' ', '-')}.yaml"


def decisive(stderr: str, workspace: Path) -> str:
    """The message, without who says it, and without what differs from machine to machine and from run to run."""
    _, _, message = stderr.rpartition("error: ") if "usage: " in stderr else stderr.partition("error: ")
    message = re.sub(r" \(found on rank \d+\)", "", " ".join(message.split()))
    message = message.replace(str(workspace / "config.yaml"), "CONFIG").replace(str(workspace / "teacher/"), "TEACHER")
    message = message.replace(str(workspace), "RUN").replace(str(ROOT), "HERE")
    message = re.sub(r"\b[0-9a-f]{64}\b", "...", message)
    message = re.sub(r"(traceback-rank-)\S+\.txt", r"\1R-...txt", message)
    message = re.sub(r"\(process \d+ on [^)]*\)", "(process N on HOST, since TIME)", message)
    return re.sub(r"\b(on rank) \d+", r"\1 R", re.sub(r"\b\d{5,}\b", "N", message))
