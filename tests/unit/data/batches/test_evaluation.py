import pytest
import torch

from trainer.data.batches.assemble import PADDING
from trainer.data.batches.batch import Batch
from trainer.data.batches.evaluation import evaluation_batches
from trainer.data.corpus import Corpus


def batches(corpus: Corpus, *, batch_size: int = 2, max_tokens: int | None = None) -> list[Batch]:
    return list(
        evaluation_batches(corpus, 0, packing="wrapped", seq_len=3, batch_size=batch_size, max_tokens=max_tokens)
    )


@pytest.mark.parametrize("length", [2, 3, 4, 5, 7, 12, 13])
@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_every_token_but_the_first_is_predicted_once_and_in_order(make_corpus, length, batch_size):
    text = "abcdefghijklmnopqrstuvwxyz"[:length]
    found = batches(make_corpus(a=text * 2), batch_size=batch_size)
    assert "".join(chr(t) for batch in found for t in batch.targets[batch.target_mask].tolist()) == text[1:]
    assert "".join(chr(t) for batch in found for t in batch.tokens[batch.valid].tolist()) == text[:-1]
    assert {batch.tokens.shape for batch in found} == {(batch_size, 3)}


def test_the_last_window_is_filled_with_positions_that_are_not_valid(make_corpus):
    (batch,) = batches(make_corpus(a="abcdef" * 2))
    assert batch.valid.tolist() == [[True, True, True], [True, True, False]]
    assert batch.loss_mask.tolist() == batch.valid.tolist()
    assert batch.tokens[1, 2] == batch.targets[1, 2] == 0
    assert batch.document_id[1].tolist() == [0, 0, PADDING]


def test_sample_ids_are_window_numbers(make_corpus):
    found = batches(make_corpus(a="abcdefgh" * 2))
    assert torch.cat([b.sample_id[:, 0] for b in found]).tolist() == [0, 1, 2, PADDING]


def test_windows_of_a_limited_evaluation_are_evenly_spaced(make_corpus):
    found = batches(make_corpus(a="a" * 200), max_tokens=13)
    assert torch.cat([b.sample_id[:, 0] for b in found]).tolist() == [0, 8, 16, 24]
    assert sum(int(b.target_mask.sum()) for b in found) == 12


def test_a_limit_above_the_text_takes_all_of_it(make_corpus):
    corpus = make_corpus(a="abcdefgh" * 2)
    assert sum(int(b.target_mask.sum()) for b in batches(corpus, max_tokens=100)) == 7


def test_a_limit_below_a_window_still_takes_one(make_corpus):
    (batch,) = batches(make_corpus(a="a" * 200), max_tokens=1)
    assert batch.valid.sum() == 3


def test_the_domain_is_the_one_that_was_asked_for(make_corpus):
    corpus = make_corpus(a="aaaa", b="bbbbbb")
    (batch,) = evaluation_batches(corpus, 1, packing="wrapped", seq_len=4, batch_size=1, max_tokens=None)
    assert batch.domain.unique().tolist() == [1]
    assert batch.tokens[batch.valid].tolist() == [ord("b")] * 2


def test_one_token_cannot_be_evaluated(make_corpus, fails):
    with fails(
        "data.split: domain a has 1 validation token; a prediction needs 2; raise data.split.fraction "
        "or give it more text"
    ):
        batches(make_corpus(a="ab"))


def test_misuse_is_refused(make_corpus):
    with pytest.raises(ValueError, match="at least 1"):
        batches(make_corpus(a="abcd"), batch_size=0)
