"""Distillation between vocabulary-sharded language models, as a plugin for Megatron-Core.

The names here need torch alone; whatever needs Megatron lives in `distillation` and `integrations`.
"""

from abkd_megatron.divergences import AlphaBeta, ToDi
from abkd_megatron.vocab_parallel import vocab_parallel_divergence

__version__ = "0.1.0"

__all__ = ["AlphaBeta", "ToDi", "__version__", "vocab_parallel_divergence"]
