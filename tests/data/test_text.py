"""Text files and the built-in corpus as documents."""

import codecs
import glob
import hashlib
import itertools
import os
import re
import sysconfig
from pathlib import Path

import pytest

from shardtrain.data import corpus_documents, open_source, text_documents, text_file, text_files
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
        folder / "no.txt": "there is no such file or folder; check the path",
        folder / "nothing": "the folder is empty; put files there, or name another folder",
        f"{folder}/*.pdf": "the glob matches no file; check the glob ('**' stands for any depth of folders",
    }.items():
        with pytest.raises(UserError, match=re.escape(f"data.path = {path}: {rule}")):
            text_files([folder, path])
    with pytest.raises(UserError, match=r"data.path = \[\]: it is empty; name at least one"):
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


def test_a_file_counts_once_however_it_is_reached(folder, monkeypatch):
    (folder / "sub" / "loop").symlink_to(folder)
    (folder / "again.txt").symlink_to("b.txt")
    (folder / "hard.txt").hardlink_to(folder / "b.txt")
    assert names(f"{folder}/**/*.md", folder) == ["sub/c.md"]
    assert names(f"{folder}/**", folder) == ["a.txt", "again.txt", "e.txt", "sub/c.md"]
    assert names(folder, folder) == ["a.txt", "again.txt", "e.txt", "sub/c.md"]
    monkeypatch.chdir(folder)
    several = ["b.txt", folder / "b.txt", f"{folder}/sub/../b.txt", "*.txt", f"{folder}/*.txt"]
    assert [str(file) for file in text_files(several)] == ["b.txt", "a.txt", "e.txt"]


def test_links_that_lead_to_each_other_end(folder):
    """Each folder with two links to itself: 2 ** 40 paths before the system refuses a longer one."""
    for name in ("one", "two"):
        (folder / "sub" / name).symlink_to(folder / "sub")
    assert names(f"{folder}/**/*.md", folder) == ["sub/c.md"]
    (folder / "self").symlink_to(folder / "self")
    assert names(f"{folder}/**/*.md", folder) == ["sub/c.md"]
    with pytest.raises(UserError, match=r"data.path .*self: there is no such file or folder"):
        text_files(folder / "self")


@pytest.mark.parametrize(
    "pattern", ["**/*.txt", "*/*.md", "**", "s*/**/*", ".*", "[ab].txt", "sub/../*.txt", "**/sub/*"]
)
def test_globs_are_those_of_the_standard_library(folder, pattern):
    (folder / "sub" / "deep").mkdir()
    (folder / "sub" / "deep" / "f.txt").write_text("x")
    found = [file for file in glob.glob(f"{folder}/{pattern}", recursive=True) if os.path.isfile(file)]
    assert names(f"{folder}/{pattern}", folder) == sorted({os.path.relpath(file, folder) for file in found})


def test_a_byte_order_mark_is_no_text(folder):
    (folder / "a.txt").write_bytes(codecs.BOM_UTF8 + b"text")
    (folder / "e.txt").write_bytes(codecs.BOM_UTF8)
    assert [document.text for document in text_documents(folder)] == ["text", "bee", "sea"]
    (folder / "a.txt").write_bytes(b"a" + codecs.BOM_UTF8)
    assert next(text_documents(folder)).text == "a\ufeff", "only at the start is it a mark"


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be", "utf-32", "utf-32-be"])
def test_other_encodings_are_named(folder, encoding):
    (folder / "a.txt").write_bytes("\ufefftext".encode(encoding) if "be" in encoding else "text".encode(encoding))
    name = encoding.removesuffix("-be")
    with pytest.raises(UserError, match=rf"a.txt: not UTF-8: .* mark of {name.upper()}; .*iconv -f {name} -t utf-8"):
        list(text_documents(folder))


def test_a_file_in_pieces(folder, monkeypatch):
    """Characters that lie in two pieces; the offset of what is no character in a later one."""
    monkeypatch.setattr(text_file, "_PIECE", 5)
    text = "größe ŝanĝo 語 🙂 " * 5
    (folder / "a.txt").write_bytes(codecs.BOM_UTF8 + text.encode())
    document = next(text_documents(folder))
    digest = hashlib.sha256()
    assert "".join(document.parts(digest)) == text
    assert digest.hexdigest() == hashlib.sha256((folder / "a.txt").read_bytes()).hexdigest()
    for end, offset in ((b"\xe9t\xe9", 0), (b"\xf0\x9f", 0), (b"\xf0\x9f a", 0)):
        (folder / "a.txt").write_bytes(text.encode() + end)
        with pytest.raises(UserError, match=rf"byte 0x{end[0]:02x} at byte offset {len(text.encode()) + offset};"):
            "".join(next(text_documents(folder)).parts())


def test_what_cannot_be_read_is_named(folder):
    memory = Path("/proc/self/mem")  # a file that opens, and whose start cannot be read
    if not memory.exists():
        pytest.skip("a system without /proc")
    with pytest.raises(UserError, match=r"data.path /proc/self/mem: the file cannot be read: Input/output error; cor"):
        list(text_documents(memory))


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        ("", r"data.path = '': it is empty; name a file"),
        (" ", r"data.path = ' ': it is empty; name a file"),
        (["x", ""], r"data.path = '': it is empty; name a file"),
        ([], r"data.path = \[\]: it is empty; name at least one"),
        (3, r"data.path = 3: it is of type int; give a path, or"),
        ([None], r"data.path: it is of type NoneType; give a path"),
    ],
)
def test_paths_that_are_none(tmp_path, paths, message):
    with pytest.raises(UserError, match=message):
        text_files(paths)
    for type in ("text", "tokens"):
        with pytest.raises(UserError, match=message):
            open_source(type, seq_len=8, vocab_size=300, path=paths, directory=tmp_path / "data")
    assert not (tmp_path / "data").exists()
