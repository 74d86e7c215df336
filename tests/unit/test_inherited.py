"""Which of the student's Megatron settings its teacher inherits: each setting of the installed Megatron has a kind."""

import argparse
import dataclasses
from collections.abc import Iterator

import pytest
import torch

pytest.importorskip("megatron.training")

from megatron.core.package_info import __version__
from megatron.core.transformer import MLATransformerConfig, TransformerConfig
from megatron.core.transformer.heterogeneous.heterogeneous_config import HeterogeneousTransformerConfig
from megatron.training.models import GPTModelConfig

from abkd_megatron.config.load import load_config
from abkd_megatron.config.megatron_args import megatron_options
from abkd_megatron.errors import ConfigError
from abkd_megatron.teacher import inherited
from abkd_megatron.teacher.compatibility import ARCHITECTURE
from abkd_megatron.teacher.inherited import MODEL, STUDENT, forget_run_of, group_of_each, kind_of, teacher_settings
from abkd_megatron.tools.dry_run import megatron_arguments

OPTIONS = megatron_options()
GROUPS = group_of_each(OPTIONS)
FIELDS = {
    item.name
    for kind in (TransformerConfig, MLATransformerConfig, HeterogeneousTransformerConfig, GPTModelConfig)
    for item in dataclasses.fields(kind)
}


def test_every_setting_has_a_kind() -> None:
    """What reaches a model's configuration has one by name: a group of the parser does not say enough of it."""
    for name in sorted({*GROUPS, *FIELDS}):
        kind = kind_of(name) if name in FIELDS else kind_of(name, GROUPS[name])
        if kind is None and name in FIELDS and name in GROUPS:
            kind = MODEL if kind_of(name, GROUPS[name]) == MODEL else None
        assert kind is not None, (
            f"megatron-core {__version__}: {name} ({GROUPS.get(name, 'a field')}) has no kind; look at what it does "
            f"to a frozen teacher and add it to {inherited.__name__}"
        )


def test_nothing_is_listed_that_megatron_has_not() -> None:
    known = {*GROUPS, *FIELDS, "kitchen_config_file", "kitchen_recipe_number"}  # those come with another package
    for names in inherited._NAMES.values():
        for pattern in names.split():
            kind = next(kind for kind, text in inherited._NAMES.items() if text is names)
            assert any(inherited._KINDS[kind].fullmatch(name) and matches(pattern, name) for name in known), pattern
    assert {group for groups in inherited._GROUPS.values() for group in groups} <= set(GROUPS.values())
    switches = {switch.partition("=")[0] for switches in inherited._ONLY_WITH for switch in switches}
    for name in (*switches, *inherited._OF_LAYERS, *(it for names in inherited._ALTERNATIVES for it in names)):
        assert name in GROUPS, name
    for patterns in inherited._ONLY_WITH.values():
        assert any(matches(patterns, name) for name in GROUPS), patterns


def matches(pattern: str, name: str) -> bool:
    return inherited.re.fullmatch(pattern, name) is not None


@pytest.mark.parametrize("name", ARCHITECTURE)
def test_what_a_checkpoint_is_held_to_is_inherited(name: str) -> None:
    assert kind_of(name, GROUPS[name]) == MODEL


BASE = {
    "num-layers": 4,
    "hidden-size": 64,
    "num-attention-heads": 4,
    "seq-length": 32,
    "max-position-embeddings": 32,
    "micro-batch-size": 1,
    "global-batch-size": 8,
    "train-iters": 10,
    "eval-interval": 10,
    "lr": 0.001,
    "tokenizer-type": "NullTokenizer",
    "vocab-size": 500,
    "mock-data": True,
    "position-embedding-type": "rope",
    "bf16": True,
}


def models(student: dict, teacher: dict, ranks: int = 8) -> tuple[argparse.Namespace, argparse.Namespace]:
    given = [f"megatron.{name}={value}" for name, value in {**BASE, **student}.items()]
    given += [f"teacher.{name}={value}" for name, value in {"num-layers": 8, **teacher}.items()]
    config = load_config(None, ["device=cuda", *given], OPTIONS)
    ours, theirs = megatron_arguments(config, ranks)
    assert theirs is not None
    return ours, theirs


# Of a run: what is set, and which argument of the teacher stays as it is without.
OF_A_RUN = {
    "overlapped tensor-parallel communication": {
        "tp-comm-overlap": True,
        "sequence-parallel": True,
        "tensor-model-parallel-size": 2,
    },
    "distributed saved activations": {
        "recompute-granularity": "full",
        "recompute-method": "uniform",
        "recompute-num-layers": 1,
        "distribute-saved-activations": True,
        "tensor-model-parallel-size": 2,
    },
    "selective recomputation": {"recompute-granularity": "selective", "recompute-modules": ["core_attn", "mlp"]},
    "offloaded activations": {"cpu-offloading-num-layers": 2},
    "fp8": {
        "fp8-format": "hybrid",
        "fp8-recipe": "tensorwise",
        "fp8-amax-history-len": 16,
        "first-last-layers-bf16": True,
    },
    "fp8 weights": {"fp8-format": "hybrid", "fp8-param-gather": True, "use-distributed-optimizer": True},
    "virtual stages": {
        "pipeline-model-parallel-size": 2,
        "num-layers-per-virtual-pipeline-stage": 1,
        "microbatch-group-size-per-virtual-pipeline-stage": 4,
    },
    "uneven stages": {"pipeline-model-parallel-size": 2, "decoder-first-pipeline-num-layers": 1},
    "multi-token prediction": {"mtp-num-layers": 1, "mtp-loss-scaling-factor": 0.3},
    "an optimizer": {"use-distributed-optimizer": True, "overlap-grad-reduce": True, "overlap-param-gather": True},
    "input jitter": {"num-experts": 4, "moe-input-jitter-eps": 0.01, "moe-z-loss-coeff": 0.001},
}


@pytest.mark.parametrize("name", OF_A_RUN)
def test_a_teacher_does_not_inherit_what_is_of_the_run(name: str) -> None:
    given = OF_A_RUN[name]
    student, teacher = models(given, {})
    _, plain = models({key: value for key, value in given.items() if kind_of_option(key) != STUDENT}, {})
    changed = {
        key for key, value in vars(teacher).items() if value != getattr(plain, key, None) and key != "tensorboard_dir"
    }
    assert not changed
    assert any(getattr(student, OPTIONS[key].dest) != getattr(teacher, OPTIONS[key].dest) for key in given)


def kind_of_option(name: str) -> str | None:
    dest = OPTIONS[name].dest
    return kind_of(dest, GROUPS[dest])


def test_a_dense_teacher_inherits_nothing_of_experts() -> None:
    experts = {"num-experts": 4, "moe-layer-freq": "'[0,1,1,1]'", "moe-router-topk": 1, "expert-model-parallel-size": 4}
    experts |= {
        "moe-grouped-gemm": False,
        "moe-router-enable-expert-bias": True,
        "moe-shared-expert-intermediate-size": 64,
    }
    experts |= {"moe-router-score-function": "sigmoid", "moe-ffn-hidden-size": 32}
    for none in (0, "null", "0"):
        _, teacher = models(experts, {"num-experts": none})
        _, plain = models({}, {})
        changed = {key for key, value in vars(teacher).items() if value != getattr(plain, key)}
        assert not changed
    _, teacher = models(experts, {"num-experts": 8, "moe-layer-freq": "1"})
    assert (teacher.moe_router_topk, teacher.moe_layer_freq, teacher.expert_model_parallel_size) == (1, 1, 4)


def test_a_teacher_without_latent_attention_inherits_nothing_of_it() -> None:
    latent = {"multi-latent-attention": True, "q-lora-rank": 32, "kv-lora-rank": 16, "mla-down-proj-fusion": True}
    _, teacher = models(latent, {"multi-latent-attention": False})
    assert teacher.q_lora_rank is None and not teacher.mla_down_proj_fusion


MIXTURE = {"num-experts": 4, "moe-router-topk": 2}
LATENT = {"multi-latent-attention": True, "kv-lora-rank": 16, "rotary-scaling-factor": 2.0, "mscale": 0.5}
LINEAR = {"experimental-attention-variant": "gated_delta_net", "linear-num-value-heads": 8, "linear-num-key-heads": 4}
YARN = {"position-embedding-type": "yarn", "yarn-beta-fast": 16, "rotary-scaling-factor": 4.0, "mscale": 0.7}
# What a student has, and what the teacher says, which has 8 layers for the student's 4.
NONSENSE = {
    "a pattern of experts": ({**MIXTURE, "moe-layer-freq": "'[0,1,1,1]'"}, {**MIXTURE, "num-experts": 8}),
    "a pattern of experts, dense": ({**MIXTURE, "moe-layer-freq": "'[0,1,1,1]'"}, {"num-experts": "null"}),
    "a frequency of experts, dense": ({**MIXTURE, "moe-layer-freq": 2}, {"num-experts": 0}),
    "a pattern without rotation": ({"no-rope-freq": "'[0,0,0,1]'"}, {}),
    "a pattern of linear attention": (
        {**LINEAR, "linear-attention-freq": "'[1,1,1,0]'"},
        {**LINEAR, "linear-attention-freq": "4"},
    ),
    "linear attention": ({**LINEAR, "linear-attention-freq": "4"}, {"experimental-attention-variant": "null"}),
    "a pattern of windows": (
        {"window-size": "'(7,0)'", "window-attn-skip-freq": "'[1,0,1,0]'"},
        {"window-size": "'(7,0)'"},
    ),
    "windows": ({"window-size": "'(7,0)'", "window-attn-skip-freq": "2"}, {"window-size": "null"}),
    "latent attention": (LATENT, {"multi-latent-attention": False}),
    "grouped queries": ({"group-query-attention": True, "num-query-groups": 2}, {"multi-latent-attention": True}),
    "YaRN": (YARN, {"position-embedding-type": "rope"}),
    "rotation": ({"rotary-base": 5, "rotary-percent": 0.5}, {"position-embedding-type": "learned_absolute"}),
    "a clamp": ({"swiglu": True, "activation-func-clamp-value": 7.0}, {"swiglu": False}),
    "widths of mup": ({"use-mup": True, "mup-width-mult": 2.0}, {"use-mup": False}),
    "layers to predict ahead": ({"mtp-num-layers": 1}, {}),
    "dense": ({}, {**MIXTURE, "moe-layer-freq": "2"}),
    "plain attention": ({}, LATENT),
    "softmax attention": ({}, {**LINEAR, "linear-attention-freq": "4"}),
    "no windows": ({}, {"window-size": "'(7,0)'", "window-attn-skip-freq": "2"}),
    "no YaRN": ({}, YARN),
}


@pytest.mark.parametrize("name", NONSENSE)
def test_a_teacher_inherits_nothing_that_makes_no_sense_for_it(name: str) -> None:
    student, own = NONSENSE[name]
    (_, teacher), (_, plain) = models(student, own), models({}, own)
    assert {key for key, value in vars(teacher).items() if value != getattr(plain, key)} == set()


def test_what_makes_sense_is_inherited_still() -> None:
    pattern = {**MIXTURE, "moe-layer-freq": "'[0,1,1,1]'"}
    _, teacher = models({**pattern, "no-rope-freq": "4"}, {"num-layers": 4})
    assert (teacher.moe_layer_freq, teacher.no_rope_freq) == ([0, 1, 1, 1], 4)
    _, teacher = models({**MIXTURE, "moe-layer-freq": "2", **YARN}, {})
    assert (teacher.moe_layer_freq, teacher.yarn_beta_fast, teacher.mscale) == (2, 16, 0.7)
    _, teacher = models({**LATENT, "rotary-base": 5, "position-embedding-type": "learned_absolute"}, {})
    assert (teacher.kv_lora_rank, teacher.rotary_base) == (16, 5)
    blocks = {"heterogeneous-layers-config-path": "/blocks.json"}
    assert blocks.items() <= teacher_settings({**BASE, **blocks}, {"rotary-base": 5}, OPTIONS).items()
    assert not blocks.keys() & teacher_settings({**BASE, **blocks}, {"hidden-size": 128}, OPTIONS).keys()


def test_what_megatron_rejects_is_said_to_be_inherited() -> None:
    with pytest.raises(ConfigError, match=r"inherits.* no-rope-freq="):
        models({"no-rope-freq": "4"}, {"num-layers": 6})


def test_what_is_inherited_is_named_as_it_was_written() -> None:
    given = {**BASE, "disable-bias-linear": True, "norm-epsilon": 1e-6, "lr": 1.0}
    found = inherited.inherited_architecture(given, {"hidden_size": 128, "vocab-size": 40}, OPTIONS)
    assert found["add_bias_linear"] == "disable-bias-linear=true"
    assert found["layernorm_epsilon"] == "norm-epsilon=1.0e-06"
    assert not {"hidden_size", "lr", "vocab_size", "seq_length"} & found.keys()
    assert inherited.declared_vocabulary({"vocab_size": 40}) == 40
    assert inherited.declared_vocabulary({"num-layers": 4}) is None


@pytest.mark.parametrize(
    ("student", "teacher", "expected"),
    [
        (
            {"group-query-attention": True, "num-query-groups": 2},
            {"multi-latent-attention": True},
            {"group_query_attention": False},
        ),
        ({"swiglu": True}, {"quick-geglu": True}, {"swiglu": False, "quick_geglu": True}),
        (
            {"use-rotary-position-embeddings": True},
            {"position-embedding-type": "learned_absolute"},
            {"position_embedding_type": "learned_absolute"},
        ),
        ({}, {"fp16": True}, {"params_dtype": torch.float16}),
        ({}, {"bf16": False}, {"params_dtype": torch.float32}),
        (
            {"no-rope-fusion": True},
            {"disable-bias-linear": True},
            {"apply_rope_fusion": False, "add_bias_linear": False},
        ),
        (
            {"num-experts": 4, "moe-token-dispatcher-type": "flex"},
            {},
            {"moe_token_dispatcher_type": "alltoall", "num_experts": 4},
        ),
    ],
    ids=str,
)
def test_what_the_teacher_says_itself_excludes_what_it_would_inherit(student, teacher, expected) -> None:
    _, found = models(student, teacher)
    assert {name: getattr(found, name) for name in expected} == expected


def test_what_is_written_for_the_teacher_is_passed_on() -> None:
    own = {"lr": 3.0, "fp8-format": "hybrid", "expert-model-parallel-size": 2, "moe_router_topk": 1}
    found = teacher_settings(BASE, own, OPTIONS)
    assert {name: found[name] for name in own} == own
    assert "train-iters" not in found and "global-batch-size" not in found


@pytest.mark.parametrize(
    ("own", "message"),
    [
        (
            {"tp-comm-overlap": True},
            "teacher: overlapped tensor-parallel communication .* the student's sizes; remove tp-",
        ),
        ({"cpu-offloading-num-layers": 1}, "teacher: offloading activations .* keeps no activations"),
        ({"fine-grained-activation-offloading": True}, "teacher: offloading activations .* remove fine-grained"),
        ({"use-megatron-fsdp": True}, "teacher: Megatron FSDP is not supported"),
    ],
)
def test_what_a_teacher_cannot_have_is_refused_by_name(own: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        models({"sequence-parallel": True, "tensor-model-parallel-size": 2}, own)


@pytest.mark.parametrize("name", ["use-megatron-fsdp", "use-torch-fsdp2"])
def test_sharded_students_are_refused_by_name(name: str) -> None:
    """And not since Megatron wants another CUDA_DEVICE_MAX_CONNECTIONS."""
    with pytest.raises(ConfigError, match=r"student: \w+ FSDP2? is not supported: (it shards|jobs read)"):
        models({name: True}, {})


def transformers(**more) -> Iterator[TransformerConfig]:
    for kind in (TransformerConfig, MLATransformerConfig):
        yield kind(num_layers=4, hidden_size=64, num_attention_heads=4, transformer_impl="local", **more)


def test_a_configuration_of_another_run_forgets_it() -> None:
    plain = list(transformers(num_moe_experts=4))
    of_a_run = transformers(
        num_moe_experts=4,
        recompute_granularity="full",
        recompute_method="uniform",
        recompute_num_layers=2,
        mtp_num_layers=1,
        moe_input_jitter_eps=0.1,
        moe_router_force_load_balancing=True,
        cpu_offloading_num_layers=1,
        calculate_per_token_loss=True,
    )
    for expected, found in zip(plain, of_a_run, strict=True):
        found.tp_comm_overlap = found.cpu_offloading = found.fp8_param = True
        found.fp8, found.fp8_recipe, found.cuda_graph_impl = "hybrid", "mxfp8", "local"
        found.moe_token_dispatcher_type = "flex"
        forget_run_of(found)
        assert found.moe_token_dispatcher_type == "alltoall"
        found.moe_token_dispatcher_type = expected.moe_token_dispatcher_type
        same = {item.name for item in dataclasses.fields(found) if not item.name.endswith(("_func", "_method"))}
        same.remove("inference_cuda_graph_scope")  # None, for a member of an enumeration that says as much
        assert {name: getattr(found, name) for name in same} == {name: getattr(expected, name) for name in same}


def test_it_reaches_the_transformer_within() -> None:
    (transformer, _) = transformers(recompute_granularity="selective")
    model = GPTModelConfig(transformer=transformer, vocab_size=64)
    forget_run_of(model)
    assert model.recompute_granularity is None and model.num_layers == 4
