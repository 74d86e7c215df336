"""Distillation between vocabulary-sharded language models, as a plugin for Megatron-Core.

The names here need torch alone; whatever needs Megatron lives in `distillation` and `integrations`.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from abkd_megatron.divergences import AlphaBeta, ToDi
    from abkd_megatron.vocab_parallel import vocab_parallel_divergence

__version__ = "0.1.0"

__all__ = ["AlphaBeta", "ToDi", "__version__", "vocab_parallel_divergence"]


def __getattr__(name: str) -> Any:
    """Import torch when one of the names is used, so that the command line's help and `env` do without."""
    if name in ("AlphaBeta", "ToDi"):
        from abkd_megatron import divergences

        return getattr(divergences, name)
    if name == "vocab_parallel_divergence":
        from abkd_megatron import vocab_parallel

        return vocab_parallel.vocab_parallel_divergence
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
