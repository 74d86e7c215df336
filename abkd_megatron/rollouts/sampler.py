"""Text from a model in any training layout, on Megatron's forward-only schedule.

Legend: n rows, P positions of the longest prompt, N new tokens.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from abkd_megatron.config.rollouts import Sampling, check_can_sample
from abkd_megatron.errors import ConfigError
from abkd_megatron.rollouts.choice import next_tokens
from abkd_megatron.rollouts.mode import sampling_mode
from abkd_megatron.teacher.model import Model, pattern_of_model, process_output
from abkd_megatron.teacher.output_layer import OutputLayer
from abkd_megatron.vocab_parallel import VocabShard

# Steps between two tests whether all texts have ended, for which the host waits.
_STEPS_BETWEEN_TESTS = 16


@dataclass(frozen=True)
class Prompts:
    """Beginnings of texts, the same on every rank of a model-parallel group."""

    tokens: Tensor
    """[n, P] int64; what is behind a prompt is ignored."""
    lengths: Tensor
    """[n] int64, of each prompt, at least 1."""
    shortest: int
    """At most the least of them, known to the host; with experts the same on every rank that shares them."""
    samples: Tensor
    """[n] int64, numbers of the samples in the run, by which they get their noise."""


@dataclass(frozen=True)
class Rollouts:
    """Prompts and what a model has added to them, the same on every rank of a model-parallel group."""

    tokens: Tensor
    """[n, P + N] int64; behind the end of a text its end token."""
    begins: Tensor
    """[n] int64, of the added text."""
    ends: Tensor
    """[n] int64, one past the last token, which may be the end token."""
    ended: Tensor
    """[n] bool, whether a text has its end token."""


class Sampler:
    """Draws texts from a model that may be in the middle of its training.

    Args:
        chunks: this rank's model without wrappers: one chunk, or its virtual pipeline stages.
        pg_collection: its process groups; `tp` and `pp` are used.
        vocab_size: number of real tokens.
        new_tokens: N, at most so many are added to each prompt.
        end: the token that ends a text; None: none does.
        paused: a block in which the model's forward returns what `process_output` makes of it.

    Raises:
        ConfigError: see `check_can_sample`.
    """

    def __init__(
        self,
        chunks: Sequence[Model],
        pg_collection: ProcessGroupCollection,
        vocab_size: int,
        *,
        new_tokens: int,
        end: int | None,
        paused: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        check_can_sample(chunks[0].config, pattern_of_model(chunks[0]))
        self._chunks = list(chunks)
        self._tp, self._pp = pg_collection.tp, pg_collection.pp
        self._vocab_size, self._new_tokens, self._end, self._paused = vocab_size, new_tokens, end, paused
        config = chunks[0].config
        # Experts on other ranks answer these ranks too, so none may stop before the others.
        self._may_stop = end is not None and config.expert_model_parallel_size == 1
        self._contexts: list[StaticInferenceContext] = []
        self._turns: dict[int | None, int] = defaultdict(int)
        self._parts: Sequence[Tensor] = ()
        self._numbers: Sequence[Tensor] = ()
        self._offset = 0
        self._sampling = Sampling()

    def sample(self, prompts: Prompts, sampling: Sampling) -> Rollouts:
        """Continue prompts up to the end token, or by N tokens.

        The text of a row depends on the weights, its prompt, its number and `sampling`; on the layout only by rounding.

        Args:
            prompts: on the model's device; a number of rows that the pipeline stages divide, with virtual ones.
            sampling: how to draw.

        Raises:
            ConfigError: a number of rows that virtual pipeline stages cannot share.

        Collectives: per token those of a forward-only schedule, of `next_tokens` on the last pipeline stage, and one
        broadcast of [n] over the pipeline. The host waits once in 16 tokens.
        """
        with sampling_mode(self._chunks), self._paused():
            hooks = []
            if (last := self._chunks[-1]).post_process:
                hooks = process_output(last, lambda *_: self._turns[_stage(last)] - 1, self._choose)
            try:
                return self._sample(prompts, sampling)
            finally:
                for hook in hooks:
                    hook.remove()
                self._contexts, self._parts, self._numbers = [], (), ()

    def _sample(self, prompts: Prompts, sampling: Sampling) -> Rollouts:
        rows, longest = prompts.tokens.shape
        length, groups = longest + self._new_tokens, self._groups(rows)
        self._sampling, self._numbers = sampling, prompts.samples.chunk(groups)
        self._contexts = [StaticInferenceContext(rows // groups, length) for _ in range(groups)]
        fill = self._end if self._end is not None else 0
        tokens = torch.nn.functional.pad(prompts.tokens, (0, self._new_tokens), value=fill)
        begins = prompts.lengths
        ends, ended = begins + self._new_tokens, torch.zeros_like(begins, dtype=torch.bool)
        start, position = 0, prompts.shortest
        while position < length:
            chosen = self._step(tokens[:, start:position], start)
            is_prompt, is_past = position < begins, position >= ends
            tokens[:, position] = torch.where(is_prompt, tokens[:, position], chosen.masked_fill(is_past, fill))
            start, position = position, position + 1
            if self._end is not None:
                ends_here = (chosen == self._end) & ~is_prompt & ~is_past
                ended |= ends_here
                ends = torch.where(ends_here, position, ends)
            is_time = (position - prompts.shortest) % _STEPS_BETWEEN_TESTS == 0
            if self._may_stop and is_time and bool((ends <= position).all()):
                break
        written = torch.arange(length, device=tokens.device) < ends.unsqueeze(-1)
        return Rollouts(tokens.masked_fill(~written, fill), begins, ends, ended)

    def _groups(self, rows: int) -> int:
        """Return the number of micro-batches: as few as keep all pipeline stages busy."""
        stages = self._pp.size()
        if rows % stages == 0:
            return int(stages)
        if len(self._chunks) > 1:
            raise ConfigError(
                f"expected a number of samples per step and data-parallel rank that the {stages} pipeline stages "
                f"divide, got {rows}; change global-batch-size"
            )
        return 1

    def _step(self, tokens: Tensor, start: int) -> Tensor:
        """Return the choice after `tokens`, [n, length] at the positions from `start` on: [n] on every rank."""
        rows, length = tokens.shape
        self._offset, self._turns = start, defaultdict(int)
        self._parts = tokens.chunk(len(self._contexts))
        for context in self._contexts:
            context.sequence_len_offset = start
            context.decode_mode = start > 0
        outputs = get_forward_backward_func()(
            forward_step_func=self._forward,
            data_iterator=[None] * len(self._chunks) if len(self._chunks) > 1 else None,
            model=self._chunks,
            num_microbatches=len(self._contexts),
            seq_length=length,
            micro_batch_size=rows // len(self._contexts),
            forward_only=True,
        )
        chosen = torch.cat(outputs) if self._chunks[-1].post_process else tokens.new_empty(rows)
        if self._pp.size() > 1:
            dist.broadcast(chosen, dist.get_global_rank(self._pp, self._pp.size() - 1), group=self._pp)
        return chosen

    def _forward(self, data_iterator: Iterator | None, model: Model) -> tuple[Tensor, None]:
        """The forward step: micro-batches come in their order to each chunk."""
        turn = self._turns[_stage(model)]
        self._turns[_stage(model)] += 1
        tokens = self._parts[turn]
        positions = torch.arange(self._offset, self._offset + tokens.shape[1], device=tokens.device)
        output = model(
            tokens,
            positions.expand_as(tokens),
            None,
            inference_context=self._contexts[turn],
            runtime_gather_output=True,  # asserted in InferenceMode; nothing is gathered
        )
        return output, None

    def _choose(
        self,
        *,
        hidden_states: Tensor,
        output_layer: torch.nn.Module,
        output_weight: Tensor | None,
        context: int,
        scale_logits: Callable[[Tensor], Tensor],
        **_: Any,
    ) -> Tensor:
        """Choose the micro-batch's next tokens, [b] int64, in place of the model's logits."""
        last = OutputLayer(hidden_states[-1:], output_layer, output_weight, scale_logits).logits()[0]
        shard = VocabShard.megatron(last.shape[-1], self._tp, self._vocab_size)
        position = self._offset + len(hidden_states)
        return next_tokens(last, shard, self._sampling, self._numbers[context], position)


def _stage(model: Model) -> int | None:
    return getattr(model, "vp_stage", None)
