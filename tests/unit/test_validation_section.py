"""Named validation sets: rows, numbers per set, the rules of the section, the record of the best checkpoint."""

import json
from argparse import Namespace
from pathlib import Path

import pytest
import torch

pytest.importorskip("megatron.training")

from abkd_megatron.config.load import load_config
from abkd_megatron.config.megatron_args import megatron_options
from abkd_megatron.errors import AbkdError, ConfigError, DataError
from abkd_megatron.hosts.evaluation import _found_before, _what
from abkd_megatron.hosts.held_out import SET, HeldOut, check_rows, number_of_rows
from abkd_megatron.student.report import SELECTED, Report, ValidationSets, masked_loss

SETS = "validation.sets={a: data/a, b: data/b}"
GIVEN = [SETS, "megatron.save=runs/x", "megatron.eval-interval=10", "teacher.load=t"]


def rows_of(start: int, number: int) -> list[dict[str, torch.Tensor]]:
    return [{"tokens": torch.full((3,), start + i), "loss_mask": torch.ones(3)} for i in range(number)]


@pytest.mark.parametrize("counts", [(5, 3), (1, 1), (8,), (4, 0, 4), (7, 1, 9)])
def test_every_row_is_read_once_in_each_validation(counts: tuple[int, ...]) -> None:
    sets = [rows_of(100 * i, count) for i, count in enumerate(counts)]
    for batch in (1, 4, 8):
        held_out = HeldOut(sets, counts, batch, repeats=True)
        number = number_of_rows(counts, batch)
        assert held_out.number == number and number % batch == 0 and 0 <= number - sum(counts) < batch
        for validation in (0, 1, 12345):
            read = [held_out[validation * number + i] for i in range(number)]
            counted = [(int(it[SET]), int(it["tokens"][0])) for it in read if it["loss_mask"].any()]
            assert counted == [(i, 100 * i + row) for i, count in enumerate(counts) for row in range(count)]
            assert all(int(it[SET]) == -1 for it in read if not it["loss_mask"].any())
        assert len(held_out) > 10**6 * number and len(HeldOut(sets, counts, batch, repeats=False)) == number
    assert sets[0] == [] or sets[0][0]["loss_mask"].all()  # filling up has not changed the row


def test_a_set_without_rows_is_rejected() -> None:
    check_rows({"a": "x", "b": "y"}, [1, 2])
    with pytest.raises(DataError, match="b"):
        check_rows({"a": "x", "b": "y"}, [1, 0])


@pytest.mark.parametrize("selects", [False, True])
def test_numbers_of_a_set_are_means_over_its_counted_tokens(selects: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    names = ("lm loss", "kd loss", "kl to teacher", "student entropy")
    per_token = {name: torch.rand(4, 6, generator=generator) for name in names}
    mask = (torch.rand(4, 6, generator=generator) < 0.7).float()
    if selects:
        per_token[SELECTED] = (torch.rand(4, 6, generator=generator) < 0.5).float()
    only = ("kd loss",) if selects else ()
    of_rows = torch.tensor([1, 0, -1, 1])
    report, sets = Report(per_token, only), ValidationSets(["a", "b", "c"], of_rows)
    loss, number, plain = masked_loss(mask, per_token["lm loss"], report)
    again, same_number, logged = masked_loss(mask, per_token["lm loss"], report, sets=sets)
    assert torch.equal(loss, again) and torch.equal(number, same_number)
    assert all(torch.equal(plain[name], logged[name]) for name in plain)
    assert logged.keys() - plain.keys() == {f"{it} {name}" for it in "abc" for name in names[:3]}
    for position, of in enumerate("abc"):
        for name in names[:3]:
            weights = mask * (of_rows == position).unsqueeze(1)
            weights = weights * per_token[SELECTED] if name in only else weights
            total, count = logged[f"{of} {name}"]
            assert total == pytest.approx(float((per_token[name] * weights).sum()), abs=1e-6)
            assert count == pytest.approx(float(weights.sum()), abs=1e-9)


@pytest.mark.parametrize(
    ("job", "words", "key"),
    [
        ("distill", ["validation.rows=4"], "rows"),
        ("distill", [SETS, "validation.rows=0"], "rows"),
        ("distill", ["validation.sets={a/b: x}"], "sets"),
        ("distill", [SETS, "megatron.valid-data-path=[x]"], "sets"),
        ("distill", [SETS, "megatron.sft=true"], "sets"),
        ("compare", [SETS], "sets"),
        ("compare", ["validation.best=lm loss"], "best"),
        ("distill", ["validation.best=lm loss", *GIVEN[1:]], "best"),
        ("distill", [SETS, "validation.best=lm loss"], "best"),
        ("distill", [*GIVEN, "validation.best=kd loss"], "best"),
        ("distill", [*GIVEN, "validation.best=c lm loss"], "best"),
        ("pretrain", [*GIVEN, "validation.best=kl to teacher"], "best"),
        ("distill", [*GIVEN[:-1], "distillation.cache=c", "validation.best=kl to teacher"], "best"),
        ("distill", [*GIVEN, "megatron.ckpt-format=torch", "validation.best=lm loss"], "best"),
        ("distill", ["validation.sets=[a]"], "sets"),
    ],
)
def test_rejected(job: str, words: list[str], key: str) -> None:
    with pytest.raises(ConfigError, match=f"validation.{key}: expected"):
        load_config(None, words, megatron_options()).check(job)


@pytest.mark.parametrize(
    ("job", "best", "more"),
    [
        ("distill", "kl to teacher", []),
        ("distill", "b kl to teacher", []),
        ("distill", "a lm loss", []),
        ("pretrain", "b lm loss", []),
        ("distill", "a bucketed kl to teacher", ["teacher.load=null", "distillation.cache=c"]),
    ],
)
def test_accepted(job: str, best: str, more: list[str]) -> None:
    config = load_config(None, [*GIVEN, f"validation.best={best}", *more], megatron_options())
    config.check(job)
    assert config.validation.sets == {"a": "data/a", "b": "data/b"} and config.validation.rows is None


WHAT = _what("lm loss", {"a": "data/a"}, None)


@pytest.fixture
def save(tmp_path: Path) -> Path:
    (tmp_path / "best" / "iter_0000020").mkdir(parents=True)
    (tmp_path / "best.json").write_text(json.dumps({**WHAT, "value": 2.5, "iteration": 20}))
    return tmp_path


def arguments(save: Path, **changed: object) -> Namespace:
    given = {"save": str(save), "load": str(save), "finetune": False, "pretrained_checkpoint": None, "ckpt_step": None}
    return Namespace(**{**given, **changed})


def test_a_resumed_run_goes_on_from_the_best_value(save: Path) -> None:
    assert _found_before(save, WHAT, arguments(save)) == 2.5
    (save / "best" / "iter_0000020").rmdir()  # a save that was lost
    assert _found_before(save, WHAT, arguments(save)) == float("inf")


def test_another_runs_best_checkpoint_is_not_overwritten(save: Path, tmp_path: Path) -> None:
    changes = [
        (WHAT, {"load": None}),
        (_what("kl to teacher", {"a": "data/a"}, None), {}),
        (_what("lm loss", {"a": "data/b"}, None), {}),
        (_what("lm loss", {"a": "data/a"}, 8), {}),
    ]
    for what, changed in changes:
        with pytest.raises(ConfigError, match="move"):
            _found_before(save, what, arguments(save, **changed))
    (save / "best.json").write_text("{")
    with pytest.raises(AbkdError, match="damaged"):
        _found_before(save, WHAT, arguments(save))
    (save / "best.json").unlink()
    with pytest.raises(ConfigError, match="move"):
        _found_before(save, WHAT, arguments(save, load=None))
