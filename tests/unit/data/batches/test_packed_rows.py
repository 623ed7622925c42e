import numpy as np
import pytest

from tests.texts import EOD, make_corpus_of, make_file, make_text
from trainer.data.batches.assemble import PADDING
from trainer.data.batches.batch import Batch
from trainer.data.batches.evaluation import evaluation_batches
from trainer.data.batches.packed_rows import PackedDocuments, PackedRows
from trainer.data.batches.stream import TrainStream
from trainer.data.token_cache.token_files import TokenFile

A, B, C = [1, 2, 3], [11, 12, 13, 14, 15, 16, 17], [21]


def packed(*documents: list[int], seq_len: int = 6, prompts: tuple[int, ...] = ()) -> Batch:
    """The rows of an evaluation, all in one batch."""
    corpus = make_corpus_of(make_file(*documents, prompts=prompts))
    num_rows = PackedDocuments(corpus.validation[0], seq_len=seq_len, end_of_document=EOD).num_rows
    (batch,) = evaluation_batches(corpus, 0, packing="bfd", seq_len=seq_len, batch_size=num_rows, max_tokens=None)
    return batch


def test_documents_share_rows_and_long_ones_are_split():
    batch = packed(A, B, C)
    assert batch.tokens.tolist() == [
        [EOD, 11, 12, 13, 14, 15],  # a full row: the beginning of B
        [EOD, 1, 2, 3, 16, 17],  # A, and the rest of B
        [EOD, 21, 0, 0, 0, 0],  # C, and padding
    ]
    assert batch.targets.tolist() == [
        [11, 12, 13, 14, 15, 16],
        [1, 2, 3, EOD, 17, EOD],
        [21, EOD, 0, 0, 0, 0],
    ]
    padding = [PADDING] * 4
    assert batch.document_id.tolist() == [[1] * 6, [0, 0, 0, 0, 1, 1], [2, 2, *padding]]
    assert batch.valid.tolist() == batch.loss_mask.tolist() == [[True] * 6, [True] * 6, [True] * 2 + [False] * 4]
    assert batch.position.tolist() == [list(range(6))] * 3


def test_prompts_are_read_and_not_learned():
    batch = packed(A, B, C, prompts=(2, 6, 1))
    assert batch.sample_id[:, 0].tolist() == [1, 2, PADDING], "the first row is all prompt, and not evaluated"
    assert batch.loss_mask.tolist()[:2] == [
        [False, False, True, True, True, True],  # 3 EOD, and 17 EOD of B
        [False, True, False, False, False, False],  # only the end of C
    ]
    stream = TrainStream(make_corpus_of(make_file(A, B, C, prompts=(2, 6, 1))), packing="bfd", seq_len=6, seed=0)
    whole = stream.rows(0, 3)
    assert sorted(whole.targets[whole.target_mask].tolist()) == [3, 17, EOD, EOD, EOD]
    assert whole.valid.sum() == 14, "what is not learned is read all the same"


@pytest.mark.parametrize("seq_len", [1, 2, 3, 7, 16, 100])
@pytest.mark.parametrize("longest", [1, 5, 40])
def test_every_token_and_every_end_is_predicted_once_from_what_is_before_it(seq_len, longest):
    """Tokens are unique numbers, so that each identifies its position."""
    lengths = np.random.default_rng(seq_len).integers(0, longest + 1, 50)
    starts = 1000 + np.cumsum(lengths) - lengths
    documents = [list(range(start, start + length)) for start, length in zip(starts, lengths, strict=True)]
    text = PackedDocuments(make_file([7], *documents), seq_len=seq_len, end_of_document=EOD)
    rows = text.read(np.arange(text.num_rows))
    real = rows.is_real
    found = sorted(zip(rows.document[real], rows.tokens[real], rows.targets[real], strict=True))
    expected = [
        (number, before, after)
        for number, document in enumerate([[7], *documents])
        for before, after in zip([EOD, *document], [*document, EOD], strict=True)
    ]
    assert found == sorted(expected)
    assert (real == np.sort(real, axis=1)[:, ::-1]).all(), "padding is behind everything else"


def test_documents_that_fit_in_a_row_are_not_split():
    text = make_text(300, longest=31, seed=1)
    rows = PackedDocuments(text, seq_len=32, end_of_document=EOD).read(np.arange(1000) % 7)
    for row in range(7):
        documents, lengths = np.unique(rows.document[row][rows.is_real[row]], return_counts=True)
        ends = np.append(text.document_starts[1:] - 1, text.num_tokens)
        assert lengths.tolist() == (ends - text.document_starts + 1)[documents].tolist()


def test_each_epoch_has_every_row_once_in_an_order_of_its_own():
    rows = PackedRows(make_text(200, longest=20), seq_len=16, end_of_document=EOD, seed=3, domain=0)
    epochs = rows.read(np.arange(3 * rows.num_rows)).document.reshape(3, rows.num_rows, -1)
    orders = [[tuple(row) for row in epoch] for epoch in epochs.tolist()]
    assert sorted(orders[0]) == sorted(orders[1]) == sorted(orders[2])
    assert orders[0] != orders[1] != orders[2] != orders[0]
    assert rows.epochs(2 * rows.num_rows) == 2.0


def test_a_text_of_one_token_has_a_row():
    batch = packed([5], seq_len=4)
    assert batch.targets[batch.target_mask].tolist() == [5, EOD]


def test_an_evaluation_is_limited_to_evenly_spaced_rows():
    corpus = make_corpus_of(make_text(100, longest=9))
    found = evaluation_batches(corpus, 0, packing="bfd", seq_len=10, batch_size=2, max_tokens=39)
    numbers = [int(n) for batch in found for n in batch.sample_id[:, 0]]
    num_rows = PackedDocuments(corpus.validation[0], seq_len=10, end_of_document=EOD).num_rows
    assert numbers == [0, num_rows // 3, 2 * num_rows // 3, PADDING]


def test_bytes_of_targets_are_those_of_the_answers():
    text = make_text(40, longest=12, prompts=True)
    corpus = make_corpus_of(text)
    found = evaluation_batches(corpus, 0, packing="bfd", seq_len=8, batch_size=3, max_tokens=None)
    targets = np.concatenate([batch.targets[batch.target_mask].numpy() for batch in found])
    ends = np.append(text.document_starts[1:] - 1, text.num_tokens)
    assert corpus.tokenizer.token_bytes()[targets].sum() == (ends - text.answer_starts).sum()
    assert (targets == EOD).sum() == text.num_documents


def test_a_token_outside_the_vocabulary_is_named(fails):
    corpus = make_corpus_of(make_file([1, 200, 3]), vocab_size=200)
    with fails(
        "cache: token 255 in the train text of domain d0; ids are below 200; the folder is damaged: remove it, and it "
        "is built again"
    ):
        TrainStream(corpus, packing="bfd", seq_len=4, seed=0).rows(0, 1)


def test_large_token_ids_are_preserved():
    file = make_file([70_000, 5], [70_001])
    assert isinstance(file, TokenFile)
    rows = PackedDocuments(file, seq_len=8, end_of_document=EOD).read(np.array([0]))
    assert rows.tokens.tolist() == [[EOD, 70_000, 5, EOD, 70_001, 0, 0, 0]]
