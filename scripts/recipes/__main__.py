"""Write the small synthetic data set of a recipe, for configs/recipes/small/NAME.yaml: deterministic, offline.

    python -m scripts.recipes NAME [OUT]

NAME is translation, sentiment, summarization, recommendation, search, or chat, for configs/stages/chat.yaml. OUT
(data/small/NAME) gets train.jsonl and test.jsonl, which share no row, and the other files that the recipe reads.
"""

import argparse
import json
import random
from pathlib import Path

from scripts.recipes import chat, recommendation, search, sentiment, summarization, translation

RECIPES = {
    "translation": translation.files,
    "sentiment": sentiment.files,
    "summarization": summarization.files,
    "recommendation": recommendation.files,
    "search": search.files,
    "chat": chat.files,
}
"""Function per recipe that draws its files: records or lines of text by file name."""
SEED = 20261123


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=RECIPES)
    parser.add_argument("out", type=Path, nargs="?")
    options = parser.parse_args()
    out = options.out or Path("data/small") / options.name
    out.mkdir(parents=True, exist_ok=True)
    for file, rows in RECIPES[options.name](random.Random(SEED)).items():
        lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
        (out / file).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        print(f"{out / file}: {len(lines)} rows")


if __name__ == "__main__":
    main()
