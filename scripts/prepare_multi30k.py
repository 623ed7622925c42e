"""Convert Multi30k to JSONL for configs/recipes/translation.yaml.

    python scripts/prepare_multi30k.py FOLDER [OUT]

FOLDER holds the original files, train.en.gz, train.de.gz and so on (or unpacked): one sentence per line, aligned across
languages. OUT (data/multi30k) gets train.jsonl, val.jsonl and test_2016_flickr.jsonl with the columns en, de, fr, cs.

Source: Elliott et al. 2016 (arXiv 1605.00459); French and Czech by Elliott et al. 2017 and Barrault et al. 2018.
"""

import argparse
import json
import sys
from pathlib import Path

from trainer.data.records.find_files import TEXT, find_files
from trainer.data.records.text_files import read_document
from trainer.errors import DataError

SPLITS = ("train", "val", "test_2016_flickr")
LANGUAGES = ("en", "de", "fr", "cs")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path, nargs="?", default=Path("data/multi30k"))
    options = parser.parse_args()
    try:
        rows = {split: parallel_rows(options.folder, split) for split in SPLITS}
    except DataError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
    options.out.mkdir(parents=True, exist_ok=True)
    for split, found in rows.items():
        path = options.out / f"{split}.jsonl"
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in found), encoding="utf-8")
        print(f"{path}: {len(found)} rows")


def parallel_rows(folder: Path, split: str) -> list[dict[str, str]]:
    """Return the aligned sentences of a split.

    Raises:
        DataError: if a file is missing or unreadable, differs in its number of lines, or has an empty line.
    """
    paths = {language: find(folder, f"{split}.{language}") for language in LANGUAGES}
    # Not splitlines(): sentences contain other characters that it takes for line ends.
    lines = {language: read_document(path).removesuffix("\n").split("\n") for language, path in paths.items()}
    for language, path in paths.items():
        if len(lines[language]) != len(lines["en"]):
            raise DataError(
                f"{path}: has {len(lines[language])} lines, and {paths['en']} {len(lines['en'])}; a line is one "
                "sentence in every language; get the files again"
            )
        for number, line in enumerate(lines[language], 1):
            if not line.strip():
                raise DataError(f"{path}:{number}: is empty; a line is one sentence in every language; get it again")
    return [dict(zip(LANGUAGES, map(str.strip, row), strict=True)) for row in zip(*lines.values(), strict=True)]


def find(folder: Path, name: str) -> Path:
    """Return the path of a file, compressed or not."""
    packed = folder / f"{name}.gz"
    return find_files(str(packed if packed.exists() else folder / name), TEXT)[0]


if __name__ == "__main__":
    main()
