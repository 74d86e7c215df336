"""Where the teacher's stages lie on the student's ranks, whatever parallelism either has."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from abkd_megatron.errors import ConfigError


@dataclass(frozen=True, order=True)
class RankCoords:
    """A rank's place in the student's layout: its index in each of these groups."""

    pp: int
    dp: int
    cp: int
    tp: int


def neighbors_of(
    student: tuple[int, int], data_parallel: int, teacher: tuple[int, int], *, has_experts: bool = False
) -> tuple[int, int]:
    """Of the teacher: how many data-parallel neighbors are one tensor-parallel group, and how many such a cell has.

    Args:
        student: its tensor and pipeline parallelism.
        data_parallel: of the student.
        teacher: its tensor and pipeline parallelism.
        has_experts: whether the teacher is a mixture of experts.

    Raises:
        ConfigError: for a teacher that cannot be laid out so.
    """
    (tensor, stages), (tensor_parallel, pipeline_parallel) = student, teacher
    if has_experts and student != teacher:
        raise ConfigError(
            "a teacher with experts must have the student's tensor and pipeline parallelism, for its expert groups are "
            "made of these; remove tensor-model-parallel-size and pipeline-model-parallel-size from `teacher:`"
        )
    if tensor_parallel % tensor:
        raise ConfigError(
            f"teacher.tensor-model-parallel-size is {tensor_parallel}, which is no multiple of the student's {tensor}; "
            "give it a multiple, or leave it out to have the student's"
        )
    joined, blocks = tensor_parallel // tensor, pipeline_parallel // math.gcd(pipeline_parallel, stages)
    if data_parallel % (joined * blocks):
        raise ConfigError(
            f"a teacher of tensor parallelism {tensor_parallel} and pipeline parallelism {pipeline_parallel} spans "
            f"{joined * blocks} data-parallel ranks of the student, whose {data_parallel} it does not divide; give it "
            "fewer ranks (teacher.tensor-model-parallel-size, teacher.pipeline-model-parallel-size), or the student "
            "more data parallelism"
        )
    return joined, blocks


class TeacherLayout:
    """The teacher's layout over the ranks of the student, seen from one rank.

    A *host* is the tensor-parallel group of one teacher stage: the ranks of one student stage, of as many data-parallel
    neighbors as it takes to be `tensor_parallel`. Hosts are numbered along the student's stages, and within a stage
    along the neighbors; each `pipeline_parallel` hosts in a row are one *replica* of the teacher. The fewest
    neighbors for which that comes out even form a *cell*, and share its replicas: micro-batch i of the cell's
    neighbor n is the work of replica (i * neighbors + n) % replicas. So every rank holds one stage of the teacher,
    all have as much to do, and hidden states only ever move forward: to a later stage of the student, or along its
    neighbors within the same one, which is why nobody can wait for somebody who waits for him.

    The student's own layout is the case of one neighbor and one replica: then only hidden states travel.

    Args:
        places: of all ranks of the job, by global rank.
        rank: this one.
        tensor_parallel: of the teacher, a multiple of the student's.
        pipeline_parallel: of the teacher.
        has_experts: whether the teacher is a mixture of experts, which must lie as the student does.

    Attributes:
        neighbors: of a cell.
        replicas: of a cell.
        host: global ranks of this rank's tensor-parallel group of the teacher, in order.
        index: of this rank in its host.
        replica: of this rank, in its cell.
        stage: of the teacher, on this rank.
        pipeline: global ranks that hold the same share of the other stages of this replica, in stage order.

    Raises:
        ConfigError: see `neighbors_of`.
    """

    def __init__(
        self,
        places: Sequence[RankCoords],
        rank: int,
        tensor_parallel: int,
        pipeline_parallel: int,
        *,
        has_experts: bool = False,
    ) -> None:
        self._places = list(places)
        self._rank_at = {place: number for number, place in enumerate(places)}
        self.place = places[rank]
        self.student_stages, data_parallel, _, self.student_tensor_parallel = (
            1 + max(values) for values in zip(*((p.pp, p.dp, p.cp, p.tp) for p in places), strict=True)
        )
        self._joined, blocks = neighbors_of(
            (self.student_tensor_parallel, self.student_stages),
            data_parallel,
            (tensor_parallel, pipeline_parallel),
            has_experts=has_experts,
        )
        self.tensor_parallel, self.pipeline_parallel = tensor_parallel, pipeline_parallel
        self.neighbors = self._joined * blocks
        self._first_neighbor = self.place.dp - self.place.dp % self.neighbors
        hosts = [self._host(stage, block) for stage in range(self.student_stages) for block in range(blocks)]
        self.replicas = len(hosts) // pipeline_parallel
        (number,) = (n for n, host in enumerate(hosts) if rank in host)
        self.host = hosts[number]
        self.index = self.host.index(rank)
        self.replica, self.stage = divmod(number, pipeline_parallel)
        self._stages = [hosts[r * pipeline_parallel : (r + 1) * pipeline_parallel] for r in range(self.replicas)]
        self.pipeline = [host[self.index] for host in self._stages[self.replica]]

    @property
    def is_students(self) -> bool:
        """Whether the teacher lies as the student does, stage by stage."""
        return self.neighbors == self.replicas == 1

    @property
    def neighbor(self) -> int:
        """This rank's number in its cell."""
        return self.place.dp - self._first_neighbor

    def replica_for(self, micro_batch: int, neighbor: int) -> int:
        """Whose work this neighbor's micro-batch is; micro-batches are numbered as they come, over all steps."""
        return (micro_batch * self.neighbors + neighbor) % self.replicas

    def first_host(self, replica: int) -> list[int]:
        """Ranks that hold the replica's first stage, and take tokens."""
        return self._stages[replica][0]

    def student_stage_of(self, rank: int) -> int:
        """The student's stage on a rank."""
        return self._places[rank].pp

    def source_of_tokens(self, neighbor: int, index: int) -> int:
        """The rank that has this neighbor's tokens and gives them to rank `index` of a replica's first host."""
        return self._rank(0, neighbor, index % self.student_tensor_parallel)

    def source_of_result(self, replica: int, neighbor: int, tp: int) -> int:
        """The rank that gives the replica's last hidden states to rank `tp` of this neighbor's last stage."""
        host, wanted = self._stages[replica][-1], self.destination(neighbor, tp)
        if wanted in host:
            return wanted
        return host[(neighbor % self._joined) * self.student_tensor_parallel + tp]

    def destination(self, neighbor: int, tp: int) -> int:
        """Rank `tp` of this neighbor's last stage, where the loss is."""
        return self._rank(self.student_stages - 1, neighbor, tp)

    def route(self, source: int, to: int) -> list[int]:
        """The ranks that a message passes, both ends included: no hop is longer than to the student's next stage.

        A message that skipped stages would be open until the stage that receives it has come to the micro-batch, and
        any synchronization of the device on the sender would wait as long: the stages would run one after another.
        """
        here, there = self._places[source], self._places[to]
        return [source, *(self._rank_at[replace(there, pp=pp)] for pp in range(here.pp + 1, there.pp)), to]

    def links(self, kind: str) -> set[tuple[int, int]]:
        """(from, to) of every message of one kind in this rank's cell; the same on all its ranks.

        Args:
            kind: "tokens", "hidden" (between stages of the teacher) or "results".
        """
        found: set[tuple[int, int]] = set()
        for replica, hosts in enumerate(self._stages):
            if kind == "hidden":
                found |= {link for of in zip(*hosts, strict=True) for link in itertools.pairwise(of)}
                continue
            for neighbor in range(self.neighbors):
                ends = self.results_of(replica, neighbor)
                if kind == "tokens":
                    ends = [(a, b) for a, b in self.tokens_of(replica, neighbor) if self.student_stage_of(b) > 0]
                found |= {link for source, to in ends for link in itertools.pairwise(self.route(source, to))}
        return {(source, to) for source, to in found if source != to}

    def tokens_of(self, replica: int, neighbor: int) -> list[tuple[int, int]]:
        """(from, to) of this neighbor's tokens, for each rank of the replica's first host; to itself where they are.

        Between ranks of the student's first stage they are exchanged in one batch, see `TeacherRunner`.
        """
        return [(self.source_of_tokens(neighbor, at), to) for at, to in enumerate(self.first_host(replica))]

    def results_of(self, replica: int, neighbor: int) -> list[tuple[int, int]]:
        """(from, to) of the last hidden states of this neighbor's micro-batch, for each of its tensor ranks."""
        return [
            (self.source_of_result(replica, neighbor, tp), self.destination(neighbor, tp))
            for tp in range(self.student_tensor_parallel)
        ]

    @property
    def cell(self) -> list[int]:
        """All ranks that share this rank's replicas."""
        return sorted(rank for replica in self._stages for host in replica for rank in host)

    def _host(self, stage: int, block: int) -> list[int]:
        return [
            self._rank(stage, block * self._joined + n, tp)
            for n in range(self._joined)
            for tp in range(self.student_tensor_parallel)
        ]

    def _rank(self, stage: int, neighbor: int, tp: int) -> int:
        return self._rank_at[replace(self.place, pp=stage, dp=self._first_neighbor + neighbor, tp=tp)]
