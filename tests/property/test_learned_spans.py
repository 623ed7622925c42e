"""Any mask of learned tokens survives the token files, and rows under either packing have exactly its targets."""

import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.texts import EOD, make_corpus_of
from trainer.data.batches.evaluation import evaluation_batches
from trainer.data.batches.packed_rows import PackedDocuments
from trainer.data.batches.row_order import SequenceRows
from trainer.data.batches.stream import TrainStream
from trainer.data.batches.wrapped_rows import Windows
from trainer.data.token_cache.token_files import TokenFile, is_intact, open_token_file
from trainer.data.token_cache.token_writer import TokenWriter
from trainer.errors import DataError

_NAME = "d.train"


def write(folder: Path, masks: list[list[bool]], *, joined_at: int | None = None) -> TokenFile:
    """Write a document for each mask, whose last entry is that of its end; two files are joined if `joined_at`."""
    sizes = {"vocab_size": 256, "end_of_document": EOD}
    with TokenWriter(folder, _NAME, **sizes) as writer:
        if joined_at is not None:
            for name, part in (("a", masks[:joined_at]), ("b", masks[joined_at:])):
                (folder / name).mkdir()
                writer.extend(write(folder / name, part))
        else:
            for number, mask in enumerate(masks):
                tokens = (np.arange(len(mask) - 1) + 10 * number) % EOD
                writer.write(tokens, num_bytes=len(tokens), is_learned=np.array(mask))
    info = writer.info()
    assert is_intact(folder, _NAME, info, vocab_size=256, verify=True)
    assert (info.gaps_sha256 is not None) == (folder / f"{_NAME}.gaps").exists()
    return open_token_file(folder, _NAME, info, vocab_size=256)


masks_of_documents = st.lists(st.lists(st.booleans(), min_size=2, max_size=12), min_size=1, max_size=8)


@settings(max_examples=60)
@given(masks=masks_of_documents, seq_len=st.integers(1, 9), data=st.data())
def test_rows_have_the_targets_of_the_mask(masks, seq_len, data):
    joined_at = data.draw(st.none() | st.integers(0, len(masks)))
    with tempfile.TemporaryDirectory() as folder:
        file = write(Path(folder), masks, joined_at=joined_at)
        assert [file.document(i)[1].tolist() for i in range(len(masks))] == masks
        tokens = file.tokens[:].tolist()
        learned = [flag for mask in masks for flag in mask]  # of every token and every end, also the last one
        begin, end = file.learned_spans()
        assert [any(b <= i < e for b, e in zip(begin, end, strict=True)) for i in range(len(learned))] == learned
        packed = PackedDocuments(file, seq_len=seq_len, end_of_document=EOD)
        num_windows = -(-(len(tokens) - 1) // seq_len)
        # Windows predict everything but the first token, packed rows also that and the last end of document.
        predicted = {"windows": slice(1, len(tokens)), "packed": slice(0, None)}
        texts = {"windows": (Windows(file, seq_len=seq_len), num_windows), "packed": (packed, packed.num_rows)}
        for name, (text, num_rows) in texts.items():
            rows: SequenceRows = text.read(np.arange(num_rows))
            counted = rows.loss_mask.astype(np.bool_) & rows.is_real
            assert text.with_targets().tolist() == np.flatnonzero(counted.any(axis=1)).tolist()
            targets = zip([*tokens, EOD][predicted[name]], learned[predicted[name]], strict=True)
            assert sorted(rows.targets[counted].tolist()) == sorted(token for token, flag in targets if flag)


def test_batches_count_the_learned_tokens_only():
    """Two answers and the question between them, through evaluation and training."""
    with tempfile.TemporaryDirectory() as folder:
        masks = [[False, True, True, False, True, True], [False, False, True, False, False]]
        corpus = make_corpus_of(write(Path(folder), masks))
    (batch,) = evaluation_batches(corpus, 0, packing="bfd", seq_len=16, batch_size=1, max_tokens=None)
    assert batch.targets[batch.target_mask].tolist() == [1, 2, 4, EOD, 12]
    rows = TrainStream(corpus, packing="bfd", seq_len=16, seed=0).rows(0, 1)
    assert rows.targets[rows.target_mask].tolist() == [1, 2, 4, EOD, 12]
    assert corpus.tokenizer.token_bytes()[batch.targets[batch.target_mask].numpy()].sum() == 4


def test_texts_without_questions_in_between_have_the_files_of_before(tmp_path):
    (tmp_path / "masks").mkdir()
    (tmp_path / "prompts").mkdir()
    file = write(tmp_path / "masks", [[False, True, True], [True, True], [False, False, True]])
    with TokenWriter(tmp_path / "prompts", _NAME, vocab_size=256, end_of_document=EOD) as writer:
        for number, (length, prompt) in enumerate([(2, 1), (1, 0), (2, 2)]):
            writer.write(np.arange(length) + 10 * number, num_bytes=length, num_prompt_tokens=prompt)
    assert not len(file.gaps)
    contents = [{path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("masks", "prompts")]
    assert contents[0] == contents[1]
    assert len(writer.info().content()) == 3, "so the fingerprints of old caches stay"


@pytest.mark.parametrize("content", [b"", bytes(16), bytes(8)])
def test_damaged_gaps_are_refused(tmp_path, content):
    with TokenWriter(tmp_path, _NAME, vocab_size=256, end_of_document=EOD) as writer:
        writer.write(np.arange(4), num_bytes=4, is_learned=np.array([True, False, True, True, True]))
    (tmp_path / f"{_NAME}.gaps").write_bytes(content)
    assert not is_intact(tmp_path, _NAME, writer.info(), vocab_size=256, verify=True)
    with pytest.raises(DataError, match="not what was written"):
        open_token_file(tmp_path, _NAME, writer.info(), vocab_size=256)
