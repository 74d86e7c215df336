"""An estimate's own arithmetic, and how it is shown; what a job takes is in tests/host/test_estimate.py.

Proves: parameters of published models; FLOPs against six a weight and attention, recomputation and spared heads; which
ranks stand for the others; which layouts are tried; a ledger's account of storages; the table and the picture.
"""

from argparse import Namespace
from dataclasses import replace

import pytest

pytest.importorskip("megatron.training")

import torch
from megatron.core.transformer.spec_utils import import_module

from abkd_megatron.tools import estimate_view, memory_tracker, meta_layers, meta_run
from abkd_megatron.tools.estimate import Alternative, Estimate, RankEstimate, flops, kinds_of_ranks, layouts, parameters
from abkd_megatron.tools.meta_run import Account, MemoryTracker

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
    }
    return Namespace(**{**settings, **others})


@pytest.mark.parametrize(("size", "published"), [("8B", 8_030_261_248), ("70B", 70_553_706_496)])
def test_parameters_of_published_models(size: str, published: int) -> None:
    assert parameters(llama(size), 128256) == published


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
    swapped = llama("8B", use_tp_pp_dp_mapping=True)
    assert list(kinds_of_ranks(swapped, llama("70B")).values()) == [0, 4, 12]


def test_layouts_are_those_that_the_sizes_allow() -> None:
    found = layouts(llama("8B"))
    assert (8, 8, 1) in found and (1, 1, 2) in found
    assert (1, 1, 4) not in found  # 128 samples over 64 ranks
    assert all(tensor <= 8 and 64 % (tensor * stages) == 0 for tensor, stages, _ in found)
    assert {stages for _, stages, _ in layouts(llama("8B", num_layers=6))} == {1, 2}


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
        parameters=8 * 10**9,
        teacher_parameters=70 * 10**9,
        gpu_memory=24.0,
        ranks=(RankEstimate("stage 1 of 2", 0, first), RankEstimate("stage 2 of 2", 32, last)),
        flops=flops(llama("8B"), llama("70B")),
        alternatives=(Alternative(8, 4, 1, 20 * gib), Alternative(1, 1, 1, 99 * gib), Alternative(1, 1, 2, None, "no")),
    )


def test_the_layer_spec_of_gpus_can_be_imported() -> None:
    assert import_module(meta_run._ON_GPU["spec"]) is meta_layers.layers_of_a_gpu


def test_what_is_shown(capsys, tmp_path, monkeypatch) -> None:
    pyplot = pytest.importorskip("matplotlib.pyplot")
    figures = []
    monkeypatch.setattr(pyplot, "close", figures.append)
    estimate = an_estimate()
    assert estimate.fullest.name == "stage 1 of 2"
    estimate_view.show(estimate, tmp_path / "folder")
    text = capsys.readouterr().out
    assert "32.00" in text and "7.00" in text
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


def test_tables_in_a_pipe_are_not_broken(capsys) -> None:
    ranks = [replace(an_estimate().ranks[0], name=f"stage {index + 1} of 40") for index in range(40)]
    estimate_view.show(replace(an_estimate(), ranks=tuple(ranks)))
    (header,) = (line for line in capsys.readouterr().out.splitlines() if "stage 1 of 40" in line and "\u2503" in line)
    assert all(rank.name in header for rank in ranks)
