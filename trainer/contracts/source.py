"""Contract of a data source: the same named documents at every reading, also part by part in other processes."""

import pickle
from itertools import chain, islice

from trainer.contracts.ensure import ensure
from trainer.data.sources.base import Document, Source
from trainer.data.sources.registry import SourceOptions

_MOST = 10_000  # documents that are looked at


def files_exist_and_are_named_once(config: SourceOptions) -> None:
    """Local files exist, are named once and are the same at every call."""
    source = config.build()
    files = source.files()
    ensure(all(path.is_file() for path in files), f"not all of {files[:3]} are files")
    ensure(len(set(files)) == len(files), "a file is named twice")
    ensure(files == source.files(), "a second call names other files")
    ensure(files or source.origin(), "neither files() nor origin() says what is read")


def documents_are_the_same_every_time(config: SourceOptions) -> None:
    """Two readings give the same documents in the same order."""
    source = config.build()
    found = _documents(source)
    ensure(found, "there are no documents")
    ensure(_documents(source) == found, "a second reading gives other documents")


def parts_in_order_are_the_whole_source(config: SourceOptions) -> None:
    """Parts that another process reads, in order, are the whole source."""
    parts = pickle.loads(pickle.dumps(config.build().parts()))
    again = pickle.loads(pickle.dumps(config)).build()
    found = list(islice(chain.from_iterable(map(again.read, parts)), _MOST))
    ensure(found == _documents(config.build()), "the parts, one after the other, are not the source")


def documents_are_text_with_names_of_their_own(config: SourceOptions) -> None:
    """Each document is UTF-8 text that is not blank, and has a name of its own in its domain."""
    documents = _documents(config.build())
    for document in documents:
        ensure(document.text.strip(), f"{document.name} is blank")
        document.text.encode("utf-8")
    ensure(len({(d.domain, d.name) for d in documents}) == len(documents), "two documents have the same name")


def the_weight_is_the_config_s(config: SourceOptions) -> None:
    """The source has the weight of its config."""
    weight = config.build().weight
    ensure(weight == config.weight, f"the weight is {weight}, and that of the config {config.weight}")


CHECKS = [
    files_exist_and_are_named_once,
    documents_are_the_same_every_time,
    parts_in_order_are_the_whole_source,
    documents_are_text_with_names_of_their_own,
    the_weight_is_the_config_s,
]


def _documents(source: Source) -> list[Document]:
    return list(islice(source.documents(), _MOST))
