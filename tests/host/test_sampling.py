"""Sampled text is that of whole forward passes in every layout, and sampling leaves the process alone."""

import json
from pathlib import Path

import pytest
from launch import launch
from sampling import DRAWS, END, KINDS, NEW, PROMPTS


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, list[list[int]]]]:
    folder = tmp_path_factory.mktemp("sampling")
    ranks = launch([Path(__file__).with_name("sampling.py"), folder / "models"], 2, timeout_seconds=480)
    found = []
    for rank in ranks:
        assert rank.code == 0, rank.output[-6000:]
        (line,) = [line for line in rank.output.splitlines() if line.startswith("FOUND ")]
        found.append(json.loads(line.removeprefix("FOUND ")))
    assert found[0] == found[1]
    return found[0]


@pytest.mark.parametrize("kind, layout", [(kind, layout) for kind, layouts in KINDS.items() for layout in layouts])
def test_text_is_that_of_whole_forward_passes(texts: dict, kind: str, layout: str) -> None:
    assert texts[f"{kind} {layout}"] == texts[f"{kind} reference"]


def test_texts_differ_between_ways_to_draw_and_end_where_they_should(texts: dict) -> None:
    found = texts["gpt reference"]
    assert len({json.dumps(found[draw]) for draw in DRAWS}) == len(DRAWS)
    added = [text[len(prompt) :] for draw in DRAWS for text, prompt in zip(found[draw], PROMPTS, strict=True)]
    assert all(END not in text[:-1] and (text[-1] == END or len(text) == NEW) for text in added)
    assert {text[-1] == END for text in added} == {True, False}
