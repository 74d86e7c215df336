"""Whatever stands in a file of text: `prepare` reads documents that it can encode, or says which line is wrong."""

import gzip
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from abkd_megatron.data.prepare import _read
from abkd_megatron.errors import DataError

few = settings(max_examples=100, deadline=None, derandomize=True)
values = st.recursive(st.none() | st.booleans() | st.floats() | st.text(), st.lists, max_leaves=5)
ODD = [b'{"text": "\\ud800"}', b'{"text": "a", "text": "b"}', b'"text"', b"[" * 10**5, b'{"text": NaN}', b"9" * 5000]
ODD += [b'{"text": "' + b"a" * 10**6, gzip.compress(b'{"text": "a"}')[:20], b"\xef\xbb\xbf{}", b"\0", b"null"]
lines = (
    st.text().map(lambda text: json.dumps({"text": text}).encode())
    | st.builds(lambda key, value: json.dumps({key: value}).encode(), st.sampled_from(["text", "body"]), values)
    | st.binary(max_size=20)
    | st.sampled_from(ODD)
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("text")


@few
@given(st.lists(lines, max_size=3), st.sampled_from([".jsonl", ".txt"]))
def test_documents_or_a_message(folder, lines, end):
    file = folder / f"data{end}"
    file.write_bytes(b"\n".join(lines))
    try:
        documents = _read([str(file)])
    except DataError as error:
        assert str(file) in str(error) and len(str(error)) < 1500 + len(str(file))
        assert str(error).isprintable()
        return
    for _, text in documents:
        assert text.strip() and text.encode()
