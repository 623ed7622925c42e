"""Noise: a pure function of its keys, uniform, independent of how tokens are batched."""

import torch

from trainer.ops.noise import mix32, stable_hash, token_keys, uniform


def test_mixing_is_a_bijection_on_a_stretch_of_integers() -> None:
    values = mix32(torch.arange(1 << 16))
    assert len(values.unique()) == 1 << 16
    assert int(values.min()) >= 0 and int(values.max()) < 1 << 32


def test_noise_of_a_token_does_not_depend_on_its_neighbours() -> None:
    sample = torch.arange(6)[:, None].expand(6, 5)
    position = torch.arange(5).expand(6, 5)
    whole = uniform(token_keys(7, sample, position).flatten(), 9, salt=1).view(6, 5, 9)
    part = uniform(token_keys(7, sample[2:4], position[2:4]).flatten(), 9, salt=1).view(2, 5, 9)
    assert torch.equal(whole[2:4], part)


def test_noise_is_uniform_and_differs_by_seed_sample_position_column_and_salt() -> None:
    sample = torch.arange(200)[:, None].expand(200, 50)
    position = torch.arange(50).expand(200, 50)
    base = uniform(token_keys(7, sample, position).flatten(), 8, salt=0)
    assert base.min() >= 0 and base.max() < 1
    share = torch.histc(base, bins=10, min=0, max=1) / base.numel()
    assert (share - 0.1).abs().max() < 0.005, "80,000 draws: three standard deviations are 0.0032"
    others = [
        uniform(token_keys(8, sample, position).flatten(), 8, salt=0),
        uniform(token_keys(7, sample + 1, position).flatten(), 8, salt=0),
        uniform(token_keys(7, sample, position + 1).flatten(), 8, salt=0),
        uniform(token_keys(7, sample + (1 << 33), position).flatten(), 8, salt=0),
        uniform(token_keys(7, sample, position).flatten(), 8, salt=1),
        base.roll(1, dims=1),
    ]
    for other in others:
        correlation = torch.corrcoef(torch.stack([base.flatten(), other.flatten()]))[0, 1]
        assert abs(float(correlation)) < 0.02


def test_the_stable_hash_is_the_same_in_every_process_and_tells_types_apart() -> None:
    assert stable_hash("init", 1337, "embedding.weight") == 0x30DE0153BCBE3332, "every initial weight would change"
    assert stable_hash("1", 2) != stable_hash(1, "2")
    assert stable_hash("ab", "c") != stable_hash("a", "bc")
    assert 0 <= stable_hash("x") < 1 << 63
