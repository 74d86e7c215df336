"""Conversations about code, for the comparisons on instruction data: ``python benchmarks/conversations.py MODEL OUT``.

The user gives a function, the assistant the first paragraph of its docstring. Functions are those of the installed
torch, numpy and transformers whose conversation has at most `LONGEST` tokens.

MODEL is a SentencePiece model of `abkd-megatron prepare`, such as ``runs/demo/data/tokenizer.model``. OUT gets
``train.jsonl`` and ``test.jsonl``, split by file, and ``tokenizer``: that model as a Hugging Face tokenizer, for
Megatron's SFTTokenizer with the prompt format nemotron-nano-v2. Checkpoints of the SentencePiece model go on with it.
"""

import argparse
import ast
import hashlib
import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path

import sentencepiece
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

PACKAGES = ("torch", "numpy", "transformers")
LONGEST = 128
ANSWER = range(6, 49)
SYSTEM = "What does it do?"
SPACE = "\u2581"

# Pieces of bytes that UTF-8 never uses stand for the tokens of the prompt format.
SPECIAL = {"<0xF8>": "<SPECIAL_10>", "<0xF9>": "<SPECIAL_11>", "<0xFA>": "<SPECIAL_12>", "<0xFB>": "Assistant"}
END, UNKNOWN = "<SPECIAL_12>", "<unk>"
HELD_OUT = 0.1


def make_tokenizer(model: Path) -> PreTrainedTokenizerFast:
    """Return a byte-pair SentencePiece model as a Hugging Face tokenizer that encodes text in the same ids."""
    given = sentencepiece.SentencePieceProcessor(model_file=str(model))
    pieces = [given.id_to_piece(number) for number in range(given.get_piece_size())]
    rank = {piece: number for number, piece in enumerate(pieces)}
    merges = [
        (rank[piece], max(rank[piece[:at]], rank[piece[at:]]), piece[:at], piece[at:])
        for piece in pieces
        for at in range(1, len(piece))
        if piece[:at] in rank and piece[at:] in rank
    ]
    vocabulary = {SPECIAL.get(piece, piece): number for piece, number in rank.items()}
    pairs = [(one, other) for *_, one, other in sorted(merges)]
    tokenizer = Tokenizer(models.BPE(vocabulary, pairs, unk_token=UNKNOWN, byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", SPACE)
    tokenizer.pre_tokenizer = pre_tokenizers.Split("\n", "isolated")
    tokenizer.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(name, normalized=False) for name in SPECIAL.values()])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, unk_token=UNKNOWN, clean_up_tokenization_spaces=False
    )


def functions(package: str) -> Iterator[tuple[str, str, str]]:
    """Yield file, code without docstring, and the docstring's first paragraph, of every function that has one."""
    spec = importlib.util.find_spec(package)
    assert spec is not None and spec.origin is not None
    root = Path(spec.origin).parent
    for file in sorted(root.rglob("*.py")):
        name = file.relative_to(root.parent).as_posix()
        if "test" in name:
            continue
        try:
            tree = ast.parse(file.read_text(encoding="utf-8"))
        except (SyntaxError, ValueError):  # templates and encodings of their own
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and len(node.body) > 1 and (said := ast.get_docstring(node)):
                node.body, node.decorator_list = node.body[1:], []
                yield name, ast.unparse(node), " ".join(said.split("\n\n")[0].split())


def main() -> None:
    """Write conversations and tokenizer."""
    parser = argparse.ArgumentParser(description="Write conversations about code.")
    parser.add_argument("model", type=Path, metavar="MODEL")
    parser.add_argument("out", type=Path, metavar="OUT")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True)
    tokenizer = make_tokenizer(arguments.model)
    tokenizer.save_pretrained(arguments.out / "tokenizer")
    lines: dict[str, list[str]] = {"train": [], "test": []}
    answers = set()
    for package in PACKAGES:
        for file, code, answer in functions(package):
            length = len(tokenizer.encode(answer))
            whole = len(tokenizer.encode(SYSTEM + code)) + length + 16  # roles and line breaks
            if length not in ANSWER or whole > LONGEST or answer in answers:
                continue
            answers.add(answer)
            said = (("system", SYSTEM), ("user", code), ("assistant", answer))
            messages = [{"role": role, "content": content} for role, content in said]
            held_out = hashlib.sha256(file.encode()).digest()[0] < 256 * HELD_OUT
            lines["test" if held_out else "train"].append(json.dumps({"messages": messages}))
    for split, of_split in lines.items():
        (arguments.out / f"{split}.jsonl").write_text("\n".join(of_split) + "\n", encoding="utf-8")
        print(f"{split}: {len(of_split)} conversations")


if __name__ == "__main__":
    main()
