"""Prepared data: real SentencePiece, real indexed datasets, read back through Megatron's own classes."""

import contextlib
import hashlib
import json
import os
import re
from dataclasses import replace
from pathlib import Path

import pytest

from abkd_megatron.config.schema import DataConfig
from abkd_megatron.data import prepare as module
from abkd_megatron.data.prepare import SPLITS, PreparedData, prepare
from abkd_megatron.errors import DataError

pytest.importorskip("megatron.core")

LIBRARY = Path(os.__file__).parent
NAMES = ("json/__init__.py", "json/decoder.py", "json/encoder.py", "json/tool.py", "abc.py", "ast.py")
ODD = "\tif x:\r\n\n\n        deep   gaps \n é漢字😀 0123 </s> <unk> \x00\x07 trailing  "


def quiet(line: str) -> None:
    pass


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Some 60 small documents, so that every split gets some at 30% held out."""
    root = tmp_path_factory.mktemp("sources")
    for name in NAMES:
        for number, part in enumerate((LIBRARY / name).read_text(encoding="utf-8").split("\n\n\n")[:12]):
            (root / f"{name.replace('/', '-')}-{number:02}.txt").write_text(part, encoding="utf-8")
    (root / "more").mkdir()
    with open(root / "more" / "lines.jsonl", "w", encoding="utf-8") as file:
        for number in range(8):
            file.write(json.dumps({"text": f"{ODD}\n{number}", "id": number}) + "\n\n")
    (root / "more" / "skipped.bin").write_bytes(b"\xff")
    return root


@pytest.fixture(scope="module")
def config(sources, tmp_path_factory):
    dir = tmp_path_factory.mktemp("prepared") / "deep" / "data"
    return DataConfig(source=[str(sources)], dir=str(dir), vocab_size=400, held_out=0.3)


@pytest.fixture(scope="module")
def prepared(config):
    return prepare(config, quiet)


def read(prepared, split):
    """The documents of a split, decoded, each checked to end in eod."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    tokenizer = module._megatron_tokenizer(prepared.tokenizer_model)
    dataset = IndexedDataset(str(getattr(prepared, split)))
    assert list(dataset.document_indices) == list(range(len(dataset) + 1))
    texts = []
    for index in range(len(dataset)):
        *ids, last = dataset[index].tolist()
        assert last == tokenizer.eod and tokenizer.eod not in ids
        texts.append(tokenizer.detokenize(ids))
    return texts


def contents(directory):
    return {path.name: path.read_bytes() for path in Path(directory).iterdir()}


def test_documents_come_back(prepared, sources):
    expected = {file.read_bytes().decode() for file in sources.glob("*.txt")}
    expected |= {f"{ODD}\n{number}" for number in range(8)}
    texts = {split: read(prepared, split) for split in SPLITS}
    everything = [text for split in SPLITS for text in texts[split]]
    assert len(everything) == len(set(everything))  # no document twice, so the splits are disjoint
    assert set(everything) == {text for text in expected if text.strip()}
    for split in SPLITS:
        counted = prepared.manifest["splits"][split]
        assert counted["documents"] == len(texts[split]) > 0
        assert counted["tokens"] * 2 == counted["bytes"] == Path(f"{prepared.train.parent}/{split}.bin").stat().st_size


def test_tokenizer_is_the_one_megatron_sees(prepared):
    tokenizer = module._megatron_tokenizer(prepared.tokenizer_model)
    assert tokenizer.vocab_size == prepared.manifest["vocab_size"] == 400
    assert tokenizer.eod == prepared.manifest["eod"] == 2
    assert tokenizer.pad == -1  # a piece that were the padding would be masked from the loss
    newline, digit = tokenizer.tokenize("\n"), tokenizer.tokenize("7")
    assert len(newline) == 1 and tokenizer.tokenize("\n\n77") == newline * 2 + digit * 2
    for text in (ODD, " lead", "a\tb\t\tc", "\n\n", "    " * 9, "x" * 3000, "\ufeffbom", "\u2028"):
        assert tokenizer.detokenize(tokenizer.tokenize(text)) == text
    assert tokenizer.detokenize(tokenizer.tokenize("\u2581")) == " "  # the one exception: its own space sign


def test_megatron_arguments(prepared):
    arguments = pytest.importorskip("megatron.training.arguments")
    import argparse

    from abkd_megatron.config.load import to_argv

    parser = arguments.add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
    options = {s.removeprefix("--"): a for a in parser._actions for s in a.option_strings}
    args = parser.parse_args(to_argv(prepared.megatron_arguments(), options))
    assert args.tokenizer_type == "SentencePieceTokenizer"
    assert args.tokenizer_model == str(prepared.tokenizer_model)
    assert args.train_data_path == [str(prepared.train)]
    assert args.valid_data_path == [str(prepared.valid)]
    assert args.test_data_path == [str(prepared.test)]
    assert args.data_cache_path == str(prepared.dir / "cache")
    # What training builds from these arguments is what the data was written with.
    from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer

    args.pad_vocab_size = False
    built = build_tokenizer(args)
    assert (built.vocab_size, built.eod) == (400, 2)
    assert built.tokenize(ODD) == module._megatron_tokenizer(prepared.tokenizer_model).tokenize(ODD)


def test_megatron_trains_on_it(prepared, tmp_path):
    """Megatron's own builder reads all three splits, and no label but the padding is masked."""
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

    arguments = prepared.megatron_arguments()
    config = GPTDatasetConfig(
        random_seed=1,
        sequence_length=32,
        blend_per_split=[(arguments[f"{split}-data-path"], None) for split in SPLITS],
        split=None,
        tokenizer=module._megatron_tokenizer(prepared.tokenizer_model),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        path_to_cache=str(tmp_path / "cache"),
    )
    datasets = BlendedMegatronDatasetBuilder(GPTDataset, [8, 4, 4], lambda: True, config).build()
    for dataset in datasets:
        sample = dataset[0]
        assert sample["tokens"].shape == (32,) and sample["tokens"].max() < 400
        assert sample["loss_mask"].sum() == 32


def test_two_runs_give_the_same_bytes(prepared, config, tmp_path):
    lines = []
    again = prepare(replace(config, dir=str(tmp_path / "again")), lines.append)
    assert contents(again.dir) == contents(prepared.dir)
    assert lines[0].startswith("reading ") and lines[-1].startswith("prepared ")
    count = sum(split["documents"] for split in prepared.manifest["splits"].values())
    assert f"encoding: {count}/{count} documents" in lines


def test_more_documents_move_none_across_splits(prepared, config, tmp_path):
    extra = tmp_path / "extra.txt"
    extra.write_text("one more document\n", encoding="utf-8")
    more = prepare(replace(config, dir=str(tmp_path / "more"), source=[*config.source, str(extra)]), quiet)
    for split in SPLITS:
        assert set(read(prepared, split)) <= set(read(more, split))


def test_reuse(prepared, config):
    before, lines = contents(prepared.dir), []
    assert prepare(config, lines.append) == prepared
    assert lines[-1] == f"already prepared: {prepared.dir}"
    (prepared.dir / "cache").mkdir()  # as training leaves it
    assert PreparedData.open(config.dir) == prepared
    (prepared.dir / "cache").rmdir()
    assert contents(prepared.dir) == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": 401}, "has other data: expected vocab_size_asked 401, got 400"),
        ({"held_out": 0.2}, "expected held_out 0.2, got 0.3; choose another data.dir"),
        ({"source": [str(LIBRARY / "abc.py")]}, "has other data: expected source"),
    ],
)
def test_other_settings_are_refused(prepared, config, change, message):
    before = contents(prepared.dir)
    with pytest.raises(DataError, match=message):
        prepare(replace(config, **change), quiet)
    assert contents(prepared.dir) == before


def test_changed_documents_are_refused(tmp_path, config):
    text = tmp_path / "text"
    text.mkdir()
    for number in range(40):
        (text / f"{number}.txt").write_text(f"document {number} " + (LIBRARY / "abc.py").read_text()[: 40 * number])
    config = replace(config, source=[str(text)], dir=str(tmp_path / "d"), vocab_size=360)
    prepare(config, quiet)
    (text / "0.txt").write_text("another text")
    with pytest.raises(DataError, match="documents_sha256"):
        prepare(config, quiet)


def test_any_other_directory_is_refused(tmp_path, config):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    with pytest.raises(DataError, match=r"data\.dir"):
        prepare(replace(config, dir=str(tmp_path / "mine")), quiet)
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.tex"]
    with pytest.raises(DataError, match="complete"):
        prepare(replace(config, dir=str(tmp_path / "mine" / "thesis.tex")), quiet)


@pytest.mark.parametrize("failure", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_run_leaves_nothing(tmp_path, config, failure):
    def log(line):
        if line.startswith("encoding"):
            assert list((tmp_path / "parent").iterdir())  # it is under way, out of sight
            raise failure

    with pytest.raises(failure):
        prepare(replace(config, dir=str(tmp_path / "parent" / "d")), log)
    assert list((tmp_path / "parent").iterdir()) == []


def test_open_names_what_is_missing(prepared, tmp_path):
    with pytest.raises(DataError, match="`abkd-megatron prepare`"):
        PreparedData.open(tmp_path / "none")
    with pytest.raises(DataError, match=r"manifest\.json.*`abkd-megatron prepare`"):
        PreparedData.open(tmp_path)
    for number, (name, change, message) in enumerate(
        [
            ("valid.idx", None, "expected the file valid.idx, got none"),
            ("tokenizer.model", None, "expected the file tokenizer.model"),
            ("tokenizer.model", b"x", "expected the SentencePiece model with sha256"),
            ("train.bin", None, "train.bin: expected .* bytes, got no file"),
            ("train.bin", b"", "train.bin: expected .* bytes, got 0 bytes"),
            ("manifest.json", b"[]", "expected a manifest.json"),
            ("manifest.json", b"{", "expected a manifest.json"),
        ]
    ):
        copy = tmp_path / str(number)
        copy.mkdir()
        for file, content in contents(prepared.dir).items():
            (copy / file).write_bytes(content)
        (copy / name).unlink()
        if change is not None:
            (copy / name).write_bytes(change)
        with pytest.raises(DataError, match=message):
            PreparedData.open(copy)
    manifest = {**prepared.manifest, "format": 0}
    (tmp_path / "6" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match="format 1, got 0"):
        PreparedData.open(tmp_path / "6")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"\xff\xfe", "a.txt: expected UTF-8 text"),
        ("a.jsonl", b'{"text": "fine"}\n{"txt": 1}\n', r"a.jsonl:2: expected \{\"text\""),
        ("a.jsonl", b"{", "a.jsonl:1: expected"),
        ("a.jsonl", b"[1]", "a.jsonl:1: expected"),
        ("a.jsonl", b'{"text": 1}', "text is int"),
        ("a.jsonl", b'{"text": "\\ud800"}', "surrogates"),
    ],
)
def test_unreadable_text(tmp_path, config, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        prepare(replace(config, source=[str(tmp_path)], dir=str(tmp_path / "d")), quiet)


def test_too_little(tmp_path, config):
    config = replace(config, dir=str(tmp_path / "d"))
    for source, remedy in (
        ("nowhere", "check the path"),
        (str(tmp_path / "*.txt"), "check the path"),
        (str(tmp_path), "a glob"),  # which is there
    ):
        with pytest.raises(DataError, match=remedy):
            prepare(replace(config, source=[source]), quiet)
    for size in (300, 100_000):
        with pytest.raises(DataError, match=f"data.vocab_size {size}"):
            prepare(replace(config, vocab_size=size), quiet)
    with pytest.raises(DataError, match=r"data\.dir"):
        prepare(replace(config, dir=None), quiet)
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="writable"):
        prepare(replace(config, dir=str(tmp_path / "file" / "d")), quiet)
    assert not (tmp_path / "d").exists()


def test_what_is_advised_of_too_few_documents_helps(tmp_path, config):
    """`held_out` is only named where it fills all splits."""
    helped = 0
    for number in range(12):
        documents = [f"document {number} {name} " * 40 for name in range(1 + number % 4)]
        (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in documents))
        one = replace(config, source=[str(tmp_path / "a.jsonl")], dir=str(tmp_path / "d"), held_out=0.01)
        with pytest.raises(DataError, match=r"data\.source") as caught:
            prepare(one, quiet)
        assert "raise" not in str(caught.value)
        if named := re.search(r"set data.held_out=(\S+),", str(caught.value)):
            helped += 1
            with contextlib.suppress(DataError):  # of so little text there is no tokenizer
                prepare(replace(one, held_out=float(named[1])), quiet)
            digests = [hashlib.sha256(text.encode()).digest() for text in documents]
            assert {module._split(digest, float(named[1])) for digest in digests} == set(SPLITS)
        assert len(documents) > 2 or not named
    assert 0 < helped < 12


WORDS = [f"{first}{second}" for first in "abcdefg" for second in "hijklmn"]


@pytest.mark.parametrize(
    ("text", "vocab_size", "remedy"),
    [
        ("hello world\n", 1000, "; add text to data.source"),  # less than the least allowed would be needed
        ("".join(map(chr, range(0x4E00, 0x4E00 + 600))), 300, "; set data.vocab_size=860 or more"),
        (
            " ".join(f"{one}{other}" for one in WORDS for other in WORDS),
            20000,
            "; set data.vocab_size=[0-9]+ or less, or",
        ),
        ("ab" * (1 << 20), 400, "; break the lines"),
    ],
)
def test_what_is_advised_of_a_vocabulary_helps(text, vocab_size, remedy):
    with pytest.raises(DataError, match=remedy):
        module._train_tokenizer([text], vocab_size, quiet)


def test_a_file_that_may_not_be_read_is_not_said_to_be_no_utf_8(tmp_path):
    (tmp_path / "a.txt").mkdir()
    with pytest.raises(DataError, match=r"Is a directory"):
        module._read_text(tmp_path / "a.txt")


def test_sources(tmp_path):
    for name in ("b.txt", "a.md", "c.log"):
        (tmp_path / name).write_text(name)
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "e.rst").write_text("e.rst")
    (tmp_path / "d" / "twin.txt").write_text("a.md")
    (tmp_path / "d" / "empty.txt").write_text(" \n")

    def texts(*sources):
        return [text for _, text in module._read(sources)]

    assert texts(str(tmp_path)) == ["a.md", "b.txt", "e.rst"]
    assert texts(str(tmp_path / "c.log")) == ["c.log"]
    assert texts(str(tmp_path / "*.log"), str(tmp_path / "a.md")) == ["a.md", "c.log"]
    assert texts(str(tmp_path / "**" / "*.rst")) == ["e.rst"]


def test_the_sample_for_the_tokenizer_is_capped(monkeypatch):
    texts = [f"document {number}\nline" for number in range(100)]
    monkeypatch.setattr(module, "_TOKENIZER_BYTES", 200)
    lines, size = module._tokenizer_lines(texts)
    assert 200 <= size < 220 and lines == module._tokenizer_lines(texts[::-1])[0]


def test_the_text_that_ships_with_python(tmp_path):
    prepared = prepare(DataConfig(dir=str(tmp_path / "d")), quiet)
    splits = prepared.manifest["splits"]
    assert splits["train"]["tokens"] > 1_000_000
    assert all(splits[split]["tokens"] > 10_000 for split in SPLITS)
    names = {name for name, _ in module._read_python()}
    assert {"python:asyncio/events.py", "python:topics/lambda"} <= names
    assert not any("/test" in name or "site-packages" in name for name in names)
