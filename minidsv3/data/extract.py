"""The documents inside a downloaded package, as plain text.

A package is only read: zipfile, tarfile and twenty lines for Debian's `ar` give the bytes of its members in memory.
Nothing of it is imported, and nothing is unpacked onto the disk, so a member called ``../../.bashrc`` is a name like
any other. Who calls these functions has checked the archive's SHA-256 first.

Every extractor takes the archive's path and the parameters of its recipe in ``data/corpora.json``, and returns a list
of `Document` in a fixed order. Lines end in a bare newline and carry no trailing blanks; two or more blank lines
become one. The last two functions need no archive: they read what every Python brings along.
"""

import importlib
import io
import json
import lzma
import re
import struct
import sysconfig
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import NamedTuple


class Document(NamedTuple):
    """One text of a corpus: a play, a speech, a module."""

    title: str
    text: str


def read_members(archive: Path, pattern: str) -> list[tuple[str, bytes]]:
    """Names and contents of the files in a .whl, .zip, .tar.* or .deb whose name matches, sorted by name.

    Parameters
    ----------
    archive : Path
    pattern : str
        Shell pattern over the member's whole name; ``*`` matches slashes too.

    Raises
    ------
    ValueError
        The file is no archive of these kinds, is cut off, or no member matches.
    """
    try:
        members = sorted(member for member in _members(archive) if fnmatchcase(member[0], pattern))
    except (zipfile.BadZipFile, tarfile.TarError, lzma.LZMAError, zlib.error, EOFError, struct.error) as error:
        raise ValueError(f"{archive.name} is not a readable archive: {error}") from None
    if not members:
        raise ValueError(f"{archive.name} has no member like {pattern!r}")
    return members


def _members(archive: Path) -> Iterator[tuple[str, bytes]]:
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as bundle:
            yield from ((info.filename, bundle.read(info)) for info in bundle.infolist() if not info.is_dir())
        return
    raw = archive.read_bytes()
    if raw.startswith(b"!<arch>\n"):
        raw = _deb_data(raw)
    with tarfile.open(fileobj=io.BytesIO(raw)) as bundle:
        for info in bundle:
            content = bundle.extractfile(info) if info.isfile() else None  # no links, no devices
            if content is not None:
                yield info.name, content.read()


def _deb_data(raw: bytes) -> bytes:
    """The data.tar.* inside a .deb: an `ar` file of 60-byte headers, each content padded to an even length."""
    position = 8
    while position + 60 <= len(raw):
        name, size = raw[position : position + 16].decode("ascii").strip(" /"), int(raw[position + 48 : position + 58])
        if name.startswith("data.tar") and position + 60 + size <= len(raw):
            return raw[position + 60 : position + 60 + size]
        position += 60 + size + size % 2
    raise tarfile.ReadError("it has no whole data.tar")


def text_files(archive: Path, members: str) -> list[Document]:
    """Each matching file is a document as it stands, titled by its file name."""
    found = read_members(archive, members)
    return [Document(PurePosixPath(name).stem, _tidy(_decode(name, raw))) for name, raw in found]


def markdown_plays(archive: Path, members: str) -> list[Document]:
    """Plays in Markdown: a bold line is who speaks and becomes ``NAME:``, all other marks go."""
    plays = []
    for name, raw in read_members(archive, members):
        text = _decode(name, raw)
        heading = re.match(r"# (.+)", text)
        title = heading[1] if heading else PurePosixPath(name).stem.replace("-", " ").title()
        plays.append(Document(title.strip(), plain_play(text)))
    return plays


def plain_play(markdown: str) -> str:
    """A play without its Markdown: ``**ROMEO**`` is ``ROMEO:``; headings and stage directions stay as plain lines."""
    text = re.sub(r"^\*\*(.+?)\*\*\s*$", r"\1:", markdown, flags=re.MULTILINE)
    text = re.sub(r"^#+ *", "", text, flags=re.MULTILINE)
    return _tidy(re.sub(r"[_*\\]", "", text))


def bible_jsonl(archive: Path, members: str) -> list[Document]:
    """Lines of {"text", "book", "chapter"}: one document a book, a heading a chapter, a line a verse."""
    books: dict[str, list[str]] = {}
    last_heading = ""
    for name, raw in read_members(archive, members):
        for line in _decode(name, raw).splitlines():
            verse = json.loads(line)
            heading = f"{verse['book']} {verse['chapter']}"
            lines = books.setdefault(verse["book"], [])
            if heading != last_heading:
                lines += ["", heading]
            lines.append(verse["text"])
            last_heading = heading
    return [Document(book, _tidy("\n".join(lines))) for book, lines in books.items()]


def r_character_vectors(archive: Path, members: str) -> list[Document]:
    """An R data base (.rdb) of character vectors: each is a document, a line an element, titled by its first line."""
    documents = []
    for _, raw in read_members(archive, members):
        while raw:
            inflate = zlib.decompressobj()  # a block: uncompressed length (4 bytes), then one zlib stream
            lines = _r_strings(inflate.decompress(raw[4:]))
            raw = inflate.unused_data
            documents.append(Document(lines[0].strip().title(), _tidy("\n".join(lines))))
    return documents


def _r_strings(block: bytes) -> list[str]:
    """The elements of one serialised R vector (XDR, version 3: header, encoding, type 16, then type 9 each)."""
    magic, version, _, _, encoding_size = struct.unpack_from(">2s4i", block)
    kind, count = struct.unpack_from(">2i", block, position := 18 + encoding_size)
    if (magic, version, kind & 0xFF) != (b"X\n", 3, 16):
        raise ValueError(f"R block {block[:6]!r} is not a character vector in XDR, version 3")
    position += 8
    strings = []
    for _ in range(count):
        (size,) = struct.unpack_from(">i", block, position + 4)  # -1 is R's missing value
        position += 8
        strings.append(block[position : position + max(size, 0)].decode("utf-8"))
        position += max(size, 0)
    return strings


def python_modules(modules: list[str]) -> list[Document]:
    """Source of the named modules of the running Python's standard library; those it does not have are left out.

    Raises
    ------
    ValueError
        Fewer than half of them are there as files (Python from a zip file, as in the embeddable distribution).
    """
    stdlib = Path(sysconfig.get_path("stdlib"))
    documents = []
    for module in modules:
        stem = stdlib.joinpath(*module.split("."))
        found = [path for path in (stem.with_suffix(".py"), stem / "__init__.py") if path.is_file()]
        if found:
            documents.append(Document(module, found[0].read_bytes().decode("utf-8").replace("\r\n", "\n")))
    if 2 * len(documents) < len(modules):
        raise ValueError(f"{stdlib} holds {len(documents)} of {len(modules)} modules: this Python has no source files")
    return documents


def pydoc_topics() -> list[Document]:
    """The topics of Python's ``help()``, chapters of its language reference, in alphabetical order."""
    try:
        topics = importlib.import_module("pydoc_data.topics").topics
    except ImportError:
        raise ValueError("this Python has no pydoc_data.topics: it was installed without its documentation") from None
    return [Document(title, _tidy(topics[title])) for title in sorted(topics)]


EXTRACTORS: dict[str, Callable[..., list[Document]]] = {
    function.__name__: function for function in (text_files, markdown_plays, bible_jsonl, r_character_vectors)
}


def _decode(name: str, raw: bytes) -> str:
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not UTF-8: {error}") from None


def _tidy(text: str) -> str:
    """Bare newlines, no trailing blanks, no two blank lines in a row, one newline at the end."""
    lines = "\n".join(line.rstrip() for line in text.replace("\r\n", "\n").replace("\r", "\n").split("\n"))
    return re.sub(r"\n{3,}", "\n\n", lines).strip("\n") + "\n"
