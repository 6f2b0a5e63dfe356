"""English from Debian's documentation: fetching packages, and the text of their pages."""

import gzip
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import lxml.etree
import lxml.html

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
# Pages and files with fewer characters are left out, longer ones cut off
MIN_CHARACTERS, MAX_CHARACTERS = 800, 400_000
_PAGES = (".html", ".htm", ".xhtml")
_TEXTS = (".txt", ".pod", ".md")
_BLOCKS = {"p", "div", "li", "dt", "dd", "tr", "pre", "br", "h1", "h2", "h3", "h4", "h5", "h6", "section", "blockquote"}
_FURNITURE = re.compile(r"sidebar|related|nav|footer|header$|headerlink|toctree|breadcrumb|menu|search")
_COMMON = frozenset("the of to and a in is that for it be as are with this or not can on by from an if which".split())  # noqa: SIM905
_COMMON_SHARE, _DICTIONARY_CHUNK = 0.16, 8000


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


def english_texts(folder: Path) -> Iterator[tuple[str, str]]:
    """Name and text of the English pages and texts of an unpacked Debian package, by path."""
    for path in sorted(folder.rglob("*")):
        if path.is_symlink() or not path.is_file():
            continue
        name = str(path.relative_to(folder))
        if name.endswith(".dict.dz"):
            yield from _entries(path)
            continue
        suffix = Path(name.removesuffix(".gz")).suffix
        if suffix not in _PAGES + _TEXTS:
            continue
        raw = gzip.decompress(path.read_bytes()) if name.endswith(".gz") else path.read_bytes()
        text = page_text(raw) if suffix in _PAGES else raw.decode("utf-8", errors="ignore")
        if len(text) >= MIN_CHARACTERS and is_english(text):
            yield name, text[:MAX_CHARACTERS]


def _entries(path: Path) -> Iterator[tuple[str, str]]:
    """A dictionary's entries, some pages at a time."""
    text = gzip.decompress(path.read_bytes()).decode("utf-8", errors="ignore")
    for number, start in enumerate(range(0, len(text), _DICTIONARY_CHUNK)):
        yield f"{path.name}#{number}", text[start : start + _DICTIONARY_CHUNK]


def page_text(raw: bytes) -> str:
    """What a reader sees of a page, a line for each block."""
    try:
        page = lxml.html.document_fromstring(raw, parser=lxml.html.HTMLParser(encoding="utf-8"))
    except (lxml.etree.ParserError, ValueError):
        return ""
    for element in list(page.iter()):
        if _is_furniture(element):
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
