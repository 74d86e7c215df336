"""What `check` finds without ranks: what a job refuses in the job's own words, and nothing where a job would run."""

import json
import re
import shlex
from pathlib import Path

import pytest
from bad_input import CASES
from launch import ROOT, launch
from matrix import REFERENCES, ROWS, of_teacher, overrides

from abkd_megatron.__main__ import JOBS

REFUSED_ROWS = {str(row): row for row in ROWS if row.refused is not None}
# What a job refuses and `check` does not: what may be on another machine, training without a teacher, what is written,
# and what is found when the models are built.
ELSEWHERE = {
    "no teacher": r"ok +settings: training without a teacher",
    "missing teacher": r"not here +teacher's checkpoint: .*nowhere",
    "data not prepared": r"not here +data: .*unprepared: run `prepare`",
    "student's checkpoint missing": r"not here +student's checkpoint: none in .*nowhere",
    "student's checkpoint of Hugging Face": r"not here +student's checkpoint: none in .*hugging-face",
    "save folder that is a file": " 0 rejected",
    "save folder that cannot be made": " 0 rejected",
    "TensorBoard folder in a file": " 0 rejected",
    "teacher of zeros": " 0 rejected",
    "resumed with another train-iters": " 0 rejected",
    "optimizer whose package is not there": " 0 rejected",
    "a hybrid model by its old name, without the kernels of Mamba": r"not here +packages: student.*M.*mamba-ssm",
    "a hybrid model without the kernels of gated delta nets": r"not here +packages: student.*G.*flash-linear-attention",
    "a hybrid model without TransformerEngine": r"not here +packages: student.*TransformerEngine",
    "a hybrid teacher without the kernels of Mamba": r"not here +packages: teacher.*M.*mamba-ssm",
}

EXAMPLES = [line for job in JOBS.values() if job.takes_config for line in job.examples]

LLAMA = """\
device: cuda
megatron:
  tensor-model-parallel-size: 8
  pipeline-model-parallel-size: 2
  sequence-parallel: true
  num-layers: 16
  hidden-size: 2048
  ffn-hidden-size: 8192
  num-attention-heads: 32
  group-query-attention: true
  num-query-groups: 8
  kv-channels: 64
  seq-length: 8192
  max-position-embeddings: 8192
  position-embedding-type: rope
  rotary-base: 500000
  normalization: RMSNorm
  swiglu: true
  disable-bias-linear: true
  untie-embeddings-and-output-weights: true
  bf16: true
  use-distributed-optimizer: true
  no-create-attention-mask-in-dataloader: true
  micro-batch-size: 1
  global-batch-size: 64
  train-iters: 1000
  eval-interval: 100
  lr: 1e-4
  tokenizer-type: NullTokenizer
  vocab-size: 128256
  mock-data: true
teacher:
  load: /nowhere/teacher
  num-layers: 80
  hidden-size: 8192
  ffn-hidden-size: 28672
  num-attention-heads: 64
  kv-channels: 128
  pipeline-model-parallel-size: 4
"""
HIDDEN = "distillation.hidden_losses=[{{student_layer: {}, teacher_layer: {}, loss: cosine, projector: {}}}]"
STAGES = "megatron.pipeline-model-parallel-size=2"

# name: (words behind the configuration, what is found). On the configuration of the host tests, with its teacher:
OF_TINY: dict[str, tuple[list[str], list[str]]] = {
    "no validation": (
        ["megatron.eval-interval=null"],
        [r"rejected +student: student: expected eval-interval,"],
    ),
    "as it is": (
        [],
        [
            r"ok +settings: training with a teacher",
            r"ok +data: tokens in .*train",
            r"ok +ranks: 1: no parallelism",
            r"ok +batch: 8 sequences per step, 256 tokens: 4 micro-batches of 2 on each of 1 DP",
            r"ok +vocabulary: 400 tokens, padded to 512 columns: 512 per rank of TP 1",
            r"ok +teacher's layout: the student's",
            r"ok +teacher's checkpoint: .*complete, and of the configured model",
            r"ok +teacher's tokenizer: the student's",
            r"0 not here, 0 rejected",
        ],
    ),
    "with the fewest ranks that two layouts allow": (
        [STAGES, "teacher.pipeline-model-parallel-size=4"],
        [r"ok +ranks: 4: PP 2 x DP 2", r"ok +teacher's layout: TP 1 x PP 4: 1 per 2 DP replicas"],
    ),
    "with several teachers that take turns": (
        [STAGES, "teacher.pipeline-model-parallel-size=1"],
        [r"ok +teacher's layout: TP 1 x PP 1: 2 per 1 DP replicas"],
    ),
    "teachers by source": (
        [
            *("data.dir=null", "megatron.tokenizer-type=NullTokenizer", "megatron.vocab-size=400"),
            *("megatron.data-path=[1, a, 1, b, 1, c]", "distillation.skip_preflight=[batch]"),
            "teachers=[{sources: [c], load: /nowhere, num-layers: 3}, {sources: [1], load: /nowhere, num-layers: 6}]",
        ],
        [
            r"not here +teachers: teacher of source c: /nowhere",
            r"ok +teachers: teacher of source c: GPTModel, 3 layers, hidden size 48",
            r"ok +teachers: teacher of source 1: GPTModel, 6 layers, hidden size 48",
        ],
    ),
    "one source of two teachers": (
        [
            *("data.dir=null", "megatron.tokenizer-type=NullTokenizer", "megatron.vocab-size=400"),
            *("megatron.data-path=[1, a, 1, b]", "teachers=[{sources: [b], load: x}, {sources: [1], load: y}]"),
        ],
        [r"rejected +teachers: teachers: expected one teacher per source, got teacher of source b and teacher of "],
    ),
    "several values and a layout": (
        ["distillation.temperature=0", "distillation.lm_weight=-1", STAGES, "megatron.num-layers=3"],
        [r"rejected +settings: .*temperature", r"rejected +settings: .*lm_weight", r"rejected +student: .*3 layers"],
    ),
    "both models": (
        [STAGES, "megatron.num-layers=3", "teacher.num-layers=5"],
        [r"rejected +student: .*3 layers", r"rejected +teacher: .*5 layers"],
    ),
    "a batch that does not divide": (
        ["--world-size", "3"],
        [r"rejected +student: student: global-batch-size 8 does not divide into micro-batches of 2 on 3 data-parallel"],
    ),
    "ranks that do not divide": (
        ["--world-size", "3", STAGES],
        [r"rejected +student: student: expected a multiple of 2 ranks \(pipeline-parallel 2\), got 3"],
    ),
    "heads that do not divide": (
        ["megatron.tensor-model-parallel-size=8"],
        [r"rejected +student: student: 4 attention heads do not divide over 8 tensor-parallel ranks"],
    ),
    "a student's layer that is not there": (
        [HIDDEN.format(3, 1, "true")],
        [r"rejected +hidden losses: .*expected a layer of the student, 1 to 2, got 3"],
    ),
    "layers of two stages": (
        [STAGES, HIDDEN.format(1, 3, "true")],
        [r"rejected +hidden losses: .*the student's 1 on stage 0 and the teacher's 3 on stage 1"],
    ),
    "layers of two sizes": (
        [HIDDEN.format(1, 1, "false")],
        [r"rejected +hidden losses: .*got 32 of the student and 48 of the teacher; give projector: true"],
    ),
    "hidden losses beside a teacher in another layout": (
        ["teacher.tensor-model-parallel-size=2", HIDDEN.format(1, 1, "true")],
        [r"rejected +hidden losses: .*the teacher must have the student's layout"],
    ),
    "a part of the vocabulary that is more than all": (
        ["distillation.shared_vocab=401"],
        [r"rejected +loss: shared_vocab is 401, the student has 400", r"rejected +teacher's checkpoint: shared_vocab"],
    ),
    "a part of the vocabulary with context parallelism": (
        ["distillation.shared_vocab=399", "megatron.context-parallel-size=2", "megatron.transformer-impl=local"],
        [r"rejected +loss: shared_vocab 399 .*context-parallel-size to 1"],
    ),
    "experts over too few ranks": (
        [*["megatron.num-experts=4", "megatron.expert-model-parallel-size=4", "--world-size", "2"]],
        [r"rejected +(student|Megatron's models): Megatron rejects.*world_size \(2\) is not divisible by expert"],
    ),
    "a tokenizer that is somewhere else": (
        ["data.dir=null", "megatron.tokenizer-type=HuggingFaceTokenizer", "megatron.tokenizer-model=nobody/nothing"],
        [r"not here +tokenizer: expected the tokenizer HuggingFaceTokenizer nobody/nothing", r" 0 rejected"],
    ),
    "a tokenizer that is somewhere else, its size given": (
        [
            *["data.dir=null", "megatron.tokenizer-type=SentencePieceTokenizer", "megatron.tokenizer-model=/nowhere"],
            "megatron.vocab-size=401",
        ],
        [
            r"not here +tokenizer: .*megatron.vocab-size is used",
            r"rejected +teacher's checkpoint: .* 400 tokens, the student one of 401",
        ],
    ),
    "no data and no tokenizer": (
        ["data.dir=null"],
        [
            r"rejected +tokenizer: Megatron rejects these arguments: tokenizer_type None is not supported",
            r" 1 rejected",
        ],
    ),
    "heads that do not divide, and hidden losses": (
        ["megatron.tensor-model-parallel-size=8", HIDDEN.format(1, 1, "true")],
        [r"rejected +student: ", r"rejected +teacher: ", r" 2 rejected"],
    ),
    "data of Megatron's that are somewhere else": (
        [
            *["data.dir=null", "megatron.tokenizer-type=NullTokenizer", "megatron.vocab-size=400"],
            "megatron.data-path=[0.3, /nowhere/a, 0.7, /nowhere/b]",
        ],
        [r"not here +data: /nowhere/a, /nowhere/b: .bin and .idx", r" 0 rejected"],
    ),
    "data that are spoilt": (["data.dir={workspace}/empty"], [r"rejected +data: .*manifest.json.*`abkd-megatron prep"]),
    "a teacher of another tokenizer": (
        ["data.dir={workspace}/other-text"],
        [r"rejected +teacher's tokenizer: .*{workspace}/data/tokenizer.model, got another one"],
    ),
}

# On a job of 64 GPUs.
OF_LLAMA: dict[str, tuple[list[str], list[str]]] = {
    "as it is": (
        ["--world-size", "64"],
        [
            r"not here +GPU: none; an H100 is assumed",
            r"ok +ranks: 64: TP 8 x PP 2 x DP 4, sequence parallel",
            r"ok +batch: 64 sequences per step, 524288 tokens: 16 micro-batches of 1 on each of 4 DP",
            r"ok +vocabulary: 128256 tokens, padded to 129024 columns: 16128 per rank of TP 8",
            r"ok +teacher: GPTModel, 80 layers, hidden size 8192, 64 heads, bfloat16",
            r"ok +teacher's layout: TP 8 x PP 4: 1 per 2 DP replicas",
            r"not here +environment: CUDA_DEVICE_MAX_CONNECTIONS=1",
            r"not here +apex: .*megatron.no-gradient-accumulation-fusion=true",
            r"not here +teacher's checkpoint: /nowhere/teacher",
            r" 0 rejected",
        ],
    ),
    "fp8": (["megatron.fp8-format=hybrid", "megatron.fp8-recipe=delayed"], [r"ok +ranks: 32:", r" 0 rejected"]),
    "a teacher over more than there is": (
        ["--world-size", "16"],
        [r"rejected +teacher: teacher: expected a multiple of 32 ranks .*got 16"],
    ),
    "a teacher of fewer columns": (
        ["teacher.tensor-model-parallel-size=4"],
        [r"rejected +teacher: .*multiple of the student's 8, got 4"],
    ),
    "attention masks": (
        ["megatron.no-create-attention-mask-in-dataloader=false"],
        [r"rejected +teacher: .*sent tokens, not attention masks"],
    ),
    "two precisions": (["megatron.fp16=true"], [r"rejected +student: Megatron rejects these arguments: assert not"]),
}


@pytest.fixture(scope="module")
def ended(workspace: Path, config: Path, teacher: Path, spoilt: Path) -> dict[str, tuple[int, str, str]]:
    """How each case ended: exit code, stdout and stderr; all in one process."""
    llama = workspace / "llama.yaml"
    llama.write_text(LLAMA)
    tiny = [str(config), f"teacher.load={teacher}"]
    # First, while the process has no stand-in for a GPU; and once more at the end, beside it.
    cases = {f"llama {name}": [str(llama), *words] for name, (words, _) in OF_LLAMA.items()}
    for path in sorted((ROOT / "configs").glob("*.yaml")):
        gpus = re.search(r"_(\d+)xH100", path.name)
        cases[f"config {path.name}"] = [str(path), *(["--world-size", gpus[1]] if gpus else [])]
    for name, case in CASES.items():
        filled = [setting.format(workspace=workspace, other=spoilt) for setting in case.settings]
        cases[f"job {name}"] = [*tiny, *filled, "--world-size", "2"]
    for name, row in REFUSED_ROWS.items():
        of = of_teacher(REFERENCES[row.reference].teacher)
        settings = [f"{key}={value}" for key, value in overrides({**of, **row.settings}).items()]
        cases[f"row {name}"] = [str(config), "teacher.load=/nowhere", *settings, "--world-size", str(row.num_ranks)]
    for line in EXAMPLES:
        _, *words = shlex.split(line.partition("abkd-megatron ")[2] or line.partition("-m abkd_megatron ")[2])
        cases[f"example {line}"] = words
    for name, (words, _) in OF_TINY.items():
        cases[f"tiny {name}"] = [*tiny, *(word.replace("{workspace}", str(workspace)) for word in words)]
    cases["llama beside the stand-in"] = [str(llama), "--world-size", "64"]
    away = workspace / "away"
    away.mkdir()
    (away / "configs").symlink_to(ROOT / "configs")
    path = away / "checked.json"
    path.write_text(json.dumps(cases))
    (rank,) = launch([Path(__file__).with_name("checked.py"), path], 1)
    assert rank.code == 0, rank.output[-6000:]
    found: dict[str, tuple[int, str, str]] = json.loads(rank.output.splitlines()[-1])
    return found


def look(ended: dict, name: str, wanted: list[str]) -> str:
    """What a case printed, after a look at whether all of that is in it and the exit code says the same."""
    code, stdout, stderr = ended[name]
    assert "Traceback" not in stderr
    refused = re.findall(r"^rejected  ", stdout, re.MULTILINE)
    assert code == (2 if refused else 0), stdout
    assert f", {len(refused)} rejected" in stdout, stdout
    for pattern in wanted:
        assert re.search(pattern, stdout), f"expected {pattern} in\n{stdout}"
    return stdout


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_the_configurations_pass(ended: dict, path: Path) -> None:
    wanted = [r" 0 rejected"]
    if gpus := re.search(r"_(\d+)xH100", path.name):
        wanted += [rf"ok +ranks: {gpus[1]}: ", r"ok +vocabulary: \d+ tokens", r"ok +teacher's layout: "]
        wanted += [r"teacher's layout: the student's, EP 8"] if "a3b" in path.name else []
    look(ended, f"config {path.name}", wanted)


@pytest.mark.parametrize("line", EXAMPLES)
def test_the_settings_in_the_help_pass(ended: dict, line: str) -> None:
    look(ended, f"example {line}", [r"ok +student: ", r" 0 rejected"])


@pytest.mark.parametrize("name", CASES)
def test_what_a_job_refuses_is_refused_in_its_words(ended: dict, name: str) -> None:
    code, stdout, stderr = ended[f"job {name}"]
    if name in ELSEWHERE:
        look(ended, f"job {name}", [ELSEWHERE[name]])
        return
    assert code == 2
    refused = "\n".join(re.findall(r"^rejected  .*(?:\n  .*)*", stdout, re.MULTILINE))  # some messages are lists
    if not stdout:  # what cannot even be read
        refused = stderr
        assert stderr.startswith("abkd-megatron check: error: command line: ")
    assert re.search(CASES[name].message, refused, re.DOTALL), f"{refused}\nfrom\n{stdout}{stderr}"


@pytest.mark.parametrize("name", REFUSED_ROWS)
def test_what_the_matrix_refuses_is_refused(ended: dict, name: str) -> None:
    message = REFUSED_ROWS[name].refused
    look(ended, f"row {name}", [rf"rejected +[^\n]*{message}", r"not here +teacher's checkpoint: /nowhere"])


@pytest.mark.parametrize("name", OF_TINY)
def test_of_a_small_model(ended: dict, workspace: Path, name: str) -> None:
    look(ended, f"tiny {name}", [pattern.replace("{workspace}", str(workspace)) for pattern in OF_TINY[name][1]])


@pytest.mark.parametrize("name", OF_LLAMA)
def test_of_a_job_on_gpus(ended: dict, name: str) -> None:
    look(ended, f"llama {name}", OF_LLAMA[name][1])


def test_a_job_on_gpus_is_the_same_beside_the_stand_in(ended: dict) -> None:
    first, again = (ended[f"llama {name}"][1].splitlines() for name in ("as it is", "beside the stand-in"))
    # The stand-in sets this variable.
    assert [line for line in first if "CUDA_DEVICE_MAX_CONNECTIONS" not in line][:-1] == again[:-1]
