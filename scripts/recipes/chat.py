"""Short conversations about capitals, opposites, sums in words and words read backwards, asked in several ways."""

import random
from collections.abc import Callable

from scripts.recipes.rows import Files, Row, split

CAPITALS = {
    "Austria": "Vienna", "Belgium": "Brussels", "Chile": "Santiago", "Cuba": "Havana", "Denmark": "Copenhagen",
    "Egypt": "Cairo", "Finland": "Helsinki", "France": "Paris", "Germany": "Berlin", "Ghana": "Accra",
    "Greece": "Athens", "Hungary": "Budapest", "Ireland": "Dublin", "Italy": "Rome", "Japan": "Tokyo",
    "Kenya": "Nairobi", "Nepal": "Kathmandu", "Norway": "Oslo", "Peru": "Lima", "Poland": "Warsaw",
    "Portugal": "Lisbon", "Spain": "Madrid", "Sweden": "Stockholm", "Vietnam": "Hanoi",
}  # fmt: skip
OPPOSITES = {
    "hot": "cold", "big": "small", "fast": "slow", "early": "late", "full": "empty", "hard": "soft", "high": "low",
    "light": "dark", "long": "short", "loud": "quiet", "new": "old", "open": "closed", "rich": "poor", "wet": "dry",
}  # fmt: skip
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
WORDS = ("bat", "bus", "cat", "cup", "dog", "fox", "gas", "hat", "jam", "key", "map", "net", "pen", "sun", "top", "web")
BRIEF = "Answer in one word."
"""System prompt under which an answer is its last word alone."""


def files(rng: random.Random) -> Files:
    """Return rows with `messages`: one or two questions, some after a system prompt."""
    return split(rng, _row, lambda row: str(row["messages"]), train=4000, test=100)


def _row(rng: random.Random) -> Row:
    is_brief = rng.random() < 0.25
    messages = [{"role": "system", "content": BRIEF}] if is_brief else []
    for _ in range(rng.choice((1, 1, 2))):
        question, answer = rng.choice(KINDS)(rng)
        if is_brief:
            last = answer.rstrip(".").split()[-1]
            answer = f"{last[0].upper()}{last[1:]}."
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": messages}


def _capital(rng: random.Random) -> tuple[str, str]:
    country = rng.choice(list(CAPITALS))
    question = rng.choice(("What is the capital of {}?", "Which city is the capital of {}?", "{}: which capital?"))
    return question.format(country), f"The capital of {country} is {CAPITALS[country]}."


def _opposite(rng: random.Random) -> tuple[str, str]:
    word = rng.choice(list(OPPOSITES))
    question = rng.choice(("What is the opposite of {}?", "Name the opposite of {}.", "What is not {}?"))
    return question.format(word), f"The opposite of {word} is {OPPOSITES[word]}."


def _sum(rng: random.Random) -> tuple[str, str]:
    first, second = rng.randrange(7), rng.randrange(7)
    question = rng.choice(("What is {} plus {}?", "How much is {} and {}?", "Add {} and {}."))
    answer = f"{NUMBERS[first]} plus {NUMBERS[second]} is {NUMBERS[first + second]}."
    return question.format(NUMBERS[first], NUMBERS[second]), f"{answer[0].upper()}{answer[1:]}"


def _backwards(rng: random.Random) -> tuple[str, str]:
    word = rng.choice(WORDS)
    question = rng.choice(("Spell {} backwards.", "What is {} backwards?", "Read {} from its end."))
    return question.format(word), f"Backwards {word} is {word[::-1]}."


KINDS: tuple[Callable[[random.Random], tuple[str, str]], ...] = (_capital, _opposite, _sum, _backwards)
