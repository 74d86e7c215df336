"""Job `generate`: a checkpoint continues prompts, in the training layout of its configuration."""

import json
import logging
import time
from argparse import Namespace
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import mpu
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.utils import unwrap_model
from megatron.training import get_tokenizer
from megatron.training.arguments import parse_and_validate_args
from megatron.training.checkpointing import load_checkpoint
from megatron.training.initialize import initialize_megatron

from abkd_megatron.config.megatron_args import checked_model_config, command_line, job_arguments, parse_model
from abkd_megatron.config.model_config import check_layers_here
from abkd_megatron.config.rollouts import GenerateConfig, Sampling, check_can_sample
from abkd_megatron.config.schema import Config
from abkd_megatron.config.unsupported import JOB
from abkd_megatron.data.prepare import data_arguments
from abkd_megatron.errors import ConfigError, DataError, on_every_rank
from abkd_megatron.preflight.run_record import checkpoint_to_load
from abkd_megatron.rollouts.sampler import Prompts, Sampler

logger = logging.getLogger(__name__)

# Arguments of a training that would read or write its files.
_NOT_HERE = ("save", "tensorboard-dir", "wandb-project", "wandb-save-dir")


def run(config: Config) -> None:
    """Continue the configured prompts and write the texts.

    Args:
        config: checked for `generate`.

    Raises:
        AbkdError: on every rank, for a job that cannot run.
    """
    with on_every_rank():
        megatron = generate_settings(job_arguments(config, data_arguments(config.data)))
        parsed = parse_model(megatron, "student", JOB)
        _check_files(config.generate, parsed)
    args, model_config = validated(megatron)
    tokenizer = get_tokenizer()
    with on_every_rank():
        texts = read_prompts(config.generate)
        prompts = [list(tokenizer.tokenize(text)) for text in texts]
        _check_prompts(prompts, texts, config.generate.new_tokens, args)
    sampler = load_sampler(args, model_config, config.generate.new_tokens)
    begin = time.perf_counter()
    found = continued(sampler, prompts, config.generate.sampling(), args)
    seconds = time.perf_counter() - begin
    written = sum(len(ids) for ids, _ in found)
    if dist.get_rank() == 0:
        rows = [
            {"prompt": text, "text": tokenizer.detokenize(ids), "tokens": len(ids), "ended": ended}
            for text, (ids, ended) in zip(texts, found, strict=True)
        ]
        with ExitStack() as held:
            out = config.generate.out
            file = held.enter_context(Path(out).expanduser().open("x", encoding="utf-8")) if out else None
            for row in rows:
                print(json.dumps(row, ensure_ascii=False), file=file, flush=file is None)
    logger.info(
        f"{written} tokens after {len(prompts)} prompts in {seconds:.2f} s: {written / max(seconds, 1e-9):.1f} tokens/s"
    )


def generate_settings(megatron: dict[str, Any]) -> dict[str, Any]:
    """Return Megatron's arguments of the job: those of a training without its files and its optimizer's state."""
    kept = {name: value for name, value in megatron.items() if name.replace("_", "-") not in _NOT_HERE}
    return {**kept, "finetune": True, "no-load-optim": True, "no-load-rng": True}


def validated(megatron: dict[str, Any]) -> tuple[Namespace, Any]:
    """Return Megatron's validated arguments and the model's configuration.

    Args:
        megatron: from `generate_settings`.

    Raises:
        AbkdError: on every rank, for a model that is not supported or from which this package does not sample.
    """
    with command_line(megatron):
        args = parse_and_validate_args()
        args.vocab_size = get_tokenizer().vocab_size
    with on_every_rank():
        model_config = checked_model_config(args, "student", JOB)
        check_layers_here(model_config, "student")
        check_can_sample(args, args.hybrid_layer_pattern)
    return args, model_config


def load_sampler(args: Namespace, model_config: Any, new_tokens: int) -> Sampler:
    """Initialize Megatron, load the model and return what samples from it, up to the end of a document."""
    initialize_megatron()
    groups = ProcessGroupCollection.use_mpu_process_groups()
    model = model_config.get_builder_cls()(model_config).build_distributed_models(groups, wrap_with_ddp=False)
    iteration, _ = load_checkpoint(model, None, None)
    logger.info(f"checkpoint: {args.load}, iteration {iteration}")
    end = getattr(get_tokenizer(), "eod", None)
    return Sampler(unwrap_model(model), groups, args.vocab_size, new_tokens=new_tokens, end=end)


def read_prompts(generate: GenerateConfig) -> list[str]:
    """Return the prompts: those of the configuration, then the lines of its file that are not empty.

    Raises:
        DataError: the file cannot be read, or has no line.
    """
    prompts = list(generate.prompts)
    if generate.file is not None:
        path = Path(generate.file).expanduser()
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, ValueError) as error:
            raise DataError(f"generate.file: expected readable text in UTF-8, got {path}: {error}") from error
        prompts += [line for line in lines if line]
    if not prompts:
        raise DataError(f"generate.file: expected at least one line of text, got none in {generate.file}")
    return prompts


def check_load(args: Namespace) -> None:
    """Reject a job without a checkpoint.

    Raises:
        ConfigError: there is none.
    """
    if checkpoint_to_load(args)[0] is None:
        raise ConfigError(f"expected a checkpoint in megatron.load, got {args.load}; give the folder of one")


def _check_files(generate: GenerateConfig, args: Namespace) -> None:
    check_load(args)
    if args.rank == 0 and generate.out is not None and Path(generate.out).expanduser().exists():
        raise ConfigError(f"generate.out: expected a file that does not exist, got {generate.out}; remove or rename it")


def _check_prompts(prompts: Sequence[list[int]], texts: Sequence[str], new_tokens: int, args: Namespace) -> None:
    longest = max(range(len(prompts)), key=lambda row: len(prompts[row]))
    length, most = len(prompts[longest]) + new_tokens, args.max_position_embeddings
    if most is not None and length > most:
        raise ConfigError(
            f"expected prompts and new tokens of at most max-position-embeddings {most}, got {length} with "
            f"{texts[longest][:40]!r}; shorten it or lower generate.new_tokens"
        )
    if not all(prompts):
        raise ConfigError("expected prompts of at least one token, got one without; remove it")


def continued(
    sampler: Sampler, prompts: Sequence[list[int]], sampling: Sampling, args: Namespace
) -> list[tuple[list[int], bool]]:
    """Return the new ids per prompt, and whether its text has ended, on every rank.

    A pass has `micro-batch-size` rows per pipeline stage and data-parallel rank; the last one is filled up.

    Collectives: those of `Sampler.sample` per pass, and one all_gather_object over data-parallel ranks.
    """
    ranks, rank = mpu.get_data_parallel_world_size(), mpu.get_data_parallel_rank()
    rows = args.micro_batch_size * mpu.get_pipeline_model_parallel_world_size()
    device = torch.cuda.current_device()
    mine: dict[int, tuple[list[int], bool]] = {}
    for first in range(0, len(prompts), rows * ranks):
        of_pass = [min(row, len(prompts) - 1) for row in range(first, first + rows * ranks)]
        lengths = [len(prompts[row]) for row in of_pass]
        here = of_pass[rank * rows : (rank + 1) * rows]
        padded = [prompts[row] + [0] * (max(lengths) - len(prompts[row])) for row in here]
        given = Prompts(
            torch.tensor(padded, dtype=torch.int64, device=device),
            torch.tensor([len(prompts[row]) for row in here], device=device),
            min(lengths),
            torch.tensor(here, device=device),
        )
        rollouts = sampler.sample(given, sampling)
        tokens, begins, ends = (it.tolist() for it in (rollouts.tokens, rollouts.begins, rollouts.ends))
        for index, row in enumerate(here):
            mine[row] = tokens[index][begins[index] : ends[index]], bool(rollouts.ended[index])
    everywhere: list[dict[int, tuple[list[int], bool]]] = [{} for _ in range(ranks)]
    dist.all_gather_object(everywhere, mine, group=mpu.get_data_parallel_group())
    whole = {row: found for part in everywhere for row, found in part.items()}
    return [whole[row] for row in range(len(prompts))]
