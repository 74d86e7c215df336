"""Rows in a teacher's tokens: chunks have the same bytes on both sides, of any tokenizer whose tokens are bytes."""

import json
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch

from abkd_megatron.config.schema import DataConfig
from abkd_megatron.data.aligned_text import ALIGNED, AlignedText, Aligner, TokenBytes, WithAlignedText
from abkd_megatron.data.prepare import _megatron_tokenizer, prepare
from abkd_megatron.errors import ConfigError, DataError
from abkd_megatron.losses.chunks import CUT_OFF, NO_CHUNK

DOCUMENTS = [path.read_text()[:9000] for path in sorted((Path(__file__).parents[2] / "docs").glob("t*.md"))]
HARD = ["naïve 漢字 😀😀 kanji\n\n\ttabs  and   spaces ", "x", "0123456789" * 5, "a<s>b</s>", "\u2028é"]


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TokenBytes]:
    folder = tmp_path_factory.mktemp("aligned")
    texts = [part for document in DOCUMENTS for part in document.split("\n\n")] + HARD
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    found = {}
    for size in (400, 900):
        source, target = str(folder / "text.jsonl"), str(folder / str(size))
        # So many documents that no split is without one.
        config = DataConfig(source=[source], dir=target, vocab_size=size, held_out=0.4)
        model = prepare(config, log=lambda _: None).tokenizer_model
        found[str(size)] = TokenBytes(_megatron_tokenizer(model), "student")
    found["prefix"] = TokenBytes(_with_dummy_prefix(folder, texts, "identity"), "teacher")
    found["normalizing"] = TokenBytes(_with_dummy_prefix(folder, texts, "nmt_nfkc"), "teacher")
    found["bytes"] = TokenBytes(_byte_level(folder, texts), "teacher")
    return found


def _with_dummy_prefix(folder: Path, texts: list[str], normalization: str):
    """As Llama 2's: a space before every text, and bytes for what it does not know."""
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(line for text in texts for line in text.split("\n") if line),
        model_prefix=str(folder / normalization),
        model_type="bpe",
        vocab_size=500,
        byte_fallback=True,
        character_coverage=0.99,
        normalization_rule_name=normalization,
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    return _megatron_tokenizer(folder / f"{normalization}.model")


def _byte_level(folder: Path, texts: list[str]):
    """As GPT-2's and Llama 3's, of Hugging Face."""
    import tokenizers
    from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
    from transformers import PreTrainedTokenizerFast

    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=700, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(texts, trainer)
    PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|end|>").save_pretrained(folder / "bytes")
    given = Namespace(
        tokenizer_type="HuggingFaceTokenizer",
        tokenizer_model=str(folder / "bytes"),
        **dict.fromkeys(("vocab_file", "merge_file", "chat_template", "special_tokens", "metadata_path")),
        **dict.fromkeys(("tokenizer_hf_no_use_fast", "trust_remote_code", "pad_vocab_size"), False),
        tokenizer_hf_no_include_special_tokens=False,
    )
    return build_tokenizer(given)


def stream(student: TokenBytes, texts: list[str]) -> np.ndarray:
    return np.concatenate([np.append(student.encode(text)[0], student.eod) for text in texts])


def parts(aligner: Aligner, ids: np.ndarray) -> list[np.ndarray]:
    """The row's parts: teacher's tokens, labels and chunks, student's chunks and bytes."""
    length, of_student = aligner.length, len(ids) - 1
    sizes = [length, length, length, of_student, of_student]
    row = aligner.row(ids)
    assert len(row) == sum(sizes)
    return np.split(row, np.cumsum(sizes)[:-1])


def check(aligner: Aligner, ids: np.ndarray) -> float:
    """Check a row by its bytes, and return the share of bytes in chunks."""
    student, teacher = aligner.student, aligner.teacher
    tokens, labels, theirs, ours, num_bytes = parts(aligner, ids)
    assert (tokens[1:] == labels[:-1]).all()
    assert ours.max() == theirs.max()
    for chunk in range(ours.max() + 1):
        places = [np.flatnonzero(of == chunk) for of in (ours, theirs)]
        assert all(len(place) and (np.diff(place) == 1).all() for place in places)
        mine, other = ids[1:][places[0]], labels[places[1]]
        if student.eod in mine:
            assert mine.tolist() == [student.eod] and other.tolist() == [teacher.eod]
        else:
            assert student.join(mine) == teacher.join(other).removeprefix(b" " * (student.join(mine)[:1] != b" "))
    return num_bytes[ours >= 0].sum() / max(num_bytes.sum(), 1)


@pytest.mark.parametrize(
    ("student", "teacher"), [("400", "900"), ("900", "400"), ("400", "bytes"), ("bytes", "400"), ("400", "prefix")]
)
def test_chunks_have_the_same_bytes_on_both_sides(tokenizers, student: str, teacher: str) -> None:
    aligner = Aligner(tokenizers[student], tokenizers[teacher], 200)
    ids = stream(aligner.student, [*HARD, *DOCUMENTS[:2], *HARD])
    shares = [check(aligner, ids[start : start + 65]) for start in range(0, len(ids) - 65, 97)]
    assert len(shares) > 50 and np.mean(shares) > 0.85


def test_equal_tokenizers_give_a_chunk_per_token(tokenizers) -> None:
    aligner = Aligner(tokenizers["400"], tokenizers["400"], 64)
    ids = stream(aligner.student, DOCUMENTS)[:65]
    tokens, labels, theirs, ours, _ = parts(aligner, ids)
    assert tokens.tolist() == ids[:-1].tolist() and labels.tolist() == ids[1:].tolist()
    assert ours.tolist() == theirs.tolist() == list(range(64))


def test_documents_end_together(tokenizers) -> None:
    aligner = Aligner(tokenizers["400"], tokenizers["900"], 40)
    eod = aligner.student.eod
    ids = np.array([eod, *aligner.student.encode("ab")[0], eod, eod, *aligner.student.encode("c")[0]])
    tokens, labels, theirs, ours, _ = parts(aligner, ids)
    assert (ours >= 0).all(), "from the end of a document on, its first token is predicted"
    assert [labels[theirs == chunk].tolist() for chunk in ours[ids[1:] == eod]] == 2 * [[aligner.teacher.eod]]
    assert (tokens[len(set(ours)) + 5 :] == aligner.teacher.eod).all()


def test_a_row_may_begin_and_end_within_a_character(tokenizers) -> None:
    aligner = Aligner(tokenizers["400"], tokenizers["bytes"], 60)
    ids = aligner.student.encode("ab 🦒 cd 🦒🦒")[0]
    starts = [n for n in range(len(ids)) if aligner.student.join(ids[n : n + 1])[0] & 0xC0 == 0x80]
    assert starts, "it is in several tokens"
    for start in starts:
        for end in range(start + 2, len(ids) + 1):
            check(aligner, ids[start:end])
    assert check(aligner, ids[starts[0] :]) > 0.5


def test_what_follows_a_special_token_is_in_no_chunk_until_the_document_ends(tokenizers) -> None:
    aligner = Aligner(tokenizers["400"], tokenizers["900"], 60)
    text, eod = aligner.student.encode("some words")[0], aligner.student.eod
    unknown = 0  # <unk>
    ids = np.array([*text, unknown, *text, eod, *text])
    _, _, theirs, ours, num_bytes = parts(aligner, ids)
    at = len(text) - 1  # of the special token's label
    assert num_bytes[at] == 0 and (ours[at : at + len(text) + 2] == NO_CHUNK).all()
    assert (ours[at + len(text) + 2 :] >= 0).all() and (ours[:at] >= 0).any()
    assert theirs.max() == ours.max()


def test_text_beyond_the_teacher_s_row_is_cut_off(tokenizers) -> None:
    aligner = Aligner(tokenizers["900"], tokenizers["400"], 20)
    ids = stream(aligner.student, DOCUMENTS)[:65]
    *_, ours, _ = parts(aligner, ids)
    first = np.flatnonzero(ours == CUT_OFF)[0]
    assert 5 < first < 20 and (ours[first:] == CUT_OFF).all() and (ours[1:first] >= 0).any()
    check(aligner, ids)


def test_a_tokenizer_that_changes_text_is_aligned_up_to_there(tokenizers) -> None:
    aligner = Aligner(tokenizers["400"], tokenizers["normalizing"], 60)
    ids = aligner.student.encode("one two three ① four five")[0]  # ① becomes 1
    *_, ours, num_bytes = parts(aligner, ids)
    end = np.flatnonzero(ours >= 0)[-1]
    assert num_bytes[: end + 1].sum() + len(aligner.student.join(ids[:1])) <= len("one two three ")
    assert (ours[end + 1 :] == NO_CHUNK).all()


class Rows(torch.utils.data.Dataset):
    split = "valid"

    def __init__(self, ids: np.ndarray, number: int = 12) -> None:
        self.ids, self.number = torch.from_numpy(ids), number

    def __len__(self) -> int:
        return self.number

    def __getitem__(self, index: int | None) -> dict[str, torch.Tensor]:
        row = self.ids[32 * (index or 0) :][:33]
        return {"tokens": row[:-1], "labels": row[1:]}


def test_samples_get_their_text(tokenizers) -> None:
    aligner = Aligner(tokenizers["400"], tokenizers["900"], 40)
    data = WithAlignedText(Rows(stream(aligner.student, DOCUMENTS)), aligner)
    assert len(data) == 12 and data.split == "valid" and data.check() > 0.9
    rows = torch.stack([data[0][ALIGNED], data[1][ALIGNED]])
    text = AlignedText.unpack(rows, 32)
    assert [list(of.shape) for of in (text.tokens, text.labels, *text.chunks)] == [[2, 40], [2, 40], [2, 32], [2, 40]]
    assert torch.equal(rows, torch.cat([*text[:2], *text.chunks[::-1], text.num_bytes], dim=1))


def test_data_that_are_no_text_are_rejected(tokenizers) -> None:
    data = WithAlignedText(Rows(np.zeros(400, dtype=np.int64)), Aligner(tokenizers["400"], tokenizers["900"], 90))
    with pytest.raises(DataError, match=r"cross_tokenizer.*0 of \d+ bytes.*teacher.tokenizer-model"):
        data.check()


def test_tokens_that_are_no_bytes_are_rejected() -> None:
    from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer

    given = Namespace(tokenizer_type="NullTokenizer", vocab_size=10, pad_vocab_size=False)
    with pytest.raises(ConfigError, match=r"cross_tokenizer.*teacher's tokenizer.*null-text"):
        TokenBytes(build_tokenizer(given), "teacher")
