"""Training steps on the student's own text: which steps, the sampling before them, and their micro-batches.

Legend: M micro-batches of b rows, n = M b, P prompt tokens, N new tokens, S sequence length.
"""

import importlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.num_microbatches_calculator import get_num_microbatches
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.rerun_state_machine import RerunState, get_rerun_state_machine
from torch import Tensor

from abkd_megatron.config.rollouts import OnPolicy
from abkd_megatron.errors import ConfigError, DataError
from abkd_megatron.losses.schedule import Progress, Schedule
from abkd_megatron.rollouts.choice import coin
from abkd_megatron.rollouts.prompts import of_beginnings, of_conversations
from abkd_megatron.rollouts.sampler import Prompts, Rollouts, Sampler

Source = Callable[[list[list[int]]], Sequence[Sequence[int]]]
"""Continues prompts: from lists of token ids to lists of new ones, at most N each."""


Reward = Callable[[list[str], list[str]], Sequence[float]]
"""Judges added texts: from prompts and texts to a number each."""

# In place of a count of 0, so that the mean is 0.
_NOTHING = 1e-12


@dataclass(frozen=True)
class Sizes:
    """Of a step's samples on this rank."""

    micro_batch: int
    """b."""
    sequence: int
    """S."""
    vocabulary: int
    """Number of real tokens."""
    chats: bool = False
    """Whether samples are rows of packed conversations, in place of one text each."""


class OwnText:
    """Decides before each training step whether it trains on own text, and samples it then.

    It is called where Megatron's loop asks its rerun state machine whether to run a step: on every rank, with the
    data's iterators, before the pipeline schedule. The step's samples of the data are read as always, and their
    beginnings are the prompts, so a run counts and resumes as one without. A step that Megatron repeats trains on the
    same text.

    Args:
        settings: of `distillation.on_policy`.
        sampler: of the student, with `settings.new_tokens`.
        source: in place of the sampler.
        reward: of texts, compared within groups.
        decode: from ids to text, for the reward.
        sizes: of samples.
        end: the token that ends a text; None: none does.
        pg_collection: of the student; `mp`, `dp` and `ep` are used.
        progress: returns the training progress before the step.

    Attributes:
        is_on: whether the current step trains on own text.
        lm_weight: of such steps: 0, since own text is no label, or the weight of the reward's policy gradient.
    """

    def __init__(
        self,
        settings: OnPolicy,
        sampler: Sampler,
        source: Source | None,
        reward: Reward | None,
        decode: Callable[[list[int]], str],
        sizes: Sizes,
        end: int | None,
        pg_collection: ProcessGroupCollection,
        progress: Callable[[], Progress],
    ) -> None:
        self.is_on = False
        self.lm_weight = settings.reward_weight if reward is not None else 0.0
        self._settings, self._sampler, self._source = settings, sampler, source
        self._reward, self._decode = reward, decode
        self._sizes, self._end, self._progress = sizes, end, progress
        self._mp, self._dp, self._ep = pg_collection.mp, pg_collection.dp, pg_collection.ep
        self._longest = settings.longest_prompt(sizes.sequence)
        self._share = Schedule.of(settings.share)
        self._batches: list[dict[str, Tensor]] = []
        self._running: dict[int | None, Iterator[dict[str, Tensor]]] = {}
        self._numbers: dict[str, Tensor] = {}
        self._advantages: Tensor | None = None
        self._reported = self._weighed = 0
        self._seconds = 0.0
        self._machine = get_rerun_state_machine()
        self._should_run = self._machine.should_run_forward_backward
        self._machine.should_run_forward_backward = self._before_step

    def remove(self) -> None:
        """Leave Megatron's loop as it was."""
        self._machine.should_run_forward_backward = self._should_run

    def _before_step(self, data_iterator: Any) -> bool:
        runs: bool = self._should_run(data_iterator)
        if not runs:
            self.is_on = False
        elif self._machine.state is not RerunState.RERUNNING_IN_PLACE:
            self.is_on = self._is_own(self._progress())
            if self.is_on:
                self._sample(data_iterator if isinstance(data_iterator, list) else [data_iterator])
        self._running, self._reported, self._weighed = {}, 0, 0
        return runs

    def _is_own(self, progress: Progress) -> bool:
        """Return the same on every rank, in a resumed run and in a repeated step.

        A run begins with a step on data, by which its teacher is checked, unless all steps are on own text.
        """
        share = self._share(progress)
        return share >= 1 or (progress.iteration > 0 and coin(self._settings.seed, progress.iteration) < share)

    def batches(self, data_iterator: Any, vp_stage: int | None) -> Iterator[dict[str, Tensor]] | None:
        """Return what a stage reads in place of the data; None where it reads none."""
        if data_iterator is None:
            return None
        if vp_stage not in self._running:
            self._running[vp_stage] = iter([dict(batch) for batch in self._batches])
        return self._running[vp_stage]

    def lm_weights(self) -> Tensor | None:
        """Return the advantages of the next micro-batch's texts, [b, S] fp32; None without a reward.

        With one update per sampled text the gradient of GRPO's objective (Shao et al., 2024, arXiv:2402.03300) is that
        of the cross entropy times the advantage.
        """
        if self._advantages is None:
            return None
        first = self._weighed * self._sizes.micro_batch
        self._weighed += 1
        of_rows = self._advantages[first : first + self._sizes.micro_batch].unsqueeze(-1)
        return of_rows.expand(-1, self._sizes.sequence)

    def report(self) -> dict[str, Tensor]:
        """Return the numbers of the next micro-batch's texts, [sum, number] each, and the step's seconds, [1]."""
        first = self._reported * self._sizes.micro_batch
        self._reported += 1
        rows = slice(first, first + self._sizes.micro_batch)
        logged = {}
        for name, per_row in self._numbers.items():
            total, count = per_row[rows].sum(0)
            logged[name] = torch.stack([total, count.clamp_min(_NOTHING)])
        return {**logged, "own text sampling seconds": total.new_full((1,), self._seconds)}

    def _sample(self, iterators: Sequence[Any]) -> None:
        """Read the step's samples, continue their prompts, and keep the micro-batches.

        Collectives: one broadcast of [n, P + 1] over the model-parallel group, and those of `Sampler.sample`; with a
        source one more of [n, N + 1]; those of `_in_step_order`, `_bounds` and `_rewards`.
        """
        begin = time.perf_counter()
        number, size, group = get_num_microbatches(), self._sizes.micro_batch, self._settings.group
        read = [[next(it) for _ in range(number)] if it is not None else None for it in iterators]
        device = torch.cuda.current_device()
        table = torch.empty(number * size, self._longest + 1, dtype=torch.int64, device=device)
        if self._mp.rank() == 0:
            assert read[0] is not None
            if any("tokens" not in batch for batch in read[0]):
                raise DataError(
                    f"distillation.on_policy: expected batches of Megatron's GPT datasets, with `tokens`, got "
                    f"{sorted(read[0][0])}; remove on_policy"
                )
            found = of_conversations if self._sizes.chats else of_beginnings
            table.copy_(found(read[0], self._longest), non_blocking=True)
        self._broadcast(table)
        row = torch.arange(number * size, device=device)
        in_step = (row // size * self._dp.size() + self._dp.rank()) * size + row % size
        if group > 1:
            table = self._in_step_order(table)[in_step // group * group]
        lengths = table[:, -1]
        shortest, longest = self._bounds(lengths)
        left_out = lengths == 0
        lengths = lengths.masked_fill(left_out, longest)  # so that others need not wait for it
        prompts = Prompts(table[:, :longest], lengths, shortest, self._progress().samples + in_step)
        if self._source is None:
            rollouts = self._sampler.sample(prompts, self._settings)
        else:
            rollouts = self._from_source(prompts, left_out, self._source)
        ends = torch.where(left_out, rollouts.begins, rollouts.ends)
        rollouts = replace(rollouts, ends=ends, ended=rollouts.ended & ~left_out)
        with_mask = any(batch.get("attention_mask") is not None for batches in read if batches for batch in batches)
        self._batches = micro_batches(rollouts, self._sizes, with_mask)
        self._numbers = numbers(rollouts, self._sizes.vocabulary)
        if self._sizes.chats:
            self._numbers["own text left out"] = torch.stack([left_out.float(), torch.ones_like(left_out).float()], -1)
        if self._reward is not None:
            rewards = self._rewards(rollouts, self._reward)
            self._advantages = advantages(self._in_step_order(rewards), group)[in_step]
            self._numbers["own text reward"] = torch.stack([rewards, (~left_out).float()], -1)
        self._seconds = time.perf_counter() - begin

    def _in_step_order(self, of_rows: Tensor) -> Tensor:
        """Return the values of all rows of a step, [GBS, ...], from those of this rank's, [n, ...].

        Collectives: one all-gather over data-parallel ranks.
        """
        ranks = self._dp.size()
        if ranks == 1:
            return of_rows
        everywhere = of_rows.new_empty(ranks * len(of_rows), *of_rows.shape[1:])
        dist.all_gather_into_tensor(everywhere, of_rows.contiguous(), group=self._dp)
        by_rank = everywhere.view(ranks, -1, self._sizes.micro_batch, *of_rows.shape[1:])
        return by_rank.transpose(0, 1).flatten(0, 2)

    def _bounds(self, lengths: Tensor) -> tuple[int, int]:
        """Return the shortest and the longest prompt, on the ranks that share experts.

        Collectives: with conversations one all-reduce of [2] over expert-parallel ranks; the host waits for it.
        """
        if not self._sizes.chats:
            return self._longest, self._longest
        bounds = torch.stack([-lengths.masked_fill(lengths == 0, self._longest).amin(), lengths.amax()])
        if self._ep.size() > 1:
            dist.all_reduce(bounds, dist.ReduceOp.MAX, group=self._ep)
        shortest, longest = bounds.tolist()
        return -shortest if longest else 1, longest or 1

    def _from_source(self, prompts: Prompts, left_out: Tensor, source: Source) -> Rollouts:
        number, new = len(prompts.tokens), self._settings.new_tokens
        added = torch.full((number, new + 1), self._end or 0, dtype=torch.int64, device="cpu")  # the last is the length
        if self._mp.rank() == 0:
            rows = (~left_out).nonzero().flatten().tolist()
            ids, sizes = prompts.tokens.tolist(), prompts.lengths.tolist()
            given = list(source([ids[row][: sizes[row]] for row in rows])) if rows else []
            if len(given) != len(rows) or not all(1 <= len(one) <= new for one in given):
                found = f"{len(given)} rows of {sorted({len(one) for one in given})}"
                raise DataError(
                    f"distillation.on_policy.source {self._settings.source}: expected {len(rows)} rows of 1 to {new} "
                    f"new tokens, got {found} tokens; return one row per prompt"
                )
            for row, one in zip(rows, given, strict=True):
                added[row, : len(one)] = torch.as_tensor(list(one), dtype=torch.int64, device="cpu")
                added[row, new] = len(one)
            if not bool(((added[:, :new] >= 0) & (added[:, :new] < self._sizes.vocabulary)).all()):
                raise DataError(
                    f"distillation.on_policy.source {self._settings.source}: expected ids in 0 .. "
                    f"{self._sizes.vocabulary - 1}, got others; return ids of the student's tokenizer"
                )
        added = added.to(prompts.tokens.device)
        self._broadcast(added)
        new_ids, lengths = added[:, :new], added[:, new]
        is_end = new_ids == (self._end if self._end is not None else -1)
        is_end &= torch.arange(new, device=new_ids.device) < lengths.unsqueeze(-1)
        ended = is_end.any(-1)
        lengths = torch.where(ended, is_end.int().argmax(-1) + 1, lengths)
        tokens = torch.nn.functional.pad(prompts.tokens, (0, new))
        tokens = tokens.scatter(1, prompts.lengths.unsqueeze(-1) + torch.arange(new, device=new_ids.device), new_ids)
        return Rollouts(tokens, prompts.lengths, prompts.lengths + lengths, ended)

    def _rewards(self, rollouts: Rollouts, reward: Reward) -> Tensor:
        """Return [n] fp32 on every rank, 0 for a row without text.

        Collectives: one broadcast of it over the model-parallel group.
        """
        found = torch.zeros(len(rollouts.tokens), dtype=torch.float32, device="cpu")
        if self._mp.rank() == 0:
            columns = (it.tolist() for it in (rollouts.tokens, rollouts.begins, rollouts.ends, rollouts.ended))
            rows, prompts, texts = [], [], []
            for row, (ids, begin, end, ended) in enumerate(zip(*columns, strict=True)):
                if end > begin:  # else it has been left out
                    rows.append(row)
                    prompts.append(self._decode(ids[:begin]))
                    texts.append(self._decode(ids[begin : end - ended]))
            given = [float(it) for it in reward(prompts, texts)] if rows else []
            if len(given) != len(texts) or not all(map(math.isfinite, given)):
                raise DataError(
                    f"distillation.on_policy.reward {self._settings.reward}: expected {len(texts)} finite numbers, got "
                    f"{len(given)}: {given[:8]}; return one per text"
                )
            found[rows] = torch.tensor(given, dtype=torch.float32, device="cpu")
        found = found.to(rollouts.tokens.device)
        self._broadcast(found)
        return found

    def _broadcast(self, tensor: Tensor) -> None:
        if self._mp.size() > 1:
            dist.broadcast(tensor, dist.get_global_rank(self._mp, 0), group=self._mp)


def advantages(rewards: Tensor, group: int) -> Tensor:
    """Return (r - mean) / (std + 1e-4) within consecutive groups, [n] fp32; std of the population."""
    grouped = rewards.view(-1, group)
    mean, std = grouped.mean(-1, keepdim=True), grouped.std(-1, correction=0, keepdim=True)
    return ((grouped - mean) / (std + 1e-4)).flatten()


def load_function(path: str, key: str) -> Callable[..., Any]:
    """Import ``module:function`` of a key of `distillation.on_policy`.

    Raises:
        ConfigError: it cannot be imported, or is not callable.
    """
    module, _, name = path.partition(":")
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"distillation.on_policy.{key}: expected module:function that can be imported, got {path!r}: {error}; "
            "check the name, or add its folder to PYTHONPATH"
        ) from error
    if not callable(function):
        raise ConfigError(f"distillation.on_policy.{key}: expected a function, got {path!r}, not callable")
    found: Callable[..., Any] = function
    return found


def micro_batches(rollouts: Rollouts, sizes: Sizes, with_mask: bool = False) -> list[dict[str, Tensor]]:
    """Return batches of Megatron's GPT datasets, of S tokens per row, in which only sampled labels count.

    Args:
        rollouts: [n, at most S + 1] tokens.
        sizes: b, S and whether the data are conversations: then a row is packed data of one sequence.
        with_mask: whether the data have attention masks: then a causal one.
    """
    length = sizes.sequence
    tokens = torch.nn.functional.pad(rollouts.tokens, (0, length + 1 - rollouts.tokens.shape[1]))
    label_at = torch.arange(1, length + 1, device=tokens.device)
    counts = (label_at >= rollouts.begins.unsqueeze(-1)) & (label_at < rollouts.ends.unsqueeze(-1))
    fields = {
        "tokens": tokens[:, :-1],
        "labels": tokens[:, 1:],
        "loss_mask": counts.float(),
        "position_ids": (label_at - 1).expand_as(counts),
    }
    if with_mask:
        mask = torch.ones(length, length, dtype=torch.bool, device=tokens.device).triu(1)
        fields["attention_mask"] = mask.expand(len(tokens), 1, -1, -1)
    if sizes.chats:
        bounds = torch.full((length + 1,), length, dtype=torch.int32, device=tokens.device)
        bounds[0] = 0
        fields["cu_seqlens"] = bounds.expand(len(tokens), -1)
        fields["max_seqlen"] = bounds[1:2].expand(len(tokens))
    parts = {name: value.split(sizes.micro_batch) for name, value in fields.items()}
    return [{name: part[index].contiguous() for name, part in parts.items()} for index in range(len(parts["tokens"]))]


def numbers(rollouts: Rollouts, vocabulary: int) -> dict[str, Tensor]:
    """Return [n, 2] fp32 by name: per text a value and the number of texts that it counts for.

    `distinct-2` is the share of different pairs of neighbors among those of a text (Li et al., 2016, arXiv:1510.03055);
    a text of one token has none. A row without text does not count.
    """
    tokens, begins, ends = rollouts.tokens, rollouts.begins.unsqueeze(-1), rollouts.ends.unsqueeze(-1)
    at = torch.arange(tokens.shape[1] - 1, device=tokens.device)
    is_pair = (at >= begins) & (at + 1 < ends)
    pairs = (tokens[:, :-1] * vocabulary + tokens[:, 1:]).masked_fill(~is_pair, -1).sort(-1).values
    is_new = torch.nn.functional.pad(pairs[:, 1:] != pairs[:, :-1], (1, 0), value=True) & (pairs >= 0)
    count = is_pair.sum(-1)
    distinct = is_new.sum(-1) / count.clamp_min(1)
    one = (ends > begins).squeeze(-1).float()
    values = {
        "own text length": ((rollouts.ends - rollouts.begins).float(), one),
        "own text ended": (rollouts.ended.float(), one),
        "own text distinct-2": (distinct, (count > 0).float()),
    }
    return {name: torch.stack([value.float(), counted], -1) for name, (value, counted) in values.items()}
