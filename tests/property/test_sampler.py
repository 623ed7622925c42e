"""Laws of the data order: permutations, epochs, quotas, and independence of how slots are asked for."""

from collections import Counter

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.data.permutation import hash64, permute
from trainer.data.sampler import BLOCK_SLOTS, Sampler

SEEDS = st.integers(min_value=0, max_value=2**64)


@st.composite
def samplers(draw: st.DrawFn) -> Sampler:
    seq_len = draw(st.integers(1, 12))
    lengths = draw(st.lists(st.integers(seq_len + 1, 300), min_size=1, max_size=4))
    weights = draw(st.lists(st.floats(0.01, 1.0), min_size=len(lengths), max_size=len(lengths)))
    names = [f"d{i}" for i in range(len(lengths))]
    return Sampler(domains=names, num_tokens=lengths, weights=weights, seq_len=seq_len, seed=draw(SEEDS))


@settings(deadline=None)
@given(size=st.integers(1, 3000), seed=SEEDS)
def test_a_permutation_is_a_bijection(size, seed):
    image = permute(np.arange(size, dtype=np.uint64), size=size, key=hash64(seed))
    assert sorted(image.tolist()) == list(range(size))


@settings(deadline=None)
@given(size=st.integers(1, 2**40), seed=SEEDS, data=st.data())
def test_an_element_does_not_depend_on_the_others(size, seed, data):
    index = np.array(data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=20)), dtype=np.uint64)
    together = permute(index, size=size, key=hash64(seed))
    assert (together < size).all()
    assert together.tolist() == [
        int(permute(index[i : i + 1], size=size, key=hash64(seed))[0]) for i in range(len(index))
    ]


@settings(deadline=None, max_examples=50)
@given(
    num_tokens=st.integers(2, 400), seq_len=st.integers(1, 20), seed=SEEDS, epoch=st.integers(0, 1000), data=st.data()
)
def test_an_epoch_has_every_window_once_and_predicts_no_token_twice(num_tokens, seq_len, seed, epoch, data):
    num_tokens = max(num_tokens, seq_len + 1)
    sampler = Sampler(domains=["d"], num_tokens=[num_tokens], weights=[1.0], seq_len=seq_len, seed=seed)
    windows = sampler.num_windows[0]
    location = sampler.locate(np.arange(epoch * windows, (epoch + 1) * windows))
    assert (location.epoch == epoch).all()
    starts = sorted(location.start.tolist())
    assert starts == [starts[0] + i * seq_len for i in range(windows)]
    assert starts[0] >= 0
    assert starts[-1] + seq_len < num_tokens
    assert windows * seq_len > num_tokens - 2 * seq_len  # less than two windows are left out


@settings(deadline=None, max_examples=30)
@given(sampler=samplers(), block=st.integers(0, 10**6))
def test_every_block_has_the_exact_quotas(sampler, block):
    slots = np.arange(block * BLOCK_SLOTS, (block + 1) * BLOCK_SLOTS)
    counts = np.bincount(sampler.locate(slots).domain, minlength=len(sampler.quotas))
    assert tuple(counts.tolist()) == sampler.quotas
    assert sum(sampler.quotas) == BLOCK_SLOTS


@settings(deadline=None, max_examples=30)
@given(sampler=samplers(), num_blocks=st.integers(1, 3))
def test_each_domain_goes_through_its_epochs_in_order_of_slots(sampler, num_blocks):
    location = sampler.locate(np.arange(num_blocks * BLOCK_SLOTS))
    for domain, windows in enumerate(sampler.num_windows):
        here = location.domain == domain
        visits = int(here.sum())
        assert location.epoch[here].tolist() == [visit // windows for visit in range(visits)]
        seen = Counter(zip(location.epoch[here].tolist(), location.start[here].tolist(), strict=True))
        assert max(seen.values()) == 1  # (epoch, window) pairs: every window at most once in an epoch


@settings(deadline=None, max_examples=50)
@given(sampler=samplers(), slots=st.lists(st.integers(0, 20_000), min_size=1, max_size=40))
def test_a_slot_has_one_location_however_it_is_asked_for(sampler, slots):
    together = sampler.locate(np.array(slots))
    for i, slot in enumerate(slots):
        alone = sampler.locate(np.array([slot]))
        assert [int(part[0]) for part in alone] == [int(part[i]) for part in together]
