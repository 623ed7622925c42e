import numpy as np
import pytest

from trainer.data.token_cache import checksums, token_files
from trainer.data.token_cache.token_files import TokenFile, is_intact, open_token_file, token_dtype
from trainer.data.token_cache.token_writer import TokenWriter
from trainer.errors import DataError


@pytest.fixture
def written(folder):
    """Write documents of tokens and map them."""

    def write(*documents: list[int], vocab_size: int = 256) -> TokenFile:
        with TokenWriter(folder, "d.train", vocab_size=vocab_size, end_of_document=vocab_size - 1) as writer:
            for document in documents:
                writer.write(np.array(document), num_bytes=len(document))
        return open_token_file(folder, "d.train", writer.info(), vocab_size=vocab_size)

    return write


def test_an_end_of_document_stands_between_documents_only(written):
    file = written([1, 2], [3], [4, 5])
    assert file.tokens[:].tolist() == [1, 2, 255, 3, 255, 4, 5]
    assert file.document_starts.tolist() == [0, 3, 5]


def test_a_single_document_has_no_end(written):
    assert written([1, 2]).tokens[:].tolist() == [1, 2]


def test_an_end_belongs_to_the_document_before_it(written):
    assert written([1, 2], [3], [4, 5]).document_of(np.arange(7)).tolist() == [0, 0, 0, 1, 1, 2, 2]


def test_document_of_keeps_the_shape(written):
    assert written([1, 2], [3]).document_of([[0, 3], [2, 1]]).tolist() == [[0, 1], [0, 0]]


def test_a_prompt_is_remembered_as_where_the_answer_starts(folder):
    with TokenWriter(folder, "d.train", vocab_size=256, end_of_document=255) as writer:
        writer.write(np.array([1, 2, 3]), num_bytes=3, num_prompt_tokens=2)
        writer.write(np.array([4]), num_bytes=1)
        writer.write(np.array([5, 6]), num_bytes=2, num_prompt_tokens=2)
    file = open_token_file(folder, "d.train", writer.info(), vocab_size=256)
    assert file.tokens[:].tolist() == [1, 2, 3, 255, 4, 255, 5, 6]
    assert (file.document_starts.tolist(), file.answer_starts.tolist()) == ([0, 4, 6], [2, 4, 8])


def test_bytes_do_not_count_ends(written):
    file = written([1, 2], [3])
    assert (file.num_tokens, file.num_bytes, file.num_documents) == (4, 3, 2)


@pytest.mark.parametrize(
    ("vocab_size", "dtype"), [(2, "u1"), (256, "u1"), (257, "<u2"), (65536, "<u2"), (65537, "<u4"), (2**32, "<u4")]
)
def test_tokens_take_the_smallest_type(vocab_size, dtype):
    assert token_dtype(vocab_size) == np.dtype(dtype)


def test_more_than_32_bits_are_refused():
    with pytest.raises(ValueError, match="more than 32 bits"):
        token_dtype(2**32 + 1)


def test_large_ids_survive(written):
    assert written([70_000], [1], vocab_size=80_000).tokens[:].tolist() == [70_000, 79_999, 1]


@pytest.mark.parametrize("token", [-1, 256])
def test_a_token_outside_the_vocabulary_is_refused(written, token):
    with pytest.raises(ValueError, match="do not fit the vocabulary 256"):
        written([token])


def test_mapped_tokens_are_read_only(written):
    with pytest.raises(ValueError, match="read-only"):
        written([1]).tokens[:][0] = 2


def test_a_file_of_the_wrong_size_or_content_is_not_intact(folder):
    with TokenWriter(folder, "d.train", vocab_size=256, end_of_document=255) as writer:
        writer.write(np.array([1, 2, 3]), num_bytes=3)
    info = writer.info()
    assert is_intact(folder, "d.train", info, vocab_size=256, verify=True)
    (folder / "d.train.tokens").write_bytes(bytes([1, 2, 4]))
    assert is_intact(folder, "d.train", info, vocab_size=256)
    assert not is_intact(folder, "d.train", info, vocab_size=256, verify=True)
    (folder / "d.train.tokens").write_bytes(bytes([1, 2]))
    assert not is_intact(folder, "d.train", info, vocab_size=256)


def test_an_array_is_compared_wherever_it_is_read(folder, monkeypatch):
    monkeypatch.setattr(token_files, "_SMALL_BYTES", 0)
    monkeypatch.setattr(checksums, "BLOCK_BYTES", 8)
    with TokenWriter(folder, "d.train", vocab_size=1 << 16, end_of_document=0) as writer:
        writer.write(np.arange(22), num_bytes=22)
    for block in range(6):  # of four tokens, the last one of two
        tokens = open_token_file(folder, "d.train", writer.info(), vocab_size=1 << 16).tokens
        content = bytearray((folder / "d.train.tokens").read_bytes())
        content[8 * block] ^= 1
        (folder / "d.train.tokens").write_bytes(content)
        first, end = 4 * block, min(4 * block + 4, 22)
        around = np.array([i for i in range(22) if not first <= i < end])
        assert tokens[around].tolist() == around.tolist()
        assert tokens[first:first].tolist() == []
        for index in (slice(first, end), slice(end - 1, end), slice(None), slice(end - 1, None, -1), np.array([first])):
            with pytest.raises(DataError, match=rf"bytes {2 * first} to {2 * end - 1} are not what was written"):
                tokens[index]
        with pytest.raises(DataError):
            np.asarray(tokens)
        content[8 * block] ^= 1
        (folder / "d.train.tokens").write_bytes(content)
        assert np.asarray(tokens).tolist() == list(range(22))


def test_a_missing_file_is_not_intact(folder):
    with TokenWriter(folder, "d.train", vocab_size=256, end_of_document=255) as writer:
        writer.write(np.array([1]), num_bytes=1)
    (folder / "d.train.documents").unlink()
    assert not is_intact(folder, "d.train", writer.info(), vocab_size=256)
