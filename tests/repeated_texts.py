"""Small texts full of repeated tokens: rulers, indentation, blank lines, padding bytes, a single byte.

Rows of equal tokens are where routers that compare tokens meet values that differ by rounding alone.
"""

import json
import random
from functools import cache
from pathlib import Path
from typing import Any

_WORDS = ["a", "token", "and", "its", "router", "share", "every", "expert", "keeps", "rows", "ranks", "hold", "sends"]


@cache
def repeated_texts(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Write a text of every kind; return the entries of `data.sources` that read them."""
    drawn = random.Random(0)

    def words(count: int) -> str:
        return " ".join(drawn.choices(_WORDS, k=count))

    def rulers(index: int) -> str:
        marks = ["-" * 79, "=" * 64, " " * 48 + words(1), words(8), "|" + "---|" * 16]
        return marks[(index * 7 + drawn.randrange(2)) % len(marks)]

    lines = {
        "rulers": [rulers(index) for index in range(240)],
        "indentation": [" " * drawn.choice([4, 8, 16, 24]) + words(drawn.randint(1, 4)) for _ in range(300)],
        "blank lines": ["\n" * drawn.randint(4, 40) + words(2) for _ in range(200)],
        "padding bytes": [words(2) + "\0" * drawn.randint(1, 60) for _ in range(200)],
        "one block": ["abcabcabcabc" * 4] * 150,
        "one byte": ["a" * 6000],
        "words": [words(8) for _ in range(200)],
    }
    sources: dict[str, list[dict[str, Any]]] = {}
    for kind, of_kind in lines.items():
        name = kind.replace(" ", "_")
        (folder / f"{name}.txt").write_text("\n".join(of_kind))
        sources[kind] = [{"kind": "text", "path": str(folder / f"{name}.txt"), "domain": name}]
    documents = [line for kind in ("rulers", "indentation", "padding bytes", "one block") for line in lines[kind]]
    rows = [
        {
            "text": line[: drawn.randint(1, 40)].strip(" ") or "-",
            "prompt": "-" * drawn.randint(0, 6),
            "gain": (n % 4) / 3,
        }
        for n, line in enumerate(documents)
    ]
    (folder / "documents.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    documents_source = {"kind": "jsonl", "path": str(folder / "documents.jsonl")}
    sources["documents"] = [documents_source]
    sources["answers"] = [{**documents_source, "prompt": "{prompt}"}]
    sources["weighted answers"] = [{**sources["answers"][0], "weight_key": "gain"}]
    chats = [
        [{"role": role, "content": "-" * drawn.randint(1, 3), "weight": n % 3 > 0} for role in ("user", "assistant")]
        + [{"role": "user", "content": "-"}, {"role": "assistant", "content": "=" * (n % 2 + 1)}]
        for n in range(60)
    ]
    (folder / "chats.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    # Rows of 8 hold the last exchange alone.
    sources["chats"] = [{"kind": "chat", "path": str(folder / "chats.jsonl"), "truncate": "left"}]
    sources["rulers and words"] = [{**sources["rulers"][0], "weight": 2.0}, sources["words"][0]]
    return sources
