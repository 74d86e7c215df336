"""The teacher's forward pass on the student's micro-batches: who runs which stage, and what travels where."""

from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region

from abkd_megatron.distillation.lane import Lane, exchange, new_group
from abkd_megatron.distillation.teacher import Teacher
from abkd_megatron.errors import ConfigError


class TeacherRunner:
    """Runs this rank's stage of the teacher, once a micro-batch, wherever `TeacherLayout` has put it.

    Everything happens within the student's forward step, a micro-batch at a time, so nothing has to be known ahead:
    tokens go from the student's first stage to the first stage of the replica whose turn it is, hidden states from
    stage to stage of that replica, and its last ones to the student's last stage. A teacher that lies as the student
    does only has the second of the three.

    Args:
        student: this rank's first model chunk.
        teacher: this rank's stage.
        timeout: for messages.

    Collectives: making it creates a group a pipeline or cell of ranks for each kind of message there is.
    """

    def __init__(self, student: GPTModel, teacher: Teacher, timeout: timedelta) -> None:
        self._student, self._teacher, self._layout = student, teacher, teacher.layout
        layout = self._layout
        self._micro_batch = 0
        # Each kind of message in a group of its own, or two of them could be taken for each other.
        cell = () if layout.is_students else layout.cell
        stages = new_group(layout.pipeline if layout.pipeline_parallel > 1 else (), timeout)
        tokens, results = new_group(cell, timeout), new_group(cell, timeout)
        self._stages, self._tokens, self._results = (
            Lane(group) if group is not None else None for group in (stages, tokens, results)
        )
        # Ranks of the first stage exchange tokens at one time.
        first = [rank for rank in cell if layout.student_stage_of(rank) == 0]
        self._now = new_group(first if layout.place.pp == 0 else (), timeout)
        if self._now is not None:
            dist.barrier(group=self._now)  # NCCL wants all of a group in its first call; exchanges are of some

    def run(self, batch: Mapping[str, Any]) -> torch.Tensor | None:
        """Run what is this rank's work of the cell's next micro-batches.

        Args:
            batch: the arguments of the student's forward on this micro-batch.

        Returns:
            On the student's last stage, the teacher's last hidden states for this rank's own micro-batch: [s, b, H],
            or [s/TP, b, H] if the student is sequence parallel. Elsewhere None.
        """
        layout, config = self._layout, self._teacher.model.config
        number, self._micro_batch = self._micro_batch, self._micro_batch + 1
        length, size, device = self._extent(batch)
        work = [n for n in range(layout.neighbours) if layout.replica_for(number, n) == layout.replica]
        tokens = self._distribute_tokens(batch, number, work, (size, length), device)

        model, mine = self._teacher.model, None
        own_length = length // layout.tensor_parallel if config.sequence_parallel else length
        for n in work:
            inputs = tokens.get(n, batch)
            if layout.stage > 0:
                assert self._stages is not None
                shape = (own_length, size, config.hidden_size)
                previous = layout.pipeline[layout.stage - 1]
                model.set_input_tensor(self._stages.receive(shape, config.params_dtype, device, previous))
            output = model(
                inputs.get("input_ids"),
                inputs.get("position_ids"),
                inputs.get("attention_mask"),
                packed_seq_params=batch.get("packed_seq_params"),
                padding_mask=inputs.get("padding_mask"),
                output_processor=_hidden_states,
            )
            if layout.stage + 1 < layout.pipeline_parallel:
                assert self._stages is not None
                self._stages.send(output, layout.pipeline[layout.stage + 1])
            else:
                kept = self._hand_over(output, n)
                mine = kept if kept is not None else mine

        place = layout.place
        if place.pp + 1 < layout.student_stages:
            return None
        if mine is None:
            assert self._results is not None
            replica = layout.replica_for(number, layout.neighbour)
            source = layout.source_of_result(replica, layout.neighbour, place.tp)
            shape = (self._student_length(length), size, config.hidden_size)
            mine = self._results.receive(shape, config.params_dtype, device, source)
        return mine

    def _extent(self, batch: Mapping[str, Any]) -> tuple[int, int, torch.device]:
        """Tokens of a sequence on this context-parallel rank, sequences, and where they are."""
        if self._student.pre_process:
            size, length = batch["input_ids"].shape
            return length, size, batch["input_ids"].device
        like = self._student.decoder.input_tensor
        parts = self._layout.student_tensor_parallel if self._student.config.sequence_parallel else 1
        return like.shape[0] * parts, like.shape[1], like.device

    def _student_length(self, length: int) -> int:
        return length // self._layout.student_tensor_parallel if self._student.config.sequence_parallel else length

    def _distribute_tokens(
        self,
        batch: Mapping[str, Any],
        micro_batch: int,
        work: list[int],
        shape: tuple[int, int],
        device: torch.device,
    ) -> dict[int, Mapping[str, Any]]:
        """Give tokens to the replicas whose work they are; return what this rank got, by neighbour."""
        layout = self._layout
        if layout.is_students:
            return {}
        assert self._tokens is not None
        rank, here = layout.host[layout.index], layout.place.pp
        found: dict[int, torch.Tensor] = {}
        at_once: list[tuple[torch.Tensor, int]] = []
        if here == 0:
            for name in ("attention_mask", "packed_seq_params")[: 1 + (layout.neighbours > 1)]:
                if batch.get(name) is not None:
                    raise ConfigError(
                        f"a teacher in a layout of its own is sent tokens and positions, not {name}; leave the teacher "
                        "in the student's layout, or for masks give no-create-attention-mask-in-dataloader"
                    )
            mine = torch.stack([batch["input_ids"], batch["position_ids"]])
            host = layout.first_host(layout.replica_for(micro_batch, layout.neighbour))
            for index, to in enumerate(host):
                if layout.source_of_tokens(layout.neighbour, index) != rank:
                    continue
                if to == rank:
                    found[layout.neighbour] = mine
                elif layout.student_stage_of(to) == 0:
                    at_once.append((mine, to))
                else:
                    self._tokens.send(mine, to)
        awaited: list[tuple[torch.Tensor, int]] = []
        if layout.stage == 0:
            for n in work:
                source = layout.source_of_tokens(n, layout.index)
                if n in found:
                    continue
                if here == 0:
                    found[n] = torch.empty((2, *shape), dtype=torch.int64, device=device)
                    awaited.append((found[n], source))
                else:
                    found[n] = self._tokens.receive((2, *shape), torch.int64, device, source)
        if self._now is not None:
            exchange(at_once, awaited, self._now)
        # A stage without tokens must not take the neighbour's for its own.
        return {n: dict(zip(("input_ids", "position_ids"), found[n], strict=True)) if n in found else {} for n in work}

    def _hand_over(self, hidden: torch.Tensor, neighbour: int) -> torch.Tensor | None:
        """Send the teacher's last hidden states to where the loss is; return them if that is here."""
        layout = self._layout
        parallel = layout.student_tensor_parallel
        scattered, wanted = (m.config.sequence_parallel for m in (self._teacher.model, self._student))
        parts = [hidden] * parallel
        if scattered != wanted or (scattered and layout.tensor_parallel != parallel):
            whole = hidden
            if scattered:
                whole = gather_from_sequence_parallel_region(hidden, group=self._teacher.pg_collection.tp)
            # Cloned, since a part that waits would keep the whole.
            parts = [part.clone() for part in whole.chunk(parallel)] if wanted else [whole] * parallel
        kept, rank = None, layout.host[layout.index]
        for tp, part in enumerate(parts):
            if layout.source_of_result(layout.replica, neighbour, tp) != rank:
                continue
            to = layout.destination(neighbour, tp)
            if to == rank:
                kept = part
            else:
                assert self._results is not None
                self._results.send(part, to)
        return kept

    def drain(self) -> None:
        """Wait until every message has left. Only between steps."""
        for lane in (self._stages, self._tokens, self._results):
            if lane is not None:
                lane.drain()

    @property
    def num_in_flight(self) -> int:
        """Messages started here and not known to have arrived."""
        return sum(lane.num_in_flight for lane in (self._stages, self._tokens, self._results) if lane is not None)


def _hidden_states(*, hidden_states: torch.Tensor, **_: Any) -> torch.Tensor:
    """The teacher's output: not its logits, before the student's head asks for them."""
    return hidden_states
