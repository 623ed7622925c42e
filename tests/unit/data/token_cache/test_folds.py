import pytest
from pydantic import ValidationError

from trainer.data.config import DataConfig
from trainer.data.token_cache.folds import FoldConfig, fold_of


def test_the_folds_of_texts_stay_what_they_were_in_earlier_versions():
    texts = [b"", b"one", b"two", "drei \u20ac".encode(), b"x" * 1000]
    assert [fold_of(text, of=5, seed=0) for text in texts] == [2, 0, 1, 1, 1]
    assert [fold_of(text, of=5, seed=1) for text in texts] == [1, 2, 1, 4, 2]


def test_folds_have_nearly_the_same_size():
    counts = [0] * 4
    for number in range(4000):
        counts[fold_of(b"document %d" % number, of=4, seed=0)] += 1
    assert all(abs(count - 1000) < 5 * 27.4 for count in counts)  # five standard deviations of a fair draw


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"fold": {"index": 3, "of": 3}}, "index: 3, but the folds are 0 to 2"),
        ({"fold": {"index": 0, "of": 1}}, "greater than or equal to 2"),
        ({"fold": {"index": 0, "of": 3}, "split": {"kind": "tail"}}, "folds part no document, but split.kind: tail"),
        (
            {"fold": {"index": 0, "of": 3}, "sources": [{"kind": "hf_stream", "path": "a/b"}]},
            "holds out documents of the whole text, but a source is a stream (hf_stream), whose end is never seen",
        ),
    ],
)
def test_folds_that_cannot_be_are_refused(values, message):
    with pytest.raises(ValidationError) as caught:
        DataConfig.model_validate(values)
    assert message in str(caught.value)


def test_a_config_without_folds_keeps_its_split():
    assert DataConfig().fold is None
    other = DataConfig.model_validate({"split": {"fraction": 0.3}})
    assert other.cached_split.fraction == 0.3
    folded = other.model_copy(update={"fold": FoldConfig(index=0, of=2)})
    assert folded.cached_split == DataConfig().split, "all folds are copied from one ingestion"
