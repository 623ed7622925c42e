"""Law: an epoch has every document exactly once, wherever a run is interrupted and on whatever ranks it resumes."""

from collections import Counter, defaultdict
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.texts import make_corpus_of, make_text
from trainer.data.batches.batch import Batch
from trainer.data.batches.stream import TrainStream
from trainer.data.config import Packing
from trainer.data.corpus import Corpus


class Attempt(NamedTuple):
    """A part of a run, between two restarts."""

    num_steps: int
    world_size: int
    micro_batch_size: int
    pieces_lost: int
    """Micro-batches that each rank reads of the step in which it is killed; never counted."""


ATTEMPTS = st.lists(
    st.builds(Attempt, st.integers(0, 9), st.integers(1, 3), st.integers(1, 5), st.integers(0, 3)),
    min_size=1,
    max_size=6,
)


def read(
    corpus: Corpus, packing: Packing, attempts: list[Attempt], *, num_rows: int, rows_of_a_step: int
) -> list[Batch]:
    """Return the counted micro-batches of all ranks, in a run of at least `num_rows` rows."""
    counted, position, number = [], 0, 0
    while position < num_rows:
        attempt = attempts[number % len(attempts)] if number < 50 else Attempt(num_rows, 1, 4, 0)
        number += 1
        streams = [TrainStream(corpus, packing=packing, seq_len=8, seed=5) for _ in range(attempt.world_size)]
        for step in range(attempt.num_steps + 1):
            is_killed = step == attempt.num_steps
            for rank, stream in enumerate(streams):
                batches = stream.micro_batches(
                    position,
                    global_batch_size=rows_of_a_step,
                    micro_batch_size=attempt.micro_batch_size,
                    rank=rank,
                    world_size=attempt.world_size,
                )
                if is_killed:
                    del batches[: attempt.pieces_lost]
                else:
                    counted += batches
            position += 0 if is_killed else rows_of_a_step
    return counted


@pytest.mark.parametrize("packing", ["bfd", "wrapped"])
@settings(max_examples=25)
@given(
    sizes=st.lists(st.integers(1, 30), min_size=1, max_size=2),
    seed=st.integers(0, 99),
    rows_of_a_step=st.integers(1, 7),
    num_rows=st.integers(1, 150),
    attempts=ATTEMPTS,
)
def test_every_document_is_read_exactly_once_in_an_epoch(packing, sizes, seed, rows_of_a_step, num_rows, attempts):
    texts = [make_text(size + 8, longest=20, seed=seed + i) for i, size in enumerate(sizes)]
    corpus = make_corpus_of(*texts, shares=(0.7, 0.3)[: len(texts)])
    batches = read(corpus, packing, attempts, num_rows=num_rows, rows_of_a_step=rows_of_a_step)
    rows = {int(b.sample_id[i, 0]): (b, i) for b in batches for i in range(len(b.tokens)) if b.sample_id[i, 0] >= 0}
    num_read = sum(int((b.sample_id[:, 0] >= 0).sum()) for b in batches)
    assert sorted(rows) == list(range(num_read)), "every row of the run once"
    stream = TrainStream(corpus, packing=packing, seq_len=8, seed=5)
    domain, visit = stream.mixture.locate(np.arange(num_read))
    for d, text in enumerate(texts):
        num_rows_of_epoch = stream.domain_rows[d].num_rows
        assert num_rows_of_epoch is not None
        of_epoch = defaultdict(Counter)
        for slot in np.flatnonzero(domain == d).tolist():
            batch, i = rows[slot]
            assert (batch.domain[i] == d).all()
            of_epoch[visit[slot] // num_rows_of_epoch].update(batch.document_id[i][batch.valid[i]].tolist())
        num_visits = int((domain == d).sum())
        assert stream.epochs(num_read)[f"d{d}"] == num_visits / num_rows_of_epoch
        ends = np.append(text.document_starts[1:] - 1, text.num_tokens)
        lengths = dict(enumerate((ends - text.document_starts + 1).tolist()))
        for epoch, tokens in of_epoch.items():
            if packing == "bfd" and epoch < num_visits // num_rows_of_epoch:
                assert tokens == lengths, "all of every document, its end included"
            assert all(tokens[n] <= lengths[n] for n in tokens), "nothing twice"
