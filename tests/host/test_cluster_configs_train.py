"""Every configs/*H100.yaml trains in small on CPU ranks, under the strict transport, and equals its run on one rank.

The job reads the file itself; overrides make it small. Each option of a file is `KEPT`, `SHRUNK` or one that a CPU
cannot run (`NOT_ON_CPU`); an option without a kind fails the first test.
"""

import email
import json
import math
import re
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from launch import ROOT, Rank, launch, run_job, scalars
from matrix import EXACT_ONLY, LOSSES
from stand_ins import program_for

from abkd_megatron import cpu_backend
from abkd_megatron.config.load import load_config
from abkd_megatron.config.megatron_args import megatron_options
from abkd_megatron.config.pattern import layers_of_pattern
from abkd_megatron.config.schema import Config, Value
from abkd_megatron.student.plan import nothing_to_gain

Settings = dict[str, Value]

CONFIGS = sorted((ROOT / "configs").glob("*H100.yaml"))

# As the file has them, for the student and the teacher.
_KEPT = """
    sequence-parallel use-distributed-optimizer overlap-grad-reduce overlap-param-gather calculate-per-token-loss
    group-query-attention add-qkv-bias qk-layernorm normalization norm-epsilon swiglu squared-relu disable-bias-linear
    untie-embeddings-and-output-weights attention-dropout hidden-dropout make-vocab-size-divisible-by
    max-position-embeddings position-embedding-type rotary-base use-rope-scaling rope-scaling-factor
    moe-router-dtype moe-token-dispatcher-type moe-router-topk-scaling-factor moe-router-score-function
    moe-router-enable-expert-bias expert-tensor-parallel-size
    micro-batch-size min-lr lr-decay-style weight-decay adam-beta2 clip-grad
    no-create-attention-mask-in-dataloader split
    ckpt-format exit-signal-handler log-throughput
    distillation.divergence distillation.alpha distillation.beta distillation.kd_weight distillation.lm_weight
    """
KEPT = set(_KEPT.split())

SMALLER = 64
"""The divisor of widths and sequence lengths."""

SHRUNK = {
    "tensor-model-parallel-size": "2 if it is more; the teacher's twice the student's if it is more than that",
    "expert-model-parallel-size": "2 if it is more",
    "num-layers": "2 for the student, for the teacher in proportion",
    "hybrid-layer-pattern": "one layer of each kind",
    "hidden-size": "by 64",
    "ffn-hidden-size": "by 64",
    "moe-ffn-hidden-size": "by 64",
    "moe-shared-expert-intermediate-size": "by 64",
    "mamba-num-heads": "by 8",
    "mamba-num-groups": "by 4",
    "mamba-head-dim": "by 16",
    "mamba-state-dim": "by 16",
    "seq-length": "by 64: `head: auto` weighs tokens against the student's width",
    "num-attention-heads": "heads and groups of both models by one number, which leaves each rank a group",
    "num-query-groups": "with the heads",
    "kv-channels": "by 64 over that number",
    "num-experts": "by 16",
    "moe-router-topk": "by 2",
    "global-batch-size": "8: 2 or 4 micro-batches per rank",
    "train-iters": "3",
    "lr-warmup-iters": "1",
    "lr": "1e-2: at 1e-4 three steps hardly move a loss",
    "eval-iters": "1",
    "eval-interval": "2: validation takes DDP's hooks off the model, and a step follows",
    "save-interval": "2: so does saving",
    "log-interval": "1",
    "distributed-timeout-minutes": "3",
    "data-path": "text that comes with Python",
    "data-cache-path": "one for each run: two run at one time",
    "tokenizer-type": "SentencePiece",
    "tokenizer-model": "of that text",
    "vocab-size": "400, padded to 512",
    "pretrained-checkpoint": "a shrunk student, saved by one rank after one step",
    "teacher.load": "a shrunk teacher, saved by one rank after two steps",
    "save": "a temporary folder",
    "load": "the same folder, still empty",
    "tensorboard-dir": "in that folder",
}

NOT_ON_CPU = {
    "device": "cpu",
    "bf16": "fp32, where 1e-4 can be asked for; one configuration also runs in bf16, compared at 2e-2",
    "attention-backend": "passed on, but it chooses between TransformerEngine's kernels",
    "moe-grouped-gemm": "false: TransformerEngine's grouped products; the local layers take one expert after another",
    "transformer-impl": "local: TransformerEngine needs a GPU",
    "distributed-backend": "gloo, with NCCL's rules (tests/distributed/strict.py)",
    "use-cpu-initialization": "true: there is no random generator of a GPU",
    "no-gradient-accumulation-fusion": "true: a CUDA extension",
    "no-masked-softmax-fusion": "true: a CUDA extension",
    "no-persist-layer-norm": "true: a CUDA extension",
    "no-rope-fusion": "true: a CUDA extension",
    "no-bias-swiglu-fusion": "true: torch.compile cannot look through the stand-in for a GPU",
    "no-bias-gelu-fusion": "true: likewise",
    "no-bias-dropout-fusion": "true: likewise",
    "disable-jit-fuser": "true: likewise",
    "num-workers": "0: no processes besides the ranks",
}

# Without these a tiny model would do less than a large one.
ADDED: Settings = {
    "megatron.ddp-bucket-size": 4000,  # several buckets, which is what overlaps; the default is 40 million parameters
    "distillation.chunk_tokens": 24,  # several chunks; on a CPU one has up to 512 tokens
}


@dataclass(frozen=True)
class Launch:
    """How a configuration is run here."""

    ranks: int
    layout: str
    lost: str = "sizes"
    """What of the file's layout so few ranks do not have."""


LAUNCHES = {
    "llama31_70b_to_8b_64xH100": Launch(
        4,
        "TP 2 x DP 2 with SP, one teacher at TP 4",
        "several teachers, which takes 8 ranks (qwen3_8b_to_1p7b_8xH100 has two); so it is llama31_70b_to_8b_8xH100",
    ),
    "llama31_70b_to_8b_8xH100": Launch(4, "TP 2 x DP 2 with SP, one teacher at TP 4"),
    "llama32_3b_to_1b_8xH100": Launch(2, "DP 2"),
    "qwen25_7b_to_1p5b_8xH100": Launch(2, "DP 2"),
    "qwen3_30b_a3b_to_1p7b_8xH100": Launch(2, "DP 2, the teacher at EP 2"),
    "nemotron3_nano_30b_a3b_to_4b_64xH100": Launch(4, "TP 2 x DP 2 with SP, the teacher's experts at EP 2"),
    "qwen3_8b_to_1p7b_8xH100": Launch(4, "DP 4, two teachers at TP 2"),
}

# Rows of both embeddings in the checkpoints, where the file says that they are more than the job pads to.
ROWS = {"qwen25_7b_to_1p5b_8xH100": {"teacher": 640, "student": 576}}

ON_ONE_RANK: Settings = {
    "megatron.tensor-model-parallel-size": 1,
    "megatron.sequence-parallel": False,
    "megatron.use-distributed-optimizer": False,
    "megatron.overlap-grad-reduce": False,
    "megatron.overlap-param-gather": False,
    "megatron.save": None,
    "megatron.load": None,
    "distillation.head": "materialized",
}
TEACHER_ON_ONE_RANK: Settings = {"tensor-model-parallel-size": 1, "expert-model-parallel-size": 1}


@cache
def read(path: Path) -> Config:
    return load_config(path, [], megatron_options())


@cache
def given_in(path: Path) -> Settings:
    """Everything that the file says, by section and option."""
    config = read(path)
    of_teacher = {"load": config.teacher.load, **config.teacher.megatron}
    sections = {"megatron": config.megatron, "teacher": of_teacher, "distillation": asdict(config.distillation)}
    known = {f"{section}.{name}": value for section, values in sections.items() for name, value in values.items()}
    known["device"] = config.device
    return {key: known[key] for key, origin in config.origins.items() if origin != "default"}


def option(key: str) -> str:
    """The option of a setting: Megatron's are called the same in both sections."""
    section, _, name = key.partition(".")
    return name if section == "megatron" or (section == "teacher" and name != "load") else key


def shrink(path: Path) -> Settings:
    """The overrides that make a configuration small, apart from its data and checkpoints."""
    own = {"megatron": read(path).megatron, "teacher": read(path).teacher.megatron}
    student, teacher = own["megatron"], {**own["megatron"], **own["teacher"]}

    def number(of: Mapping[str, Value], name: str) -> int:
        return int(str(of[name]))

    tensor = min(number(student, "tensor-model-parallel-size"), 2)
    tensors = {"megatron": tensor, "teacher": min(number(teacher, "tensor-model-parallel-size"), 2 * tensor)}
    groups = [number(of, "num-query-groups") for of in (student, teacher)]
    common = math.gcd(*groups, *(number(of, "num-attention-heads") for of in (student, teacher)))
    least = max(2, *tensors.values())
    fewer = max(by for by in range(1, common + 1) if common % by == 0 and (by == 1 or min(groups) // by >= least))
    divisors = {
        **dict.fromkeys(("hidden-size", "ffn-hidden-size", "moe-ffn-hidden-size", "seq-length"), SMALLER),
        "moe-shared-expert-intermediate-size": SMALLER,
        **dict.fromkeys(("num-attention-heads", "num-query-groups"), fewer),
        "kv-channels": SMALLER // fewer,
        "num-experts": 16,
        "moe-router-topk": 2,
        **{"mamba-num-heads": 8, "mamba-num-groups": 4, "mamba-head-dim": 16, "mamba-state-dim": 16},
    }
    small: Settings = {"device": "cpu"}
    for section, values in own.items():
        for name, by in divisors.items():
            if name in values:
                small[f"{section}.{name}"], rest = divmod(number(values, name), by)
                assert rest == 0, f"{section}.{name} {values[name]} does not divide by {by}"
        if "hybrid-layer-pattern" in values:
            layers = layers_of_pattern(str(values["hybrid-layer-pattern"]))
            small[f"{section}.hybrid-layer-pattern"] = "".join(dict.fromkeys(layers))
        else:
            small[f"{section}.num-layers"] = round(2 * number(values, "num-layers") / number(student, "num-layers"))
        if "tensor-model-parallel-size" in values:
            small[f"{section}.tensor-model-parallel-size"] = tensors[section]
        if "expert-model-parallel-size" in values:
            small[f"{section}.expert-model-parallel-size"] = min(number(values, "expert-model-parallel-size"), 2)
        if "moe-grouped-gemm" in values:
            small[f"{section}.moe-grouped-gemm"] = False
    return small | {
        "megatron.bf16": False,
        "megatron.global-batch-size": 8,
        "megatron.train-iters": 3,
        "megatron.lr-warmup-iters": 1,
        "megatron.lr": 1e-2,
        "megatron.eval-iters": 1,
        "megatron.eval-interval": 2,
        "megatron.save-interval": 2,
        "megatron.log-interval": 1,
        "megatron.distributed-timeout-minutes": 3,
        "megatron.vocab-size": 400,
    }


def alike(path: Path) -> Path:
    """The first configuration that is the same in small, whose teacher, student and run on one rank serve for both."""

    def rest(path: Path) -> Settings:
        kept = {key: value for key, value in given_in(path).items() if option(key) in KEPT}
        return {**kept, **shrink(path), "rows": str(ROWS.get(path.stem))}

    return next(other for other in CONFIGS if rest(other) == rest(path))


def run(job: str, path: Path, settings: Settings, num_ranks: int) -> list[Rank]:
    """Run a job by this file, with settings in place of its own; every rank must end well."""
    words = [f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in settings.items()]
    program = program_for({key.removeprefix("megatron."): value for key, value in settings.items()})
    ranks = launch([*program, Path(__file__).with_name("counted.py"), job, "--config", path, *words], num_ranks)
    for number, rank in enumerate(ranks):
        assert rank.code == 0, f"rank {number} of {job} ended with {rank.code}:\n{rank.output[-6000:]}"
    return ranks


def together[T](*calls: Callable[[], T]) -> list[T]:
    """What these return, called at the same time."""
    with ThreadPoolExecutor(len(calls)) as pool:
        return [each.result() for each in [pool.submit(call) for call in calls]]


class Trained(NamedTuple):
    ranks: list[Rank]
    logged: dict[str, list[float]]
    """As TensorBoard has it."""


@pytest.fixture(scope="module")
def text(workspace: Path, config: Path) -> Path:
    """Prepared text of many short documents, so that each part of `split` has some."""
    source, prepared = workspace / "cluster-lines.jsonl", workspace / "cluster-data"
    lines = "".join(file.read_text() for file in Path(email.__file__).parent.glob("*.py")).splitlines()
    source.write_text("\n".join(json.dumps({"text": line}) for line in lines))
    run_job("prepare", config, {"data.source": f"[{source}]", "data.dir": prepared})
    return prepared


@pytest.fixture(scope="module")
def train(workspace: Path, text: Path) -> Callable[..., list[Trained]]:
    """Trains by a configuration in small: on the ranks of its launch, and on one."""
    folder = workspace / "cluster"
    data: Settings = {
        "megatron.data-path": [str(text / "train")],
        "megatron.tokenizer-type": "SentencePieceTokenizer",
        "megatron.tokenizer-model": str(text / "tokenizer.model"),
    }

    def pretrained(path: Path, kind: str, steps: int, settings: Settings) -> str:
        saved = folder / f"{kind} of {path.stem}"
        rows = {"make-vocab-size-divisible-by": ROWS[path.stem][kind]} if path.stem in ROWS else {}
        own = {"train-iters": steps, "lr-warmup-iters": 0, "save": str(saved), "tensorboard-dir": None}
        own["data-cache-path"] = f"{saved} cache"
        start: Settings = {"pretrained-checkpoint": None, "load": None}
        small = {**data, **shrink(path), **ON_ONE_RANK}
        small |= {f"megatron.{name}": value for name, value in {**settings, **own, **start, **rows}.items()}
        run("pretrain", path, {key: value for key, value in small.items() if key.startswith(("meg", "dev"))}, 1)
        return str(saved)

    @cache
    def models(path: Path) -> Settings:
        of_teacher = read(path).teacher.megatron | {
            key.removeprefix("teacher."): value for key, value in shrink(path).items() if key.startswith("teacher.")
        }
        # Initial weights that differ more: after two steps its answers would hardly differ from token to token.
        of_teacher |= {**TEACHER_ON_ONE_RANK, "init-method-std": 0.1, "seed": 7}
        student, teacher = together(
            partial(pretrained, path, "student", 1, {}), partial(pretrained, path, "teacher", 2, of_teacher)
        )
        return {"megatron.pretrained-checkpoint": student, "teacher.load": teacher}

    @cache
    def train(path: Path, num_ranks: int, bf16: bool = False) -> Trained:
        out = folder / f"{path.stem} on {num_ranks}{' in bf16' * bf16}"
        own: Settings = {"megatron.save": str(out), "megatron.load": str(out), "megatron.bf16": bf16}
        own |= {"megatron.tensorboard-dir": str(out / "tensorboard"), "megatron.data-cache-path": str(out / "cache")}
        settings = {**data, **shrink(path), **models(alike(path)), **own}
        changed = {option(key) for key in settings}
        assert changed <= SHRUNK.keys() | NOT_ON_CPU.keys()
        if num_ranks > 1:
            settings |= ADDED
        else:
            whole = {f"teacher.{name}": size for name, size in TEACHER_ON_ONE_RANK.items()}
            settings |= ON_ONE_RANK | {key: size for key, size in whole.items() if key in given_in(path)}
        return Trained(run("distill", path, settings, num_ranks), scalars(out / "tensorboard"))

    def beside_one_rank(path: Path, bf16: bool = False) -> list[Trained]:
        models(alike(path))  # before two threads ask for them
        num_ranks = LAUNCHES[path.stem].ranks
        first = alike(path) if LAUNCHES[alike(path).stem].ranks == num_ranks else path
        return together(partial(train, first, num_ranks, bf16), partial(train, alike(path), 1))

    return beside_one_rank


def test_every_option_is_of_one_kind() -> None:
    given = {option(key) for path in CONFIGS for key in given_in(path)} | cpu_backend.MEGATRON_DEFAULTS.keys()
    kinds = (KEPT, SHRUNK.keys(), NOT_ON_CPU.keys())
    known = [name for kind in kinds for name in kind]
    assert len(known) == len(set(known)), "an option of two kinds"
    assert given - set(known) == set(), "it is not said what a CPU makes of them"
    assert set(known) - given == set(), "no configuration has them"
    assert LAUNCHES.keys() == {path.stem for path in CONFIGS}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_auto_fuses_the_head_at_full_size(path: Path) -> None:
    """As in small: with the file's own sizes, in bf16, and the chunks of a GPU, of up to 2048 tokens."""
    model = read(path).megatron

    def number(name: str) -> int:
        return int(str(model[name]))

    tensor, multiple = number("tensor-model-parallel-size"), number("make-vocab-size-divisible-by")
    columns = math.ceil(number("vocab-size") / (multiple * tensor)) * multiple
    weight = torch.empty(columns, number("hidden-size"), dtype=torch.bfloat16, device="meta")
    chunks = 2048 * (2 if tensor > 1 else 1) * 2 * columns * weight.dtype.itemsize
    assert nothing_to_gain(weight, number("micro-batch-size") * number("seq-length"), 2048, chunks, False) == []


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_trains_as_on_one_rank(train: Callable[..., list[Trained]], path: Path) -> None:
    ours, one = train(path)
    check_equal(ours, one, (*LOSSES, *EXACT_ONLY), 1e-4)
    check_heads(ours, path)
    check_in_force(ours, path)


def test_trains_in_bf16(train: Callable[..., list[Trained]]) -> None:
    path = next(path for path in CONFIGS if path.stem == "llama31_70b_to_8b_8xH100")
    ours, one = train(path, bf16=True)
    check_equal(ours, one, LOSSES, 2e-2)
    assert ours.logged["lm loss"] != one.logged["lm loss"], "this was fp32"
    check_heads(ours, path)


def check_equal(ours: Trained, one: Trained, names: tuple[str, ...], tolerance: float) -> None:
    """Three steps, validation after the second and after the last, and the test set."""
    for name in ("grad-norm", *names, *(f"{name} validation" for name in names)):
        got, wanted = ours.logged[name], one.logged[name]
        assert len(got) == len(wanted) == 3, name
        assert got == pytest.approx(wanted, rel=tolerance), name


def check_heads(ours: Trained, path: Path) -> None:
    """The files leave it to `head: auto`, which fuses here; every micro-batch is to get it, in validation too."""
    micro_batches = 8 * int(str(shrink(path)["megatron.tensor-model-parallel-size"])) // len(ours.ranks)
    for rank in ours.ranks:
        heads = json.loads(rank.output.splitlines()[-1])
        assert heads == {"fused": (3 + 3) * micro_batches, "materialized": 0}


def check_in_force(ours: Trained, path: Path) -> None:
    """Megatron has not changed what was kept, and has several buckets to overlap."""
    blocks = re.findall(r"-- arguments --+\n(.*?)\n--+ end of arguments", ours.ranks[0].output, re.DOTALL)
    student, teacher = (dict(re.findall(r"^  (\S+) \.+ (.*)$", block, re.MULTILINE)) for block in blocks)
    for key, value in given_in(path).items():
        section, _, name = key.partition(".")
        if name not in KEPT or section == "distillation":
            continue
        action = megatron_options()[name]
        wanted = action.const if action.nargs == 0 and value else value
        of = teacher if section == "teacher" else student
        assert of[action.dest] == str(wanted), f"{key}: Megatron made {of[action.dest]} of it"
    (buckets,) = re.findall(r"Number of buckets for gradient all-reduce / reduce-scatter: (\d+)", ours.ranks[0].output)
    assert int(buckets) >= 4
