"""Layer patterns of a HybridModel, such as ``M-*-|M-*-/*-``. Does not import Megatron.

A letter is a layer: M Mamba, G gated delta net, * attention, + or D latent attention, - MLP, E experts. ``|`` separates
pipeline segments, and each part after ``/`` is one layer of multi-token prediction. A layer of a GPTModel is two layers
of a pattern, ``*-`` or ``*E``.
"""

from argparse import Namespace

from abkd_megatron.errors import ConfigError

# Destinations of the options that give a pattern; the second is a deprecated name of the first, which Megatron's
# validation forwards.
PATTERN_OPTIONS = ("hybrid_layer_pattern", "hybrid_override_pattern")
# The position embeddings that HybridModel builds.
_POSITIONS = ("rope", "yarn", "learned_absolute", "none")


def pattern_of(args: Namespace) -> str | None:
    """Return the layer pattern in Megatron's arguments, validated or not; None for a GPTModel."""
    return next((found for name in PATTERN_OPTIONS if (found := getattr(args, name, None))), None)


def model_name(pattern: str | None) -> str:
    """Return the class of a model, with its layer pattern, for output."""
    return "GPTModel" if pattern is None else f"HybridModel {pattern}"


def layers_and_pipes(pattern: str) -> str:
    """Return the main pattern, without multi-token prediction."""
    return pattern.partition("/")[0]


def layers_of_pattern(pattern: str) -> str:
    """Return a pattern's layers, one letter each, without pipeline segments and multi-token prediction."""
    return layers_and_pipes(pattern).replace("|", "")


def check_pattern(args: Namespace, who: str) -> None:
    """Reject settings that a HybridModel ignores or handles differently, and patterns that a teacher cannot have.

    Args:
        args: Megatron's arguments, validated or not; those of a GPTModel are not looked at.
        who: "student" or "teacher".

    Raises:
        ConfigError: naming the setting and what to change.
    """
    pattern = pattern_of(args)
    if pattern is None:
        return
    main, layers = layers_and_pipes(pattern), layers_of_pattern(pattern)
    for name in ("use_rope_scaling", "rotary_interleaved"):
        if getattr(args, name):
            raise ConfigError(
                f"{who}: {name.replace('_', '-')} is not supported with hybrid-layer-pattern {pattern}: Megatron's "
                "HybridModel does not apply it to its rotary embedding and would train another model; remove one of "
                "the two"
            )
    if args.position_embedding_type not in _POSITIONS:
        raise ConfigError(
            f"{who}: expected position-embedding-type {', '.join(_POSITIONS)} with hybrid-layer-pattern {pattern}, "
            f"got {args.position_embedding_type}, with which HybridModel has no positions; change it"
        )
    if "E" in layers and not args.num_experts:
        raise ConfigError(
            f"{who}: expected num-experts for the layers E of hybrid-layer-pattern {pattern}, got none; set it"
        )
    stages, segments = args.pipeline_model_parallel_size, main.count("|") + 1
    uneven = args.decoder_first_pipeline_num_layers, args.decoder_last_pipeline_num_layers
    if segments == 1 and len(layers) % stages and not any(uneven):
        raise ConfigError(
            f"{who}: the {len(layers)} layers of hybrid-layer-pattern {pattern} do not divide over {stages} pipeline "
            "stages; separate the stages by |"
        )
    if who == "student":
        if args.fine_grained_activation_offloading:
            raise ConfigError(
                "student: fine-grained-activation-offloading is not supported with hybrid-layer-pattern, because "
                "HybridModel would offload the output layer's parameters; remove fine-grained-activation-offloading"
            )
        return
    if "/" in pattern:
        raise ConfigError(
            "teacher: multi-token prediction is not supported: its layers predict what no loss here compares; give "
            f"`teacher:` the hybrid-layer-pattern {main} (the checkpoint may have them)"
        )
    if segments > max(stages, 1):
        raise ConfigError(
            "teacher: virtual pipeline stages are not supported: they shorten the wait for a backward pass, and a "
            f"teacher has none; give `teacher:` a hybrid-layer-pattern of {stages} segments separated by |, got "
            f"{segments} in {pattern}"
        )
