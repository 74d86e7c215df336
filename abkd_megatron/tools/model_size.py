"""Parameters and floating-point operations of a GPTModel or HybridModel, by the letters of its layer pattern.

FLOPs are two per multiply-add of the matrix products, with attention over the unmasked half of the positions, and the
recurrences of Mamba and gated delta nets as in Megatron's `num_floating_point_operations`. Norms, activations and
losses are not counted. For recomputation see Korthikanti et al. 2022 (https://arxiv.org/abs/2205.05198).
"""

from argparse import Namespace
from dataclasses import dataclass

from abkd_megatron.config.pattern import layers_of_pattern


@dataclass(frozen=True)
class Flops:
    """FLOPs per token, summed over all ranks."""

    student_forward: float
    student_backward: float
    recomputed: float
    student_head: float
    """Forward and backward, of multi-token prediction too."""
    teacher_forward: float
    teacher_head: float

    @property
    def total(self) -> float:
        """Sum of all parts."""
        return sum(vars(self).values())

    @property
    def teacher_share(self) -> float:
        """The teacher's fraction of the total."""
        return (self.teacher_forward + self.teacher_head) / self.total


@dataclass(frozen=True)
class _Layer:
    """One layer of a pattern."""

    weights: int
    """Elements of matrices by which every token is multiplied."""
    others: int = 0
    """Other parameters, such as norms, biases and the experts that a token is not sent to."""
    recurrence: float = 0.0
    """FLOPs per token of the forward pass besides `weights` and attention."""
    attention: float = 0.0
    """FLOPs per token of attention's two products, over half the positions."""

    @property
    def parameters(self) -> int:
        return self.weights + self.others


def parameters(args: Namespace, vocab_size: int) -> int:
    """Return the number of parameters of a model, summed over its ranks.

    Args:
        args: Megatron's validated arguments.
        vocab_size: rows of the embedding; pass the padded size to count padding.
    """
    main, predicting = _layers(args)
    depths = 1 if args.mtp_use_repeated_layer else len(predicting)
    h, norm = args.hidden_size, _norm(args, args.hidden_size)
    embeddings = vocab_size * h * (2 if args.untie_embeddings_and_output_weights else 1)
    if args.position_embedding_type == "learned_absolute":
        embeddings += args.max_position_embeddings * h
    layers = "".join([main, *predicting[:depths]])
    # Each depth of multi-token prediction projects two vectors to one, and has three norms.
    return _sum(args, layers).parameters + depths * (2 * h * h + 3 * norm) + norm + embeddings


def flops(student: Namespace, *teachers: Namespace, every: int = 1) -> Flops:
    """Return the floating-point operations per token.

    Args:
        student: Megatron's validated arguments, with the `padded_vocab_size`.
        teachers: Megatron's validated arguments of each, all of which run on every token; none for a cache.
        every: one in `every` tokens is distilled; the teacher's head skips the others.
    """
    linear, attention = _forward(student)
    head = 2.0 * student.hidden_size * student.padded_vocab_size * (1 + len(_layers(student)[1]))
    repeated = 0.0
    if student.recompute_granularity == "full":
        share = 1.0
        if student.recompute_method == "block":
            chunks = student.pipeline_model_parallel_size * (student.virtual_pipeline_model_parallel_size or 1)
            share = min(1.0, student.recompute_num_layers * chunks / student.num_layers)
        repeated = share * (linear + attention)
    elif student.recompute_granularity == "selective" and "core_attn" in (student.recompute_modules or ["core_attn"]):
        repeated = attention
    return Flops(
        student_forward=linear + attention,
        student_backward=2 * (linear + attention),
        recomputed=repeated,
        student_head=3 * head,
        teacher_forward=sum(sum(_forward(teacher)) for teacher in teachers),
        teacher_head=sum(2.0 * teacher.hidden_size * student.padded_vocab_size / every for teacher in teachers),
    )


def _forward(args: Namespace) -> tuple[float, float]:
    """Return the forward FLOPs per token of all layers: (all but attention's products, attention's products)."""
    main, predicting = _layers(args)
    total = _sum(args, "".join([main, *predicting]))
    projections = 2 * args.hidden_size**2 * len(predicting)
    return 2.0 * (total.weights + projections) + total.recurrence, total.attention


def _layers(args: Namespace) -> tuple[str, list[str]]:
    """Return the model's layers as letters, and those of each depth of multi-token prediction."""
    if args.hybrid_layer_pattern is not None:
        _, *predicting = args.hybrid_layer_pattern.split("/")
        return layers_of_pattern(args.hybrid_layer_pattern), predicting
    layers = ["*-"] * args.num_layers
    if args.num_experts:
        every = args.moe_layer_freq
        of_experts = every if isinstance(every, list) else [index % every == 0 for index in range(args.num_layers)]
        layers = ["*E" if experts else "*-" for experts in of_experts]
    return "".join(layers), layers[-1:] * (args.mtp_num_layers or 0)


def _sum(args: Namespace, layers: str) -> _Layer:
    kinds = [(_KINDS[letter](args), layers.count(letter)) for letter in sorted(set(layers))]
    return _Layer(
        weights=sum(layer.weights * count for layer, count in kinds),
        others=sum(layer.others * count for layer, count in kinds),
        recurrence=sum(layer.recurrence * count for layer, count in kinds),
        attention=sum(layer.attention * count for layer, count in kinds),
    )


def _norm(args: Namespace, size: int) -> int:
    return size * (2 if args.normalization == "LayerNorm" else 1)


def _attention(args: Namespace) -> _Layer:
    h, channels, heads = args.hidden_size, args.kv_channels, args.num_attention_heads
    query = heads * channels
    key_value = 2 * channels * (args.num_query_groups if args.group_query_attention else heads)
    others = _norm(args, h)
    if args.add_bias_linear or args.add_qkv_bias:
        others += query + key_value
    if args.add_bias_linear:
        others += h
    if args.qk_layernorm:
        others += 2 * _norm(args, channels)
    return _Layer(h * (2 * query + key_value), others, attention=2.0 * args.seq_length * query)


def _mlp(args: Namespace) -> _Layer:
    h, f, gated = args.hidden_size, args.ffn_hidden_size, 2 if args.swiglu else 1
    biases = h + gated * f if args.add_bias_linear else 0
    return _Layer(h * f * (gated + 1), _norm(args, h) + biases)


def _experts(args: Namespace) -> _Layer:
    h, f, gated = args.hidden_size, args.moe_ffn_hidden_size or args.ffn_hidden_size, 2 if args.swiglu else 1
    expert, shared = h * f * (gated + 1), args.moe_shared_expert_intermediate_size or 0
    weights = args.moe_router_topk * expert + h * args.num_experts + h * shared * (gated + 1)
    if shared and args.moe_shared_expert_gate:
        weights += h
    others = _norm(args, h) + (args.num_experts - args.moe_router_topk) * expert
    if args.add_bias_linear:
        others += args.num_experts * (1 + gated * f + h)  # the router's, too
    return _Layer(weights, others)


def _mamba(args: Namespace) -> _Layer:
    """Mamba-2, Dao and Gu 2024 (https://arxiv.org/abs/2405.21060)."""
    h, heads = args.hidden_size, args.mamba_num_heads or 2 * args.hidden_size // args.mamba_head_dim
    inner, states = heads * args.mamba_head_dim, args.mamba_num_groups * args.mamba_state_dim
    weights = h * (2 * inner + 2 * states + heads) + inner * h
    convolution = (inner + 2 * states) * (4 + 1)  # four positions and a bias
    return _Layer(weights, convolution + 3 * heads + inner + _norm(args, h), 7.0 * inner * args.mamba_state_dim)


def _gated_delta_net(args: Namespace) -> _Layer:
    """Gated delta rule, Yang et al. 2024 (https://arxiv.org/abs/2412.06464)."""
    h, heads, size = args.hidden_size, args.linear_num_value_heads, args.linear_value_head_dim
    keys, values = args.linear_num_key_heads * args.linear_key_head_dim, heads * size
    convolution = args.linear_conv_kernel_dim * (2 * keys + values)
    weights = h * (2 * keys + 2 * values + 2 * heads) + values * h
    others = convolution + 2 * heads + _norm(args, size) + _norm(args, h)
    return _Layer(weights, others, 2.0 * (convolution + 4 * heads * size**2))


_KINDS = {"*": _attention, "-": _mlp, "E": _experts, "M": _mamba, "G": _gated_delta_net}
