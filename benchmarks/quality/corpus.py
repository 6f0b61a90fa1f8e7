"""corpus: text that ships with Python and Debian, as bytes: what the small model is trained on and judged by."""

from __future__ import annotations

import gzip
import random
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_SEED = 7
_HELD_OUT_SHARE = 0.08
_FILE_BYTES_MIN = 2_000
_FILE_BYTES_MAX = 400_000
_DEBIAN_FOLDERS = ("/usr/share/doc", "/usr/share/perl", "/usr/share/common-licenses")
_DEBIAN_SUFFIXES = (".txt", ".pod", ".md", ".rst", "README", "NEWS", "FAQ", "README.Debian")


@dataclass(frozen=True, slots=True)
class Corpus:
    """Two disjoint sets of files' texts, joined; `held_out` was never trained on."""

    training: bytes
    held_out: bytes

    def save(self, file: Path) -> None:
        """Write both parts into one gzip file, to use the same text on another machine."""
        with gzip.open(file, "wb") as out:
            out.write(len(self.training).to_bytes(8, "little") + self.training + self.held_out)

    @classmethod
    def open(cls, file: Path) -> Corpus:
        """Read what `save` wrote."""
        with gzip.open(file, "rb") as source:
            size = int.from_bytes(source.read(8), "little")
            return cls(source.read(size), source.read())


def gather(*, size_bytes_max: int) -> Corpus:
    """The standard library's sources (half of them prose) and Debian's documents; whole files are held out, not lines.

    Args:
        size_bytes_max: stop after so many bytes.
    """
    texts = sorted(set(_documents()))
    chooser = random.Random(_SEED)
    chooser.shuffle(texts)
    training: list[bytes] = []
    held_out: list[bytes] = []
    size_bytes = 0
    for text in texts:
        (held_out if chooser.random() < _HELD_OUT_SHARE else training).append(text)
        size_bytes += len(text)
        if size_bytes >= size_bytes_max:
            break
    return Corpus(b"\n".join(training), b"\n".join(held_out))


def _documents() -> Iterator[bytes]:
    for file in sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py")):
        if not {"test", "tests", "site-packages", "dist-packages"} & set(file.parts):
            yield from _long_enough(_content_of(file))
    for folder in map(Path, _DEBIAN_FOLDERS):
        for file in sorted(folder.rglob("*")) if folder.is_dir() else ():
            name = file.name.removesuffix(".gz")
            if name.endswith(_DEBIAN_SUFFIXES) and file.is_file() and not file.is_symlink():
                yield from _long_enough(_content_of(file))


def _long_enough(text: bytes) -> Iterator[bytes]:
    if _FILE_BYTES_MIN <= len(text) <= _FILE_BYTES_MAX and text.isascii():
        yield text


def _content_of(file: Path) -> bytes:
    try:
        return gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    except (OSError, EOFError):
        return b""
