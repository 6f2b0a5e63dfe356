"""Which tokens of a corpus its assistant wrote: NAME.mask beside NAME.bin and NAME.idx, a byte for each token, 0 or 1.

Owns the file format, and whether a mask belongs to the corpus beside it. Leaves writing both at once to `binidx.py`.
"""

import hashlib
import struct
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from radlads.data.binidx import BinIdxReader

_MAGIC = b"RADMASK\0"
_VERSION = 1
# magic, version, number of tokens, SHA-256 of the corpus's .idx
_HEADER = struct.Struct("<8sQQ32s")
_AGAIN = "copy or build the corpus again, all three files"


def mask_file(path_stem: Path) -> Path:
    """Where the mask of a corpus is, by the name that its .bin and .idx share."""
    return path_stem.with_name(f"{path_stem.name}.mask")


def mask_header(num_tokens: int, index: bytes) -> bytes:
    """What a mask begins with. index: what the corpus's .idx holds."""
    return _HEADER.pack(_MAGIC, _VERSION, num_tokens, hashlib.sha256(index).digest())


def has_mask(reader: "BinIdxReader") -> bool:
    """Whether a corpus says which tokens its assistant wrote."""
    return mask_file(reader.path_stem).is_file()


def read_mask(reader: "BinIdxReader") -> NDArray[np.bool_]:
    """True for each token of the corpus that its assistant wrote, [num_tokens], in memory.

    Raises ValueError, naming the file and the remedy, if there is no mask, or one of another corpus, or a damaged one.
    """
    path = mask_file(reader.path_stem)
    if not path.is_file():
        raise ValueError(
            f"{path} is missing, which says what the assistant wrote: build the corpus with `radlads data build "
            "--chat`, or have a teacher write it with `radlads data write`"
        )
    content = path.read_bytes()
    if len(content) < _HEADER.size or not content.startswith(_MAGIC):
        raise ValueError(f"{path} is no mask of a corpus: {_AGAIN}")
    _, version, num_tokens, digest = _HEADER.unpack_from(content)
    if version != _VERSION:
        raise ValueError(f"{path} has version {version}, and only version {_VERSION} is known: {_AGAIN}")
    if num_tokens != reader.num_tokens or digest != _index_digest(reader.path_stem):
        raise ValueError(
            f"{path} is the mask of another corpus ({num_tokens:,} tokens) than the {reader.num_tokens:,} tokens "
            f"beside it: {_AGAIN}"
        )
    mask = np.frombuffer(content, np.uint8, offset=_HEADER.size)
    if len(mask) != num_tokens or (mask.size and mask.max() > 1):
        raise ValueError(f"{path} is damaged or cut short: {_AGAIN}")
    return mask.astype(bool)


def _index_digest(path_stem: Path) -> bytes:
    return hashlib.sha256(path_stem.with_name(f"{path_stem.name}.idx").read_bytes()).digest()
