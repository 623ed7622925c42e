import numpy as np
import pytest

from trainer.data.sampler import BLOCK_SLOTS, Sampler


def sampler(*num_tokens: int, weights: list[float] | None = None, seq_len: int = 4, seed: int = 0) -> Sampler:
    return Sampler(
        domains=[f"d{i}" for i in range(len(num_tokens))],
        num_tokens=num_tokens,
        weights=weights or [1.0] * len(num_tokens),
        seq_len=seq_len,
        seed=seed,
    )


def test_a_text_of_exactly_one_window_is_always_read_whole():
    location = sampler(5).locate(np.arange(3))
    assert location.start.tolist() == [0, 0, 0]
    assert location.epoch.tolist() == [0, 1, 2]


def test_a_text_of_less_than_two_windows_is_cut_at_every_place_that_fits():
    assert set(sampler(7).locate(np.arange(200)).start.tolist()) == {0, 1, 2}


def test_epochs_start_at_different_offsets():
    location = sampler(100).locate(np.arange(24 * 20))
    offsets = [set((location.start[location.epoch == epoch] % 4).tolist()) for epoch in range(20)]
    assert all(len(offset) == 1 for offset in offsets)
    assert set.union(*offsets) == {0, 1, 2, 3}


def test_seeds_give_different_orders():
    slots = np.arange(24)
    assert sampler(100, seed=1).locate(slots).start.tolist() != sampler(100, seed=2).locate(slots).start.tolist()


def test_domains_of_equal_length_are_read_in_different_orders():
    location = sampler(100, 100).locate(np.arange(200))
    assert location.start[location.domain == 0][:20].tolist() != location.start[location.domain == 1][:20].tolist()


def test_blocks_mix_domains_differently():
    location = sampler(100, 100).locate(np.arange(2 * BLOCK_SLOTS))
    assert location.domain[:BLOCK_SLOTS].tolist() != location.domain[BLOCK_SLOTS:].tolist()


def test_no_long_stretch_is_of_one_domain():
    domain = sampler(100, 100).locate(np.arange(BLOCK_SLOTS)).domain
    changes = np.flatnonzero(np.diff(domain))
    assert np.diff(changes).max() < 25  # 4096 fair coins: a run of 25 has probability 1e-4


def test_quotas_are_rounded_to_the_largest_remainders():
    assert sampler(9, 9, 9).quotas == (1366, 1365, 1365)
    assert sampler(9, 9, weights=[3.0, 1.0]).quotas == (3072, 1024)
    assert sampler(9, 9, weights=[0.9998, 0.0002]).quotas == (4095, 1)  # 0.8 of a slot


def test_no_slots_have_no_location():
    assert sampler(100, 50).locate(np.zeros(0, dtype=np.int64)).start.tolist() == []


def test_a_distant_slot_costs_no_more_than_a_near_one():
    location = sampler(100, 50).locate(np.array([2**40, 0, 2**40]))
    assert location.start[0] == location.start[2]
    assert location.epoch[0] > 10**9


def test_a_text_shorter_than_a_window_is_named(says):
    with says(
        "data.sources: domain d1 has 4 training tokens; one window of model.seq_len 4 needs 5; give it more text or "
        "use model.seq_len: 3 or less"
    ):
        sampler(5, 4)


def test_a_domain_that_would_never_be_drawn_is_named(says):
    with says(
        "data.sources: domain d1 has 0.0001 of the weight and would never be drawn; the smallest share that is drawn "
        "is 1/4096 (0.00025); raise its weight or leave it out"
    ):
        sampler(9, 9, weights=[0.9999, 0.0001])


def test_misuse_is_refused():
    with pytest.raises(ValueError, match="negative"):
        sampler(9).locate(np.array([-1]))
    with pytest.raises(ValueError, match="positive"):
        sampler(9, weights=[0.0])
    with pytest.raises(ValueError, match="one of each"):
        sampler(9, weights=[1.0, 1.0])
    with pytest.raises(ValueError, match="at least one token"):
        sampler(9, seq_len=0)
