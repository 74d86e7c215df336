"""Packed data of the command line's own jobs: conversations (`sft`) and documents, the same in every layout."""

import json
import re
import sysconfig
from collections.abc import Sequence
from pathlib import Path

import pytest
from launch import run_job, scalars
from matrix import recorded

from abkd_megatron.data.conversations import check_conversations
from abkd_megatron.errors import DataError

TRAINED = ("lm loss", "kd loss", "total loss", "grad-norm", "total loss validation", "lm loss validation")
OWN_TEXT_JOB = Path(__file__).with_name("own_text.py")
SPEC = "[tests.host.sequences, packed_layers]"
LAYERS = {
    "megatron.num-layers": 4,
    "megatron.spec": SPEC,
    "megatron.micro-batch-size": 1,
}
FUSED = {"distillation.head": "fused", "distillation.chunk_tokens": 24}
PP = {"megatron.pipeline-model-parallel-size": 2}
LAYOUTS = {
    "conversations": {
        "TP 2 with SP": {"megatron.tensor-model-parallel-size": 2, "megatron.sequence-parallel": "true"},
        "PP 2 x VPP 2": PP | FUSED | {"megatron.num-layers-per-virtual-pipeline-stage": 1},
        "DP 2": {},
    },
    "documents": {"TP 2": FUSED | {"megatron.tensor-model-parallel-size": 2}, "PP 2": PP},
}
PLACES = [(f"packed {data}, from the command line's own data", where) for data, of in LAYOUTS.items() for where in of]


@pytest.fixture(scope="module")
def conversations(workspace: Path) -> dict[str, object]:
    """Settings of conversations about functions, of their own tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    folder = workspace / "conversations"
    folder.mkdir()
    asked = []
    for file in sorted((Path(sysconfig.get_path("stdlib")) / "email").glob("*.py")):
        for found in re.finditer(r'def (\w+)\(.*?\).*?:\n\s+"""(.+?)[\n"]', file.read_text()):
            asked.append(({"role": "user", "content": found[1]}, {"role": "assistant", "content": found[2]}))
    system = {"role": "system", "content": "Say what it does."}
    lines = [
        json.dumps({"messages": [message for pair in asked[at : at + 2] for message in (system, *pair)]})
        for at in range(0, len(asked), 2)
    ]
    assert len(lines) > 40
    for split, part in (("train", lines[8:]), ("valid", lines[:8])):
        (folder / f"{split}.jsonl").write_text("\n".join(part))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["</s>", "<SPECIAL_10>", "<SPECIAL_11>", "<SPECIAL_233>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet)
    tokenizer.train_from_iterator([pair[1]["content"] for pair in asked], trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>").save_pretrained(folder / "tokenizer")
    return {
        **LAYERS,
        "data.dir": "null",
        "megatron.sft": "true",
        "megatron.tokenizer-type": "SFTTokenizer",
        "megatron.tokenizer-model": folder / "tokenizer",
        "megatron.data-cache-path": workspace / "cache",
        "megatron.train-data-path": f"[{folder / 'train.jsonl'}]",
        "megatron.valid-data-path": f"[{folder / 'valid.jsonl'}]",
        "megatron.test-data-path": f"[{folder / 'valid.jsonl'}]",
        "megatron.seq-length": 64,
        "megatron.max-position-embeddings": 64,
    }


@pytest.fixture(scope="module")
def of_data(conversations) -> dict[str, dict[str, object]]:
    """Settings by data."""
    documents = {**LAYERS, "megatron.dataloader-inter-document-masking": "true"}
    return {"conversations": conversations, "documents": documents}


@pytest.fixture(scope="module")
def train(workspace: Path, config: Path, of_data):
    """Train a student after a teacher of the same data, in a layout."""
    made: dict[str, Path] = {}

    def train(
        data: str,
        name: str,
        num_ranks: int,
        given: dict[str, object],
        file: Path = config,
        program: Sequence[object] = ("-m", "abkd_megatron"),
    ) -> dict[str, list[float]]:
        settings = of_data[data]
        tensorboard = workspace / "packed" / f"{data} {name}"
        if tensorboard.exists():
            return scalars(tensorboard)
        if data not in made:
            made[data] = workspace / f"teacher of {data}"
            of_teacher = {"num-layers": 4, "hidden-size": 48, "ffn-hidden-size": 96, "train-iters": 4}
            of_teacher |= {"save": made[data], "save-interval": 4, "seed": 7}
            run_job("pretrain", config, settings | {f"megatron.{key}": value for key, value in of_teacher.items()})
            first = {"train-iters": 1, "save": workspace / f"student of {data}", "save-interval": 1}
            run_job("pretrain", config, settings | {f"megatron.{key}": value for key, value in first.items()})
        own = {"megatron.train-iters": 3, "megatron.tensorboard-dir": tensorboard}
        own |= {} if "distillation.cache" in given else {"teacher.load": made[data]}
        own |= {"megatron.load": workspace / f"student of {data}", "megatron.finetune": "true"}
        run_job("distill", file, {**settings, **own, **given}, num_ranks=num_ranks, program=program)
        return scalars(tensorboard)

    return train


@pytest.mark.parametrize("data", LAYOUTS)
def test_layouts_equal_one_rank(train, data: str) -> None:
    expected = train(data, "one rank", 1, {})
    for name, layout in LAYOUTS[data].items():
        with recorded(f"packed {data}, from the command line's own data", name, "equal to one rank within 1e-4"):
            found = train(data, name, 2, layout)
            for key in TRAINED:
                assert found[key] == pytest.approx(expected[key], rel=1e-4), (name, key)


def test_validation_is_one_mean_over_all_tokens(train, conversations) -> None:
    """As a training step's is. The same rows and weights for both."""
    same = {"megatron.train-data-path": conversations["megatron.valid-data-path"], "megatron.lr": 1e-30}
    found = train("conversations", "the same rows", 1, same | {"megatron.train-iters": 1})
    for name in ("lm loss", "kd loss", "total loss"):
        assert found[f"{name} validation"][0] == pytest.approx(found[name][0], rel=1e-6)


@pytest.mark.parametrize("data", LAYOUTS)
def test_a_cache_of_packed_data_trains_as_the_teacher(train, workspace: Path, config: Path, of_data, data: str) -> None:
    expected = train(data, "one rank", 1, {})
    cache, settings = workspace / f"cache of {data}", of_data[data]
    exact = {"cache.top_k": 400, "cache.precision": "fp32", "cache.dir": cache}
    of_teacher = {"teacher.load": workspace / f"teacher of {data}", "megatron.train-iters": 3, "teacher.spec": SPEC}
    of_teacher |= {"teacher.num-layers": 4, "teacher.pipeline-model-parallel-size": 2}
    run_job("cache", config, settings | of_teacher | exact, num_ranks=2)
    alone = workspace / f"without the teacher of {data}.yaml"
    before, section, rest = config.read_text().partition("teacher:")
    alone.write_text(before + rest[rest.index("distillation:") :])
    assert section
    found = train(data, "cached", 1, {"distillation.cache": cache}, alone)
    for key in TRAINED:
        assert found[key] == pytest.approx(expected[key], rel=1e-5), key


OWN_TEXT = {
    "one rank": (1, {}),
    **{name: (2, layout) for name, layout in LAYOUTS["conversations"].items()},
    "PP 2": (2, PP),
}


def on_policy(**more: object) -> dict[str, object]:
    given = {"share": 1, "new_tokens": 16, **more}
    return {
        "distillation.divergence": "reverse_kl",
        "distillation.on_policy": "{" + ", ".join(f"{name}: {value}" for name, value in given.items()) + "}",
    }


@pytest.fixture(scope="module")
def reward(workspace: Path) -> Path:
    """A module of a reward, which holds only for prompts of conversations."""
    folder = workspace / "reward-of-chats"
    folder.mkdir()
    (folder / "chat_reward.py").write_text(
        "def of_length(prompts, texts):\n"
        "    assert all('Assistant' in it[-12:] for it in prompts), prompts\n"
        "    return [len(text) for text in texts]\n"
        "def backwards(prompts):\n"
        "    assert len({len(ids) for ids in prompts}) > 1 and all(0 not in ids for ids in prompts)\n"
        "    return [ids[:3][::-1] for ids in prompts]\n"
    )
    return folder


def test_a_source_continues_conversations(train, reward: Path) -> None:
    policy = on_policy(source="chat_reward:backwards")
    found = [
        train("conversations", f"of a source, {ranks}", ranks, given | policy, program=(OWN_TEXT_JOB, "source", reward))
        for ranks, given in ((1, {}), (2, PP))
    ]
    for numbers in found:
        assert numbers["own text length"] == [3, 3, 3]
        assert numbers["own text kd loss"] == pytest.approx(found[0]["own text kd loss"], rel=1e-4)


def test_conversations_are_continued_the_same_in_every_layout(train, reward: Path) -> None:
    """Groups are of several micro-batches, and at DP 2 of several ranks."""
    policy = on_policy(reward="chat_reward:of_length", group=2, prompt_tokens=41)
    found = {
        name: train(
            "conversations", f"own text, {name}", ranks, layout | policy, program=(OWN_TEXT_JOB, "source", reward)
        )
        for name, (ranks, layout) in OWN_TEXT.items()
    }
    one = found.pop("one rank")
    assert all(reward > 0 for reward in one["own text reward"])
    assert any(0 < share < 1 for share in one["own text left out"])
    for name, of_layout in found.items():
        for key in ("own text left out", "own text length", "own text reward", "own text distinct-2"):
            assert of_layout[key] == pytest.approx(one[key], rel=1e-6), (name, key)
        for key in ("own text lm loss", "own text kd loss", "own text total loss", "grad-norm"):
            assert of_layout[key] == pytest.approx(one[key], rel=1e-4, abs=1e-6), (name, key)


def test_answers_are_scored_the_same_in_every_layout(train, workspace: Path, config: Path, conversations) -> None:
    pytest.importorskip("rouge_score")
    train("conversations", "one rank", 1, {})
    lines = Path(str(conversations["megatron.test-data-path"])[1:-1]).read_text().splitlines()
    chats = [json.loads(line)["messages"] for line in lines]
    numbers = {"rouge_prompts": 4, "prompt_tokens": 44, "new_tokens": 20}
    given = {
        **conversations,
        **{f"compare.{name}": number for name, number in numbers.items()},
        "megatron.load": workspace / "student of conversations",
    }
    found = []
    for layout in ({}, PP):
        out = workspace / f"answers-{len(layout)}"
        run_job("rouge", config, {**given, **layout, "compare.out": out}, num_ranks=1 + len(layout))
        found.append(json.loads((out / "rouge.json").read_text()))
    assert found[0] == found[1]
    assert found[0]["prompts"] == len(found[0]["examples"]) == 4
    answers = {question["content"]: answer["content"] for _, question, answer, *_ in chats}
    for example in found[0]["examples"]:
        (asked,) = (question for question in answers if f"User\n{question}\n" in example["prompt"])
        text = example["text"].strip()
        assert text and answers[asked].strip().startswith(text.split("<SPECIAL_12>")[0].strip())
    with pytest.raises(AssertionError, match="expected at most 0"):
        run_job("rouge", config, {**given, "compare.prompt_tokens": 3, "compare.out": workspace / "answers-none"})


@pytest.mark.parametrize(
    "line", ["", "no json", '{"text": "no messages"}', '{"messages": [{"role": "robot", "content": ""}]}']
)
def test_other_lines_are_rejected(tmp_path: Path, line: str) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(line)
    with pytest.raises(DataError):
        check_conversations([str(path)])
