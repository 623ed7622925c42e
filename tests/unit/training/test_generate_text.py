"""The held-out text that the sample at the end of training continues."""

import pytest

from tests.texts import make_corpus_of, make_file
from trainer.data.config import Packing
from trainer.training.generate_text import held_out_prompt

LONG = [number % 200 for number in range(700)]


@pytest.mark.parametrize(
    ("prompt", "packing", "expected"),
    [
        (5, "bfd", LONG[:5]),  # the question of the first document
        (100, "bfd", LONG[:100]),
        (600, "bfd", LONG[:48]),  # too long to be read
        (0, "bfd", LONG[:48]),
        (5, "wrapped", LONG[:48]),
    ],
)
def test_a_sample_answers_the_first_question(prompt: int, packing: Packing, expected: list[int]) -> None:
    assert held_out_prompt(make_corpus_of(make_file(LONG, [1, 2], prompts=(prompt, 1))), packing) == expected
