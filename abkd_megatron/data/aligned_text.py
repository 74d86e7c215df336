"""The text of a sample in the tokens of a teacher with another tokenizer, and the chunks that both cut alike.

Legend: b micro-batch, s tokens of the student, t of the teacher.
"""

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from abkd_megatron.data.wrapped import WrappedDataset
from abkd_megatron.errors import ConfigError, DataError
from abkd_megatron.losses.chunks import CUT_OFF, NO_CHUNK, Chunks

ALIGNED = "aligned_text"
"""Name of a sample's row as `Aligner.row` makes it, [3 t + 2 s] int64."""

_SPACE = "\u2581"  # SentencePiece's
_NUM_TRIED = 8
# Share of bytes in chunks below which two tokenizers are not of the same kind of text.
_LEAST_ALIGNED = 0.01


class AlignedText(NamedTuple):
    """A micro-batch's text in the teacher's tokens, and its chunks."""

    tokens: Tensor
    """[b, t] int64, of the teacher."""
    labels: Tensor
    """[b, t] int64, its next tokens."""
    chunks: Chunks
    """Of both models' labels."""
    num_bytes: Tensor
    """[b, s] int64, of each of the student's labels; 0 for a special token."""

    @classmethod
    def unpack(cls, packed: Tensor, length: int) -> "AlignedText":
        """Return the parts of rows.

        Args:
            packed: [b, 3 t + 2 s], as `Aligner.row` makes them.
            length: s.
        """
        of_teacher, of_student = packed.split([packed.shape[1] - 2 * length, 2 * length], dim=1)
        tokens, labels, theirs = of_teacher.chunk(3, dim=1)
        ours, num_bytes = of_student.chunk(2, dim=1)
        return cls(tokens.contiguous(), labels.contiguous(), Chunks(ours, theirs), num_bytes)


class TokenBytes:
    """The bytes of a tokenizer's tokens.

    Args:
        tokenizer: Megatron's, of SentencePiece or of Hugging Face's fast ones.
        whose: "student" or "teacher", for messages.

    Raises:
        ConfigError: a tokenizer whose tokens are not known to be bytes, or one without an end of document.
    """

    def __init__(self, tokenizer: Any, whose: str) -> None:
        library = getattr(tokenizer, "library", type(tokenizer).__name__)
        inner = getattr(getattr(tokenizer, "_tokenizer", None), "tokenizer", None)
        found: list[bytes | None] | None = None
        if library == "sentencepiece" and inner is not None:
            found = _of_sentencepiece(inner)
        elif library == "huggingface" and getattr(inner, "backend_tokenizer", None) is not None:
            found = _of_hugging_face(inner)
        if found is None:
            raise ConfigError(
                f"distillation.cross_tokenizer: expected the {whose}'s tokenizer to be of SentencePiece, or a fast one "
                f"of Hugging Face with a ByteLevel or byte-fallback decoder, got one of {library} whose tokens are not "
                "known to be bytes; use one of those"
            )
        self._encode = tokenizer.tokenize
        self.eod = int(tokenizer.eod)
        self.size = int(tokenizer.vocab_size)
        self._bytes = [of if of is not None else b"" for of in found]
        # -1 for a special token, whose text is not known.
        self.lengths = np.array([-1 if of is None else len(of) for of in found], dtype=np.int64)

    def join(self, ids: Sequence[int] | np.ndarray) -> bytes:
        """Return the bytes of tokens, without those of special ones."""
        return b"".join([self._bytes[token] for token in ids])

    def encode(self, text: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Tokenize a text.

        Returns:
            [n] ids; [n] ends, the bytes of the text up to and with each token, -1 behind the first token that does not
            give its text back; and [n] bool, the special ones.
        """
        ids, wanted = np.asarray(self._encode(text), dtype=np.int64), text.encode()
        got, lengths = self.join(ids), self.lengths[ids]
        is_special = lengths < 0
        ends = np.maximum(lengths, 0).cumsum()
        if got != wanted:
            size = _common(got, wanted)
            if got[:1] == b" " and (without := _common(got[1:], wanted)) > size:  # SentencePiece's dummy prefix
                size, ends = without, np.maximum(ends - 1, 0)
            ends[ends > size] = -1
        return ids, ends, is_special


def _common(one: bytes, other: bytes) -> int:
    """Return the number of bytes with which both begin."""
    size = min(len(one), len(other))
    differs = np.flatnonzero(np.frombuffer(one, np.uint8, size) != np.frombuffer(other, np.uint8, size))
    return int(differs[0]) if differs.size else size


def _of_sentencepiece(model: Any) -> list[bytes | None]:
    found: list[bytes | None] = []
    for token in range(model.get_piece_size()):
        if model.is_byte(token):
            found.append(_byte(model.id_to_piece(token)))
        elif model.is_control(token) or model.is_unknown(token) or model.is_unused(token):
            found.append(None)
        else:
            found.append(model.id_to_piece(token).replace(_SPACE, " ").encode())
    return found


def _byte(piece: str) -> bytes:
    """Return the byte of a piece such as <0x0A>."""
    return bytes([int(piece[3:-1], 16)])


def _of_hugging_face(tokenizer: Any) -> list[bytes | None] | None:
    """Return None for a decoder that is not known to give bytes back."""
    decoder = json.loads(tokenizer.backend_tokenizer.to_str()).get("decoder") or {}
    kinds = {of["type"] for of in decoder.get("decoders", [decoder]) if "type" in of}
    # GPT-2's: printable characters in place of bytes, the others in their order from U+0100 on.
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    by_character = {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}
    added = tokenizer.added_tokens_decoder
    found: list[bytes | None] = []
    for token in range(len(tokenizer)):
        piece = tokenizer.convert_ids_to_tokens(token)
        if token in added:
            found.append(None if added[token].special else added[token].content.encode())
        elif piece is None:
            found.append(None)
        elif "ByteLevel" in kinds:
            known = all(character in by_character for character in piece)
            found.append(bytes(by_character[character] for character in piece) if known else None)
        elif "ByteFallback" in kinds:
            is_byte = len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">")
            found.append(_byte(piece) if is_byte else piece.replace(_SPACE, " ").encode())
        else:
            return None
    return found


class Aligner:
    """Cuts a student's rows into a teacher's tokens.

    Documents are tokenized one by one. The end of a document is a chunk by itself. What the teacher cannot be given,
    an incomplete character at the start of a row or what follows a special token within a document, is in no chunk.

    Args:
        student: the tokenizer of the data.
        teacher: the teacher's.
        length: t, tokens of a row of the teacher. Text beyond it is cut off.
    """

    def __init__(self, student: TokenBytes, teacher: TokenBytes, length: int) -> None:
        self.student, self.teacher, self.length = student, teacher, length

    def row(self, ids: np.ndarray) -> np.ndarray:
        """Align a row.

        Args:
            ids: [s + 1], the student's tokens with the last label.

        Returns:
            [3 t + 2 s] int64: the teacher's tokens, labels and chunks of labels; the student's chunks of labels and
            their bytes. The teacher's row is filled up with ends of documents, which are in no chunk.
        """
        ours = np.full(len(ids), NO_CHUNK, dtype=np.int64)
        tokens: list[np.ndarray] = []
        theirs: list[np.ndarray] = []
        chunk = begin = 0
        for end in [*np.flatnonzero(ids == self.student.eod), len(ids)]:
            chunk, is_whole = self._document(ids[begin:end], ours[begin:end], tokens, theirs, chunk, begin == 0)
            if end < len(ids):
                counts = is_whole and bool(tokens)  # a row's first token is not predicted
                ours[end] = chunk if counts else NO_CHUNK
                tokens.append(np.array([self.teacher.eod]))
                theirs.append(np.array([ours[end]]))
                chunk += counts
            begin = end + 1
        all_tokens, all_theirs = np.concatenate([*tokens, []]), np.concatenate([*theirs, []])
        beyond = all_theirs[self.length + 1 :]
        if (lost := beyond[beyond >= 0]).size:
            all_theirs[all_theirs >= lost.min()] = NO_CHUNK
            ours[np.flatnonzero(ours >= lost.min())[0] :] = CUT_OFF
        missing = (0, max(self.length + 1 - len(all_tokens), 0))
        all_tokens = np.pad(all_tokens[: self.length + 1], missing, constant_values=self.teacher.eod)
        all_theirs = np.pad(all_theirs[: self.length + 1], missing, constant_values=NO_CHUNK)
        num_bytes = np.maximum(self.student.lengths[ids[1:]], 0)
        parts = all_tokens[:-1], all_tokens[1:], all_theirs[1:], ours[1:], num_bytes
        return np.concatenate(parts).astype(np.int64)

    def _document(
        self,
        ids: np.ndarray,
        ours: np.ndarray,
        tokens: list[np.ndarray],
        theirs: list[np.ndarray],
        chunk: int,
        is_first: bool,
    ) -> tuple[int, bool]:
        """Add the part of a document that is in a row.

        Args:
            ids: its tokens, without its end.
            ours: their chunks, to be written.
            tokens: the teacher's so far.
            theirs: their chunks.
            chunk: the next one.
            is_first: whether the row begins with it; the models do not predict its first token.

        Returns:
            The next chunk, and whether the teacher was given all of the text.
        """
        lengths = self.student.lengths[ids]
        unknown = np.flatnonzero(lengths < 0)
        known = unknown[0] if unknown.size else len(ids)
        raw = self.student.join(ids[:known])
        skipped = 0
        while is_first and skipped < min(len(raw), 3) and raw[skipped] & 0xC0 == 0x80:
            skipped += 1
        is_whole = not unknown.size
        try:
            text = raw[skipped:].decode()
        except UnicodeDecodeError as error:
            text, is_whole = raw[skipped : skipped + error.start].decode(), False
        if not text:
            return chunk, is_whole
        their_ids, their_ends, is_special = self.teacher.encode(text)
        their_ends = np.where(their_ends < 0, -1, their_ends + skipped)
        our_ends = lengths[:known].cumsum()
        common = np.intersect1d(our_ends, their_ends[~is_special])
        number = len(common) - is_first
        for ends, left_out, into in (
            (our_ends, None, ours[:known]),
            (their_ends, is_special | (their_ends < 0), their := np.full(len(their_ids), NO_CHUNK, dtype=np.int64)),
        ):
            at = np.searchsorted(common, ends) - is_first
            counts = (at >= 0) & (at < number) if left_out is None else (at >= 0) & (at < number) & ~left_out
            into[counts] = chunk + at[counts]
        tokens.append(their_ids)
        theirs.append(their)
        return chunk + max(number, 0), is_whole and bool(common.size and common[-1] == our_ends[-1])


class WithAlignedText(WrappedDataset):
    """A data set of Megatron's whose samples also have their text in the teacher's tokens.

    Args:
        dataset: of samples with `tokens` and `labels`, [s].
        aligner: of the job.
    """

    def __init__(self, dataset: Any, aligner: Aligner) -> None:
        super().__init__(dataset)
        self._aligner = aligner

    def __getitem__(self, index: int | None) -> dict[str, Tensor]:
        """Return a sample, with `ALIGNED`."""
        sample = self._dataset[index]
        ids = torch.cat([sample["tokens"][:1], sample["labels"]]).numpy()
        return {**sample, ALIGNED: torch.from_numpy(self._aligner.row(ids))}

    def check(self) -> float:
        """Align a few samples.

        Returns:
            The share of their bytes that are in chunks.

        Raises:
            DataError: next to none are.
        """
        tried = sorted({i * (len(self) - 1) // max(_NUM_TRIED - 1, 1) for i in range(_NUM_TRIED)}) if len(self) else []
        aligned = total = 0
        for index in tried:
            sample = self[index]
            text = AlignedText.unpack(sample[ALIGNED].unsqueeze(0), len(sample["tokens"]))
            aligned += int(text.num_bytes[text.chunks.of_student >= 0].sum())
            total += int(text.num_bytes.sum())
        if tried and aligned <= _LEAST_ALIGNED * total:
            raise DataError(
                f"distillation.cross_tokenizer: expected text that both tokenizers cut at common places, got {aligned} "
                f"of {total} bytes in common chunks in {len(tried)} samples; one of the tokenizers does not give its "
                "text back: give teacher.tokenizer-model of the teacher, and data of the student's tokenizer"
            )
        return aligned / total if total else 1.0
