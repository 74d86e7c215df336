"""Mapping of the teacher's pipeline stages to the student's ranks, for any parallelism of the two."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from abkd_megatron.errors import ConfigError


@dataclass(frozen=True, order=True)
class RankCoords:
    """A rank's index in each of the student's parallel groups."""

    pp: int
    dp: int
    cp: int
    tp: int


def sharing_group_shape(
    student: tuple[int, int], data_parallel: int, teacher: tuple[int, int], *, has_experts: bool = False
) -> tuple[int, int]:
    """Return the shape of a sharing group: (DP replicas per stage group, stage groups per student stage).

    Args:
        student: tensor and pipeline parallelism.
        data_parallel: of the student.
        teacher: tensor and pipeline parallelism.
        has_experts: the teacher is a mixture of experts.

    Raises:
        ConfigError: for a teacher that cannot be mapped to these ranks.
    """
    (tensor, stages), (tensor_parallel, pipeline_parallel) = student, teacher
    if has_experts and student != teacher:
        raise ConfigError(
            "a teacher with experts must have the student's tensor and pipeline parallelism, because its expert groups "
            "are built from them; remove tensor-model-parallel-size and pipeline-model-parallel-size from `teacher:`"
        )
    if tensor_parallel % tensor:
        raise ConfigError(
            f"teacher.tensor-model-parallel-size: expected a multiple of the student's {tensor}, got "
            f"{tensor_parallel}; set a multiple, or remove it to use the student's"
        )
    per_stage_group = tensor_parallel // tensor
    groups_per_stage = pipeline_parallel // math.gcd(pipeline_parallel, stages)
    if data_parallel % (per_stage_group * groups_per_stage):
        raise ConfigError(
            f"a teacher of tensor parallelism {tensor_parallel} and pipeline parallelism {pipeline_parallel} needs a "
            f"student data-parallel size divisible by {per_stage_group * groups_per_stage}, got {data_parallel}; lower "
            "teacher.tensor-model-parallel-size or teacher.pipeline-model-parallel-size, or raise the student's data "
            "parallelism"
        )
    return per_stage_group, groups_per_stage


class TeacherLayout:
    """The teacher's layout over the student's ranks, from the perspective of one rank.

    - A *stage group* is the tensor-parallel group of one teacher stage. It has the ranks of one student stage from as
      many DP replicas as `tensor_parallel` requires.
    - A *replica* is `pipeline_parallel` consecutive stage groups. Stage groups are numbered by student stage, then by
      DP replica.
    - A *sharing group* is the smallest set of DP replicas whose stage groups form whole replicas of the teacher. It
      shares these replicas: micro-batch i of its DP replica n is processed by replica
      (i * num_dp_replicas + n) % num_replicas.

    Every rank has one teacher stage, and all ranks have equal work. Messages only go to a later student stage, or to
    another DP replica of the same stage, so waits cannot be circular. With the student's parallelism a sharing group
    has one DP replica and one teacher replica, and only hidden states are sent.

    Args:
        all_coords: coordinates of all ranks of the job, by global rank.
        rank: this rank.
        tensor_parallel: of the teacher, a multiple of the student's.
        pipeline_parallel: of the teacher.
        has_experts: the teacher is a mixture of experts; it then needs the student's parallelism.

    Attributes:
        data_parallel: of the student.
        first_dp_replica: data-parallel rank of the sharing group's first DP replica.
        num_dp_replicas: DP replicas of the sharing group.
        num_replicas: teacher replicas of the sharing group.
        stage_group: global ranks of this rank's tensor-parallel group of the teacher, in order.
        index: this rank's index in its stage group.
        replica: this rank's teacher replica in its sharing group.
        stage: this rank's teacher stage.
        pipeline: global ranks with this rank's index in all stages of its replica, in stage order.

    Raises:
        ConfigError: see `sharing_group_shape`.
    """

    def __init__(
        self,
        all_coords: Sequence[RankCoords],
        rank: int,
        tensor_parallel: int,
        pipeline_parallel: int,
        *,
        has_experts: bool = False,
    ) -> None:
        self._all_coords = list(all_coords)
        self._rank_at = {coords: number for number, coords in enumerate(all_coords)}
        self.coords = all_coords[rank]
        self.student_stages, self.data_parallel, _, self.student_tensor_parallel = (
            1 + max(values) for values in zip(*((p.pp, p.dp, p.cp, p.tp) for p in all_coords), strict=True)
        )
        self._dp_replicas_per_stage_group, groups_per_stage = sharing_group_shape(
            (self.student_tensor_parallel, self.student_stages),
            self.data_parallel,
            (tensor_parallel, pipeline_parallel),
            has_experts=has_experts,
        )
        self.tensor_parallel, self.pipeline_parallel = tensor_parallel, pipeline_parallel
        self.num_dp_replicas = self._dp_replicas_per_stage_group * groups_per_stage
        self.first_dp_replica = self.coords.dp - self.coords.dp % self.num_dp_replicas
        stage_groups = [
            self._stage_group(stage, block) for stage in range(self.student_stages) for block in range(groups_per_stage)
        ]
        self.num_replicas = len(stage_groups) // pipeline_parallel
        (number,) = (n for n, group in enumerate(stage_groups) if rank in group)
        self.stage_group = stage_groups[number]
        self.index = self.stage_group.index(rank)
        self.replica, self.stage = divmod(number, pipeline_parallel)
        self._stages = [
            stage_groups[r * pipeline_parallel : (r + 1) * pipeline_parallel] for r in range(self.num_replicas)
        ]
        self.pipeline = [group[self.index] for group in self._stages[self.replica]]

    @property
    def matches_student(self) -> bool:
        """True if the teacher has the student's layout, stage by stage."""
        return self.num_dp_replicas == self.num_replicas == 1

    @property
    def dp_replica(self) -> int:
        """This rank's DP replica, counted within the sharing group."""
        return self.coords.dp - self.first_dp_replica

    def replica_for(self, micro_batch: int, dp_replica: int) -> int:
        """Return the replica that processes this micro-batch; micro-batches are counted over all steps."""
        return (micro_batch * self.num_dp_replicas + dp_replica) % self.num_replicas

    def first_stage_group(self, replica: int) -> list[int]:
        """Return the ranks of the replica's first stage, which receive tokens."""
        return self._stages[replica][0]

    def student_stage_of(self, rank: int) -> int:
        """Return the student's stage on a rank."""
        return self._all_coords[rank].pp

    def source_of_tokens(self, dp_replica: int, index: int) -> int:
        """Return the rank that sends this DP replica's tokens to rank `index` of a replica's first stage group."""
        return self._rank(0, dp_replica, index % self.student_tensor_parallel)

    def source_of_result(self, replica: int, dp_replica: int, tp: int) -> int:
        """Return the rank that sends the replica's last hidden states to rank `tp` of this DP replica's last stage."""
        group, wanted = self._stages[replica][-1], self.destination(dp_replica, tp)
        if wanted in group:
            return wanted
        return group[(dp_replica % self._dp_replicas_per_stage_group) * self.student_tensor_parallel + tp]

    def destination(self, dp_replica: int, tp: int) -> int:
        """Return rank `tp` of this DP replica's last stage, which computes the loss."""
        return self._rank(self.student_stages - 1, dp_replica, tp)

    def route(self, source: int, to: int) -> list[int]:
        """Return the ranks on a message's way, both ends included, in hops of at most one student stage.

        A message that skipped stages would be pending until its receiver reaches the micro-batch, and a device
        synchronization on the sender would wait for it.
        """
        here, there = self._all_coords[source], self._all_coords[to]
        return [source, *(self._rank_at[replace(there, pp=pp)] for pp in range(here.pp + 1, there.pp)), to]

    def links(self, kind: str) -> set[tuple[int, int]]:
        """Return (source, destination) of all messages of one kind in the sharing group; identical on its ranks.

        Args:
            kind: "tokens", "hidden" (between stages of the teacher) or "results".
        """
        found: set[tuple[int, int]] = set()
        for replica, stage_groups in enumerate(self._stages):
            if kind == "hidden":
                found |= {link for of in zip(*stage_groups, strict=True) for link in itertools.pairwise(of)}
                continue
            for dp_replica in range(self.num_dp_replicas):
                ends = self.results_of(replica, dp_replica)
                if kind == "tokens":
                    ends = [(a, b) for a, b in self.tokens_of(replica, dp_replica) if self.student_stage_of(b) > 0]
                found |= {link for source, to in ends for link in itertools.pairwise(self.route(source, to))}
        return {(source, to) for source, to in found if source != to}

    def tokens_of(self, replica: int, dp_replica: int) -> list[tuple[int, int]]:
        """Return (source, destination) of a DP replica's tokens, per rank of the replica's first stage group.

        The two are equal where the rank has the tokens. Ranks of the student's first stage exchange tokens in one
        batch, see `TeacherRunner`.
        """
        return [(self.source_of_tokens(dp_replica, at), to) for at, to in enumerate(self.first_stage_group(replica))]

    def results_of(self, replica: int, dp_replica: int) -> list[tuple[int, int]]:
        """Return (source, destination) of a micro-batch's last hidden states, per tensor rank of its DP replica."""
        return [
            (self.source_of_result(replica, dp_replica, tp), self.destination(dp_replica, tp))
            for tp in range(self.student_tensor_parallel)
        ]

    @property
    def sharing_group(self) -> list[int]:
        """All ranks that share this rank's replicas."""
        return sorted(rank for replica in self._stages for group in replica for rank in group)

    def _stage_group(self, stage: int, block: int) -> list[int]:
        return [
            self._rank(stage, block * self._dp_replicas_per_stage_group + n, tp)
            for n in range(self._dp_replicas_per_stage_group)
            for tp in range(self.student_tensor_parallel)
        ]

    def _rank(self, stage: int, dp_replica: int, tp: int) -> int:
        return self._rank_at[replace(self.coords, pp=stage, dp=self.first_dp_replica + dp_replica, tp=tp)]
