"""Bytes to ids and back, and the wrapper around a released tokenizer.json (with a stand-in for its package)."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minidsv3.data.tokenizer import ByteTokenizer, load_tokenizer

BYTES = ByteTokenizer()


@settings(deadline=None)
@given(st.binary())
def test_byte_tokenizer_round_trips_any_bytes(raw):
    assert BYTES.decode_bytes(BYTES.encode(raw)) == raw


@settings(deadline=None)
@given(st.text())
def test_byte_tokenizer_round_trips_any_text(text):
    assert BYTES.decode(BYTES.encode(text)) == text


@settings(deadline=None)
@given(st.binary(), st.lists(st.integers(0, 30)))
def test_byte_tokenizer_boundaries_vanish(raw, places):
    ids = list(raw)
    for place in places:
        ids.insert(place, BYTES.boundary)
    assert BYTES.decode_bytes(ids) == raw


def test_byte_tokenizer_ids_are_the_utf8_bytes():
    np.testing.assert_array_equal(BYTES.encode("a\u00e9"), [97, 0xC3, 0xA9])


@pytest.mark.parametrize("text", ["", "abc", b"", b"\xff"])
def test_byte_tokenizer_ids_are_int64(text):
    assert BYTES.encode(text).dtype == np.int64


def test_byte_tokenizer_ids_can_be_written_to():
    ids = BYTES.encode("abc")
    ids[0] = 98
    assert BYTES.decode(ids) == "bbc"


def test_byte_tokenizer_decode_replaces_half_a_character():
    assert BYTES.decode(BYTES.encode("a\u00e9")[:2]) == "a\ufffd"


@pytest.mark.parametrize("bad", [-1, 257, 10**6])
def test_byte_tokenizer_id_out_of_range_is_an_error(bad):
    with pytest.raises(ValueError, match=rf"id {bad} is outside \[0, 257\)"):
        BYTES.decode_bytes([65, bad])


def test_byte_tokenizer_ids_that_are_no_integers_are_an_error():
    with pytest.raises(ValueError, match="float64"):
        BYTES.decode([65.0])


class WordTokenizer:
    """Stand-in for `tokenizers.Tokenizer`: one id a word."""

    vocabulary = ("hello", "world", "<s>")

    @classmethod
    def from_file(cls, path):
        if "broken" in path:
            raise Exception("expected value at line 1")
        return cls()

    def token_to_id(self, name):
        return self.vocabulary.index(name) if name in self.vocabulary else None

    def get_vocab_size(self, with_added_tokens):
        return len(self.vocabulary) if with_added_tokens else len(self.vocabulary) - 1

    def encode(self, text, add_special_tokens):
        start = [2] if add_special_tokens else []
        return SimpleNamespace(ids=start + [self.vocabulary.index(word) for word in text.split()])

    def decode(self, ids, skip_special_tokens):
        return " ".join(self.vocabulary[i] for i in ids)


@pytest.fixture
def released(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "tokenizers", SimpleNamespace(Tokenizer=WordTokenizer))
    (tmp_path / "tokenizer.json").write_text("{}", encoding="utf-8")
    return load_tokenizer(tmp_path)


def test_released_tokenizer_encodes_without_special_tokens(released):
    np.testing.assert_array_equal(released.encode(b"world hello"), [1, 0])


def test_released_tokenizer_decode_leaves_boundaries_out(released):
    assert released.decode([2, 0, 1, 2]) == "hello world"


def test_released_tokenizer_decode_bytes_is_utf8(released):
    assert released.decode_bytes([1]) == b"world"


def test_released_tokenizer_has_vocabulary_and_boundary_of_the_file(released):
    assert (released.vocab_size, released.boundary) == (3, 2)


def test_released_tokenizer_id_out_of_range_is_an_error(released):
    with pytest.raises(ValueError, match="id 3 is outside"):
        released.decode([3])


def test_released_tokenizer_without_boundary_is_an_error(released, monkeypatch, tmp_path):
    monkeypatch.setattr(WordTokenizer, "vocabulary", ("hello", "world"))
    with pytest.raises(ValueError, match="none of the boundary tokens"):
        load_tokenizer(tmp_path)


def test_load_tokenizer_of_a_damaged_file_is_an_error(released, tmp_path):
    (tmp_path / "broken.json").write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match=r"broken\.json is not a tokenizer\.json: expected value"):
        load_tokenizer(tmp_path / "broken.json")


def test_load_tokenizer_of_a_missing_file_is_an_error(released, tmp_path):
    with pytest.raises(ValueError, match="gone is no file"):
        load_tokenizer(tmp_path / "gone")


def test_load_tokenizer_without_the_package_names_the_extra(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "tokenizers", None)  # makes the import fail
    with pytest.raises(ValueError, match=r"minidsv3\[tokenizers\]"):
        load_tokenizer(tmp_path)


def test_load_tokenizer_reads_a_real_file(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    model = tokenizers.models.WordLevel({"<unk>": 0, "<s>": 1, "to": 2, "be": 3}, unk_token="<unk>")
    inner = tokenizers.Tokenizer(model)
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    inner.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.decode([1, *tokenizer.encode("to be")]) == "to be"
