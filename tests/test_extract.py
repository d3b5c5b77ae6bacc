"""Extractors, on small archives in the layout of the real packages."""

import inspect
import io
import json
import struct
import tarfile
import textwrap
import zipfile
import zlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minidsv3.data.extract import (
    EXTRACTORS,
    bible_jsonl,
    markdown_plays,
    plain_play,
    pydoc_topics,
    python_modules,
    r_character_vectors,
    read_members,
    text_files,
)


def write_zip(path, members):
    with zipfile.ZipFile(path, "w") as bundle:
        for name, content in members.items():
            bundle.writestr(name, content)
    return path


def tar_bytes(members, mode="w:gz"):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as bundle:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            bundle.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def deb_bytes(members):
    """A Debian package: three members, the first of odd length, so that the padding matters."""
    parts = {"debian-binary": b"2.0", "control.tar.xz": b"\xfd7", "data.tar.xz": tar_bytes(members, "w:xz")}
    out = b"!<arch>\n"
    for name, content in parts.items():
        out += f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(content):<10}`\n".encode() + content
        out += b"\n" * (len(content) % 2)
    return out


def rdb_block(lines, kind=16):
    """A character vector as R stores it; None is its missing value."""
    raw = b"X\n" + struct.pack(">4i", 3, 0x040201, 0x030500, 5) + b"UTF-8" + struct.pack(">2i", kind, len(lines))
    for line in lines:
        encoded = b"" if line is None else line.encode()
        raw += struct.pack(">2i", 0x40009, -1 if line is None else len(encoded)) + encoded
    return struct.pack(">I", len(raw)) + zlib.compress(raw)


def test_read_members_of_zip_are_sorted_and_match(tmp_path):
    archive = write_zip(tmp_path / "a.whl", {"p/b.txt": "B", "p/a.txt": "A", "q/c.txt": "C", "p/d.py": "D"})
    assert read_members(archive, "p/*.txt") == [("p/a.txt", b"A"), ("p/b.txt", b"B")]


def test_read_members_of_tar_are_read(tmp_path):
    archive = tmp_path / "a.tar.gz"
    archive.write_bytes(tar_bytes({"x-1/y.txt": b"Y"}))
    assert read_members(archive, "x-1/*") == [("x-1/y.txt", b"Y")]


def test_read_members_of_deb_are_read(tmp_path):
    archive = tmp_path / "a.deb"
    archive.write_bytes(deb_bytes({"./usr/y.txt": b"Y"}))
    assert read_members(archive, "./usr/*") == [("./usr/y.txt", b"Y")]


def test_read_members_of_tar_leave_links_out(tmp_path):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as bundle:
        link = tarfile.TarInfo("x/link.txt")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        bundle.addfile(link)
        bundle.addfile(tarfile.TarInfo("x/empty.txt"))
    (tmp_path / "a.tar").write_bytes(buffer.getvalue())
    assert read_members(tmp_path / "a.tar", "x/*") == [("x/empty.txt", b"")]


def test_read_members_write_nothing_to_disk(tmp_path):
    folder = tmp_path / "inner"
    folder.mkdir()
    archive = write_zip(folder / "a.zip", {"../evil.txt": "E"})
    assert read_members(archive, "*") == [("../evil.txt", b"E")]
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a.zip", "inner"]


def test_read_members_without_match_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"a\.zip has no member like 'q/\*'"):
        read_members(write_zip(tmp_path / "a.zip", {"p/a": "A"}), "q/*")


@pytest.mark.parametrize(
    "raw",
    [
        tar_bytes({"x/y": b"Y" * 5000})[:60],
        deb_bytes({"x/y": b"Y"})[:100],
        deb_bytes({"x/y": b"Y" * 5000})[:-40],
        b"no archive",
        b"",
    ],
    ids=["tar cut", "deb without data", "deb cut", "text", "empty"],
)
def test_read_members_of_a_damaged_archive_is_an_error(tmp_path, raw):
    (tmp_path / "a.bin").write_bytes(raw)
    with pytest.raises(ValueError, match=r"a\.bin is not a readable archive"):
        read_members(tmp_path / "a.bin", "*")


def test_text_files_are_titled_by_file_name(tmp_path):
    archive = write_zip(tmp_path / "a.whl", {"s/1790-W.txt": "Fellow-Citizens:", "s/1791-W.txt": "Again."})
    assert text_files(archive, "s/*.txt") == [("1790-W", "Fellow-Citizens:\n"), ("1791-W", "Again.\n")]


def test_text_files_have_tidy_lines(tmp_path):
    archive = write_zip(tmp_path / "a.whl", {"a.txt": "\r\none  \r\ntwo\r\n\r\n\r\n\r\nthree\r\n\r\n"})
    assert text_files(archive, "*")[0].text == "one\ntwo\n\nthree\n"


def test_text_files_not_in_utf8_are_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"s/old\.txt is not UTF-8"):
        text_files(write_zip(tmp_path / "a.whl", {"s/old.txt": "caf\u00e9".encode("latin-1")}), "*")


def test_plain_play_names_the_speaker():
    assert (
        plain_play("**KING HENRY V**  \nOnce more  \nunto the breach\n")
        == "KING HENRY V:\nOnce more\nunto the breach\n"
    )


def test_plain_play_keeps_headings_and_stage_directions_as_lines():
    play = "# Hamlet\n\n## ACT I\n\n_Enter GHOST_\n\n**GHOST**  \n__\\[Beneath]_  \nSwear\\--swear.\n"
    assert plain_play(play) == "Hamlet\n\nACT I\n\nEnter GHOST\n\nGHOST:\n[Beneath]\nSwear--swear.\n"


@settings(deadline=None)
@given(st.text(alphabet="ab _*\\#\n[", max_size=60))
def test_plain_play_leaves_no_marks(markdown):
    assert not set(plain_play(markdown)) & set("_*\\")


def test_markdown_plays_are_titled_by_heading_or_file_name(tmp_path):
    archive = write_zip(tmp_path / "a.whl", {"p/x/a.md": "# King John\n\nI", "p/y/all-s-well.md": "## ACT I\n"})
    assert [play.title for play in markdown_plays(archive, "p/*.md")] == ["King John", "All S Well"]


def test_bible_jsonl_has_a_document_a_book_and_a_heading_a_chapter(tmp_path):
    verses = [("Ruth", 1, "Now it came"), ("Ruth", 1, "And"), ("Ruth", 2, "And Naomi"), ("Jude", 1, "Jude")]
    lines = [json.dumps({"book": book, "chapter": chapter, "text": text}) for book, chapter, text in verses]
    (tmp_path / "a.tar.gz").write_bytes(tar_bytes({"b-1/kjv.jsonl": "\n".join(lines).encode()}))
    ruth, jude = bible_jsonl(tmp_path / "a.tar.gz", "*/kjv.jsonl")
    assert ruth == ("Ruth", "Ruth 1\nNow it came\nAnd\n\nRuth 2\nAnd Naomi\n")
    assert jude == ("Jude", "Jude 1\nJude\n")


def test_r_character_vectors_are_documents(tmp_path):
    rdb = rdb_block(["EMMA", "", "Caf\u00e9"]) + rdb_block(["PERSUASION", None, "Sir Walter"])
    (tmp_path / "a.deb").write_bytes(deb_bytes({"./data/Rdata.rdb": rdb}))
    novels = r_character_vectors(tmp_path / "a.deb", "./data/*.rdb")
    assert novels == [("Emma", "EMMA\n\nCaf\u00e9\n"), ("Persuasion", "PERSUASION\n\nSir Walter\n")]


def test_r_character_vectors_of_another_type_are_an_error(tmp_path):
    with pytest.raises(ValueError, match="not a character vector"):
        r_character_vectors(write_zip(tmp_path / "a.zip", {"a.rdb": rdb_block(["x"], kind=13)}), "*")


def test_python_modules_are_the_source():
    assert python_modules(["textwrap"]) == [("textwrap", inspect.getsource(textwrap))]


def test_python_modules_read_packages():
    assert python_modules(["json"])[0].text == inspect.getsource(json)


def test_python_modules_that_are_missing_are_left_out():
    assert [module.title for module in python_modules(["ast", "no_such_module", "bisect"])] == ["ast", "bisect"]


def test_python_modules_that_are_mostly_missing_are_an_error():
    with pytest.raises(ValueError, match="holds 1 of 3 modules"):
        python_modules(["ast", "no_such_module", "nor_this"])


def test_pydoc_topics_are_in_alphabetical_order():
    titles = [topic.title for topic in pydoc_topics()]
    assert len(titles) > 50
    assert titles == sorted(titles)


def test_extractors_go_by_their_function_names():
    assert all(function.__name__ == name for name, function in EXTRACTORS.items())
