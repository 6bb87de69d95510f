"""Text files and the built-in corpus as documents."""

import itertools
import os
import re
import sysconfig

import pytest

from shardtrain.data import corpus_documents, text_documents, text_files
from shardtrain.errors import UserError


@pytest.fixture
def folder(tmp_path):
    files = {
        "b.txt": "bee",
        "a.txt": "ä\r\n",
        "sub/c.md": "sea",
        ".hidden": "x",
        ".git/d.txt": "x",
        "e.txt": "",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(text.encode())
    return tmp_path


def names(paths, folder):
    return [os.path.relpath(file, folder) for file in text_files(paths)]


def test_a_path_is_a_file_a_folder_or_a_glob(folder):
    assert names(folder / "b.txt", folder) == ["b.txt"]
    assert names(folder, folder) == ["a.txt", "b.txt", "e.txt", "sub/c.md"]
    assert names(f"{folder}/*.txt", folder) == ["a.txt", "b.txt", "e.txt"]
    assert names(f"{folder}/**/*.md", folder) == ["sub/c.md"]
    assert names([folder / "b.txt", f"{folder}/*.txt"], folder) == ["b.txt", "a.txt", "e.txt"], "each once"


def test_texts_are_exact_and_empty_files_of_a_folder_hold_none(folder):
    assert [document.text for document in text_documents(folder)] == ["ä\r\n", "bee", "sea"]
    assert next(text_documents(folder)).name == str(folder / "a.txt")


def test_what_stands_for_no_file(folder):
    (folder / "nothing").mkdir()
    (folder / "nothing" / ".hidden").touch()
    for path, rule in {
        folder / "no.txt": "there is no such file or folder (looked from ",
        folder / "nothing": "the folder is empty; put text files into it, or name another",
        f"{folder}/*.pdf": "the glob matches no file; '**' stands for any depth of folders",
    }.items():
        with pytest.raises(UserError, match=re.escape(f"data.path {path}: {rule}")):
            text_files([folder, path])
    with pytest.raises(UserError, match=r"data.path \[\]: name at least one"):
        text_files([])


def test_empty_files(folder):
    for paths in (folder / "e.txt", [folder, folder / "e.txt"]):
        with pytest.raises(UserError, match=r"data.path .*e.txt: the file is empty; write text to it, or leave"):
            list(text_documents(paths))
    with pytest.raises(UserError, match=r"data.path .*e\*: all 1 files are empty; write text to them"):
        list(text_documents(f"{folder}/e*"))


def test_bytes_that_are_not_utf8_are_named_with_their_offset(folder):
    (folder / "a.txt").write_bytes("été".encode() + b"\xe9t\xe9")
    with pytest.raises(UserError, match=r"a.txt: not UTF-8: byte 0xe9 at byte offset 5; convert it \(iconv"):
        list(text_documents(folder))


def test_corpus_is_fixed_capped_and_real():
    documents = list(corpus_documents())
    assert documents == list(corpus_documents())
    size = sum(len(document.text.encode()) for document in documents)
    assert 2_000_000 < size <= 4_000_000
    smaller = list(corpus_documents(max_bytes=600_000))
    assert smaller == documents[: len(smaller)]
    topics = [d.name for d in documents if d.name.startswith("topics/")]
    sources = [d.name for d in documents[len(topics) :]]
    assert topics == sorted(topics)
    assert sources == sorted(sources)
    assert "def " in documents[-1].text
    assert not [name for name in sources if "test" in name.split("/") or "site-packages" in name]


def test_corpus_without_a_standard_library(tmp_path, monkeypatch):
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(UserError, match=rf"data.type corpus: .* sources under {tmp_path}; use another Python, or"):
        next(itertools.chain(corpus_documents()))
