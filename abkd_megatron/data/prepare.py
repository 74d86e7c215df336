"""Preparation of text for Megatron: a SentencePiece model, and an indexed dataset per split.

The output is deterministic. Documents are ordered by name, a hash of its text assigns a document to a split, and the
SentencePiece model is trained on the train split only.
"""

import contextlib
import glob
import hashlib
import io
import json
import re
import sysconfig
import tempfile
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from abkd_megatron.config.schema import LEAST_VOCAB_SIZE, DataConfig
from abkd_megatron.errors import DataError, brief

SPLITS = ("train", "valid", "test")
SUFFIXES = (".txt", ".md", ".rst", ".py", ".jsonl")
"""Suffixes of the files that are read from a directory. Explicit files and globs may have any suffix."""

_FORMAT = 1
_TOKENIZER_BYTES = 32 << 20  # SentencePiece keeps its text in memory; more text hardly changes the pieces
_LONGEST_LINE = 1 << 20  # in bytes
_MAX_PYTHON_FILE = 1 << 20
_NOT_SOURCE = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


@dataclass(frozen=True, slots=True)
class PreparedData:
    """A data set written by `prepare`."""

    dir: Path
    """Absolute path of the directory."""
    tokenizer_model: Path
    """The SentencePiece model."""
    train: Path
    """Prefix of the train split, without ``.bin`` and ``.idx``."""
    valid: Path
    """Prefix of the validation split."""
    test: Path
    """Prefix of the test split."""
    manifest: dict[str, Any]
    """Content of ``manifest.json``: settings and checksums."""

    @classmethod
    def open(cls, dir: str | Path) -> "PreparedData":
        """Open a prepared directory.

        Args:
            dir: the configuration's ``data.dir``.

        Returns:
            The paths, after all files were checked.

        Raises:
            DataError: a file is missing or differs from the manifest.
        """
        root = Path(dir).expanduser().absolute()
        remedy = "run `abkd-megatron prepare` with another data.dir, or remove this one first"
        if not root.is_dir():
            raise DataError(f"{root}: expected prepared data, got no directory; run `abkd-megatron prepare`")
        try:
            manifest = json.loads((root / "manifest.json").read_text(encoding="utf-8"))
            form, splits, sha256 = manifest["format"], manifest["splits"], manifest["tokenizer_sha256"]
            sizes = {name: splits[name]["bytes"] for name in SPLITS}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{root}: expected a manifest.json of prepared data, got {error!r}; {remedy}") from error
        if form != _FORMAT:
            raise DataError(f"{root}: expected manifest format {_FORMAT}, got {form!r}; {remedy}")
        model = root / "tokenizer.model"
        for name in (model.name, *(f"{split}.idx" for split in SPLITS)):
            if not (root / name).is_file():
                raise DataError(f"{root}: expected the file {name}, got none; {remedy}")
        if _sha256(model.read_bytes()) != sha256:
            raise DataError(f"{model}: expected the SentencePiece model with sha256 {sha256}; {remedy}")
        for split, expected in sizes.items():
            file = root / f"{split}.bin"
            got = f"{file.stat().st_size} bytes" if file.is_file() else "no file"
            if got != f"{expected} bytes":
                raise DataError(f"{file}: expected {expected} bytes, got {got}; {remedy}")
        return cls(
            dir=root,
            tokenizer_model=model,
            train=root / "train",
            valid=root / "valid",
            test=root / "test",
            manifest=manifest,
        )

    def megatron_arguments(self) -> dict[str, Any]:
        """Return the Megatron arguments for this data set, keyed by option name without leading dashes."""
        return {
            "tokenizer-type": "SentencePieceTokenizer",
            "tokenizer-model": str(self.tokenizer_model),
            "train-data-path": [str(self.train)],
            "valid-data-path": [str(self.valid)],
            "test-data-path": [str(self.test)],
            "data-cache-path": str(self.dir / "cache"),
        }


def data_arguments(config: DataConfig) -> dict[str, Any]:
    """Return the Megatron arguments for the configured data set; empty without `data.dir`.

    Raises:
        DataError: see `PreparedData.open`.
    """
    return PreparedData.open(config.dir).megatron_arguments() if config.dir is not None else {}


def prepare(config: DataConfig, log: Callable[[str], None] = print) -> PreparedData:
    """Write the configured data set, or return an existing one.

    The directory is created atomically. An existing directory is never modified.

    Args:
        config: the ``data`` section, with ``dir``.
        log: called with lines of text on the progress.

    Returns:
        The data set.

    Raises:
        DataError: text cannot be read, a split has no documents, SentencePiece cannot build the vocabulary, or the
            directory has other contents.
    """
    if not config.dir:
        raise DataError("data.dir: expected an output directory, got none; set data.dir")
    target = Path(config.dir).expanduser().absolute()
    log(f"reading {', '.join(config.source)}")
    documents = _read(config.source)
    settings = {
        "format": _FORMAT,
        "source": config.source,
        "held_out": config.held_out,
        "vocab_size_asked": config.vocab_size,
        "documents_sha256": _sha256(b"".join(digest for digest, _ in documents)),
    }
    if target.exists() or target.is_symlink():
        return _reuse(target, settings, log)

    splits: dict[str, list[str]] = {name: [] for name in SPLITS}
    for digest, text in documents:
        splits[_split(digest, config.held_out)].append(text)
    counts = ", ".join(f"{len(texts)} {name}" for name, texts in splits.items())
    characters = sum(len(text) for _, text in documents)
    log(f"{len(documents)} documents ({counts}), {characters / 1e6:.1f} M characters")
    for name, texts in splits.items():
        if not texts:
            raise DataError(
                f"data: expected documents in each of {', '.join(SPLITS)}, got none in {name} out of "
                f"{len(documents)} with data.held_out {config.held_out}; "
                f"{_more_documents([digest for digest, _ in documents])}"
            )

    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # A sibling directory, because a rename must stay on one file system.
        with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as scratch:
            root = Path(scratch) / "data"
            root.mkdir()
            model = _train_tokenizer(splits["train"], config.vocab_size, log)
            (root / "tokenizer.model").write_bytes(model)
            manifest = {**settings, **_encode(root, splits, log), "tokenizer_sha256": _sha256(model)}
            (root / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
            root.rename(target)
    except OSError as error:
        raise DataError(
            f"{target}: expected a writable directory, got: {error}; set another data.dir, or free disk space"
        ) from error
    log(f"prepared {target}: {manifest['splits']['train']['tokens']} train tokens")
    return PreparedData.open(target)


def _reuse(target: Path, settings: dict[str, Any], log: Callable[[str], None]) -> PreparedData:
    remedy = "choose another data.dir, or remove this one"
    try:
        found = PreparedData.open(target)
    except DataError as error:
        raise DataError(f"{target} exists but is not a complete prepared data set ({error}); {remedy}") from error
    for key, expected in settings.items():
        got = found.manifest.get(key)
        if got != expected:
            raise DataError(f"{target} has other data: expected {key} {expected!r}, got {got!r}; {remedy}")
    log(f"already prepared: {target}")
    return found


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _split(digest: bytes, held_out: float) -> str:
    """Return the split of a document. It depends on the hash only, so adding documents never moves others."""
    if int.from_bytes(digest[:8]) >= held_out * 2**64:
        return "train"
    return "valid" if digest[8] & 1 else "test"


def _more_documents(digests: Sequence[bytes]) -> str:
    """Return the remedy for an empty split: a `held_out` that fills all splits if there is one, or more documents."""
    more = 'add documents to data.source: one per file, or per line {"text": "..."} of a .jsonl; duplicates count once'
    for share in (number / 100 for number in range(1, 50)):
        if {_split(digest, share) for digest in digests} == set(SPLITS):
            return f"set data.held_out={share}, or {more}"
    return more


# Text -------------------------------------------------------------------------------------------------------


def _read(sources: Iterable[str]) -> list[tuple[bytes, str]]:
    """Return (SHA-256, text) of all documents, ordered by name, without empty documents and duplicates."""
    named = sorted(document for source in sources for document in _read_source(source))
    unique: dict[bytes, str] = {}
    for _, text in named:
        if text.strip():
            unique.setdefault(hashlib.sha256(text.encode()).digest(), text)
    return list(unique.items())


def _read_source(source: str) -> Iterator[tuple[str, str]]:
    if source == "python":
        yield from _read_python()
        return
    path = Path(source).expanduser()
    if path.is_dir():
        files = [file for file in path.rglob("*") if file.suffix in SUFFIXES]
    else:
        files = [path] if path.exists() else [Path(name) for name in glob.glob(str(path), recursive=True)]
    files = [file for file in files if file.is_file()]
    if not files:
        by_glob = f"use a glob for other files, such as {path / '**/*.text'}"
        remedy = by_glob if path.is_dir() else "check the path"
        raise DataError(
            f"data.source {source!r}: expected 'python', a file, a glob, or a directory with "
            f"{', '.join(SUFFIXES)} files, got nothing to read; {remedy}"
        )
    for file in files:
        if file.suffix == ".jsonl":
            yield from _read_jsonl(file)
        else:
            yield str(file), _read_text(file)


def _read_text(file: Path) -> str:
    try:
        return file.read_bytes().decode("utf-8")
    except OSError as error:
        raise DataError(f"{file}: expected a readable file, got: {error}; correct or remove the file") from error
    except UnicodeError as error:
        raise DataError(f"{file}: expected UTF-8 text, got: {error}; convert or remove the file") from error


def _read_jsonl(file: Path) -> Iterator[tuple[str, str]]:
    # Not splitlines(): JSON strings may have unescaped U+2028.
    for number, line in enumerate(_read_text(file).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            text = json.loads(line)["text"]
            if not isinstance(text, str):
                raise TypeError(f"text is {type(text).__name__}")
            text.encode()  # raises for lone surrogates
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise DataError(
                f'{file}:{number}: expected {{"text": "..."}}, got {line[:60]!r} ({brief(repr(error))}); fix the line'
            ) from error
        yield f"{file}:{number:09}", text


def _read_python() -> Iterator[tuple[str, str]]:
    """Yield the text that ships with Python: sources of the standard library without tests, and pydoc's topics."""
    root = Path(sysconfig.get_path("stdlib"))
    files = [file for file in root.rglob("*.py") if _NOT_SOURCE.isdisjoint(file.relative_to(root).parts)]
    if not files:
        raise DataError(f"data.source 'python': expected .py files in {root}, found none; set other sources")
    for file in files:
        name = file.relative_to(root).as_posix()
        # The topics follow as separate documents. A second copy in one file would leak across splits.
        if name != "pydoc_data/topics.py" and file.is_file() and file.stat().st_size <= _MAX_PYTHON_FILE:
            yield f"python:{name}", _read_text(file)
    with contextlib.suppress(ImportError):  # absent in some distributions
        from pydoc_data.topics import topics

        for topic, text in topics.items():
            yield f"python:topics/{topic}", text


# Tokens -----------------------------------------------------------------------------------------------------


def _train_tokenizer(texts: list[str], vocab_size: int, log: Callable[[str], None]) -> bytes:
    """Return a byte-pair SentencePiece model. It is lossless for text without U+2581, its space symbol."""
    import sentencepiece

    lines, size = _tokenizer_lines(texts)
    log(f"training SentencePiece: {vocab_size} pieces from {size / 1e6:.1f} MB")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            character_coverage=0.9995,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            user_defined_symbols=["\n"],
            max_sentence_length=_LONGEST_LINE,
            unk_id=0,
            bos_id=1,
            eos_id=2,  # Megatron's eod
            pad_id=-1,  # Megatron masks labels equal to the pad id, so it must not be a piece
            num_threads=1,
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        said = " ".join(str(error).split())
        raise DataError(
            f"data.vocab_size {vocab_size}: SentencePiece makes no such model from {size} bytes of train "
            f"text ({said}); {_other_vocabulary(said)}"
        ) from error
    return model.getvalue()


def _other_vocabulary(said: str) -> str:
    """Return the remedy for an error of SentencePiece."""
    if most := re.search(r"set it to a value <= (\d+)", said):
        fewer = f"set data.vocab_size={most[1]} or less, or " if int(most[1]) >= LEAST_VOCAB_SIZE else ""
        return f"{fewer}add text to data.source"
    if least := re.search(r"smaller than required_chars. \d+ vs (\d+)", said):
        return f"set data.vocab_size={least[1]} or more, the number of different characters"
    if "!sentences_.empty()" in said:
        return f"break the lines of the text: all are longer than {_LONGEST_LINE >> 20} MiB and would be skipped"
    return "change data.vocab_size or add text to data.source"


def _tokenizer_lines(texts: list[str]) -> tuple[list[str], int]:
    """Return lines of complete documents up to the size limit. Ordering by hash makes the sample fair and stable."""
    lines, size = [], 0
    for text in sorted(texts, key=lambda text: hashlib.sha256(text.encode()).digest()):
        if size >= _TOKENIZER_BYTES:
            break
        lines += [line for line in text.split("\n") if line]
        size += len(text.encode())
    return lines, size


def _encode(root: Path, splits: dict[str, list[str]], log: Callable[[str], None]) -> dict[str, Any]:
    """Write the indexed datasets and return their part of the manifest."""
    import torch
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    tokenizer = _megatron_tokenizer(root / "tokenizer.model")
    dtype = DType.optimal_dtype(tokenizer.vocab_size)
    total, done, shown = sum(map(len, splits.values())), 0, 0
    written = {}
    for split, texts in splits.items():
        builder, tokens = IndexedDatasetBuilder(str(root / f"{split}.bin"), dtype=dtype), 0
        for text in texts:
            ids = [*tokenizer.tokenize(text), tokenizer.eod]
            builder.add_item(torch.tensor(ids))
            builder.end_document()
            tokens += len(ids)
            done += 1
            if done * 20 // total > shown:
                shown = done * 20 // total
                log(f"encoding: {done}/{total} documents")
        builder.finalize(str(root / f"{split}.idx"))
        size = (root / f"{split}.bin").stat().st_size
        written[split] = {"documents": len(texts), "tokens": tokens, "bytes": size}
    return {"vocab_size": tokenizer.vocab_size, "eod": tokenizer.eod, "splits": written}


def _megatron_tokenizer(model: Path) -> Any:
    """Return the tokenizer that Megatron builds for the model."""
    from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer

    return build_tokenizer(
        Namespace(
            tokenizer_type="SentencePieceTokenizer",
            tokenizer_model=str(model),
            tokenizer_sentencepiece_legacy=False,
            tokenizer_sentencepiece_ignore_extra_whitespaces=True,
            chat_template=None,
            special_tokens=None,
            metadata_path=None,
            pad_vocab_size=False,
        )
    )
