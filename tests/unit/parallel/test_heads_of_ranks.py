"""Shares of the heads of attention: every head of queries is on one rank, and the fewest are counted right."""

from hypothesis import given
from hypothesis import strategies as st

from trainer.parallel.heads_of_ranks import fewest_queries, heads_of_ranks


@given(num_key_heads=st.integers(1, 12), per_key=st.integers(1, 12), num_ranks=st.integers(1, 40))
def test_ranks_have_all_heads_of_queries_in_order_and_none_has_fewer_than_counted(num_key_heads, per_key, num_ranks):
    ranges = [share.range_of(per_key) for share in heads_of_ranks(num_key_heads, num_ranks)]
    assert len(ranges) == num_ranks
    assert [begin for begin, _ in ranges] == [0, *(end for _, end in ranges[:-1])]
    assert ranges[-1][1] == num_key_heads * per_key
    assert min(end - begin for begin, end in ranges) == fewest_queries(
        num_key_heads * per_key, num_key_heads, num_ranks
    )
