from dataclasses import fields, replace

import numpy as np
import pytest
import torch

from trainer.data.batches.assemble import PADDING, pad_rows
from trainer.data.batches.stream import TrainStream
from trainer.data.token_cache.token_files import TokenFile

TEXT = "".join(chr(97 + i % 26) for i in range(200))


def test_targets_are_the_next_tokens(make_corpus):
    batch = TrainStream(make_corpus(a=TEXT), packing="wrapped", seq_len=4, seed=0).rows(0, 50)
    assert torch.equal(batch.tokens[:, 1:], batch.targets[:, :-1])
    assert torch.equal((batch.tokens - 97 + 1) % 26, batch.targets - 97)


def test_every_field_is_b_by_s(make_corpus):
    batch = TrainStream(make_corpus(a=TEXT), packing="wrapped", seq_len=4, seed=0).rows(3, 5)
    types = {name: (tensor.shape, tensor.dtype) for name, tensor in batch.tensors().items()}
    flags = {"loss_mask", "valid"}
    assert types == {name: ((5, 4), torch.bool if name in flags else torch.int64) for name in types}


def test_sample_ids_are_slots_and_positions_are_columns(make_corpus):
    batch = TrainStream(make_corpus(a=TEXT), packing="wrapped", seq_len=3, seed=0).rows(7, 2)
    assert batch.sample_id.tolist() == [[7, 7, 7], [8, 8, 8]]
    assert batch.position.tolist() == [[0, 1, 2], [0, 1, 2]]


def test_real_rows_are_valid_and_counted(make_corpus):
    assert TrainStream(make_corpus(a=TEXT), packing="wrapped", seq_len=3, seed=0).rows(0, 4).target_mask.all()


def test_rows_of_a_domain_are_its_text(make_corpus):
    batch = TrainStream(make_corpus(low="a" * 40, high="z" * 80), packing="wrapped", seq_len=4, seed=0).rows(0, 64)
    assert set(batch.domain.unique().tolist()) == {0, 1}
    assert torch.equal(batch.tokens, torch.where(batch.domain == 0, ord("a"), ord("z")))


@pytest.mark.parametrize(("key", "is_whole"), [("global_batch_size", True), ("seed", False), ("mixture", False)])
def test_seed_and_mixture_change_an_epoch_and_batch_size_does_not(make_corpus, key: str, is_whole: bool):
    """Half of an epoch is read; then the run resumes with another value of one key."""
    text = "".join(chr(97 + i // 26) + chr(97 + i % 26) + "..." for i in range(120))
    corpus = make_corpus(a=text, b=text.upper())
    first = TrainStream(corpus, packing="wrapped", seq_len=5, seed=0)
    epochs = [rows.num_rows or 0 for rows in first.domain_rows]
    half, step = sum(epochs) // 2, 7 if key == "global_batch_size" else 4
    then = TrainStream(
        replace(corpus, weights=(0.9, 0.1)) if key == "mixture" else corpus,
        packing="wrapped",
        seq_len=5,
        seed=1 if key == "seed" else 0,
    )
    batches = [first.rows(0, half), *(then.rows(start, step) for start in range(half, 40 * half, step))]
    is_once = []
    for domain, num_rows in enumerate(epochs):
        rows = [row for batch in batches for row in batch.tokens[batch.domain[:, 0] == domain].tolist()][:num_rows]
        is_once.append(len({tuple(row) for row in rows}) == num_rows)
    assert all(is_once) == is_whole


def test_only_the_training_text_is_drawn(make_corpus):
    batch = TrainStream(make_corpus(a="a" * 40 + "b" * 40), packing="wrapped", seq_len=4, seed=0).rows(0, 500)
    assert (batch.targets == ord("a")).all()


def test_document_ids_change_after_an_end_of_document(folder, make_corpus):
    corpus = make_corpus(a=TEXT)
    file = TokenFile(
        tokens=np.array([1, 2, 255, 3, 4, 255, 5], dtype=np.uint8),
        document_starts=np.array([0, 3, 6]),
        answer_starts=np.array([0, 3, 6]),
        num_bytes=5,
    )
    corpus = type(corpus)(**{f.name: getattr(corpus, f.name) for f in fields(corpus)} | {"train": (file,)})
    batch = TrainStream(corpus, packing="wrapped", seq_len=6, seed=0).rows(0, 1)
    assert batch.tokens.tolist() == [[1, 2, 255, 3, 4, 255]]
    assert batch.document_id.tolist() == [[0, 0, 0, 1, 1, 1]]


def test_two_streams_of_the_same_seed_give_the_same_rows(make_corpus):
    corpus = make_corpus(a=TEXT, b=TEXT)
    one, two = (TrainStream(corpus, packing="wrapped", seq_len=4, seed=5).rows(100, 20) for _ in range(2))
    assert torch.equal(one.tokens, two.tokens)


def test_a_short_last_micro_batch_is_padded(make_corpus):
    batches = TrainStream(make_corpus(a=TEXT), packing="wrapped", seq_len=3, seed=0).micro_batches(
        10, global_batch_size=3, micro_batch_size=2
    )
    last = batches[-1]
    assert last.sample_id[:, 0].tolist() == [12, PADDING]
    assert last.valid.tolist() == last.loss_mask.tolist() == [[True] * 3, [False] * 3]
    assert last.tokens[1].tolist() == last.targets[1].tolist() == [0, 0, 0]
    assert last.position[1].tolist() == [0, 1, 2]


def test_a_rank_without_rows_gets_padding(make_corpus):
    batch = pad_rows(TrainStream(make_corpus(a=TEXT), packing="wrapped", seq_len=3, seed=0).rows(10, 0), 2)
    assert batch.tokens.shape == (2, 3)
    assert not batch.valid.any()


def test_a_full_batch_is_not_copied(make_corpus):
    batch = TrainStream(make_corpus(a=TEXT), packing="wrapped", seq_len=3, seed=0).rows(0, 2)
    assert pad_rows(batch, 2) is batch


def test_misuse_is_refused(make_corpus):
    stream = TrainStream(make_corpus(a=TEXT), packing="wrapped", seq_len=3, seed=0)
    with pytest.raises(ValueError, match="3 rows do not fit in 2"):
        pad_rows(stream.rows(0, 3), 2)
    with pytest.raises(ValueError, match="micro_batch_size is 0"):
        stream.micro_batches(0, global_batch_size=1, micro_batch_size=0)
    with pytest.raises(ValueError, match="negative"):
        stream.rows(-1, 2)


def test_a_text_shorter_than_a_row_is_named(make_corpus, fails):
    with fails(
        "data.sources: domain b has 4 training tokens; one window of model.seq_len 16 needs 17; give it more text, "
        "or use model.seq_len: 3 or less, or data.packing: bfd"
    ):
        TrainStream(make_corpus(a=TEXT, b="abcdefgh"), packing="wrapped", seq_len=16, seed=0)


def test_a_token_outside_the_vocabulary_is_named(make_corpus, fails):
    corpus = make_corpus(a=TEXT)
    corpus.tokenizer.vocab_size = 122
    stream = TrainStream(corpus, packing="wrapped", seq_len=30, seed=0)
    with fails(
        f"{corpus.folders[0]}: token 122 in the train text of domain a; ids are below 122; the folder is damaged: "
        "remove it, and it is built again"
    ):
        stream.rows(0, 1)
