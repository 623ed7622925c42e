"""Make the ranking questions of configs/recipes/recommendation.yaml and search.yaml.

    python scripts/prepare_rankings.py recommendation [OUT]     OUT is data/recommendation
    python scripts/prepare_rankings.py search [OUT]             OUT is data/search

recommendation: from Amazon Reviews 2023 (arXiv 2403.03952), video games: the last purchase of each user, the purchases
    before it, and 100 candidates, which are that purchase and 99 items drawn uniformly from the test set. Metrics on
    sampled candidates only compare models on the same file (Krichene and Rendle 2020).
search: each test query of ESCI (arXiv 2206.06588) with all products judged for it; exact matches are relevant. Queries
    where all or no products match are left out.

--path, --data-files and --split read other records, as a source of kind `hf` does.
"""

import argparse
import json
import os
import random
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from trainer.data.records.base import Record
from trainer.data.records.registry import HfRecordsConfig
from trainer.errors import DataError

AMAZON = "hf://datasets/McAuley-Lab/Amazon-Reviews-2023/benchmark/5core/last_out_w_his/Video_Games.test.csv"
ROWS = {
    "recommendation": {"path": "csv", "data_files": AMAZON},
    "search": {"path": "tasksource/esci", "split": "test"},
}
NUM_CANDIDATES = 100
SEED = 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=ROWS)
    parser.add_argument("out", type=Path, nargs="?")
    parser.add_argument("--path")
    parser.add_argument("--data-files")
    parser.add_argument("--split")
    options = parser.parse_args()
    given = {key: getattr(options, key) for key in ("path", "data_files", "split")}
    source = {**ROWS[options.name], **{key: value for key, value in given.items() if value is not None}}
    out = options.out or Path("data") / options.name
    make = {"recommendation": next_purchases, "search": judged_queries}[options.name]
    try:
        questions = list(make(HfRecordsConfig.model_validate(source).reader().records()))
        if not questions:
            raise DataError(f"{source['path']}: no question can be made of its rows; see --help for what is needed")
    except DataError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
    out.mkdir(parents=True, exist_ok=True)
    path = out / "test.jsonl"
    path.write_text("".join(json.dumps(q, ensure_ascii=False) + "\n" for q in questions), encoding="utf-8")
    print(f"{path}: {len(questions)} rows")


def next_purchases(rows: Iterable[Record]) -> Iterator[dict[str, Any]]:
    """Yield users with earlier purchases: `history`, `next`, and 100 `candidates`.

    Raises:
        DataError: if a column is missing, or a user bought nearly all items.
    """
    bought = [(row.where, row.text("history").split(), row.text("parent_asin")) for row in rows if row.value("history")]
    items = sorted({item for _, history, last in bought for item in [*history, last]})
    rng = random.Random(SEED)
    for where, history, last in bought:
        known = {*history, last}
        drawn = rng.sample(items, min(len(items), NUM_CANDIDATES - 1 + len(known)))
        others = [item for item in drawn if item not in known][: NUM_CANDIDATES - 1]
        if len(others) < NUM_CANDIDATES - 1:
            raise DataError(
                f"{where}: only {len(others)} of {len(items)} items were not bought by this person; "
                f"{NUM_CANDIDATES - 1} are drawn from those; use a larger category"
            )
        candidates = [last, *others]
        rng.shuffle(candidates)
        yield {"history": " ".join(history), "next": last, "candidates": candidates}


def judged_queries(rows: Iterable[Record]) -> Iterator[dict[str, Any]]:
    """Yield queries with relevant and irrelevant products: `user`, `query`, `candidates`, `relevant`.

    Raises:
        DataError: if a column is missing.
    """
    products: dict[tuple[str, str], dict[str, bool]] = {}
    for row in rows:
        title = row.value("product_title")
        if title is None or not row.text("product_title").strip():
            continue
        of_query = products.setdefault((row.text("product_locale"), row.text("query")), {})
        # Two products can have the same title.
        of_query[title] = of_query.get(title, False) or row.text("esci_label") == "Exact"
    for (user, query), judged in products.items():
        relevant = [title for title, is_exact in judged.items() if is_exact]
        if 0 < len(relevant) < len(judged):
            yield {"user": user, "query": query, "candidates": list(judged), "relevant": relevant}


if __name__ == "__main__":
    main()
    # pyarrow's threads may still be closing the file; a normal interpreter exit would abort them (arrow#45214).
    sys.stdout.flush()
    os._exit(0)
