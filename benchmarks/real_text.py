"""Prepare the text of benchmarks/real_conversion.py: English of Debian's documentation, Python of installed packages.

    python benchmarks/real_text.py --out data/real [--tokenizer smollm2] [--train-tokens 30000000]

Fetches the Debian packages of DEBIAN with apt-get (no root needed), takes the English pages out of them, and reads the
.py files of the packages that this interpreter has. One document in forty is held out, by a hash of its name. A
document for training that shares most of its lines with one read before, held out or not, is left out. Writes
{english,python}-{train,heldout}.{bin,idx} and sources.json, which names every package with version, licence and tokens.
"""

import argparse
import gzip
import hashlib
import itertools
import json
import pydoc_data.topics
import re
import shutil
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from importlib import metadata
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import lxml.etree
import lxml.html
import numpy as np
from numpy.typing import NDArray
from python_corpus import copies, distinctive_lines
from tokenizers import Tokenizer

from radlads.checkpoint.tokenizer_files import locate_tokenizer, num_ids
from radlads.convert.hf_source import end_of_text_id, load_tokenizer
from radlads.data.binidx import BinIdxWriter
from radlads.data.python_text import iter_documents
from radlads.files import write_text
from radlads.recipes.stage_configs import BUNDLED_TEACHER

# Debian 12's packages and the licence of their texts, as /usr/share/doc/PACKAGE/copyright has it
DEBIAN = {
    "anarchism": "GPL-2",
    "apache2-doc": "Apache-2.0",
    "cmake-doc": "BSD-3-Clause",
    "debian-handbook": "GPL-2+ or CC-BY-SA-3.0",
    "debian-policy": "GPL-2+",
    "debian-reference-en": "GPL-2+",
    "developers-reference": "GPL-2+",
    "dict-gcide": "GPL-3+",
    "gimp-help-en": "GFDL-1.2+",
    "git-doc": "GPL-2",
    "gnucash-docs": "GFDL-1.1+",
    "installation-guide-amd64": "GPL-2",
    "libboost1.74-doc": "BSL-1.0",
    "linux-doc-6.1": "GPL-2",
    "maxima-doc": "GPL-2",
    "octave-doc": "GPL-3+",
    "perl-doc": "GPL-1+ or Artistic",
    "postfix-doc": "IPL-1.0 or EPL-2.0",
    "postgresql-doc-15": "PostgreSQL",
    "python3.11-doc": "PSF-2.0",
    "python-django-doc": "BSD-3-Clause",
    "python-sqlalchemy-doc": "MIT",
    "qtbase5-doc-html": "GFDL-1.3",
    "sqlite3-doc": "public domain",
    "vim-doc": "Vim",
}
HELDOUT_ONE_IN = 40
SOURCES = "sources.json"
_MIN_CHARACTERS, _MAX_CHARACTERS = 800, 400_000
_PAGES = (".html", ".htm", ".xhtml")
_TEXTS = (".txt", ".pod", ".md")
_BLOCKS = {"p", "div", "li", "dt", "dd", "tr", "pre", "br", "h1", "h2", "h3", "h4", "h5", "h6", "section", "blockquote"}
_FURNITURE = re.compile(r"sidebar|related|nav|footer|header$|headerlink|toctree|breadcrumb|menu|search")
_COMMON = frozenset("the of to and a in is that for it be as are with this or not can on by from an if which".split())  # noqa: SIM905
_COMMON_SHARE, _DICTIONARY_CHUNK = 0.16, 8000
_BATCH = 64
_Ids = NDArray[np.int32]
_ByPackage = dict[str, list[_Ids]]


class Document(NamedTuple):
    """A text, the package it came in, and a name that stays the same whoever reads it."""

    package: str
    name: str
    text: str

    @property
    def is_heldout(self) -> bool:
        return int(hashlib.sha256(f"{self.package}/{self.name}".encode()).hexdigest(), 16) % HELDOUT_ONE_IN == 0


def english_documents(folder: Path, package: str) -> Iterator[Document]:
    """The English pages and texts of an unpacked Debian package, by path."""
    for path in sorted(folder.rglob("*")):
        if path.is_symlink() or not path.is_file():
            continue
        name = str(path.relative_to(folder))
        if name.endswith(".dict.dz"):
            yield from _entries(path, package)
            continue
        suffix = Path(name.removesuffix(".gz")).suffix
        if suffix not in _PAGES + _TEXTS:
            continue
        raw = gzip.decompress(path.read_bytes()) if name.endswith(".gz") else path.read_bytes()
        text = _page_text(raw) if suffix in _PAGES else raw.decode("utf-8", errors="ignore")
        if len(text) >= _MIN_CHARACTERS and is_english(text):
            yield Document(package, name, text[:_MAX_CHARACTERS])


def _entries(path: Path, package: str) -> Iterator[Document]:
    """A dictionary's entries, some pages at a time."""
    text = gzip.decompress(path.read_bytes()).decode("utf-8", errors="ignore")
    for number, start in enumerate(range(0, len(text), _DICTIONARY_CHUNK)):
        yield Document(package, f"{path.name}#{number}", text[start : start + _DICTIONARY_CHUNK])


def _page_text(raw: bytes) -> str:
    """What a reader sees of a page, a line for each block."""
    try:
        page = lxml.html.document_fromstring(raw, parser=lxml.html.HTMLParser(encoding="utf-8"))
    except (lxml.etree.ParserError, ValueError):
        return ""
    for element in list(page.iter()):
        if (
            not isinstance(element.tag, str)
            or element.tag in ("script", "style", "head", "nav", "footer")
            or _FURNITURE.search(element.get("class") or "")
            or element.get("role") in ("navigation", "search")
        ):
            _remove(element)
        elif element.tag in _BLOCKS:
            element.tail = "\n" + (element.tail or "")
    lines = (re.sub(r"[ \t\xa0]+", " ", line).rstrip() for line in page.text_content().splitlines())
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip() + "\n"


def _is_furniture(element: lxml.html.HtmlElement) -> bool:
    """Whether an element is none of the page's text: a comment, a script, a menu."""
    if not isinstance(element.tag, str) or element.tag in ("script", "style", "head", "nav", "footer"):
        return True
    return bool(_FURNITURE.search(element.get("class") or "")) or element.get("role") in ("navigation", "search")


def _remove(element: lxml.html.HtmlElement) -> None:
    if element.getparent() is not None:
        element.drop_tree()


def is_english(text: str) -> bool:
    """Whether the commonest English words are as common as in English prose."""
    words = re.findall(r"[^\W\d_]+", text[:20_000].lower())
    return bool(words) and sum(word in _COMMON for word in words) / len(words) >= _COMMON_SHARE


def python_documents() -> Iterator[Document]:
    """The .py files of every package that this interpreter has, by package and path."""
    installed = {each.metadata["Name"]: each for each in metadata.distributions()}
    for package in sorted(installed, key=str.lower):
        for file in sorted(installed[package].files or (), key=str):
            path = Path(str(file.locate()))
            if file.suffix == ".py" and path.is_file() and _MIN_CHARACTERS <= path.stat().st_size <= _MAX_CHARACTERS:
                yield Document(package, str(file), path.read_text(encoding="utf-8", errors="ignore"))


def python_licences() -> dict[str, str]:
    """Each installed package's licence in its own words, shortened."""
    return {each.metadata["Name"]: _licence(each) for each in metadata.distributions()}


def _licence(package: metadata.Distribution) -> str:
    facts = package.metadata
    named = [line.rsplit("::", 1)[-1].strip() for line in facts.get_all("Classifier") or [] if "License ::" in line]
    text = facts.get("License-Expression") or ", ".join(named) or (facts.get("License") or "").strip()
    return text.splitlines()[0][:120] if text else "unknown"


def fresh(documents: Iterable[Document]) -> Iterator[Document]:
    """Held-out documents first, then those for training that are no copies of what came before."""
    everything = list(documents)
    seen: set[int] = set()
    for document in sorted(everything, key=lambda each: not each.is_heldout):
        lines = distinctive_lines(document.text)
        if not copies(document.text, seen):
            yield document
        seen |= lines


class Corpus:
    """{stem}-train and {stem}-heldout, and how many tokens of each package went into which."""

    def __init__(self, stem: Path, tokenizer: Tokenizer, end: int, *, train_tokens: int):
        self._stem, self._tokenizer, self._end, self._train_tokens = stem, tokenizer, end, train_tokens
        self.tokens: dict[str, Counter[str]] = {"train": Counter(), "heldout": Counter()}

    def write(self, documents: Iterable[Document]) -> None:
        """Write both corpora. A package gives training text until the packages have filled `train_tokens` evenly."""
        rows = max(num_ids(self._tokenizer), self._end + 1)
        queues = self._encoded(documents)
        for split, by_package in queues.items():
            with BinIdxWriter(self._stem.with_name(f"{self._stem.name}-{split}"), rows) as writer:
                budget = self._train_tokens if split == "train" else sys.maxsize
                for package, ids in _in_turns(by_package):
                    if writer.num_tokens >= budget:
                        break
                    writer.add_document(ids)
                    self.tokens[split][package] += ids.size

    def _encoded(self, documents: Iterable[Document]) -> dict[str, _ByPackage]:
        encoded: dict[str, _ByPackage] = {split: defaultdict(list) for split in self.tokens}
        batch: list[Document] = []
        for document in documents:
            batch.append(document)
            if len(batch) == _BATCH:
                self._encode(batch, encoded)
                batch = []
        self._encode(batch, encoded)
        return encoded

    def _encode(self, batch: list[Document], encoded: dict[str, _ByPackage]) -> None:
        texts = [document.text for document in batch]
        for document, encoding in zip(
            batch, self._tokenizer.encode_batch_fast(texts, add_special_tokens=False), strict=True
        ):
            split = "heldout" if document.is_heldout else "train"
            encoded[split][document.package].append(np.array([*encoding.ids, self._end], dtype=np.int32))


def _in_turns(by_package: _ByPackage) -> Iterator[tuple[str, _Ids]]:
    """Documents such that every package is spread over the whole corpus: by their place within their package."""
    places = [
        ((number + 0.5) / len(documents), package, ids)
        for package, documents in by_package.items()
        for number, ids in enumerate(documents)
    ]
    return ((package, ids) for _, package, ids in sorted(places, key=lambda each: each[:2]))


def write_tiny_text(folder: Path) -> tuple[Path, Path]:
    """Text of this Python in small and the bundled teacher with a template: the teacher's folder, the text's."""
    teacher, data = folder / "teacher", folder / "data"
    if (data / SOURCES).is_file():
        return teacher, data
    shutil.copytree(BUNDLED_TEACHER, teacher, dirs_exist_ok=True)
    (teacher / "chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] }}\n{% endfor %}")
    tokenizer = load_tokenizer(teacher, 2**31)
    end = end_of_text_id(teacher, tokenizer)
    topics = "\n".join(pydoc_data.topics.topics.values())
    english = [Document("python", str(start), topics[start : start + 2000]) for start in range(0, len(topics), 2000)]
    pages = itertools.islice(iter_documents("train"), 400)
    python = [Document("python", str(path), text[:3000]) for path, text in pages]
    data.mkdir(exist_ok=True)
    for kind, documents in (("english", english), ("python", python)):
        Corpus(data / kind, tokenizer, end, train_tokens=50_000).write(documents)
    write_text(data / SOURCES, json.dumps({"english": "pydoc_data.topics", "python": "the standard library"}) + "\n")
    return teacher, data


def fetch(package: str, folder: Path) -> str:
    """Download and unpack a Debian package below `folder`; its version."""
    done = subprocess.run(
        ["apt-get", "download", "-q", package], cwd=folder, capture_output=True, text=True, check=False
    )
    files = list(folder.glob(f"{package}_*.deb"))
    if done.returncode or not files:
        raise ValueError(f"{package} could not be fetched with apt-get: {done.stderr.strip().splitlines()[-1:]}")
    subprocess.run(["dpkg-deb", "-x", str(files[0]), str(folder / package)], check=True)
    return files[0].name.split("_")[1].replace("%3a", ":")


def main(argv: list[str] | None = None) -> int:
    """Write both kinds of text and what is in them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the corpora")
    parser.add_argument(
        "--tokenizer", default="smollm2", help="a teacher's folder, GGUF file or name (default smollm2)"
    )
    parser.add_argument("--train-tokens", type=int, default=30_000_000, help="of each kind, at most (default 30M)")
    parser.add_argument("--debian", action="append", choices=DEBIAN, help="a package; repeatable (default: all)")
    arguments = parser.parse_args(argv)
    if (arguments.out / SOURCES).exists():
        parser.error(f"{arguments.out / SOURCES} exists already: remove the folder, or choose another --out")
    arguments.out.mkdir(parents=True, exist_ok=True)
    folder = locate_tokenizer(arguments.tokenizer)
    tokenizer = load_tokenizer(folder, 2**31)
    end = end_of_text_id(folder, tokenizer)
    licences = {"english": DEBIAN, "python": python_licences()}
    versions = {"english": {}, "python": {each.metadata["Name"]: each.version for each in metadata.distributions()}}

    def english() -> Iterator[Document]:
        with TemporaryDirectory() as temporary:
            for package in arguments.debian or DEBIAN:
                versions["english"][package] = fetch(package, Path(temporary))
                yield from english_documents(Path(temporary) / package, package)

    sources = {}
    for kind, documents in (("english", english()), ("python", python_documents())):
        corpus = Corpus(arguments.out / kind, tokenizer, end, train_tokens=arguments.train_tokens)
        corpus.write(fresh(documents))
        tokens = {split: sum(counts.values()) for split, counts in corpus.tokens.items()}
        print(f"{kind}: {tokens['train']:,} tokens to train on, {tokens['heldout']:,} held out", flush=True)
        sources[kind] = tokens | {
            "packages": {
                package: {"version": versions[kind][package], "licence": licences[kind][package], "train_tokens": count}
                for package, count in corpus.tokens["train"].most_common()
            }
        }
    write_text(arguments.out / SOURCES, json.dumps(sources, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
