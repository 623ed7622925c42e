import numpy as np
import pytest

from trainer.data import mixture as module
from trainer.data.config import MixtureConfig
from trainer.data.mixture import LARGEST_BLOCK, SMALLEST_BLOCK, Mixture, domain_shares
from trainer.data.permutation import permute_index


def mixture(*shares: float, seed: int = 0) -> Mixture:
    return Mixture(domains=[f"d{i}" for i in range(len(shares))], shares=shares, seed=seed)


def shares(*, weights: list[float], num_tokens: list[int], sources: list[int] | None = None, **section) -> list[float]:
    config = MixtureConfig.model_validate(section)
    sources = sources or list(range(len(num_tokens)))
    return list(domain_shares(**config.model_dump(), sources=sources, weights=weights, num_tokens=num_tokens))


def test_a_source_has_its_weights_share_split_over_its_domains():
    assert shares(weights=[3.0, 1.0], num_tokens=[5, 500, 7], sources=[0, 0, 1]) == [0.375, 0.375, 0.25]


def test_by_tokens_all_domains_are_read_equally_often():
    assert shares(weights=[1.0, 1.0], num_tokens=[10, 20, 10], sources=[0, 0, 1], by="tokens") == [0.25, 0.5, 0.25]


def test_by_tokens_a_weight_multiplies_the_epochs():
    assert shares(weights=[1.0, 6.0], num_tokens=[30, 10], by="tokens") == pytest.approx([1 / 3, 2 / 3])


def test_a_temperature_evens_out():
    assert shares(weights=[1.0, 1.0], num_tokens=[1, 16], by="tokens", temperature=2.0) == pytest.approx([0.2, 0.8])
    even = shares(weights=[1.0, 1.0], num_tokens=[1, 10**12], by="tokens", temperature=1e6)
    assert even == pytest.approx([0.5, 0.5], abs=1e-4)


def test_a_very_low_temperature_has_shares_all_the_same():
    assert shares(weights=[1.0, 1.0], num_tokens=[10**9, 10**10], by="tokens", temperature=1e-3) == [0.0, 1.0]


def test_blocks_mix_domains_differently():
    domain, _ = mixture(0.5, 0.5).locate(np.arange(2 * SMALLEST_BLOCK))
    assert domain[:SMALLEST_BLOCK].tolist() != domain[SMALLEST_BLOCK:].tolist()


def test_seeds_mix_domains_differently():
    one, two = (mixture(0.5, 0.5, seed=seed).locate(np.arange(99))[0].tolist() for seed in (1, 2))
    assert one != two


def test_no_long_stretch_is_of_one_domain():
    domain, _ = mixture(0.5, 0.5).locate(np.arange(SMALLEST_BLOCK))
    changes = np.flatnonzero(np.diff(domain))
    assert np.diff(changes).max() < 25  # 4096 fair coins: a run of 25 has probability 1e-4


def test_quotas_are_rounded_to_the_largest_remainders():
    assert mixture(1, 1, 1).quotas.tolist() == [1366, 1365, 1365]
    assert mixture(3.0, 1.0).quotas.tolist() == [3072, 1024]
    assert mixture(0.9998, 0.0002).quotas.tolist() == [4095, 1]  # 0.8 of a slot


def test_a_block_grows_if_a_domain_would_have_no_slot():
    grown = mixture(0.9999, 0.0001)  # 0.4 of 4096 slots
    assert grown.block_slots == 2**18  # 26 slots, and 13 of half of it
    assert grown.quotas.tolist() == [2**18 - 26, 26]
    domain, visit = grown.locate(np.arange(3 * 2**18, 4 * 2**18))
    assert (domain == 1).sum() == 26
    assert visit[domain == 1].tolist() == list(range(3 * 26, 4 * 26))


def test_many_domains_have_a_few_slots_each():
    assert mixture(*[1.0] * 256).block_slots == 4096
    many = mixture(*[1.0] * 1000)
    assert many.block_slots == 2**14
    assert set(many.quotas.tolist()) == {16, 17}


def test_the_largest_block_is_the_end():
    assert mixture(1 - 2e-7, 2e-7).quotas.tolist() == [LARGEST_BLOCK - 1, 1]


@pytest.mark.parametrize("share", [1e-7, 0.0])
def test_a_domain_that_would_never_be_drawn_is_named(fails, share):
    with fails(
        f"data.sources: domain d1 has {share:.2g} of the rows and would never be drawn; the smallest possible "
        "share is 1/4194304 (2.4e-07); raise its weight or data.mixture.temperature, or leave it out"
    ):
        mixture(1 - share, share)


def test_visits_are_counted_up_to_any_slot():
    mixed = mixture(0.6, 0.3, 0.1)
    domain, _ = mixed.locate(np.arange(10_000))
    for num_slots in (0, 1, 17, 4095, 4096, 4097, 9999):
        assert mixed.num_visits(num_slots).tolist() == np.bincount(domain[:num_slots], minlength=3).tolist()
    assert mixture(1.0).num_visits(5000).tolist() == [5000]


def test_a_block_is_laid_out_once_for_all_batches_in_it(monkeypatch):
    laid_out = []
    monkeypatch.setattr(
        module, "permute_index", lambda *args, **kwargs: laid_out.append(1) or permute_index(*args, **kwargs)
    )
    mixed = mixture(*np.random.default_rng(0).lognormal(0, 1, 300))
    for first in range(0, mixed.block_slots, 512):
        mixed.locate(np.arange(first, first + 512))
    assert len(laid_out) == 1


def test_no_slots_have_no_location():
    domain, visit = mixture(0.7, 0.3).locate(np.zeros(0, dtype=np.int64))
    assert domain.tolist() == visit.tolist() == []


def test_a_distant_slot_costs_no_more_than_a_near_one():
    _, visit = mixture(0.7, 0.3).locate(np.array([2**40, 0, 2**40]))
    assert visit[0] == visit[2] > 10**11


def test_misuse_is_refused():
    with pytest.raises(ValueError, match="negative"):
        mixture(1.0).locate(np.array([-1]))
    with pytest.raises(ValueError, match="positive"):
        mixture(0.0)
    with pytest.raises(ValueError, match="positive"):
        mixture(1.0, -0.5)
    with pytest.raises(ValueError, match="one of each"):
        Mixture(domains=["a"], shares=[1.0, 1.0], seed=0)
