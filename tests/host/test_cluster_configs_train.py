"""Each configuration in configs/ trains on CPU ranks, under the strict transport, as its shrunk form does on one rank.

The job reads the file itself, and overrides on its command line make it small. Of every option in a file it is known
whether it is `KEPT`, `SHRUNK` or something that a CPU does not have (`NOT_ON_CPU`), and why.
"""

import email
import json
import math
import re
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import pytest
from launch import ROOT, Rank, run_job, scalars
from matrix import EXACT_ONLY, LOSSES

from abkd_megatron import cpu
from abkd_megatron.config import Config, Value
from abkd_megatron.config_file import load_config
from abkd_megatron.integrations.add_teacher import megatron_options

CONFIGS = sorted((ROOT / "configs").glob("*H100.yaml"))

# As they stand in the file, of the student and of the teacher.
KEPT = """
    sequence-parallel use-distributed-optimizer overlap-grad-reduce overlap-param-gather calculate-per-token-loss
    group-query-attention add-qkv-bias qk-layernorm normalization norm-epsilon swiglu disable-bias-linear
    untie-embeddings-and-output-weights attention-dropout hidden-dropout make-vocab-size-divisible-by
    max-position-embeddings position-embedding-type rotary-base use-rope-scaling rope-scaling-factor
    moe-router-dtype moe-token-dispatcher-type
    micro-batch-size min-lr lr-decay-style weight-decay adam-beta2 clip-grad
    no-create-attention-mask-in-dataloader split
    ckpt-format save-interval exit-signal-handler log-throughput eval-interval
    distillation.divergence distillation.alpha distillation.beta distillation.kd_weight distillation.lm_weight
""".split()

SMALLER = 64
"""What the widths of both models and the length of their sequences are divided by."""

SHRUNK = {
    "tensor-model-parallel-size": "2 where it is more; the teacher's twice the student's where it is more than that",
    "expert-model-parallel-size": "2 where it is more",
    "num-layers": "2 of the student, of the teacher as many more as it has",
    "hidden-size": "by 64",
    "ffn-hidden-size": "by 64",
    "moe-ffn-hidden-size": "by 64",
    "seq-length": "by 64, so that `head: auto` weighs a student's width against as many tokens",
    "num-attention-heads": "all numbers of heads and groups by one that leaves each rank a group, and two on one rank",
    "num-query-groups": "with the heads",
    "kv-channels": "by as much as is left of 64",
    "num-experts": "by 16",
    "moe-router-topk": "by 4",
    "global-batch-size": "8, of which a rank has 2 or 4 micro-batches",
    "train-iters": "3",
    "lr-warmup-iters": "1",
    "lr": "1e-2, with which 3 steps move the losses by more than the comparison lets pass",
    "eval-iters": "1",
    "log-interval": "1",
    "distributed-timeout-minutes": "3",
    "data-path": "text that comes with Python",
    "data-cache-path": "beside it",
    "tokenizer-type": "SentencePiece, of that text",
    "tokenizer-model": "that one",
    "vocab-size": "400, of 512 columns",
    "pretrained-checkpoint": "a shrunk student after one step",
    "teacher.load": "a shrunk teacher after two steps, in another layout",
    "save": "a temporary folder",
    "load": "the same, empty, where the file has one for both",
    "tensorboard-dir": "in it",
}

NOT_ON_CPU = {
    "device": "cpu",
    "bf16": "fp32: the CPU rounds bf16 so coarsely that only 2e-2 could be asked for (one job below does); in fp32 1e-4",
    "attention-backend": "`auto` is passed on, and chooses between kernels of TransformerEngine alone",
    "moe-grouped-gemm": "the experts' grouped products are TransformerEngine's; here one expert follows another",
    "transformer-impl": "TransformerEngine needs a GPU; Megatron's local layers take its place",
    "distributed-backend": "NCCL needs GPUs; gloo under the rules of tests/strict.py",
    "use-cpu-initialization": "there is no random generator of a GPU",
    "no-gradient-accumulation-fusion": "a CUDA extension of apex or TransformerEngine",
    "no-masked-softmax-fusion": "a CUDA extension",
    "no-bias-swiglu-fusion": "compiled, and the compiler cannot look through the stand-in for a GPU",
    "no-bias-gelu-fusion": "likewise",
    "no-bias-dropout-fusion": "likewise",
    "disable-jit-fuser": "likewise",
    "no-rope-fusion": "a kernel of TransformerEngine or apex",
    "no-persist-layer-norm": "a kernel of apex",
    "num-workers": "data loaders that fork beside gloo's threads; the reading itself is the same",
}

# Without which a tiny model would not do what a large one does.
ADDED = {
    "megatron.ddp-bucket-size": (4000, "several buckets, as at 40 million parameters each; one holds a tiny model"),
    "distillation.chunk_tokens": (24, "the CPU would take up to 512 tokens, more than a micro-batch now has"),
}


@dataclass(frozen=True)
class Launch:
    ranks: int
    lost: str = ""
    """What of the layout that many ranks do not have."""


LAUNCHES = {
    "llama31_70b_to_8b_64xH100": Launch(4, "several teachers side by side, which qwen3_8b_to_1p7b_8xH100 has"),
    "llama31_70b_to_8b_8xH100": Launch(4),
    "llama32_3b_to_1b_8xH100": Launch(2),
    "qwen25_7b_to_1p5b_8xH100": Launch(2),
    "qwen3_30b_a3b_to_1p7b_8xH100": Launch(2),
    "qwen3_8b_to_1p7b_8xH100": Launch(4),
}

# The teacher's and the student's embedding in the checkpoint: configs/qwen25_7b_to_1p5b_8xH100.yaml says that both are
# padded otherwise than the job pads them.
ROWS = {"qwen25_7b_to_1p5b_8xH100": (640, 576)}

ON_ONE_RANK: Mapping[str, Value] = {
    "megatron.tensor-model-parallel-size": 1,
    "megatron.sequence-parallel": False,
    "megatron.use-distributed-optimizer": False,
    "megatron.overlap-grad-reduce": False,
    "megatron.overlap-param-gather": False,
    "megatron.ddp-bucket-size": None,
    "megatron.save": None,
    "megatron.load": None,
    "distillation.head": "materialised",
    "distillation.chunk_tokens": None,
}
ONE_RANK_OF_TEACHER: Mapping[str, Value] = {"tensor-model-parallel-size": 1, "expert-model-parallel-size": 1}


@cache
def read(path: Path) -> Config:
    return load_config(path, [], megatron_options())


def options_of(config: Config) -> dict[str, list[str]]:
    """What the file gives: {option: the sections that it stands in}, Megatron's without a section."""
    found: dict[str, list[str]] = {}
    for key, origin in config.origins.items():
        section, _, name = key.partition(".")
        if origin in ("default", "command line"):
            continue
        megatrons = section == "megatron" or (section == "teacher" and name != "load")
        found.setdefault(name if megatrons else key, []).append(section)
    return found


def shrink(config: Config) -> dict[str, Value]:
    """The settings that make a configuration small, but for its data and checkpoints."""
    student, teacher = config.megatron, {**config.megatron, **config.teacher.megatron}

    def number(of: Mapping[str, Value], name: str) -> int:
        return int(str(of[name]))

    tensor = min(number(student, "tensor-model-parallel-size"), 2)
    tensors = (tensor, min(number(teacher, "tensor-model-parallel-size"), 2 * tensor))
    heads = [number(of, name) for of in (student, teacher) for name in ("num-attention-heads", "num-query-groups")]
    common, groups = math.gcd(*heads), min(heads[1::2])
    fewer = max(by for by in range(1, common + 1) if common % by == 0 and groups // by >= max(2, *tensors))
    layers = number(student, "num-layers")
    by = {
        **dict.fromkeys(("hidden-size", "ffn-hidden-size", "moe-ffn-hidden-size", "seq-length"), SMALLER),
        **dict.fromkeys(("num-attention-heads", "num-query-groups"), fewer),
        "kv-channels": SMALLER // fewer,
        "num-experts": 16,
        "moe-router-topk": 4,
    }
    settings: dict[str, Value] = {"device": "cpu"}
    for section, given, own_tensor in (
        ("megatron", student, tensors[0]),
        ("teacher", config.teacher.megatron, tensors[1]),
    ):
        small: dict[str, Value] = {}
        for name, divisor in by.items():
            if name in given:
                small[name], rest = divmod(number(given, name), divisor)
                assert rest == 0, f"{name} {given[name]} does not divide by {divisor}"
        small["num-layers"] = round(2 * number(given, "num-layers") / layers)
        if "tensor-model-parallel-size" in given:
            small["tensor-model-parallel-size"] = own_tensor
        if "expert-model-parallel-size" in given:
            small["expert-model-parallel-size"] = min(number(given, "expert-model-parallel-size"), 2)
        if "moe-grouped-gemm" in given:
            small["moe-grouped-gemm"] = False
        settings |= {f"{section}.{name}": value for name, value in small.items()}
    run: dict[str, Value] = {
        "bf16": False,
        "global-batch-size": 8,
        "train-iters": 3,
        "lr-warmup-iters": 1,
        "lr": 1e-2,
        "eval-iters": 1,
        "log-interval": 1,
        "distributed-timeout-minutes": 3,
        "vocab-size": 400,
    }
    return settings | {f"megatron.{name}": value for name, value in run.items()}


def words(settings: Mapping[str, Value]) -> dict[str, object]:
    """`settings` for the command line."""
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in settings.items()}


def in_force(ranks: list[Rank]) -> list[dict[str, str]]:
    """Megatron's arguments after it has validated them, as rank 0 printed them: the student's and the teacher's."""
    blocks = re.findall(r"-- arguments --+\n(.*?)\n--+ end of arguments", ranks[0].output, re.DOTALL)
    return [dict(re.findall(r"^  (\S+) \.+ (.*)$", block, re.MULTILINE)) for block in blocks]


def as_printed(name: str, value: Value) -> tuple[str, str]:
    """What Megatron prints of an option: the argument's name, and its value."""
    action = megatron_options()[name]
    return action.dest, str(action.const if action.nargs == 0 and value else value)


def heads_of(ranks: list[Rank]) -> list[str]:
    """How the head is said to work; a change during the run is said as well."""
    return re.findall(r"LM head (fused|materiali[sz]ed)", ranks[-1].output)


@pytest.fixture(scope="module")
def text(workspace: Path, config: Path) -> Path:
    """Prepared text of many short documents, of which the configurations' `split` leaves some to each set."""
    source, prepared = workspace / "cluster-lines.jsonl", workspace / "cluster-data"
    lines = "".join(file.read_text() for file in Path(email.__file__).parent.glob("*.py")).splitlines()
    source.write_text("\n".join(json.dumps({"text": line}) for line in lines))
    run_job("prepare", config, {"data.source": f"[{source}]", "data.dir": prepared})
    return prepared


@pytest.fixture(scope="module")
def train(workspace: Path, text: Path):
    """Trains by a configuration; what every rank printed, and what TensorBoard then shows."""
    folder = workspace / "cluster"
    read_here: dict[str, Value] = {
        "megatron.data-path": [str(text / "train")],
        "megatron.data-cache-path": str(folder / "cache"),
        "megatron.tokenizer-type": "SentencePieceTokenizer",
        "megatron.tokenizer-model": str(text / "tokenizer.model"),
    }

    def model(path: Path, kind: str, settings: Mapping[str, Value], num_ranks: int) -> Path:
        """A checkpoint of the configuration's student or teacher."""
        saved = folder / f"{kind} of {path.stem}"
        steps = 2 if kind == "teacher" else 1
        own = {
            "megatron.train-iters": steps,
            "megatron.lr-warmup-iters": 0,
            "megatron.pretrained-checkpoint": None,
            "megatron.load": None,
            "megatron.save": str(saved),
            "megatron.tensorboard-dir": None,
        }
        run_job("pretrain", path, words({**read_here, **settings, **own}), num_ranks=num_ranks)
        return saved

    @cache
    def models(path: Path) -> dict[str, Value]:
        """Where the student begins, and its teacher."""
        small, of_teacher, of_student = shrink(read(path)), {"init-method-std": 0.1, "seed": 7}, {}
        if path.stem in ROWS:
            of_teacher["make-vocab-size-divisible-by"], of_student["make-vocab-size-divisible-by"] = ROWS[path.stem]
        own = {key: value for key, value in read(path).teacher.megatron.items()}
        own |= {key.partition(".")[2]: value for key, value in small.items() if key.startswith("teacher.")}
        alone = {**small, **ON_ONE_RANK}
        alone = {key: value for key, value in alone.items() if not key.startswith(("teacher.", "distillation."))}
        made = together(
            partial(model, path, "student", alone | megatrons(of_student), 1),
            partial(model, path, "teacher", alone | megatrons(own | of_teacher | ONE_RANK_OF_TEACHER), 1),
        )
        return dict(zip(("megatron.pretrained-checkpoint", "teacher.load"), map(str, made), strict=True))

    @cache
    def train(path: Path, num_ranks: int, **settings: Value) -> tuple[list[Rank], dict[str, list[float]]]:
        run = folder / f"{path.stem} on {num_ranks} {settings}"
        own = {"megatron.save": str(run), "megatron.load": str(run), "megatron.tensorboard-dir": str(run / "board")}
        added = {key: value for key, (value, _) in ADDED.items()}
        layout: dict[str, Value] = {}
        if num_ranks == 1:
            layout = dict(ON_ONE_RANK)
            layout |= {f"teacher.{key}": value for key, value in ONE_RANK_OF_TEACHER.items() if key in read(path).teacher.megatron}
        everything = {**read_here, **shrink(read(path)), **models(path), **own, **added, **megatrons(settings), **layout}
        ranks = run_job("distill", path, words(everything), num_ranks=num_ranks)
        return ranks, scalars(run / "board")

    return train


def test_every_option_is_of_one_kind() -> None:
    kinds = (set(KEPT), set(SHRUNK), set(NOT_ON_CPU))
    assert sum(map(len, kinds)) == len(set.union(*kinds))
    given = set.union(*(set(options_of(read(path))) for path in CONFIGS))
    assert given - set.union(*kinds) == set(), "options of a configuration of which it is not said how a CPU takes them"
    assert set.union(*kinds) - given - set(cpu.MEGATRON_DEFAULTS) == set(), "options that no configuration has"
    assert set(cpu.MEGATRON_DEFAULTS) - set(KEPT) <= set(NOT_ON_CPU)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_only_what_is_said_to_be_is_changed(path: Path) -> None:
    changed = {key if key.startswith(("distillation.", "teacher.load")) else key.partition(".")[2] or key for key in shrink(read(path))}
    assert changed <= set(SHRUNK) | set(NOT_ON_CPU)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_trains_as_on_one_rank(train, path: Path) -> None:
    (ranks, got), (_, wanted) = together(partial(train, path, LAUNCHES[path.stem].ranks), partial(train, path, 1))
    names = [*LOSSES, *EXACT_ONLY]
    for name in ("grad-norm", *names, *(f"{name} validation" for name in names)):
        assert len(got[name]) == len(wanted[name]) == (2 if "validation" in name else 3), name
        assert got[name] == pytest.approx(wanted[name], rel=1e-4), name
    assert heads_of(ranks) == ["fused"], "every step and the validation, by the head that the whole job is told of"
    config, (student, teacher) = read(path), in_force(ranks)
    for of, given in ((student, config.megatron), (teacher, config.teacher.megatron)):
        for name in given.keys() & set(KEPT):
            argument, value = as_printed(name, given[name])
            assert of[argument] == value, f"{name}: Megatron made {of[argument]} of it"


def together[T](*calls: Callable[[], T]) -> list[T]:
    """What these return, called beside each other."""
    with ThreadPoolExecutor(len(calls)) as pool:
        return [each.result() for each in [pool.submit(call) for call in calls]]


def megatrons(settings: Mapping[str, Value]) -> dict[str, Value]:
    return {f"megatron.{name}": value for name, value in settings.items()}
