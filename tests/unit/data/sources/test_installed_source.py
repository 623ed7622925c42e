import ast
import importlib.util
import sys
import sysconfig

import pytest

from trainer.data.sources.installed import separate
from trainer.data.sources.registry import InstalledSourceConfig


def test_docstrings_are_taken_out_of_the_code():
    module = separate('"""About a."""\nx = 1\n\n\ndef f():\n    """Do\n    it.\n    """\n    return 1  # yes\n')
    assert module.code == "x = 1\n\n\ndef f():\n    return 1  # yes\n"
    assert module.docstrings == ["About a.", "Do\nit."]


def test_a_function_with_only_a_docstring_keeps_a_body():
    assert separate('class A:\n    "Doc."\n').code == "class A:\n    ...\n"


def test_code_on_the_line_of_a_docstring_stays():
    assert separate('def f(): "doc"\n').code == "def f(): ...\n"
    assert separate('"doc"; x = 1\n').code == "...; x = 1\n"
    assert separate('("doc")\nx = 1\n').code == "x = 1\n"


def test_a_comment_after_a_docstring_stays():
    assert separate('def f():\n    "doc"  # why\n    return 1\n').code == "def f():\n    # why\n    return 1\n"


def test_columns_are_right_after_characters_of_several_bytes():
    assert separate('def ö(): "schön"; return "ü"\n').code == 'def ö(): ...; return "ü"\n'


def test_a_string_that_documents_nothing_stays():
    code = 'x = 1\n"no docstring"\n'
    assert separate(code).code == code


def test_the_three_domains_have_text(installed_documents):
    for domain in ("python", "english", "cpp"):
        assert sum(len(d.text) for d in installed_documents if d.domain == domain) > 500_000


def test_code_is_still_code_and_has_no_docstrings(installed_documents):
    owners = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for document in [d for d in installed_documents if d.domain == "python"][::8]:
        nodes = [node for node in ast.walk(ast.parse(document.text)) if isinstance(node, owners)]
        assert all(ast.get_docstring(node) is None for node in nodes), document.name


def test_names_are_unique_in_a_domain_and_start_at_the_library(installed_documents):
    names = [(d.domain, d.name) for d in installed_documents]
    assert len(set(names)) == len(names)
    assert ("python", "json/decoder.py") in names
    assert ("cpp", "c10/core/Device.h") in names
    assert ("english", "topics/lambda") in names


def test_no_text_is_there_twice_or_empty(installed_documents):
    texts = [(d.domain, d.text) for d in installed_documents]
    assert len(set(texts)) == len(texts)
    assert all(text.strip() for _, text in texts)


def test_machine_specific_files_and_packages_are_left_out(installed_documents):
    for document in installed_documents:
        assert not {"site-packages", "test", "config"} & set(document.name.split("/")), document.name
        assert "_sysconfigdata" not in document.name


def test_only_the_chosen_domains_are_read():
    source = InstalledSourceConfig(domains=["cpp"]).build()
    assert {d.domain for d in source.documents()} == {"cpp"}
    assert {path.suffix for path in source.files()} == {".h"}


def test_a_python_without_its_library_is_named(folder, monkeypatch, fails):
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(folder))
    with fails(
        f"data.sources: installed: no standard library at {folder}; domains python and english read it; use a Python "
        "that has its library as files, or set domains: [cpp]"
    ):
        InstalledSourceConfig().build().files()


def test_a_file_that_does_not_parse_is_skipped(folder, monkeypatch):
    (folder / "a.py").write_text("print 'two'\n")
    (folder / "b.py").write_text("x = 1\n")
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(folder))
    assert [d.name for d in InstalledSourceConfig(domains=["python"]).build().documents()] == ["b.py"]


def test_a_missing_manual_is_named(monkeypatch, fails):
    monkeypatch.setitem(sys.modules, "pydoc_data", None)
    monkeypatch.delitem(sys.modules, "pydoc_data.topics", raising=False)
    with fails(
        "data.sources: installed: this Python has no pydoc_data.topics; domain english reads it; install the full "
        "standard library, or set domains without english"
    ):
        InstalledSourceConfig(domains=["english"]).build().files()


def test_missing_headers_are_named(monkeypatch, fails):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with fails(
        "data.sources: installed: torch's C++ headers are not installed; domain cpp reads torch/include; install torch "
        "from a wheel, or set domains without cpp"
    ):
        InstalledSourceConfig(domains=["cpp"]).build().files()


@pytest.mark.parametrize("domain", ["python", "english"])
def test_library_domains_read_python_files(domain):
    assert {path.suffix for path in InstalledSourceConfig(domains=[domain]).build().files()} == {".py"}
