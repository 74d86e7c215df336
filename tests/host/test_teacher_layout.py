"""Where a teacher in a layout of its own lies: everybody agrees on who does what, and messages only move forward."""

import itertools
from collections import defaultdict

import pytest

from abkd_megatron.errors import ConfigError
from abkd_megatron.teacher.layout import RankCoords, TeacherLayout

# Of the student: (pipeline, data, context, tensor parallelism).
STUDENTS = [
    (1, 1, 1, 1),
    (1, 4, 1, 2),
    (2, 2, 1, 1),
    (2, 2, 2, 2),
    (2, 6, 1, 1),
    (3, 4, 1, 1),
    (4, 1, 1, 2),
    (4, 4, 1, 1),
]
TEACHERS = list(itertools.product((1, 2, 4), (1, 2, 3, 4, 8)))


def places(student: tuple[int, int, int, int]) -> list[RankCoords]:
    """In Megatron's order of ranks: tensor, context, data, pipeline."""
    return [RankCoords(*place) for place in itertools.product(*map(range, student))]


def layouts(student: tuple[int, int, int, int], teacher: tuple[int, int]) -> list[TeacherLayout] | None:
    ranks = places(student)
    try:
        return [TeacherLayout(ranks, rank, *teacher) for rank in range(len(ranks))]
    except ConfigError:
        return None


POSSIBLE = [(s, t) for s, t in itertools.product(STUDENTS, TEACHERS) if layouts(s, t) is not None]


def test_enough_cases() -> None:
    assert len(POSSIBLE) > 45
    assert {t for _, t in POSSIBLE} >= {(1, 1), (2, 1), (4, 1), (1, 2), (1, 3), (2, 2), (1, 4), (4, 2)}


@pytest.mark.parametrize(("student", "teacher"), POSSIBLE, ids=str)
def test_every_rank_holds_one_share(student: tuple, teacher: tuple) -> None:
    found = layouts(student, teacher)
    assert found is not None
    tensor, pipeline = teacher
    for rank, layout in enumerate(found):
        assert layout.stage_group[layout.index] == rank and len(layout.stage_group) == tensor
        assert layout.pipeline[layout.stage] == rank and len(layout.pipeline) == pipeline
        assert len(layout.sharing_group) == layout.num_replicas * tensor * pipeline
        for other in layout.stage_group:
            assert found[other].stage_group == layout.stage_group
            assert found[other].coords.pp == layout.coords.pp  # they run at one time
        for stage, other in enumerate(layout.pipeline):
            assert (found[other].stage, found[other].replica) == (stage, layout.replica)
            assert found[other].pipeline == layout.pipeline
    assert found[0].matches_student == (tensor == student[3] and pipeline == student[0])


@pytest.mark.parametrize(("student", "teacher"), POSSIBLE, ids=str)
def test_messages_are_awaited_by_whom_they_are_sent_to_and_move_forward(student: tuple, teacher: tuple) -> None:
    found = layouts(student, teacher)
    assert found is not None
    last = student[0] - 1
    tensor_parallel = student[3]
    directions: dict[str, set[tuple[int, int]]] = defaultdict(set)
    for micro_batch in range(2 * found[0].num_replicas):
        sent: dict[str, list] = defaultdict(list)
        awaited: dict[str, list] = defaultdict(list)
        for rank, layout in enumerate(found):
            for n in range(layout.num_dp_replicas):
                replica = layout.replica_for(micro_batch, n)
                if layout.coords.pp == 0 and n == layout.dp_replica:
                    for index, to in enumerate(layout.first_stage_group(replica)):
                        if layout.source_of_tokens(n, index) == rank != to:
                            kind = "tokens now" if layout.student_stage_of(to) == 0 else "tokens"
                            sent[kind].append((rank, to, n))
                if replica == layout.replica:
                    if layout.stage == 0 and (source := layout.source_of_tokens(n, layout.index)) != rank:
                        awaited["tokens now" if layout.coords.pp == 0 else "tokens"].append((source, rank, n))
                    if layout.stage + 1 < len(layout.pipeline):
                        sent["states"].append((rank, layout.pipeline[layout.stage + 1], n))
                    else:
                        sent["results"] += [
                            (rank, layout.destination(n, tp), n)
                            for tp in range(tensor_parallel)
                            if layout.source_of_result(replica, n, tp) == rank != layout.destination(n, tp)
                        ]
                    if layout.stage > 0:
                        awaited["states"].append((layout.pipeline[layout.stage - 1], rank, n))
            if layout.coords.pp == last:
                n, tp = layout.dp_replica, layout.coords.tp
                source = layout.source_of_result(layout.replica_for(micro_batch, n), n, tp)
                assert layout.destination(n, tp) == rank
                if source != rank:
                    awaited["results"].append((source, rank, n))
        for kind in {*sent, *awaited}:
            assert sorted(sent[kind]) == sorted(awaited[kind]), kind
            directions[kind] |= {(source, to) for source, to, _ in sent[kind]}
    for kind, pairs in directions.items():
        for source, to in pairs:
            ahead, behind = found[source].coords, found[to].coords
            if kind == "tokens now":
                assert ahead.pp == behind.pp == 0
            else:
                assert (to, source) not in pairs  # a lane of two ranks has one direction
                assert ahead.pp < behind.pp or (kind != "tokens" and ahead.pp == behind.pp)


def test_a_round_gives_every_replica_as_much_to_do() -> None:
    for student, teacher in POSSIBLE:
        found = layouts(student, teacher)
        assert found is not None
        one = found[0]
        work = [one.replica_for(i, n) for i in range(one.num_replicas) for n in range(one.num_dp_replicas)]
        assert {work.count(replica) for replica in range(one.num_replicas)} == {one.num_dp_replicas}


@pytest.mark.parametrize(
    ("student", "teacher", "message"),
    [
        ((1, 2, 1, 2), (1, 1), "multiple of the student's 2, got 1"),
        ((1, 2, 1, 2), (3, 1), "multiple of the student's 2, got 3"),
        ((1, 1, 1, 2), (4, 1), "divisible by 2, got 1"),
        ((2, 3, 1, 1), (1, 4), "divisible by 2, got 3"),
    ],
)
def test_what_cannot_be_laid_out(student: tuple, teacher: tuple, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TeacherLayout(places(student), 0, *teacher)
