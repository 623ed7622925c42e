import hashlib

import numpy as np

from tests.texts import EOD, make_corpus_of, make_file, make_text
from trainer.data.batches.evaluation import evaluation_batches
from trainer.data.batches.stream import TrainStream
from trainer.data.batches.wrapped_rows import WrappedRows
from trainer.data.token_cache.token_files import TokenFile


def rows(num_tokens: int, *, seq_len: int = 4, seed: int = 0, domain: int = 0) -> WrappedRows:
    text = make_file(list(range(num_tokens)))
    return WrappedRows(text, seq_len=seq_len, seed=seed, domain=domain, name=f"d{domain}")


def test_the_order_of_rows_never_changes_between_releases():
    """The hashes are those of the first release: a resumed run keeps its order."""

    def text(num_tokens: int, starts: list[int], seed: int) -> TokenFile:
        tokens = (((np.arange(num_tokens) * 2654435761 + seed) >> 7) % 255).astype(np.uint8)
        tokens[np.array(starts[1:], dtype=np.int64) - 1] = EOD
        begin = np.array(starts)
        return TokenFile(tokens=tokens, document_starts=begin, answer_starts=begin, num_bytes=num_tokens)

    corpus = make_corpus_of(
        text(1000, [0, 10, 500, 521], 1), text(333, [0], 2), text(70, [0, 30], 3), shares=(0.5, 0.3, 0.2)
    )
    stream = TrainStream(corpus, packing="wrapped", seq_len=16, seed=7)
    digest = hashlib.sha256()
    for first in (0, 4090, 10**6):
        batch = stream.rows(first, 64)
        for part in (batch.tokens, batch.targets, batch.document_id, batch.domain, batch.sample_id):
            digest.update(part.numpy().astype("<i8").tobytes())
    assert digest.hexdigest() == "9001b8cc92b74b4e01bb67abcea23ac5b7efdc08d2f54c72880566c6ced31b07"
    digest = hashlib.sha256()
    for domain in range(3):
        for batch in evaluation_batches(corpus, domain, packing="wrapped", seq_len=16, batch_size=5, max_tokens=200):
            for part in (batch.tokens, batch.targets, batch.valid, batch.sample_id):
                digest.update(part.numpy().astype("<i8").tobytes())
    assert digest.hexdigest() == "6264e455c86afcc513bbe0d3eeb9b0c1765c94187e7137e6b37569d0817fe1a1"


def test_a_text_of_exactly_one_window_is_always_read_whole():
    found = rows(5)
    assert found.starts(np.arange(3)).tolist() == [0, 0, 0]
    assert found.num_rows == 1 and found.epochs(3) == 3.0


def test_a_text_of_less_than_two_windows_uses_every_offset_that_fits():
    assert set(rows(7).starts(np.arange(200)).tolist()) == {0, 1, 2}


def test_epochs_start_at_different_offsets():
    found = rows(100)
    starts = found.starts(np.arange(found.num_rows * 20)).reshape(20, -1)
    offsets = [set((epoch % 4).tolist()) for epoch in starts]
    assert all(len(offset) == 1 for offset in offsets)
    assert set.union(*offsets) == {0, 1, 2, 3}


def test_seeds_and_domains_give_different_orders():
    visits = np.arange(24)
    orders = {tuple(rows(100, **key).starts(visits).tolist()) for key in ({}, {"seed": 1}, {"domain": 1})}
    assert len(orders) == 3


def test_a_text_shorter_than_a_window_is_named(fails):
    with fails(
        "data.sources: domain d0 has 4 training tokens; one window of model.seq_len 4 needs 5; give it more text, or "
        "use model.seq_len: 3 or less, or data.packing: bfd"
    ):
        rows(4)


def test_prompts_are_read_and_not_learned():
    #        0  1  2  3  4 EOD 6 7 8 EOD 10
    text = make_file([1, 2, 3, 4, 5], [6, 7, 8], [9], prompts=[2, 3, 0])
    batch = TrainStream(make_corpus_of(text), packing="wrapped", seq_len=10, seed=0).rows(0, 1)
    assert batch.tokens.tolist() == [[1, 2, 3, 4, 5, EOD, 6, 7, 8, EOD]]
    assert batch.targets[batch.target_mask].tolist() == [3, 4, 5, EOD, EOD, 9]
    assert batch.valid.all()


def test_an_evaluation_skips_windows_without_a_target():
    text = make_file(list(range(20)), list(range(30, 36)), prompts=[17, 0])
    found = list(evaluation_batches(make_corpus_of(text), 0, packing="wrapped", seq_len=4, batch_size=1, max_tokens=8))
    assert [int(batch.sample_id[0, 0]) for batch in found] == [4, 5]
    assert [batch.targets[batch.target_mask].tolist() for batch in found] == [[17, 18, 19, EOD], [30, 31, 32, 33]]


def test_a_text_that_is_all_prompt_cannot_be_evaluated(fails):
    corpus = make_corpus_of(make_file([1, 2, 3], prompts=[3]))
    with fails(
        "data.split: domain d0 has 3 validation tokens, all of them in a prompt, so there is nothing to predict; "
        "raise data.split.fraction or give it more text"
    ):
        next(evaluation_batches(corpus, 0, packing="wrapped", seq_len=4, batch_size=1, max_tokens=None))


def test_every_target_of_a_text_is_in_a_window_that_is_evaluated():
    for seed in range(20):
        text = make_text(30, longest=9, seed=seed, prompts=True)
        batches = evaluation_batches(
            make_corpus_of(text), 0, packing="wrapped", seq_len=3, batch_size=4, max_tokens=None
        )
        positions = np.arange(1, text.num_tokens)
        learned = text.is_learned(positions, text.document_of(positions))
        targets = [t for batch in batches for t in batch.targets[batch.target_mask].tolist()]
        assert targets == text.tokens[positions[learned]].tolist()
