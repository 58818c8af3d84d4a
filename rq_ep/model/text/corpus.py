"""A text corpus from any Python installation, in four domains, with whole documents held out.

The domains differ enough for a router to distinguish them: `code` is the standard library's modules, `prose` the
language reference of `help()`, `c` the interpreter's C headers, `table` generated lines of Unicode and HTML data.
"""

import html.entities
import sysconfig
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import md5
from importlib import import_module
from pathlib import Path

import torch

DOMAINS = ("code", "prose", "c", "table")
SPLITS = ("train", "held-out")
MAX_DOMAIN_BYTES = 4_000_000
LINES_PER_TABLE = 64


@dataclass(frozen=True)
class Document:
    """A named text of one domain."""

    name: str
    domain: str
    text: str

    @property
    def split(self) -> str:
        """The split of a document by a hash of its name, the same on every machine; a tenth is held out."""
        return SPLITS[md5(self.name.encode()).digest()[0] < 26]


def documents(domain: str) -> list[Document]:
    """All documents of a domain in the order of their names, up to `MAX_DOMAIN_BYTES`."""
    result: list[Document] = []
    num_bytes = 0
    for name, text in _SOURCES[domain]():
        num_bytes += len(text.encode())
        if num_bytes > MAX_DOMAIN_BYTES:
            break
        result.append(Document(name, domain, text))
    return result


def texts(split: str) -> dict[str, list[str]]:
    """Domain -> texts of the documents in `split` ("train" or "held-out")."""
    return {domain: [document.text for document in documents(domain) if document.split == split] for domain in DOMAINS}


def write_corpus(directory: str | Path) -> None:
    """Write every document to `directory`/SPLIT/DOMAIN/NAME.txt, from which calibrate and eval read it by domain."""
    for domain in DOMAINS:
        for document in documents(domain):
            path = Path(directory, document.split, domain, document.name.replace("/", "-") + ".txt")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(document.text, encoding="utf-8")


def _code() -> Iterator[tuple[str, str]]:
    stdlib = Path(sysconfig.get_path("stdlib"))
    files = [path for pattern in ("*.py", "asyncio/*.py", "email/*.py") for path in stdlib.glob(pattern)]
    return _read(stdlib, files)


def _prose() -> Iterator[tuple[str, str]]:
    topics: dict[str, str] = import_module("pydoc_data.topics").topics
    return iter(sorted(topics.items()))


def _c() -> Iterator[tuple[str, str]]:
    include = Path(sysconfig.get_path("include"))
    files = list(include.rglob("*.h"))
    if not files:  # Python without its development headers; torch's wheel has some
        include = Path(torch.__file__).parent / "include"
        files = list(include.rglob("*.h"))
    return _read(include, files)


def _table() -> Iterator[tuple[str, str]]:
    characters = [
        f"{code:04X};{name};{unicodedata.category(chr(code))};{unicodedata.bidirectional(chr(code))};\n"
        for code in range(0x20, 0x3000)
        if (name := unicodedata.name(chr(code), ""))
    ]
    entities = [
        f'"&{name}": {{"codepoints": {[ord(character) for character in text]}}},\n'
        for name, text in sorted(html.entities.html5.items())
    ]
    for kind, lines in (("unicode", characters), ("html", entities)):
        for start in range(0, len(lines), LINES_PER_TABLE):
            yield f"{kind}-{start:05d}", "".join(lines[start : start + LINES_PER_TABLE])


def _read(root: Path, files: list[Path]) -> Iterator[tuple[str, str]]:
    for path in sorted(files):
        yield path.relative_to(root).as_posix(), path.read_text(encoding="utf-8", errors="replace")


_SOURCES = {"code": _code, "prose": _prose, "c": _c, "table": _table}
