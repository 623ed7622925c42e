"""Two people make an appointment, and change it: a summary says what was agreed on, not what was proposed first."""

import random

from scripts.recipes.rows import Files, Row, split

NAMES = ("Anna", "Ben", "Carla", "David", "Emma", "Frank", "Grace", "Hugo", "Irene", "Jonas")
PLANS = ("play chess", "go running", "have lunch", "see a film", "paint", "study", "go swimming", "play tennis")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
PLACES = ("in the park", "at the station", "by the lake", "at the library", "at the school", "in the old town")


def files(rng: random.Random) -> Files:
    """Return rows with `dialogue` and `summary`."""
    return split(rng, _row, lambda row: row["dialogue"], train=4000, test=100)


def _row(rng: random.Random) -> Row:
    one, two = rng.sample(NAMES, 2)
    plan, place = rng.choice(PLANS), rng.choice(PLACES)
    day, other = rng.sample(DAYS, 2)
    lines = [f"{one}: Shall we {plan} on {day}?"]
    how = rng.randrange(3)
    if how == 1:
        lines += [f"{two}: Not on {day}. {other}?", f"{one}: {other} is fine."]
        day = other
    lines += [f"{two}: Good. Where do we meet?", f"{one}: Let us meet {place}."]
    if how == 2:
        lines += [f"{two}: Sorry, I am ill on {day}.", f"{one}: Another time then."]
        summary = f"{one} and {two} will not {plan} on {day}, for {two} is ill."
    else:
        lines += [f"{two}: See you there."]
        summary = f"{one} and {two} will {plan} on {day} and meet {place}."
    return {"dialogue": "\n".join(lines), "summary": summary}
