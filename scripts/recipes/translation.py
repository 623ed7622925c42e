"""Sentences of a small grammar in four languages: gender, case and the order of words differ, as they really do."""

import random
from typing import NamedTuple

from scripts.recipes.rows import Files, Row, split


class Noun(NamedTuple):
    """A noun: its gender (m, f, n; in Czech also a, masculine and alive), and its form as subject and as object."""

    en: str
    de: tuple[str, str, str]
    fr: tuple[str, str]
    cs: tuple[str, str, str]


class Adjective(NamedTuple):
    """An adjective: its stem in German and Czech, its two forms in French and whether it goes before the noun there."""

    en: str
    de: str
    fr: tuple[str, str]
    is_before: bool
    cs: str


ANIMATE = (
    Noun("dog", ("m", "Hund", "Hund"), ("m", "chien"), ("a", "pes", "psa")),
    Noun("cat", ("f", "Katze", "Katze"), ("m", "chat"), ("f", "kočka", "kočku")),
    Noun("horse", ("n", "Pferd", "Pferd"), ("m", "cheval"), ("a", "kůň", "koně")),
    Noun("cow", ("f", "Kuh", "Kuh"), ("f", "vache"), ("f", "kráva", "krávu")),
    Noun("woman", ("f", "Frau", "Frau"), ("f", "femme"), ("f", "žena", "ženu")),
    Noun("boy", ("m", "Junge", "Jungen"), ("m", "garçon"), ("a", "kluk", "kluka")),
    Noun("girl", ("n", "Mädchen", "Mädchen"), ("f", "fille"), ("f", "dívka", "dívku")),
)
THINGS = (
    Noun("house", ("n", "Haus", "Haus"), ("f", "maison"), ("m", "dům", "dům")),
    Noun("table", ("m", "Tisch", "Tisch"), ("f", "table"), ("m", "stůl", "stůl")),
    Noun("boat", ("n", "Boot", "Boot"), ("m", "bateau"), ("f", "loď", "loď")),
    Noun("car", ("n", "Auto", "Auto"), ("f", "voiture"), ("n", "auto", "auto")),
    Noun("ball", ("m", "Ball", "Ball"), ("m", "ballon"), ("m", "míč", "míč")),
    Noun("flower", ("f", "Blume", "Blume"), ("f", "fleur"), ("f", "květina", "květinu")),
    Noun("book", ("n", "Buch", "Buch"), ("m", "livre"), ("f", "kniha", "knihu")),
    Noun("bridge", ("f", "Brücke", "Brücke"), ("m", "pont"), ("m", "most", "most")),
)
ADJECTIVES = (
    Adjective("small", "klein", ("petit", "petite"), True, "mal"),
    Adjective("big", "groß", ("grand", "grande"), True, "velk"),
    Adjective("black", "schwarz", ("noir", "noire"), False, "čern"),
    Adjective("white", "weiß", ("blanc", "blanche"), False, "bíl"),
    Adjective("green", "grün", ("vert", "verte"), False, "zelen"),
    Adjective("red", "rot", ("rouge", "rouge"), False, "červen"),
)
VERBS = (
    ("sees", "sieht", "voit", "vidí"),
    ("seeks", "sucht", "cherche", "hledá"),
    ("paints", "malt", "peint", "maluje"),
    ("holds", "hält", "tient", "drží"),
    ("knows", "kennt", "connaît", "zná"),
    ("pulls", "zieht", "tire", "táhne"),
)
DE_ARTICLES = {  # of a subject and of an object
    ("the", "m"): ("der", "den"),
    ("the", "f"): ("die", "die"),
    ("the", "n"): ("das", "das"),
    ("a", "m"): ("ein", "einen"),
    ("a", "f"): ("eine", "eine"),
    ("a", "n"): ("ein", "ein"),
}
DE_ENDINGS = {
    ("the", "m"): ("e", "en"),
    ("the", "f"): ("e", "e"),
    ("the", "n"): ("e", "e"),
    ("a", "m"): ("er", "en"),
    ("a", "f"): ("e", "e"),
    ("a", "n"): ("es", "es"),
}
FR_ARTICLES = {("the", "m"): "le", ("the", "f"): "la", ("a", "m"): "un", ("a", "f"): "une"}
CS_ENDINGS = {"a": ("ý", "ého"), "m": ("ý", "ý"), "f": ("á", "ou"), "n": ("é", "é")}


def files(rng: random.Random) -> Files:
    """Return rows with the columns `en`, `de`, `fr` and `cs`."""
    return split(rng, _row, lambda row: row["en"], train=2500, test=100)


def _row(rng: random.Random) -> Row:
    subject = _phrase(rng, rng.choice(ANIMATE), case=0)
    object_ = _phrase(rng, rng.choice(THINGS), case=1)
    verb = dict(zip(("en", "de", "fr", "cs"), rng.choice(VERBS), strict=True))
    sentences = {language: f"{subject[language]} {verb[language]} {object_[language]}." for language in verb}
    return {language: text[0].upper() + text[1:] for language, text in sentences.items()}


def _phrase(rng: random.Random, noun: Noun, *, case: int) -> Row:
    """Return a noun with its article and, three times in four, an adjective; `case` is 0 for a subject."""
    article = rng.choice(("the", "a"))
    de_gender, *de = noun.de
    fr_gender, fr = noun.fr
    cs_gender, *cs = noun.cs
    words = {
        "en": [article, noun.en],
        "de": [DE_ARTICLES[article, de_gender][case], de[case]],
        "fr": [FR_ARTICLES[article, fr_gender], fr],
        "cs": [cs[case]],
    }
    if rng.random() < 0.75:
        adjective = rng.choice(ADJECTIVES)
        words["en"].insert(1, adjective.en)
        words["de"].insert(1, adjective.de + DE_ENDINGS[article, de_gender][case])
        words["fr"].insert(1 if adjective.is_before else 2, adjective.fr[fr_gender == "f"])
        words["cs"].insert(0, adjective.cs + CS_ENDINGS[cs_gender][case])
    return {language: " ".join(of_it) for language, of_it in words.items()}
