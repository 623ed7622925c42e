"""Order of the rows of epochs and domains."""

import numpy as np

from trainer.data.batches.row_order import epoch_order


def _orders(*, domain: int, seed: int = 0, num_epochs: int = 3) -> list[list[int]]:
    epoch, row = epoch_order(np.arange(num_epochs * 50), num_rows=50, seed=seed, domain=domain)
    assert epoch.tolist() == [e for e in range(num_epochs) for _ in range(50)]
    return row.reshape(num_epochs, 50).tolist()


def test_every_epoch_has_every_row_once_in_an_order_of_its_own() -> None:
    orders = _orders(domain=0)
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert orders[0] != orders[1] != orders[2] != orders[0]


def test_domains_and_seeds_have_orders_of_their_own() -> None:
    first, other_domain, other_seed = _orders(domain=0)[0], _orders(domain=1)[0], _orders(domain=0, seed=1)[0]
    assert first != other_domain != other_seed != first
