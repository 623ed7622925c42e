"""Laws of the data order: permutations, epochs, quotas, and independence of how slots are requested."""

from collections import Counter

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.texts import make_file
from trainer.data.batches.wrapped_rows import WrappedRows
from trainer.data.mixture import Mixture
from trainer.data.permutation import hash64, permute_index

SEEDS = st.integers(min_value=0, max_value=2**64)


@st.composite
def mixtures(draw: st.DrawFn) -> Mixture:
    shares = draw(st.lists(st.floats(0.01, 1.0), min_size=1, max_size=4))
    return Mixture(domains=[f"d{i}" for i in range(len(shares))], shares=shares, seed=draw(SEEDS))


@given(size=st.integers(1, 3000), seed=SEEDS)
def test_a_permutation_is_a_bijection(size, seed):
    image = permute_index(np.arange(size, dtype=np.uint64), size=size, key=hash64(seed))
    assert sorted(image.tolist()) == list(range(size))


@given(size=st.integers(1, 2**40), seed=SEEDS, data=st.data())
def test_an_element_does_not_depend_on_the_others(size, seed, data):
    index = np.array(data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=20)), dtype=np.uint64)
    together = permute_index(index, size=size, key=hash64(seed))
    assert (together < size).all()
    assert together.tolist() == [
        int(permute_index(index[i : i + 1], size=size, key=hash64(seed))[0]) for i in range(len(index))
    ]


@settings(max_examples=50)
@given(
    num_tokens=st.integers(2, 400), seq_len=st.integers(1, 20), seed=SEEDS, epoch=st.integers(0, 1000), data=st.data()
)
def test_an_epoch_has_every_window_once_and_predicts_no_token_twice(num_tokens, seq_len, seed, epoch, data):
    num_tokens = max(num_tokens, seq_len + 1)
    rows = WrappedRows(make_file([0] * num_tokens), seq_len=seq_len, seed=seed, domain=0, name="d")
    windows = rows.num_rows
    visits = np.arange(epoch * windows, (epoch + 1) * windows)
    starts = sorted(rows.starts(visits).tolist())
    assert starts == [starts[0] + i * seq_len for i in range(windows)]
    assert starts[0] >= 0
    assert starts[-1] + seq_len < num_tokens
    assert windows * seq_len > num_tokens - 2 * seq_len  # less than two windows are left out
    some = data.draw(st.lists(st.sampled_from(visits.tolist()), min_size=1, max_size=9))
    assert rows.starts(np.array(some)).tolist() == [int(rows.starts(np.array([visit]))[0]) for visit in some]


@settings(max_examples=30)
@given(mixture=mixtures(), block=st.integers(0, 10**6))
def test_every_block_has_the_exact_quotas(mixture, block):
    size = mixture.block_slots
    domain, _ = mixture.locate(np.arange(block * size, (block + 1) * size))
    assert np.bincount(domain, minlength=len(mixture.quotas)).tolist() == mixture.quotas.tolist()


@settings(max_examples=30)
@given(mixture=mixtures(), num_blocks=st.integers(1, 3))
def test_each_domain_is_visited_in_order_of_slots(mixture, num_blocks):
    domain, visit = mixture.locate(np.arange(num_blocks * mixture.block_slots))
    for d, num_visits in Counter(domain.tolist()).items():
        assert visit[domain == d].tolist() == list(range(num_visits))


@settings(max_examples=50)
@given(mixture=mixtures(), slots=st.lists(st.integers(0, 20_000), min_size=1, max_size=40))
def test_a_slot_is_one_visit_however_it_is_asked_for(mixture, slots):
    domain, visit = mixture.locate(np.array(slots))
    for i, slot in enumerate(slots):
        assert [int(part[0]) for part in mixture.locate(np.array([slot]))] == [domain[i], visit[i]]
