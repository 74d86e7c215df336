"""Conversations of benchmarks/conversations.py: the tokenizer's ids are those of the SentencePiece model."""

import email
import json
from pathlib import Path

import pytest

pytest.importorskip("transformers")

import sentencepiece

from abkd_megatron.data.prepare import _train_tokenizer

with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    import conversations

FILES = sorted(Path(email.__file__).parent.glob("*.py"))[:4]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("conversations") / "tokenizer.model"
    path.write_bytes(_train_tokenizer([file.read_text() for file in FILES], 400, lambda _: None))
    return path


def test_tokens_are_those_of_the_model(model: Path, tmp_path: Path) -> None:
    from megatron.core.tokenizers.text.libraries.sft_tokenizer import SFTTokenizer

    expected = sentencepiece.SentencePieceProcessor(model_file=str(model))
    found = conversations.make_tokenizer(model)
    texts = [*(file.read_text() for file in FILES), "  two  spaces, a tab\t, é, 你好 and \U0001f400\n\n"]
    for text in texts:
        ids = found.encode(text)
        assert ids == expected.encode(text)
        assert found.decode(ids) == text
    assert len(found) == expected.get_piece_size() == 400
    found.save_pretrained(tmp_path)
    chat = SFTTokenizer(str(tmp_path), "nemotron-nano-v2")
    said = [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "Hello, you."}]
    tokens, targets = chat.tokenize_conversation(said, return_target=True, add_generation_prompt=False)
    answer = [int(target) for target in targets if target >= 0]
    assert chat.ids_to_text(answer) == "Hello, you.\n<SPECIAL_12>\n"
    assert answer.index(chat.eod) == len(answer) - 2
    assert max(tokens) < 400


def test_functions_have_their_docstring_as_the_answer() -> None:
    found = {code.split("(")[0]: (code, answer) for _, code, answer in conversations.functions("email")}
    code, answer = found["def message_from_string"]
    assert answer == "Parse a string into a Message object model."
    assert answer not in code and json.dumps(code)
