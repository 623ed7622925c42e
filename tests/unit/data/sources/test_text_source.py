from trainer.data.sources.base import Document
from trainer.data.sources.registry import TextSourceConfig


def test_each_file_is_one_document_named_by_its_path(folder):
    (folder / "b.txt").write_text("two\n")
    (folder / "a.txt").write_text("one\n")
    source = TextSourceConfig(path="*.txt", domain="notes").build()
    assert list(source.documents()) == [
        Document(name="a.txt", domain="notes", text="one\n"),
        Document(name="b.txt", domain="notes", text="two\n"),
    ]
