"""Table of evaluations at several numbers of experts per token."""

from collections.abc import Mapping, Sequence


def sweep_table(records: Mapping[int, Mapping[str, float]], *, trained: Sequence[int]) -> str:
    """Return a table with one line per k; a star marks the values that the router was trained with."""
    lines = [
        "experts per token   active parameters   bits per byte      loss   expert-domain mutual information (bits)"
    ]
    for top_k, record in records.items():
        star = "*" if top_k in trained else " "
        information = record.get("eval/expert_domain_mi")
        lines.append(
            f"{top_k:15} {star} {record['active_parameters'] / 1e6:18.2f}M {record['eval/bits_per_byte']:15.4f} "
            f"{record['eval/loss']:9.4f}   {'-' if information is None else f'{information:.4f}'}"
        )
    return "\n".join([*lines, "* trained with this k"])
