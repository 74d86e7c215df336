"""An estimate's own arithmetic, and how it is shown; what a job takes is in tests/host/test_estimate.py.

Proves: parameters of published models, and of models that Megatron builds at TP, PP and EP, for every layer of a
pattern; FLOPs against six a weight and attention, against Megatron's own formula, recomputation and spared heads; which
ranks stand for the others; which layouts are tried; a ledger's account of storages; the table and the picture.
"""

import contextlib
import json
import multiprocessing
from argparse import Namespace
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from types import SimpleNamespace
from unittest import mock

import pytest

pytest.importorskip("megatron.training")

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.transformer.spec_utils import ModuleSpec, import_module
from megatron.training.training import num_floating_point_operations

from abkd_megatron.cache.record import RecordLayout
from abkd_megatron.config.load import load_config
from abkd_megatron.config.megatron_args import megatron_options
from abkd_megatron.config.model_config import model_config
from abkd_megatron.config.rollouts import OnPolicy
from abkd_megatron.config.schema import Config
from abkd_megatron.errors import ConfigError
from abkd_megatron.tools import dry_run, estimate_view, memory_tracker, meta_layers, meta_run
from abkd_megatron.tools.cache_estimate import CacheEstimate
from abkd_megatron.tools.estimate import (
    Alternative,
    Estimate,
    RankEstimate,
    _check,
    _with_layout,
    decode_bytes,
    kinds_of_ranks,
    kv_bytes,
    layouts,
)
from abkd_megatron.tools.meta_run import Account, MemoryTracker
from abkd_megatron.tools.model_size import flops, parameters

# https://huggingface.co/meta-llama/Llama-3.1-8B/blob/main/config.json, and that of 70B.
SIZES = {
    "8B": {"num_layers": 32, "hidden_size": 4096, "ffn_hidden_size": 14336, "num_attention_heads": 32},
    "70B": {"num_layers": 80, "hidden_size": 8192, "ffn_hidden_size": 28672, "num_attention_heads": 64},
}


def llama(size: str, **others: object) -> Namespace:
    settings = {
        **SIZES[size],
        "kv_channels": 128,
        "group_query_attention": True,
        "num_query_groups": 8,
        "normalization": "RMSNorm",
        "swiglu": True,
        "add_bias_linear": False,
        "add_qkv_bias": False,
        "qk_layernorm": False,
        "untie_embeddings_and_output_weights": True,
        "position_embedding_type": "rope",
        "seq_length": 8192,
        "padded_vocab_size": 128256,
        "recompute_granularity": None,
        "recompute_method": None,
        "recompute_modules": None,
        "recompute_num_layers": None,
        "world_size": 64,
        "tensor_model_parallel_size": 4,
        "pipeline_model_parallel_size": 4,
        "virtual_pipeline_model_parallel_size": None,
        "context_parallel_size": 1,
        "data_parallel_size": 4,
        "micro_batch_size": 1,
        "global_batch_size": 128,
        "use_tp_pp_dp_mapping": False,
        "decoder_first_pipeline_num_layers": None,
        "decoder_last_pipeline_num_layers": None,
        "pipeline_model_parallel_layout": None,
        "account_for_embedding_in_pipeline_split": False,
        "account_for_loss_in_pipeline_split": False,
        "hybrid_layer_pattern": None,
        "mtp_num_layers": None,
        "mtp_use_repeated_layer": False,
        "num_experts": None,
    }
    return Namespace(**{**settings, **others})


@pytest.mark.parametrize(("size", "published"), [("8B", 8_030_261_248), ("70B", 70_553_706_496)])
def test_parameters_of_published_models(size: str, published: int) -> None:
    assert parameters(llama(size), 128256) == published


def test_bytes_of_sampling_text() -> None:
    args = llama("8B", params_dtype=torch.bfloat16)
    assert decode_bytes(args) == (8_030_261_248 - 128256 * 4096) // 4 * 2, "all stages' weights, without the embedding"
    # 8 layers of a stage, 32 rows, keys and values of 2 heads.
    assert kv_bytes(args, OnPolicy(share=1, prompt_tokens=40, new_tokens=24)) == 8 * 32 * 64 * 2 * 2 * 128 * 2
    assert kv_bytes(args, OnPolicy(share=1, new_tokens=24)) == 8 * 32 * 8193 * 2 * 2 * 128 * 2


def test_parameters_of_another_kind() -> None:
    # GPT-2's 124439808, https://huggingface.co/openai-community/gpt2
    gpt2 = llama(
        "8B",
        num_layers=12,
        hidden_size=768,
        ffn_hidden_size=3072,
        num_attention_heads=12,
        kv_channels=64,
        group_query_attention=False,
        normalization="LayerNorm",
        swiglu=False,
        add_bias_linear=True,
        untie_embeddings_and_output_weights=False,
        position_embedding_type="learned_absolute",
        max_position_embeddings=1024,
    )
    assert parameters(gpt2, 50257) == 124_439_808


# A HybridModel with every kind of layer.
HYBRID = {
    **{"hidden-size": 64, "ffn-hidden-size": 160, "num-attention-heads": 4, "kv-channels": 32, "seq-length": 32},
    **{"group-query-attention": True, "num-query-groups": 2, "max-position-embeddings": 32, "swiglu": True},
    **{"position-embedding-type": "rope", "normalization": "RMSNorm", "disable-bias-linear": True},
    **{"mamba-state-dim": 8, "mamba-head-dim": 16, "mamba-num-groups": 2, "linear-conv-kernel-dim": 4},
    **{"linear-key-head-dim": 16, "linear-value-head-dim": 16, "linear-num-key-heads": 2, "linear-num-value-heads": 4},
    **{"num-experts": 4, "moe-ffn-hidden-size": 96, "moe-router-topk": 2, "moe-shared-expert-intermediate-size": 80},
    **{"untie-embeddings-and-output-weights": True, "hybrid-layer-pattern": "M*-|EG*/*-"},
    **{"tokenizer-type": "NullTokenizer", "vocab-size": 250, "mock-data": True, "train-iters": 1, "eval-interval": 9},
    **{"micro-batch-size": 1, "global-batch-size": 8, "lr": 0.1},
}
# Sizes with which none of Megatron's formulas assumes another.
GPT = {"hybrid-layer-pattern": None, "num-layers": 4, "moe-layer-freq": "([1,0]*2)"}
DENSE = dict.fromkeys(["moe-layer-freq", *(name for name in HYBRID if "moe" in name or "experts" in name)])
MODELS: dict[str, tuple[int, dict[str, object]]] = {
    "one rank": (1, {"hybrid-layer-pattern": "M*-EG*"}),
    "tied, LayerNorm, biases": (
        1,
        {
            **{"normalization": "LayerNorm", "untie-embeddings-and-output-weights": False, "qk-layernorm": True},
            **{"hybrid-layer-pattern": "M*-EG*", "moe-shared-expert-intermediate-size": None},
            **{"position-embedding-type": "learned_absolute", "disable-bias-linear": False},
        },
    ),
    "TP 2 with SP, a size of heads of its own": (
        2,
        {
            **{"hybrid-layer-pattern": "M*-EG*/-/-", "tensor-model-parallel-size": 2, "sequence-parallel": True},
            "mamba-num-heads": 4,
        },
    ),
    "PP 2, tied": (2, {"pipeline-model-parallel-size": 2, "untie-embeddings-and-output-weights": False}),
    "PP 2 x EP 2": (4, {"pipeline-model-parallel-size": 2, "expert-model-parallel-size": 2}),
    "GPTModel, EP 2": (2, {**GPT, "expert-model-parallel-size": 2}),
    "GPTModel, multi-token prediction": (1, {**GPT, **DENSE, "mtp-num-layers": 2}),
}


def job(settings: dict[str, object]) -> Config:
    """A configuration of these Megatron arguments, without a teacher."""
    given = {name: value for name, value in {**HYBRID, **settings}.items() if value is not None}
    words = [f"megatron.{name}={json.dumps(value)}" for name, value in given.items()]
    return load_config(None, ["device=cuda", *words], megatron_options())


def arguments(config: Config, world_size: int) -> Namespace:
    student, _ = dry_run.megatron_arguments(config, world_size)
    return student


def built(settings: dict[str, object], world_size: int) -> int:
    """The parameters of the model that Megatron builds, on the meta device: of all ranks, each once.

    In a process of its own, because it patches torch and Megatron.
    """
    config, ledger, found = job(settings), MemoryTracker(), 0
    for rank in range(world_size):
        with contextlib.ExitStack() as stack:
            watch = SimpleNamespace(step=None)
            for owner, name, value in meta_run._replacements(config, ledger, watch, 80.0):
                stack.enter_context(mock.patch.object(owner, name, value, create=name == "rearrange"))
            meta_run.start_rank(rank, world_size)
            stack.enter_context(ledger)
            stack.enter_context(meta_run._Numbers())
            try:
                shortened = meta_run._without_files(config, 250, 8)
                found += of_rank(arguments(replace(shortened, teacher=config.teacher), world_size))
            finally:
                dist.destroy_process_group()
                parallel_state.destroy_model_parallel()
    return found


def of_rank(args: Namespace) -> int:
    """The parameters of a rank that no earlier rank has."""
    parallel_state.initialize_model_parallel(
        args.tensor_model_parallel_size,
        args.pipeline_model_parallel_size,
        expert_model_parallel_size=args.expert_model_parallel_size,
        create_gloo_process_groups=False,
    )
    model_parallel_cuda_manual_seed(1)
    groups, config = ProcessGroupCollection.use_mpu_process_groups(), model_config(args)
    model = config.get_builder_cls()(config).build_model(groups)
    count = 0
    for name, parameter in model.named_parameters():
        of_expert = not getattr(parameter, "allreduce", True)
        tensor, data = (groups.expt_tp, groups.expt_dp) if of_expert else (groups.tp, groups.dp_cp)
        first = data.rank() == 0 and (tensor.rank() == 0 or getattr(parameter, "tensor_model_parallel", False))
        # Tied to the first stage's embedding, or a copy of it for multi-token prediction.
        copy = groups.pp.rank() > 0 and name.startswith(
            ("embedding", *(("output_layer",) if model.share_embeddings_and_output_weights else ()))
        )
        count += parameter.numel() if first and not copy else 0
    return count


@pytest.fixture(scope="module")
def processes() -> Iterator[ProcessPoolExecutor]:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield pool


@pytest.mark.parametrize("name", MODELS)
def test_parameters_of_what_megatron_builds(processes: ProcessPoolExecutor, name: str) -> None:
    world_size, settings = MODELS[name]
    args = arguments(job(settings), world_size)
    assert processes.submit(built, settings, world_size).result() == parameters(args, args.padded_vocab_size)


@pytest.mark.parametrize("name", MODELS)
def test_flops_against_megatrons_formula(name: str) -> None:
    world_size, settings = MODELS[name]
    args = arguments(job(settings), world_size)
    found = flops(args, args)
    training = found.student_forward + found.student_backward + found.student_head
    # Megatron's formula leaves out routers; of a HybridModel the projections of multi-token prediction, too, and the
    # width of a Mamba layer is twice the hidden size there.
    h, depths, pattern = args.hidden_size, args.mtp_num_layers or 0, args.hybrid_layer_pattern
    experts = pattern.count("E") if pattern else 2 * bool(args.num_experts)
    besides = 6 * (h * (args.num_experts or 0) * experts)
    if pattern:
        besides += 6 * 2 * h * h * depths
        inner = (args.mamba_num_heads or 2 * h // args.mamba_head_dim) * args.mamba_head_dim
        besides += 3 * pattern.count("M") * (inner - 2 * h) * (2 * h * 3 + 7 * args.mamba_state_dim)
    else:
        besides -= 6 * 3 * h * depths  # norms
    assert training == pytest.approx(num_floating_point_operations(args, 1) / args.seq_length + besides, rel=1e-12)


def test_flops_are_six_a_weight_and_attention() -> None:
    student, teacher = llama("8B"), llama("70B")
    found = flops(student, teacher)
    norms, embedding = (2 * 32 + 1) * 4096, 128256 * 4096
    weights = parameters(student, 128256) - norms - embedding  # the head's among them
    attention = 32 * (2 * 2 * 4096 * 8192) / 2
    assert found.student_forward + found.student_backward + found.student_head == 6 * weights + 3 * attention
    weights = parameters(teacher, 128256) - (2 * 80 + 1) * 8192 - 128256 * 8192
    assert found.teacher_forward + found.teacher_head == 2 * weights + 80 * (2 * 2 * 8192 * 8192) / 2
    assert found.recomputed == 0
    assert found.total == sum(vars(found).values())
    assert 0.7 < found.teacher_share < 0.8


def test_flops_of_recomputation_and_of_spared_heads() -> None:
    plain = flops(llama("8B"), llama("70B"))
    full = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    assert flops(llama("8B", **full), llama("70B")).recomputed == plain.student_forward
    block = {**full, "recompute_method": "block", "recompute_num_layers": 2}  # of 8 layers a stage
    assert flops(llama("8B", **block), llama("70B")).recomputed == plain.student_forward / 4
    selective = {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]}
    assert flops(llama("8B", **selective), llama("70B")).recomputed == 32 * 2 * 4096 * 8192
    every = flops(llama("8B"), llama("70B"), every=4)
    assert every.teacher_head == plain.teacher_head / 4
    assert every.teacher_forward == plain.teacher_forward
    both = flops(llama("8B"), llama("70B"), llama("8B"))
    assert both.teacher_forward == plain.teacher_forward + plain.student_forward
    assert both.teacher_head == plain.teacher_head + plain.student_head / 3


def test_a_rank_of_each_kind() -> None:
    assert kinds_of_ranks(llama("8B"), llama("70B")) == {
        "stage 1 of 4": 0,
        "stages 2 to 3 of 4": 16,
        "stage 4 of 4": 48,
    }
    uneven = llama("8B", decoder_first_pipeline_num_layers=5)
    assert list(kinds_of_ranks(uneven, llama("70B")).values()) == [0, 16, 32, 48]
    alone = {"pipeline_model_parallel_size": 1, "tensor_model_parallel_size": 1, "data_parallel_size": 64}
    assert kinds_of_ranks(llama("8B", **alone), llama("70B", **alone)) == {"stage 1 of 1": 0}
    apart = {"pipeline_model_parallel_size": 2, "tensor_model_parallel_size": 4}
    assert kinds_of_ranks(llama("8B"), llama("70B", **apart)) == {
        "stage 1 of 4, teacher's 1 of 2": 0,
        "stages 2 to 3 of 4, teacher's 2 of 2": 16,
        "stage 4 of 4, teacher's 2 of 2": 48,
    }
    hybrid = llama("8B", hybrid_layer_pattern="M-|M-|*-|M-")  # stages of other layers
    assert list(kinds_of_ranks(hybrid, llama("70B")).values()) == [0, 16, 32, 48]
    swapped = llama("8B", use_tp_pp_dp_mapping=True)
    assert list(kinds_of_ranks(swapped, llama("70B")).values()) == [0, 4, 12]


def test_layouts_are_those_that_the_sizes_allow() -> None:
    found = layouts(llama("8B"))
    assert (8, 8, 1) in found and (1, 1, 2) in found
    assert (1, 1, 4) not in found  # 128 samples over 64 ranks
    assert all(tensor <= 8 and 64 % (tensor * stages) == 0 for tensor, stages, _ in found)
    assert {stages for _, stages, _ in layouts(llama("8B", num_layers=6))} == {1, 2}
    mamba = {"hybrid_layer_pattern": "M-" * 16, "mamba_num_groups": 2}
    assert {tensor for tensor, _, _ in layouts(llama("8B", **mamba))} == {1, 2}


def test_layers_of_a_pattern_are_divided_over_the_stages_of_another_layout() -> None:
    teacher = {"teacher.load": "here", "teacher.hybrid-layer-pattern": "M|*"}
    config = load_config(
        None,
        [f"{name}={value}" for name, value in teacher.items()] + ["megatron.hybrid-layer-pattern=M-|*-/M-/M-"],
        megatron_options(),
    )
    other = _with_layout(config, 1, 4, 1)
    assert other.megatron["hybrid-layer-pattern"] == "M-*-/M-/M-"
    assert other.teacher.megatron["hybrid-layer-pattern"] == "M*"


@pytest.mark.parametrize(
    ("student", "named"), [({"hybrid_layer_pattern": "+-"}, r"\+"), ({"moe_latent_size": 64}, "moe-latent-size")]
)
def test_what_cannot_be_counted_is_named(student: dict[str, object], named: str) -> None:
    with pytest.raises(ConfigError, match=rf"student.*{named}"):
        _check(load_config(None, [], megatron_options()), "student", llama("8B", **student))


def test_a_ledger_follows_storages_by_part() -> None:
    with MemoryTracker() as ledger:
        with ledger.belongs_to(memory_tracker.HEADS):
            kept = torch.zeros(1024)
        view = kept[:10]
        assert kept.device.type == "meta" and ledger.held == {memory_tracker.HEADS: 4096}
        temporary = torch.ones(4096, requires_grad=True) * 2
        assert ledger.total == 4096 + 2 * 16384
        grown = ledger.total
        del temporary
        assert ledger.total == 4096  # the graph went with it
        assert sum(ledger.peak.values()) == grown
        ledger.assign([view], memory_tracker.TEACHER)
        assert {part: size for part, size in ledger.held.items() if size} == {memory_tracker.TEACHER: 4096}
        ledger.restart()
        assert sum(ledger.peak.values()) == 4096
        assert torch.ones(()).item() == 1.0
        weight = torch.ones(256, requires_grad=True)
        (weight * 3).sum().backward()
        assert ledger.peak[memory_tracker.BACKWARD] >= 1024


def test_a_selection_by_position_and_its_complement_are_of_the_size_they_have() -> None:
    with MemoryTracker(one_in=4):
        selected = torch.zeros(10, dtype=torch.bool)
        assert selected.nonzero().shape == (2, 1)
        assert (~selected).nonzero().shape == (8, 1)


def an_estimate() -> Estimate:
    gib = 2**30
    first = Account(
        {memory_tracker.PARAMETERS: 2 * gib, memory_tracker.ACTIVATIONS: 30 * gib},
        {memory_tracker.PARAMETERS: 2 * gib},
        1,
        2,
        0,
    )
    last = Account(
        {memory_tracker.PARAMETERS: 2 * gib, memory_tracker.HEADS: 5 * gib},
        {memory_tracker.PARAMETERS: 2 * gib},
        1,
        2,
        0,
    )
    return Estimate(
        device="cuda",
        world_size=64,
        layout="TP 4 x PP 4",
        student="HybridModel M*-",
        teacher="GPTModel",
        parameters=8 * 10**9,
        teacher_parameters=70 * 10**9,
        gpu_memory=24.0,
        ranks=(RankEstimate("stage 1 of 2", 0, first), RankEstimate("stage 2 of 2", 32, last)),
        flops=flops(llama("8B"), llama("70B")),
        alternatives=(Alternative(8, 4, 1, 20 * gib), Alternative(1, 1, 1, 99 * gib), Alternative(1, 1, 2, None, "no")),
    )


def test_a_cache_saves_from_the_second_run_on() -> None:
    counted = flops(llama("8B"), llama("70B"))
    args = Namespace(train_samples=None, train_iters=1000, global_batch_size=256, seq_length=4096)
    found = CacheEstimate.of(args, RecordLayout(128256, 64), counted)
    assert found.tokens == 1000 * 256 * 4096 and found.num_bytes == found.tokens * 332
    assert found.saving(1) == pytest.approx(1.0)
    assert found.saving(2) == pytest.approx(2 / (2 - counted.teacher_share))
    assert found.saving(10**9) == pytest.approx(1 / (1 - counted.teacher_share), rel=1e-6)
    assert found.read_per_gpu(4e14) == pytest.approx(332 * 4e14 / (counted.total * (1 - counted.teacher_share)))


def test_the_layer_specs_of_gpus_can_be_imported() -> None:
    of_gpt, of_hybrid = ({"num-layers": 2}, {"hybrid-layer-pattern": "M-"})
    assert import_module(meta_run._layers(of_gpt, "cuda")["spec"]) is meta_layers.layers_of_a_gpu
    assert isinstance(import_module(meta_run._layers(of_hybrid, "cuda")["spec"]), ModuleSpec)


def test_what_is_shown(capsys, tmp_path, monkeypatch) -> None:
    pyplot = pytest.importorskip("matplotlib.pyplot")
    figures = []
    monkeypatch.setattr(pyplot, "close", figures.append)
    estimate = an_estimate()
    assert estimate.fullest.name == "stage 1 of 2"
    estimate_view.show(estimate, tmp_path / "folder")
    text = capsys.readouterr().out
    assert "32.00" in text and "7.00" in text
    assert "HybridModel M*-" in text and "GPTModel" in text
    assert "activations kept for backward, 94%. Does not fit in 24 GiB." in text
    assert "Not counted" in text
    rows = [line for line in text.splitlines() if line.startswith("│")]
    (fits,) = (row for row in rows if "20.00" in row)
    (too_much,) = (row for row in rows if "99.00" in row)
    assert "yes" in fits and "no" in too_much
    (figure,) = figures
    height, width, _ = pyplot.imread(tmp_path / "folder" / "estimate.png").shape
    assert [width, height] == [int(inches * 100) for inches in figure.get_size_inches()]
    parts, others = figure.axes
    drawn = [[bar.get_width() for bar in bars] for bars in parts.containers]
    assert [sum(of) for of in zip(*drawn, strict=True)] == pytest.approx(
        [rank.account.total / estimate_view.GIB for rank in estimate.ranks]
    )
    assert [bar.get_width() for bar in others.patches] == [20.0, 99.0]


def test_the_reads_of_sampling_are_shown_for_gpus(capsys) -> None:
    with_reads = replace(an_estimate(), sampling=2**31, decode=33_500_000_000)
    for device, shown in (("cuda", True), ("cpu", False)):
        estimate_view.show(replace(with_reads, device=device))
        text = capsys.readouterr().out
        assert "2.00 GiB" in text and ("10.00 ms" in text) == shown


def test_tables_in_a_pipe_are_not_broken(capsys) -> None:
    ranks = [replace(an_estimate().ranks[0], name=f"stage {index + 1} of 40") for index in range(40)]
    estimate_view.show(replace(an_estimate(), ranks=tuple(ranks)))
    (header,) = (line for line in capsys.readouterr().out.splitlines() if "stage 1 of 40" in line and "\u2503" in line)
    assert all(rank.name in header for rank in ranks)
