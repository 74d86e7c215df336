"""Forward pass of the teacher on the student's micro-batches, with the messages between ranks."""

from collections import defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.num_microbatches_calculator import get_num_microbatches
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer import TransformerConfig

from abkd_megatron.errors import ConfigError
from abkd_megatron.losses.mixed_sequences import Draw
from abkd_megatron.teacher.build import Teacher
from abkd_megatron.teacher.channel import Channel, Outbox, batched_p2p, new_group
from abkd_megatron.teacher.model import Model, mixed_embeddings, without_head

_Expected = tuple[Sequence[int], torch.dtype]
"""Shape and dtype of a message."""

# Sent before a message whose shape the receiver cannot know: its three sizes.
_HEADER: _Expected = (3,), torch.int64


def hidden_between_stages(config: TransformerConfig, length: int, size: int, tensor_parallel: int) -> _Expected:
    """Return shape and dtype of hidden states between stages, as in Megatron (fp32 with fp32-residual-connection)."""
    length = length // tensor_parallel if config.sequence_parallel else length
    return (length, size, config.hidden_size), config.pipeline_dtype or config.params_dtype


class TeacherRunner:
    """Runs this rank's stage of the teacher, once per micro-batch, in any `TeacherLayout`.

    All work is done within the student's forward step of one micro-batch, so nothing must be known in advance. Tokens
    go from the student's first stage to the first stage of the replica for this micro-batch, hidden states from stage
    to stage of that replica, and the last ones to the student's last stage. A teacher in the student's layout only
    sends hidden states.

    Ranks of one student stage exchange messages within the forward step, where Megatron does not synchronize. Messages
    to a later stage wait in the `Outbox` for Megatron's send of this micro-batch and are relayed stage by stage. Stage
    i + 1 receives them no later than it runs the micro-batch, so the pipeline is not serialized.

    In both schedules, when a stage runs micro-batch m, the next stage has received the messages of micro-batch
    m - `max_lead`. Waiting for older sends therefore never blocks, and frees their tensors; not every backend reports
    completed sends by itself.

    Args:
        chunks: the student's model chunks on this rank.
        teacher: this rank's share of the teacher.
        outbox: for messages to later stages, see `TeacherRunners`.
        timeout: for messages.

    Collectives: the constructor creates a group per kind of message and pipeline or sharing group, and connects all
    pairs of ranks that will exchange messages.
    """

    def __init__(self, chunks: Sequence[Model], teacher: Teacher, outbox: Outbox, timeout: timedelta) -> None:
        student = chunks[0]
        self._student, self._teacher, self._layout = student, teacher, teacher.layout
        layout, config = self._layout, student.config
        self._micro_batch = 0
        self._extent: tuple[int, int] | None = None
        self._device = next(parameter.device for parameter in (*student.parameters(), *teacher.parameters()))
        self._num_chunks = len(chunks)
        self._microbatch_group_size = config.microbatch_group_size_per_vp_stage or layout.student_stages
        max_lead = 2 * len(chunks) * max(layout.student_stages, self._microbatch_group_size) + 2
        per_micro_batch = layout.num_dp_replicas * max(layout.tensor_parallel, layout.student_tensor_parallel)

        def channel(kind: str, ranks: Sequence[int]) -> Channel | None:
            group = new_group(ranks, timeout)
            if group is None:
                return None
            return Channel(group, layout.links(kind), self._device, max_lead * per_micro_batch)

        # One group per kind: some links have hidden states in one direction and results in the other, which could be
        # confused or wait for each other.
        sharing_group = () if layout.matches_student else layout.sharing_group
        self._stages = channel("hidden", layout.pipeline if layout.pipeline_parallel > 1 else ())
        self._tokens, self._results = channel("tokens", sharing_group), channel("results", sharing_group)
        # Ranks of the first stage exchange tokens in one batch.
        first = [rank for rank in sharing_group if layout.student_stage_of(rank) == 0]
        self._first_stage = new_group(first if layout.coords.pp == 0 else (), timeout)
        if self._first_stage is not None:
            dist.barrier(
                group=self._first_stage
            )  # NCCL needs all ranks in a group's first call; exchanges involve only some
        self._outbox = outbox
        self._posted: dict[tuple[Channel, int], deque[tuple[dist.Work, torch.Tensor]]] = defaultdict(deque)
        self._passes = self._posted_for = 0
        self._counters = []
        if layout.student_stages > 1:
            if config.variable_seq_lengths:
                # NCCL needs all ranks in the first call of Megatron's group, but a stage waits for a header before it.
                dist.barrier(group=teacher.pg_collection.pp)
            if len(chunks) > 1:
                self._counters = [chunk.register_forward_pre_hook(self._count) for chunk in chunks]

    def run(
        self, batch: Mapping[str, Any], draw: Callable[[int, int], Draw | None] | None = None
    ) -> torch.Tensor | None:
        """Run this rank's stage on its share of the sharing group's next micro-batches.

        Args:
            batch: arguments of the student's forward on this micro-batch.
            draw: returns what a micro-batch is mixed with, by DP replica and number of sequences; None: nothing.

        Returns:
            On the student's last stage, the teacher's last hidden states for this rank's micro-batch: [s, b, H], or
            [s/TP, b, H] if the student is sequence parallel. None on other stages.
        """
        layout = self._layout
        number, self._micro_batch = self._micro_batch, self._micro_batch + 1
        length, size = self._extent_of(batch)
        if self._student.training:  # validation may use other sizes
            self._extent = length, size
        work = [n for n in range(layout.num_dp_replicas) if layout.replica_for(number, n) == layout.replica]
        tokens = self._distribute_tokens(batch, number, work, (size, length))

        model, mine = self._teacher.model, None
        between, result = self._expected_hidden(length, size), self._expected_result(length, size)
        for n in work:
            inputs = tokens.get(n, batch)
            if layout.stage > 0:
                assert self._stages is not None
                model.set_input_tensor(self._receive(self._stages, between, layout.pipeline[layout.stage - 1]))
            with without_head(model), mixed_embeddings(model, draw(n, size) if draw is not None else None):
                output = model(
                    inputs.get("input_ids"),
                    inputs.get("position_ids"),
                    inputs.get("attention_mask"),
                    packed_seq_params=batch.get("packed_seq_params"),
                    padding_mask=inputs.get("padding_mask"),
                )
            if layout.stage + 1 < layout.pipeline_parallel:
                assert self._stages is not None
                to = layout.pipeline[layout.stage + 1]
                if self._student.config.variable_seq_lengths:
                    header = torch.tensor(output.shape, dtype=torch.int64, device=self._device)
                    self._send(self._stages, header, to)
                self._send(self._stages, output, to, between)
            else:
                kept = self._send_results(output, n, result)
                mine = kept if kept is not None else mine
        return self._distribute_results(number, mine, result)

    def again(self, batch: Mapping[str, Any]) -> torch.Tensor | None:
        """Run the micro-batch of the last call of `run` once more, outside Megatron's schedule; return what `run` does.

        For all ranks at the same time, after a step's last micro-batch. Not with variable_seq_lengths over several
        pipeline stages, where messages are received within Megatron's.

        Args:
            batch: as in that call.

        Collectives: those of a pass of the teacher, and its messages, which have left when this returns.
        """
        self._outbox.release()
        self.drain()
        self._micro_batch -= 1
        hidden_states = self.run(batch)
        self._outbox.release()
        self.drain()
        return hidden_states

    def _extent_of(self, batch: Mapping[str, Any]) -> tuple[int, int]:
        """Return the tokens per sequence on this context-parallel rank, and the number of sequences."""
        if self._student.pre_process:
            size, length = batch["input_ids"].shape
            return length, size
        like = self._student.decoder.input_tensor
        parts = self._layout.student_tensor_parallel if self._student.config.sequence_parallel else 1
        return like.shape[0] * parts, like.shape[1]

    def _expected_hidden(self, length: int, size: int) -> _Expected:
        return hidden_between_stages(self._teacher.model.config, length, size, self._layout.tensor_parallel)

    def _expected_result(self, length: int, size: int) -> _Expected:
        """Return shape and dtype of the hidden states after the final norm, for one of the student's ranks."""
        config = self._teacher.model.config
        length = length // self._layout.student_tensor_parallel if self._student.config.sequence_parallel else length
        return (length, size, config.hidden_size), config.params_dtype

    def _send(self, channel: Channel, tensor: torch.Tensor, to: int, expected: _Expected | None = None) -> None:
        """Send immediately within the stage; otherwise with the student's activation."""
        send = partial(channel.send, tensor, to, expected)
        if self._layout.student_stage_of(to) > self._layout.coords.pp:
            self._outbox.add(send)
        else:
            send()

    def _receive(self, channel: Channel, expected: _Expected, source: int) -> torch.Tensor:
        """Return the next message of a link, which may have been posted ahead."""
        posted = self._posted[channel, source]
        if not posted:
            if self._student.config.variable_seq_lengths and self._layout.student_stages > 1:
                raise ConfigError(
                    "variable_seq_lengths with pipeline stages: expected Megatron's receive to start a timer of this "
                    "package, but config.timers was replaced since the last micro-batch, as Megatron's evaluate() "
                    "does; pad micro-batches to one length"
                )
            return channel.receive(*expected, source)
        work, received = posted.popleft()
        work.wait()
        if (tuple(received.shape), received.dtype) != (tuple(expected[0]), expected[1]):
            raise RuntimeError(
                f"message of the teacher: expected {list(expected[0])} {expected[1]}, got {list(received.shape)} "
                f"{received.dtype}, because micro-batches changed size between steps; set timing-log-level below 2"
            )
        return received

    def post_ahead(self, name: str) -> None:
        """Post the receives of the next micro-batch within Megatron's receive of its activation, where required.

        This is required if Megatron synchronizes after a stage's send and before the next stage's forward step: with
        variable_seq_lengths (between shapes and activations), and with virtual stages at timing-log-level 2 (the next
        stage runs a backward pass in between, whose gradient the waiting stage would have to receive).
        """
        if self._layout.coords.pp == 0:
            return
        if self._student.config.variable_seq_lengths:
            assert self._stages is not None
            source = self._layout.pipeline[self._layout.stage - 1]
            sizes = self._stages.receive(*_HEADER, source).tolist()  # synchronizes, as Megatron does for its shapes
            dtype = self._expected_hidden(1, 1)[1]
            self._posted[self._stages, source].append(self._stages.post(sizes, dtype, source))
            return
        if self._num_chunks == 1 or self._outbox.log_level < 2 or not torch.is_grad_enabled() or self._extent is None:
            return
        if name == "forward-recv":  # once per step, at the start of the interleaved schedule
            self._passes, self._posted_for = 0, -1
        # A stage's forward passes in the order of get_schedule_table: groups of micro-batches, chunk by chunk.
        batches, group = get_num_microbatches(), self._microbatch_group_size
        done, within = divmod(self._passes, group * self._num_chunks)
        is_first_chunk = within < min(group, batches - done * group)
        if self._passes < batches * self._num_chunks and is_first_chunk and self._posted_for != self._passes:
            self._posted_for = self._passes
            for channel, (shape, dtype), source in self._incoming(self._micro_batch, *self._extent):
                self._posted[channel, source].append(channel.post(shape, dtype, source))

    def _count(self, *_: Any) -> None:
        self._passes += torch.is_grad_enabled()

    def _incoming(self, micro_batch: int, length: int, size: int) -> list[tuple[Channel, _Expected, int]]:
        """Return the messages from the previous stage within one micro-batch, in the order of each link."""
        layout, rank = self._layout, self._layout.stage_group[self._layout.index]
        found = []
        if layout.stage > 0 and layout.student_stage_of(layout.pipeline[layout.stage - 1]) < layout.coords.pp:
            assert self._stages is not None
            for n in range(layout.num_dp_replicas):
                if layout.replica_for(micro_batch, n) == layout.replica:
                    found.append((self._stages, self._expected_hidden(length, size), layout.pipeline[layout.stage - 1]))
        for channel, ends_of, expected in (
            (self._tokens, layout.tokens_of, ((2, size, length), torch.int64)),
            (self._results, layout.results_of, self._expected_result(length, size)),
        ):
            for n in range(layout.num_dp_replicas) if channel is not None else ():
                assert channel is not None
                for source, to in ends_of(layout.replica_for(micro_batch, n), n):
                    route = layout.route(source, to)
                    if rank in route[1:] and layout.student_stage_of(before := route[route.index(rank) - 1]) < (
                        layout.coords.pp
                    ):
                        found.append((channel, expected, before))
        return found

    def _distribute_tokens(
        self, batch: Mapping[str, Any], micro_batch: int, work: list[int], shape: tuple[int, int]
    ) -> dict[int, Mapping[str, Any]]:
        """Send tokens to the replicas that process them; return the tokens for this rank, by DP replica."""
        layout = self._layout
        if layout.matches_student:
            return {}
        assert self._tokens is not None
        here, rank = layout.coords.pp, layout.stage_group[layout.index]
        found: dict[int, torch.Tensor] = {}
        outgoing: list[tuple[torch.Tensor, int]] = []
        awaited: list[tuple[torch.Tensor, int]] = []
        mine: torch.Tensor | None = None
        if here == 0:
            for name in ("attention_mask", "packed_seq_params")[: 1 + (layout.num_dp_replicas > 1)]:
                if batch.get(name) is not None:
                    raise ConfigError(
                        f"a teacher with independent parallelism supports no {name}, only tokens and positions; use "
                        "the student's parallelism for it, or for masks set no-create-attention-mask-in-dataloader"
                    )
            mine = torch.stack([batch["input_ids"], batch["position_ids"]])
        expected = (2, *shape), torch.int64
        for n in range(layout.num_dp_replicas):
            for source, to in layout.tokens_of(layout.replica_for(micro_batch, n), n):
                if source == to == rank:
                    assert mine is not None
                    found[n] = mine
                elif layout.student_stage_of(to) > 0:
                    arrived = self._relay(self._tokens, source, to, mine, expected)
                    if arrived is not None:
                        found[n] = arrived
                elif rank == source:
                    assert mine is not None
                    outgoing.append((mine, to))
                elif rank == to:
                    found[n] = torch.empty(expected[0], dtype=torch.int64, device=self._device)
                    awaited.append((found[n], source))
        if self._first_stage is not None:
            batched_p2p(outgoing, awaited, self._first_stage)
        # A stage without tokens must not fall back to this rank's batch.
        return {n: dict(zip(("input_ids", "position_ids"), found[n], strict=True)) if n in found else {} for n in work}

    def _relay(
        self,
        channel: Channel,
        source: int,
        to: int,
        own: torch.Tensor | None,
        expected: _Expected,
    ) -> torch.Tensor | None:
        """Relay a message along its route; return it on its destination."""
        route, rank = self._layout.route(source, to), self._layout.stage_group[self._layout.index]
        if rank not in route:
            return None
        at = route.index(rank)
        tensor = own if at == 0 else self._receive(channel, expected, route[at - 1])
        if rank == to:
            return tensor
        assert tensor is not None
        self._send(channel, tensor, route[at + 1], expected)
        return None

    def _send_results(self, hidden: torch.Tensor, dp_replica: int, expected: _Expected) -> torch.Tensor | None:
        """Send the teacher's last hidden states to the rank that computes the loss; return them if it is this rank."""
        layout = self._layout
        parallel = layout.student_tensor_parallel
        scattered, wanted = (m.config.sequence_parallel for m in (self._teacher.model, self._student))
        parts = [hidden] * parallel
        if scattered != wanted or (scattered and layout.tensor_parallel != parallel):
            whole = hidden
            if scattered:
                whole = gather_from_sequence_parallel_region(hidden, group=self._teacher.pg_collection.tp)
            # Cloned, because a pending view would keep the whole tensor alive.
            parts = [part.clone() for part in whole.chunk(parallel)] if wanted else [whole] * parallel
        kept, rank = None, layout.stage_group[layout.index]
        for tp, (source, to) in enumerate(layout.results_of(layout.replica, dp_replica)):
            if source != rank:
                continue
            if to == rank:
                kept = parts[tp]
            else:
                assert self._results is not None
                self._send(self._results, parts[tp], layout.route(source, to)[1], expected)
        return kept

    def _distribute_results(
        self, micro_batch: int, mine: torch.Tensor | None, expected: _Expected
    ) -> torch.Tensor | None:
        """Relay results to later stages; on the last stage, return this rank's."""
        layout, rank = self._layout, self._layout.stage_group[self._layout.index]
        if self._results is not None:
            for n in range(layout.num_dp_replicas):
                for source, to in layout.results_of(layout.replica_for(micro_batch, n), n):
                    if rank != source and source != to:
                        arrived = self._relay(self._results, source, to, None, expected)
                        mine = arrived if arrived is not None else mine
        if layout.coords.pp + 1 < layout.student_stages:
            return None
        assert mine is not None
        return mine

    def _channels(self) -> list[Channel]:
        return [channel for channel in (self._stages, self._tokens, self._results) if channel is not None]

    def drain(self) -> None:
        """Wait for all sends, which have left the outbox."""
        # Reset here, because the step after validation does not start our timers: evaluate() has replaced them.
        self._passes = self._posted_for = 0
        for channel in self._channels():
            channel.drain()

    def close(self) -> None:
        """Drain, and remove all hooks."""
        self.drain()
        for counter in self._counters:
            counter.remove()

    @property
    def num_in_flight(self) -> int:
        """Number of sends from this rank that are not known to be complete."""
        return sum(channel.num_in_flight for channel in self._channels())
