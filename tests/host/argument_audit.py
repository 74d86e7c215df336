"""Changes Megatron's arguments one at a time and looks for those that never reach what is built.

Each option of the installed Megatron takes other values than it has, on top of what it needs to mean anything (the
contexts of `option_fuzz`). Of what Megatron accepts, three things are compared: the configurations that our job makes,
with the arguments that have the same names; whether anything changed at all; and the models that Megatron's builder
makes of those configurations, with those that its older `get_model` makes of the same arguments.
"""

import ast
import contextlib
import dataclasses
import io
import logging
import re
import sys
from argparse import Namespace
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from option_fuzz import CONTEXTS, MLA, Case, Settings, _alone, _load, cases

# Fields that Megatron derives, by what of.
DERIVED = {
    "transformer.microbatch_group_size_per_vp_stage": "the pipeline size",
    "transformer.num_query_groups": "the heads, without grouped queries",
    "transformer.embedding_init_method_std": "init-method-std",
    "transformer.recompute_modules": "a default of its own",
    "transformer.recompute_granularity": "moe-layer-recompute, an older name",
    "transformer.cp_comm_type": "one for all layers",
    "transformer.rope_type": "the kind of attention",
    "transformer.mup_base_hidden_size": "hidden-size",
    "transformer.moe_flex_dispatcher_num_sms": "those of the dispatcher",
    "ddp.fsdp_double_buffer": "another option of the same",
    "model.vocab_size": "padded",
    "model.seq_length": "max-position-embeddings",
}

# Options that nothing on our way reads and that are taken all the same: they change no model, data or number that a
# user of this job could expect. By group of Megatron's parser, and by destination.
OTHERS_GROUPS = (
    *("biencoder", "vision", "rl", "inference", "Logits Distillation", "fault injector", "In-process restart"),
    *("autoresume", "one logger", "ft_package", "workload inspector", "msc"),
)
OTHERS = {
    "use_flash_attn": "a switch of old, which scripts still set: flash attention is TransformerEngine's choice now",
    "deprecated_use_mcore_models": "a switch of old, which scripts still set: there are no other models",
    "onnx_safe": "a switch of old",
    "bert_binary_head": "of another model",
    "enable_full_sharding_in_hsdp": "of FSDP, which is rejected",
    "use_layer_wise_param_layout": "without it the layer-wise optimizer gathers parameters as it did before",
    "torch_fsdp2_reshard_after_forward": "of FSDP, which is rejected",
    "dist_ckpt_save_pre_mcore_014": "a format of old",
    "exit_signal_handler_for_dataloader": "data loaders of Megatron's have it with exit-signal-handler",
    "moe_upcycling_granularity": "of upcycling, which writes a checkpoint and ends",
    **dict.fromkeys(("sample_rate", "mask_prob", "short_seq_prob"), "of other datasets"),
    **dict.fromkeys(
        ("fim_rate", "fim_spm_rate", "fim_fragment_rate", "fim_split_sample", "fim_no_prefix"),
        "of fill-in-the-middle data, which is rejected",
    ),
    **dict.fromkeys(("decoder_seq_length", "encoder_seq_length"), "of encoder-decoder models"),
}


# Fields that Megatron hands on by a part of their name.
HANDED_ON = re.compile(r"muon_.*|moe_(deepep|hybridep)_num_sms")

# What Megatron compiles for, when a model is built.
COMPILED = ("nccl_ub",)

# What a setting needs to mean anything, where its context has not got it: by destination.
YARN, MLA_AND = {"position-embedding-type": "yarn"}, {**MLA, "position-embedding-type": "rope"}
BESIDE: dict[str, Settings] = {
    "rope_scaling_factor": {"use-rope-scaling": "true"},
    "num_query_groups": {"group-query-attention": "true"},
    **dict.fromkeys(("yarn_original_max_position_embeddings", "yarn_beta_fast", "yarn_beta_slow"), YARN),
    **dict.fromkeys(("rotary_scaling_factor", "mscale", "mscale_all_dim"), MLA_AND),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "qk_head_dim", "qk_pos_emb_head_dim", "v_head_dim"), MLA_AND),
}


def audit(config: Path) -> dict[str, list[str]]:
    """What is lost, by the kind of comparison; empty lists where nothing is."""
    from abkd_megatron.config.megatron_args import megatron_options
    from abkd_megatron.config.unsupported import _BELONGS_TO
    from abkd_megatron.cpu_backend import MEGATRON_DEFAULTS
    from abkd_megatron.errors import AbkdError

    options = megatron_options()
    given = {**MEGATRON_DEFAULTS, **_load(config, ["device=cpu"], "cpu").megatron}
    tried = [*cases(options, given), *numbers(options, given)]
    found: dict[str, list[str]] = {"differs": [], "without effect": [], "models": []}
    before: dict[str, dict[str, str]] = {}
    changed: set[str] = set()
    dests = {case.dest for case in tried}
    accepted = {it.dest: str(it.container.title) for it in options.values() if it.dest not in dests | {"help"}}
    for case in tried:
        context = CONTEXTS[case.context]
        settings = {**context.beside, **context.student, **BESIDE.get(case.dest, {})}
        settings.pop("save", None)
        base = case.context + repr(BESIDE.get(case.dest))
        with _alone():
            if base not in before:
                before[base] = flat(make(config, settings)[1])
            try:
                args, made = make(config, {**settings, case.option: case.value})
            except (AbkdError, AssertionError, ValueError, RuntimeError, TypeError):
                continue
            after = flat(made)
            accepted[case.dest] = case.group
            found["differs"] += [
                f"{case}: {name} is {value}, the argument {getattr(args, name.split('.')[-1])!r}"
                for name, value in after.items()
                if name not in DERIVED
                and hasattr(args, name.split(".")[-1])
                and repr(getattr(args, name.split(".")[-1])) != value
            ]
            names = {name.split(".")[0] for name, value in after.items() if value != before[base].get(name)}
            if names:
                changed.add(case.dest)
            if names & {"model", "transformer", "ddp"} and case.dest not in COMPILED:
                found["models"] += [f"{case}: {line}" for line in compared(args, made)]
                if "planted" not in found:  # it has to be seen
                    made.model.rotary_percent = 0.5
                    found["planted"] = compared(args, made)
    # An option that takes neither words nor one number was not tried: there is a field of its name, or not.
    changed |= {name.split(".")[-1] for values in before.values() for name in values} - dests
    # And a field that nothing reads is as good as none.
    reached = changed & read_by_megatron(of_any=True) | read_by_megatron() | read_by_us()
    known = reached | _BELONGS_TO.keys() | OTHERS.keys()
    found["without effect"] = [
        name
        for name, group in accepted.items()
        if name not in known and group not in OTHERS_GROUPS and not HANDED_ON.fullmatch(name)
    ]
    return found


def numbers(options: Mapping[str, Any], given: Mapping[str, Any]) -> Iterator[Case]:
    """Of each option that is a number, another one."""
    spellings: dict[int, list[str]] = {}
    for name, action in options.items():
        spellings.setdefault(id(action), []).append(name)
    for names in spellings.values():
        action = options[names[0]]
        if action.type not in (int, float) or action.nargs is not None or action.choices is not None:
            continue
        now = next((given[name] for name in names if name in given), action.default)
        if action.type is int:
            value = 3 if now is None else 2 * int(now) or 1
        else:
            value = 0.5 if now is None else 2 * float(now) or 0.5
        context = next(name for name, of in CONTEXTS.items() if re.fullmatch(of.options, names[0]))
        yield Case(names[0], str(value), str(now), action.dest, str(action.container.title), context)


def make(config: Path, settings: Mapping[str, object]) -> tuple[Namespace, Any]:
    """The student's arguments, and the configurations that our job gives to Megatron's `pretrain`."""
    from megatron.training.argument_utils import pretrain_cfg_container_from_args

    from abkd_megatron.config.model_config import model_config
    from abkd_megatron.tools import dry_run

    loaded = _load(config, [f"megatron.{name}={value}" for name, value in settings.items()], "cpu")
    with dry_run.as_in_a_job(loaded, 1):
        args = dry_run.student_arguments(dry_run.arguments_with_data(loaded))
        dry_run.set_vocabulary(args)
        return args, pretrain_cfg_container_from_args(args, model_config(args))


def flat(container: Any) -> dict[str, str]:
    """The fields of its configurations, as text."""
    values = {}
    for outer in dataclasses.fields(container):
        of = getattr(container, outer.name)
        for item in dataclasses.fields(of) if dataclasses.is_dataclass(of) else ():
            values[f"{outer.name}.{item.name}"] = getattr(of, item.name)
    transformer = values.pop("model.transformer")
    for item in dataclasses.fields(transformer):
        values[f"transformer.{item.name}"] = getattr(transformer, item.name)
    return {name: re.sub(" at 0x[0-9a-f]+", "", repr(value)) for name, value in values.items()}


def read_by_megatron(*, of_any: bool = False) -> set[str]:
    """Arguments that Megatron reads somewhere but in its parser and in what builds no model from a configuration.

    With `of_any` as an attribute of anything, such as a configuration.
    """
    import megatron.training

    root = Path(megatron.training.__file__).parents[1]
    aside = {root / "training" / name for name in ("arguments.py", "yaml_arguments.py", "config/utils.py")}
    files = [path for path in sorted(root.rglob("*.py")) if path not in aside]
    names = set().union(*(read_in(path, ("get_model",), of_any=of_any) for path in files))
    # What it turns into other arguments, which are looked at themselves.
    return names | read_in(root / "training/arguments.py", (), stored=True)


def read_by_us() -> set[str]:
    import abkd_megatron

    root = Path(abkd_megatron.__file__).parent
    checks = ("check_layout", "_check_sizes", "check_effect")
    return set().union(*(read_in(path, checks) for path in root.rglob("*.py")))


def read_in(path: Path, but_in: tuple[str, ...], *, stored: bool = False, of_any: bool = False) -> set[str]:
    """The names that a file reads as `args.NAME`, or of any object; with `stored` where it decides or sets others."""
    names: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.FunctionDef) and node.name in but_in:
            return
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            of = node.value
            if (
                of_any
                or (isinstance(of, ast.Name) and of.id == "args")
                or (isinstance(of, ast.Call) and getattr(of.func, "id", "") == "get_args")
            ):
                names.add(node.attr)
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("getattr", "hasattr"):
            first, second, *_ = node.args
            if (of_any or getattr(first, "id", "") == "args") and isinstance(second, ast.Constant):
                names.add(str(second.value))
        for child in ast.iter_child_nodes(node):
            visit(child)

    tree = ast.parse(path.read_text())
    if not stored:
        visit(tree)
        return names
    for node in ast.walk(tree):  # `if args.old: args.new = ...`, and what is asserted or raised about
        if isinstance(node, ast.If | ast.Assert | ast.Assign):
            visit(node)
    return names


def compared(args: Namespace, made: Any) -> list[str]:
    """What differs between the model of our configurations and the one of Megatron's older way."""
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from megatron.training import get_args, training
    from megatron.training.global_vars import set_args, unset_global_variables

    groups = ProcessGroupCollection.use_mpu_process_groups()
    unset_global_variables()
    set_args(args)
    assert get_args() is args
    outcomes: list[Any] = []
    for build in (
        lambda: made.model.get_builder_cls()(made.model).build_distributed_models(
            pg_collection=groups, ddp_config=made.ddp
        ),
        lambda: training.get_model(provider, pg_collection=groups),
    ):
        torch.manual_seed(1)
        model_parallel_cuda_manual_seed(1, force_reset_rng=True)
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                outcomes.append(attributes(build()[0], sums=args.perform_initialization))
        except Exception as error:
            outcomes.append(f"{type(error).__name__}: {error}"[:200])
    ours, theirs = outcomes
    if isinstance(ours, str) or isinstance(theirs, str):
        return [] if isinstance(ours, type(theirs)) else [f"{ours}"[:400], f"by get_model() {theirs}"[:400]]
    return [
        f"{name} is {ours.get(name)}, {theirs.get(name)} by get_model()"
        for name in sorted(ours.keys() | theirs.keys())
        if ours.get(name) != theirs.get(name)
    ]


def provider(pre_process: bool = True, post_process: bool = True, config: Any = None, **_: Any) -> torch.nn.Module:
    """A model straight from Megatron's arguments, as the scripts of old make it."""
    from megatron.core.models.gpt import GPTModel
    from megatron.training import get_args
    from megatron.training.arguments import core_transformer_config_from_args
    from megatron.training.models.gpt import GPTModelConfig, default_layer_spec, mtp_block_spec

    args = get_args()
    transformer = core_transformer_config_from_args(args)
    whole = GPTModelConfig(transformer=transformer, vocab_size=args.padded_vocab_size)
    spec = default_layer_spec(whole, None)
    return GPTModel(
        config=transformer,
        transformer_layer_spec=spec,
        mtp_block_spec=mtp_block_spec(whole, spec, vp_stage=None),
        vocab_size=args.padded_vocab_size,
        max_sequence_length=args.max_position_embeddings,
        pre_process=pre_process,
        post_process=post_process,
        fp16_lm_cross_entropy=args.fp16_lm_cross_entropy,
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        position_embedding_type=args.position_embedding_type,
        rotary_percent=args.rotary_percent,
        rotary_base=args.rotary_base,
        rope_scaling=args.use_rope_scaling,
        rope_scaling_factor=args.rope_scaling_factor,
        seq_len_interpolation_factor=args.rotary_seq_len_interpolation_factor,
    )


def attributes(model: torch.nn.Module, sums: bool) -> dict[str, str]:
    """Plain attributes of all its modules, and its weights and buffers, as text."""
    found = {}
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if isinstance(value, bool | int | float | str | torch.dtype | None):
                found[f"{path}.{name}"] = repr(value)
        for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            marks = [
                mark for mark in ("sequence_parallel", "allreduce", "is_embedding_parameter") if hasattr(tensor, mark)
            ]
            number = float(tensor.detach().double().abs().sum()) if sums else 0
            found[f"{path}.{name}"] = f"{list(tensor.shape)} {tensor.dtype} {tensor.requires_grad} {marks} {number:.6g}"
        inv_freq = getattr(module, "inv_freq", None)
        if isinstance(inv_freq, torch.Tensor):
            found[f"{path}.inv_freq"] = f"{float(inv_freq.double().sum()):.9g}"
    if (ddp := getattr(model, "ddp_config", None)) is not None:
        found |= {f"ddp.{item.name}": repr(getattr(ddp, item.name)) for item in dataclasses.fields(ddp)}
    found["buckets"] = repr([len(group.buckets) for group in getattr(model, "bucket_groups", ())])
    return found


def main(config: str) -> dict[str, list[str]]:
    """In a process of its own: it gets the stand-in for a GPU, and process groups of one rank."""
    from datetime import timedelta

    from megatron.core import mpu
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    from abkd_megatron import cpu_backend

    logging.disable(logging.WARNING)
    cpu_backend.install()
    cpu_backend.init_process_group(timedelta(minutes=5))
    mpu.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1)
    return audit(Path(config))


if __name__ == "__main__":
    for kind, lines in main(sys.argv[1]).items():
        print(f"{kind}:", *lines or ["nothing"], sep="\n  ")
