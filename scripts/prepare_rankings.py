"""Make the questions of configs/recipes/recommendation.yaml and search.yaml: rows with a list to order.

    python scripts/prepare_rankings.py recommendation [OUT]     OUT is data/recommendation
    python scripts/prepare_rankings.py search [OUT]             OUT is data/search

recommendation: the last purchase of every person of Amazon Reviews 2023 (arXiv 2403.03952), video games, what that
    person bought before, and as candidates that purchase and 99 others, drawn evenly from all that is in the test. What
    comes of drawn candidates compares models on the same file, and with nothing else (Krichene and Rendle 2020).
search: every query of the test of ESCI (arXiv 2206.06588) with all products that were judged for it; those that match
    exactly are relevant. A query of which all or none match is left out.

--path, --data-files and --split read the rows from somewhere else, as a source of kind `hf` does.
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
    """Yield people with a past: `history`, `next`, and 100 `candidates`.

    Raises:
        DataError: if a row has no such columns, or somebody bought nearly everything.
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
    """Yield queries with something to choose from: `user`, `query`, `candidates`, and which of them are `relevant`.

    Raises:
        DataError: if a row has no such columns.
    """
    products: dict[tuple[str, str], dict[str, bool]] = {}
    for row in rows:
        title = row.value("product_title")
        if title is None or not row.text("product_title").strip():
            continue
        of_query = products.setdefault((row.text("product_locale"), row.text("query")), {})
        # The same title can be judged twice, as two products.
        of_query[title] = of_query.get(title, False) or row.text("esci_label") == "Exact"
    for (user, query), judged in products.items():
        relevant = [title for title, is_exact in judged.items() if is_exact]
        if 0 < len(relevant) < len(judged):
            yield {"user": user, "query": query, "candidates": list(judged), "relevant": relevant}


if __name__ == "__main__":
    main()
    # Threads of pyarrow may still let go of the file; python's way out would stop them, and they abort (arrow#45214).
    sys.stdout.flush()
    os._exit(0)
