"""Distillation in a custom pretraining script, such as Megatron-LM's pretrain_gpt.py: an argument group and one call.

Without `--kd-teacher-load` or `--kd-cache` on the command line the script trains bit for bit as before.
"""

import ast
import inspect
import logging
import sys
import textwrap
from argparse import SUPPRESS, ArgumentParser, Namespace
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import fields
from typing import Any

from megatron.training import get_tokenizer, print_rank_0

from abkd_megatron import cpu_backend
from abkd_megatron.config.load import from_argv, load_config
from abkd_megatron.config.megatron_args import megatron_options
from abkd_megatron.config.model_config import check_layers_here, check_model_config
from abkd_megatron.config.presets import PRESETS
from abkd_megatron.config.schema import TEACHER_KEYS, DistillationConfig
from abkd_megatron.config.stages import check_stages
from abkd_megatron.config.unsupported import SCRIPT, check_layout
from abkd_megatron.errors import AbkdError, ConfigError, on_every_rank
from abkd_megatron.hosts.add_cache import add_cache
from abkd_megatron.hosts.add_teacher import add_teacher
from abkd_megatron.hosts.script_cache import ReadsRecords
from abkd_megatron.preflight.rules import FOLDER_CHECKS, Setup, run_checks
from abkd_megatron.preflight.run_record import check_resumed_alone
from abkd_megatron.preflight.student_checkpoint import only_writer

# {name without the prefix: (section.key that the argument sets, metavar, help)}.
_TEACHER = {
    "teacher_load": ("teacher.load", "CHECKPOINT", "The teacher's torch_dist checkpoint; without it nothing changes."),
    "teacher_step": ("teacher.ckpt-step", "ITERATION", "The iteration to load; the checkpoint's latest if left out."),
    "teacher_declared": (
        "teacher.declared",
        "DECLARED",
        "Whether these settings are declared to be the teacher's where nothing saved with its weights describes it.",
    ),
    "teacher_expected_loss": (
        "teacher.expected-loss",
        "LOSS",
        "The teacher's cross entropy per token on the first step's batch as measured elsewhere, in nats.",
    ),
    "teacher_weights": (
        "teacher.weights",
        "WEIGHTS",
        "Its layers' weights: on the device (default), there in int8, or on the host, copied layer by layer.",
    ),
}
# Holds the lock of the save folder until the process ends.
_held = ExitStack()
_TEACHER_ARGS = "Megatron arguments in which the teacher differs from the student, such as num-layers=32 swiglu=false."


def _settings() -> dict[str, str]:
    """Return {name without the prefix: section.key that the argument sets}."""
    ours = {item.name.removeprefix("kd_"): f"distillation.{item.name}" for item in fields(DistillationConfig)}
    return {name: key for name, (key, *_) in _TEACHER.items()} | ours


def add_kd_arguments(parser: ArgumentParser) -> ArgumentParser:
    """Add the argument group "knowledge distillation" to Megatron's parser: an `extra_args_provider`.

    Each field of `DistillationConfig` has an argument (`--kd-weight` for `kd_weight`), with its value as in the
    configuration file: `--kd-alpha '{schedule: linear, from: 0.5, to: 0.2, end: 1000}'`. The teacher has
    `--kd-teacher-load`, `--kd-teacher-step`, `--kd-teacher-declared`, `--kd-teacher-expected-loss`,
    `--kd-teacher-weights` and `--kd-teacher-args`. An argument that is not given does not appear in Megatron's
    arguments.

    Args:
        parser: Megatron's.

    Returns:
        The same parser.
    """
    group = parser.add_argument_group("knowledge distillation", "of a student from the teacher in --kd-teacher-load")

    def add(name: str, text: str, **how: Any) -> None:
        option, text = f"--kd-{name.replace('_', '-')}", text.replace("%", "%%").replace("`", "")
        group.add_argument(option, dest=f"kd_{name}", default=SUPPRESS, help=text, **how)

    for name, (_, metavar, text) in _TEACHER.items():
        add(name, text, metavar=metavar, **({"nargs": "?", "const": "true"} if name == "teacher_declared" else {}))
    add("teacher_args", _TEACHER_ARGS, metavar="NAME=VALUE", nargs="+")
    texts = _documented(DistillationConfig)
    for item in fields(DistillationConfig):
        default = getattr(DistillationConfig(), item.name)
        how: dict[str, Any] = {"nargs": "?", "const": "true"} if isinstance(default, bool) else {}
        if item.name in PRESETS["none"]:
            default = "the preset's"
        shown = "none" if default in (None, []) else str(default).lower() if isinstance(default, bool) else default
        text = f"{texts[item.name]} (default: {shown})"
        add(item.name.removeprefix("kd_"), text, metavar=item.name.rpartition("_")[2].upper(), **how)
    return parser


def distill[Step: Callable[..., Any]](args: Namespace, model_cfg: Any, forward_step: Step) -> Step | Callable[..., Any]:
    """Turn a pretraining run into distillation, if the command line names a teacher or a cache.

    A script that reads a cache also gives `pretrain` its datasets as `cached(provider)`.

    Call it between `parse_and_validate_args` and `pretrain`. The teacher is built and attached after Megatron has built
    the student. Its arguments are the student's on this process's command line, overridden by `--kd-teacher-args`.

    Args:
        args: Megatron's arguments, parsed with `add_kd_arguments`. With a teacher, `vocab_size` is set to the
            tokenizer's.
        model_cfg: the GPTModelConfig or HybridModelConfig for `pretrain`; with a teacher it gets a post-wrap hook.
        forward_step: the script's own, called as (data_iterator, model, ...). It calls the model with `labels` and
            `loss_mask`, and returns the loss per token [b, s] and a loss function of it. It stays in charge of batches.

    Returns:
        The forward step for `pretrain`: the same object without a teacher. With one, its loss function keeps what it
        returns, and the report gets our numbers (docs/training.md); `lm loss` is the student's cross entropy.

    Raises:
        ConfigError: an argument of ours without a teacher, an invalid value, or an unsupported feature.
        CheckpointError: a teacher that is missing, damaged or not the configured one, or a student's checkpoint that
            cannot be loaded.

    Collectives: none without a teacher; with one, those of `add_teacher`, and one all_gather_object where
    torch.distributed is initialized. It is not yet in Megatron-LM's scripts: a rank then raises only its own errors.
    """
    given = {key: getattr(args, f"kd_{name}") for name, key in _settings().items() if hasattr(args, f"kd_{name}")}
    own: list[str] = getattr(args, "kd_teacher_args", [])
    if "teacher.load" not in given and "distillation.cache" not in given:
        if given or own:
            names = [name for name in vars(args) if name.startswith("kd_")]
            raise ConfigError(
                "expected --kd-teacher-load with the teacher's checkpoint, or --kd-cache with its records, got only "
                f"{', '.join(_option(name) for name in names)}; add it, or remove them to train without a teacher"
            )
        if (alone := check_resumed_alone(args)) is not None:
            print_rank_0(f"WARNING: {alone}; give --kd-teacher-load to train with a teacher")
        return forward_step
    if args.rank != args.world_size - 1:  # the last rank logs, as in Megatron
        logging.getLogger("abkd_megatron").setLevel(logging.WARNING)
    options = megatron_options()
    with _as_options():
        with on_every_rank():
            for setting in own:
                if setting.partition("=")[0].replace("_", "-") in TEACHER_KEYS:
                    given_by = ", ".join(_option(f"kd_{name}") for name in _TEACHER)
                    raise ConfigError(
                        f"expected Megatron arguments of the teacher's model in --kd-teacher-args, got {setting}; its "
                        f"checkpoint is given by {given_by}"
                    )
            device = "cpu" if cpu_backend.is_installed() else "cuda"
            overrides = [f"teacher.{setting}" for setting in own] + [f"{key}={text}" for key, text in given.items()]
            config = load_config(None, [f"device={device}", *overrides], options)
            config.check("distill")
            check_layout(args, "student", SCRIPT, options)
            check_model_config(model_cfg, args)
            check_stages(model_cfg.transformer, "student", getattr(model_cfg, "hybrid_layer_pattern", None))
            check_layers_here(model_cfg, "student")
            run_checks(FOLDER_CHECKS, Setup(config=config, job="distill", student=args))
            if args.rank == 0:
                _held.enter_context(only_writer(args))
            if config.distillation.sources:
                raise ConfigError(
                    "sources need the dataset of each sequence, and a forward step of Megatron's kind does not pass "
                    "`dataset_id` on; use `abkd-megatron distill`, or remove --kd-sources"
                )
            if config.distillation.cross_tokenizer is not None:
                raise ConfigError(
                    "cross_tokenizer needs the text of each sample in the teacher's tokens, and a forward step of "
                    "Megatron's kind does not pass it on; use `abkd-megatron distill`, or remove --kd-cross-tokenizer"
                )
            packed = args.sft or args.dataloader_inter_document_masking
            if config.distillation.on_policy is not None and packed:
                raise ConfigError(
                    "on_policy with packed data has been run in this package's own job only; use `abkd-megatron "
                    "distill`, or remove --kd-on-policy"
                )
            if config.distillation.cache is not None and packed and max(*_rows(args), args.context_parallel_size) > 1:
                raise ConfigError(
                    "a cache with packed data needs micro-batches of one row and no context parallelism, since a "
                    "script flattens and splits its rows by itself; set micro-batch-size and context-parallel-size to "
                    "1, or use --kd-teacher-load"
                )
            _check_shared_vocab(config.distillation.shared_vocab, get_tokenizer().vocab_size, args)
            if config.distillation.hidden_losses and args.pipeline_model_parallel_size > 1:
                raise ConfigError(
                    "hidden_losses need the loss mask on every pipeline stage that holds a pair of layers, and a "
                    "forward step of Megatron's kind has it only on the last; set pipeline-model-parallel-size to 1, "
                    "or use `abkd-megatron distill`"
                )
        args.vocab_size = get_tokenizer().vocab_size
        # A script may set these in args_defaults; they are the same for both models.
        chosen = {"tokenizer-type": args.tokenizer_type, "tokenizer-model": args.tokenizer_model}
        if config.distillation.cache is not None:
            step = ReadsRecords(forward_step)
            step.distilled = add_cache(config, args, model_cfg, step)
            return step.distilled
        return add_teacher(config, chosen | from_argv(sys.argv[1:], options), args, model_cfg, forward_step)


def _rows(args: Namespace) -> tuple[int, int]:
    """Return the rows of a micro-batch in training and in validation."""
    return args.micro_batch_size, args.eval_micro_batch_size or args.micro_batch_size


def _check_shared_vocab(shared: int | None, vocab_size: int, args: Namespace) -> None:
    there = args.pipeline_model_parallel_size == 1 or args.mtp_num_layers
    if shared is not None and shared < vocab_size and not there:
        raise ConfigError(
            f"shared_vocab {shared} of the student's {vocab_size} tokens needs the input ids on the last pipeline "
            "stage, and a forward step of Megatron's kind has them only on the first; set "
            "pipeline-model-parallel-size to 1, or use `abkd-megatron distill`"
        )


def _option(dest: str) -> str:
    return f"--{dest.replace('_', '-')}"


@contextmanager
def _as_options() -> Iterator[None]:
    """Explain the names of settings in errors, which are those of the configuration file."""
    try:
        yield
    except AbkdError as error:
        hint = "here distillation.NAME is --kd-NAME, and the keys of `teacher:` are in --kd-teacher-args"
        raise type(error)(f"{error}\n({hint})") from None


def _documented(kind: type) -> dict[str, str]:
    """Return the docstrings of a dataclass's fields, which Python does not keep."""
    (body,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    assert isinstance(body, ast.ClassDef)
    texts = {}
    for item, text in zip(body.body, body.body[1:], strict=False):
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name) and isinstance(text, ast.Expr):
            assert isinstance(text.value, ast.Constant)
            texts[item.target.id] = " ".join(str(text.value.value).split())
    return texts
