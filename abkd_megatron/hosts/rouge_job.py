"""Job `rouge`: continuations of held-out text by a student, scored by ROUGE-L against the text.

ROUGE-L (Lin, 2004) is the F-measure of the longest common subsequence of words, as the package `rouge-score` has it.
"""

import json
import logging
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.training import get_args, get_tokenizer
from megatron.training.training import build_train_valid_test_datasets, get_train_valid_test_num_samples
from torch import Tensor

from abkd_megatron.config.compare import CompareConfig
from abkd_megatron.config.megatron_args import job_arguments, parse_model
from abkd_megatron.config.rollouts import Sampling
from abkd_megatron.config.schema import Config
from abkd_megatron.config.unsupported import JOB
from abkd_megatron.data.conversations import check_conversations
from abkd_megatron.data.indexed import check_datasets, prefixes_of
from abkd_megatron.data.prepare import data_arguments
from abkd_megatron.errors import ConfigError, HostError, from_rank_0, on_every_rank
from abkd_megatron.hosts.batches import Packing, train_valid_test_datasets_provider
from abkd_megatron.hosts.generate_job import check_load, continued, generate_settings, load_sampler, validated
from abkd_megatron.rollouts.prompts import of_conversations

logger = logging.getLogger(__name__)

DRAWS = {"greedy": 0.0, "sampled": 1.0}
"""Temperatures by name."""


def run(config: Config) -> None:
    """Continue the beginnings of test samples, and write ``rouge.json`` into `compare.out`.

    Of conversations, the prompt is what precedes the first answer, which is the text. The file has ``prompts``, their
    number; per draw ``rougeL``, the mean F-measure; and some ``examples``.

    Args:
        config: checked for `rouge`; the student's, with its checkpoint in `megatron.load`.

    Raises:
        AbkdError: on every rank, for a job that cannot run.
    """
    of = config.compare
    with on_every_rank():
        score = scorer()
        megatron = generate_settings(job_arguments(config, data_arguments(config.data)))
        check_load(parse_model(megatron, "student", JOB))
    args, model_config = validated(megatron)
    with on_every_rank():
        if of.prompt_tokens + of.new_tokens > args.seq_length:
            raise ConfigError(
                f"compare.new_tokens: expected prompt_tokens + new_tokens of at most seq-length {args.seq_length}, the "
                f"length of a held-out sample, got {of.prompt_tokens} + {of.new_tokens}; lower one of them"
            )
    sampler = load_sampler(args, model_config, of.new_tokens)
    if args.sft:
        from_rank_0(lambda: check_conversations(prefixes_of(args)))
    else:
        from_rank_0(lambda: check_datasets(prefixes_of(args), args.vocab_size))
    samples = _held_out(config)
    prompts = [prompt for prompt, _ in samples]
    tokenizer, end = get_tokenizer(), getattr(get_tokenizer(), "eod", None)
    texts = {"text": [text for _, text in samples]}
    seed = config.data.seed if config.data.seed is not None else args.seed
    for name, temperature in DRAWS.items():
        rollouts = continued(sampler, prompts, Sampling(temperature=temperature, seed=seed), args)
        texts[name] = [_until(end, ids) for ids, _ in rollouts]
        logger.info(f"{len(prompts)} {name} continuations of {of.new_tokens} tokens")
    if dist.get_rank() == 0:
        words = {name: [tokenizer.detokenize(ids) for ids in of_name] for name, of_name in texts.items()}
        found: dict[str, Any] = {"prompts": len(prompts)}
        for name in DRAWS:
            scores = [score(text, own) for text, own in zip(words["text"], words[name], strict=True)]
            found[name] = {"rougeL": statistics.fmean(scores)}
        beginnings = [tokenizer.detokenize(prompt) for prompt in prompts]
        rows = zip(beginnings, *words.values(), strict=True)
        found["examples"] = [dict(zip(("prompt", *words), row, strict=True)) for row in list(rows)[:8]]
        out = Path(of.out).expanduser()
        out.mkdir(parents=True, exist_ok=True)
        (out / "rouge.json").write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
        logger.info(f"ROUGE-L: {', '.join(f'{name} {found[name]["rougeL"]:.4f}' for name in DRAWS)}; in {out}")


def scorer() -> Any:
    """Return a function of a text and a continuation that returns the F-measure of ROUGE-L.

    Raises:
        HostError: the package is missing.
    """
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise HostError(f"rouge: {error}; pip install 'abkd-megatron[rouge]'") from error
    scores = RougeScorer(["rougeL"])
    return lambda text, continuation: scores.score(text, continuation)["rougeL"].fmeasure


def _held_out(config: Config) -> list[tuple[list[int], list[int]]]:
    """Return prompts of the test split and the text after each, the same on every rank. No text is empty.

    Raises:
        ConfigError: on every rank, for too few samples.
    """
    args, of = get_args(), config.compare
    end = getattr(get_tokenizer(), "eod", None)

    def provide(num_samples: Sequence[int], vp_stage: int | None = None) -> tuple:
        return train_valid_test_datasets_provider(
            num_samples, vp_stage, held_out_seed=config.data.seed, packing=Packing.of(args)
        )

    *_, test = build_train_valid_test_datasets(provide, get_train_valid_test_num_samples())

    def read() -> list[tuple[list[int], list[int]]]:
        test_set = test[0] if isinstance(test, list) else test
        found: list[tuple[list[int], list[int]]] = []
        for index in range(len(test_set) if test_set is not None else 0):
            prompt, text = _of_conversation(test_set[index], of) if args.sft else _of_text(test_set[index], of)
            # Megatron repeats conversations until they are as many as the job's evaluations read.
            if prompt and (text := _until(end, text)) and not (args.sft and (prompt, text) in found):
                found.append((prompt, text))
            if len(found) == of.rouge_prompts:
                return found
        raise ConfigError(
            f"compare.rouge_prompts: expected at most {len(found)}, the usable samples of the test split at eval-iters "
            f"{args.eval_iters}, got {of.rouge_prompts}; lower it, or raise megatron.eval-iters"
        )

    return from_rank_0(read)


def _of_text(sample: Mapping[str, Tensor], of: CompareConfig) -> tuple[list[int], list[int]]:
    tokens = sample["tokens"][: of.prompt_tokens + of.new_tokens].tolist()
    return tokens[: of.prompt_tokens], tokens[of.prompt_tokens :]


def _of_conversation(sample: Mapping[str, Tensor], of: CompareConfig) -> tuple[list[int], list[int]]:
    """Return prompt and first answer of at most `new_tokens`; no prompt if it is longer than `prompt_tokens`."""
    batch = {name: sample[name][None] for name in ("tokens", "loss_mask", "cu_seqlens")}
    *prompt, length = of_conversations([batch], of.prompt_tokens)[0].tolist()
    counts = sample["loss_mask"].bool().tolist()
    begin = counts.index(True) if length else 0
    until = counts.index(False, begin) if False in counts[begin:] else len(counts)
    return prompt[:length], sample["labels"][begin : min(until, begin + of.new_tokens)].tolist()


def _until(end: int | None, ids: list[int]) -> list[int]:
    return ids[: ids.index(end)] if end in ids else ids
