"""The cut into training and validation, the order of batches, and the validation windows."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minidsv3.data.loader import IGNORED, Loader, split_documents, token_stream, validation_windows
from minidsv3.data.tokenizer import ByteTokenizer

BYTES = ByteTokenizer()
DISTINCT = [bytes(range(0, 41)), bytes(range(41, 100))]  # with one boundary each: 102 tokens, of which two are equal


def ring_of(documents):
    return [token for document in documents for token in [256, *document]]


def loader(seed=0, seq_len=7, documents=DISTINCT):
    return Loader(documents, BYTES, seq_len, seed)


def test_split_documents_loses_no_byte():
    documents = [b"a" * 1000, b"b" * 333]
    train, validation = split_documents(documents)
    assert [head + tail for head, (_, tail) in zip(train, validation)] == documents


@settings(deadline=None)
@given(st.lists(st.text(max_size=40), max_size=5))
def test_split_documents_cuts_no_character(texts):
    train, validation = split_documents([text.encode() for text in texts])
    for raw in [*train, *(part for pair in validation for part in pair)]:
        raw.decode("utf-8")


@settings(deadline=None)
@given(st.lists(st.text(max_size=40), max_size=5))
def test_split_documents_keeps_all_text_in_order(texts):
    train, validation = split_documents([text.encode() for text in texts])
    assert sum(map(len, train)) + sum(len(text) for _, text in validation) == sum(len(t.encode()) for t in texts)


@pytest.mark.parametrize(
    "sizes, held_out",
    [
        ([1000, 3000], [100, 300]),  # below 400 kB: a tenth
        ([399_990], [39_999]),
        ([400_000], [200_000]),  # from there on at least 200 kB
        ([1_000_000, 600_000], [125_000, 75_000]),
        ([6_000_000, 2_000_000], [300_000, 100_000]),  # from 4 MB on: a twentieth
    ],
)
def test_split_documents_holds_out_the_stated_share(sizes, held_out):
    _, validation = split_documents([b"x" * size for size in sizes])
    assert [len(text) for _, text in validation] == held_out


def test_split_documents_reaches_the_least_size_with_many_documents():
    _, validation = split_documents([b"x" * 37] * 12_000)
    assert sum(len(text) for _, text in validation) >= 200_000


def test_split_documents_context_is_what_stands_before_the_text():
    train, validation = split_documents([bytes(range(200)), b"z" * 30])
    assert all(head.endswith(context) and context for head, (context, _) in zip(train, validation))


def test_split_documents_of_nothing_is_nothing():
    assert split_documents([]) == ([], [])


def test_token_stream_has_a_boundary_before_each_document():
    np.testing.assert_array_equal(token_stream([b"ab", b"c"], BYTES), [256, 97, 98, 256, 99])


@pytest.mark.parametrize("vocab_size, dtype", [(257, np.uint16), (65536, np.uint16), (65537, np.uint32)])
def test_token_stream_is_compact(vocab_size, dtype):
    tokenizer = ByteTokenizer()
    tokenizer.vocab_size = vocab_size
    assert token_stream([b"ab"], tokenizer).dtype == dtype


def test_loader_targets_are_the_tokens_after_on_the_ring():
    tokens_in, targets = loader().batch(0, 14)
    ring = ring_of(DISTINCT)
    followers = set(itertools.pairwise([*ring, ring[0]]))
    for row_in, row_target in zip(tokens_in.tolist(), targets.tolist()):
        assert row_in[1:] == row_target[:-1]
        assert set(zip(row_in, row_target)) <= followers


def test_loader_batch_has_shape_and_dtype():
    for array in loader().batch(3, 5):
        assert (array.shape, array.dtype) == ((5, 7), np.int64)


@pytest.mark.parametrize("epoch", [0, 1, 5])
def test_loader_epoch_uses_every_window_once(epoch):
    _, targets = loader(seed=4).batch(14 * epoch, 14)  # 14 windows of 7: 98 of the 102 tokens
    bytes_only = targets[targets != BYTES.boundary].tolist()
    assert len(set(bytes_only)) == len(bytes_only) >= 96


def test_loader_leaves_out_other_tokens_each_epoch():
    deal = loader(seed=4)
    seen = set(deal.batch(0, 20 * deal.windows_per_epoch)[1].ravel().tolist())
    assert seen == set(ring_of(DISTINCT))


def test_loader_batch_is_a_function_of_seed_and_position():
    one, other = loader(seed=9), loader(seed=9)
    walked = [one.batch(position, 4) for position in range(0, 60, 4)]
    for number in reversed(range(15)):  # the other way round, as a resumed run might ask
        np.testing.assert_array_equal(other.batch(4 * number, 4), walked[number])


def test_loader_batch_is_its_sequences_one_by_one_across_epochs():
    deal = loader(seq_len=11)
    assert deal.windows_per_epoch == 9
    whole = deal.batch(5, 17)  # the ends of epochs 0 and 1 lie inside
    singles = [deal.batch(position, 1) for position in range(5, 22)]
    np.testing.assert_array_equal(whole[0], np.concatenate([tokens for tokens, _ in singles]))


def test_loader_order_changes_with_the_epoch():
    deal = loader()
    assert deal.batch(0, 14)[0].tolist() != deal.batch(14, 14)[0].tolist()


def test_loader_order_changes_with_the_seed():
    assert loader(seed=1).batch(0, 14)[0].tolist() != loader(seed=2).batch(0, 14)[0].tolist()


def test_loader_takes_a_text_of_one_sequence_and_one_token():
    tokens_in, targets = loader(seq_len=5, documents=[b"abcde"]).batch(0, 1)
    ring = ring_of([b"abcde"])
    start = ring.index(tokens_in[0, 0])
    assert targets[0].tolist() == [ring[(start + 1 + i) % 6] for i in range(5)]


def test_loader_of_a_shorter_text_is_an_error():
    with pytest.raises(ValueError, match=r"has 5 tokens, one sequence needs seq_len \+ 1 = 6"):
        loader(seq_len=5, documents=[b"abcd"])


@pytest.mark.parametrize("arguments, named", [({"seq_len": 0}, "seq_len=0"), ({"seed": -1}, "seed=-1")])
def test_loader_arguments_out_of_range_are_an_error(arguments, named):
    with pytest.raises(ValueError, match=named):
        loader(**arguments)


@pytest.mark.parametrize("position, batch_size", [(-1, 2), (0, 0)])
def test_loader_batch_arguments_out_of_range_are_an_error(position, batch_size):
    with pytest.raises(ValueError, match=f"position={position}.*batch_size={batch_size}"):
        loader().batch(position, batch_size)


PAIRS = st.lists(st.tuples(st.binary(max_size=3), st.binary(min_size=1, max_size=23)), min_size=1, max_size=4)


@settings(deadline=None)
@given(PAIRS, st.integers(1, 9))
def test_validation_windows_predict_every_byte_once(pairs, seq_len):
    _, targets, _ = validation_windows(pairs, BYTES, seq_len)
    assert bytes(targets[targets != IGNORED].tolist()) == b"".join(text for _, text in pairs)


@settings(deadline=None)
@given(PAIRS, st.integers(1, 9))
def test_validation_windows_input_is_the_token_before(pairs, seq_len):
    tokens_in, targets, _ = validation_windows(pairs, BYTES, seq_len)
    expected = []
    for context, text in pairs:
        before = context[-1] if context else BYTES.boundary
        for byte in text:
            expected.append((before, byte))
            before = byte
    predicted = targets != IGNORED
    assert list(zip(tokens_in[predicted].tolist(), targets[predicted].tolist())) == expected


def test_validation_windows_pad_the_last_window_of_each_text():
    tokens_in, targets, _ = validation_windows([(b"a", b"bcde"), (b"f", b"g")], BYTES, 3)
    assert targets.tolist() == [[98, 99, 100], [101, IGNORED, IGNORED], [103, IGNORED, IGNORED]]
    assert tokens_in.tolist() == [[97, 98, 99], [100, 256, 256], [102, 256, 256]]


def test_validation_windows_count_the_bytes():
    assert validation_windows([(b"a", b"bcde"), (b"", b"fg")], BYTES, 3)[2] == 6


def test_validation_windows_are_int64():
    tokens_in, targets, _ = validation_windows([(b"", b"ab")], BYTES, 5)
    assert (tokens_in.dtype, targets.dtype) == (np.int64, np.int64)


@pytest.mark.parametrize("pairs", [[], [(b"abc", b"")]])
def test_validation_windows_of_no_text_are_an_error(pairs):
    with pytest.raises(ValueError, match="no validation text"):
        validation_windows(pairs, BYTES, 4)
