"""What tells one corpus from another: its sizes, dtype, index, and samples of its tokens from all over.

Owns what is hashed. Leaves to `train/` what is compared with what. Reads the files, never their mapping: a file that
was cut short gives another hash, not a dead process.
"""

import hashlib
from pathlib import Path
from typing import Any

from radlads.checksums import sha256
from radlads.data.binidx import BinIdxReader, corpus_files
from radlads.data.mask import has_mask, mask_file

_BLOCK_BYTES = 4096
_BLOCKS = 1024  # 4 MiB are read of a corpus of any size, and a smaller one as a whole


def describe_corpus(reader: BinIdxReader) -> dict[str, Any]:
    """A corpus's absolute name, and what tells it from others wherever it lies: all else in the dictionary.

    Two corpora that differ in a few tokens only may be described alike; the first and the last 4096 bytes always count.
    Raises OSError if a file has gone.
    """
    bin_path, idx_path = corpus_files(reader.path_stem)
    masked = {"mask": sha256(mask_file(reader.path_stem))[:16]} if has_mask(reader) else {}
    return {
        "name": str(reader.path_stem.absolute()),
        "tokens": reader.num_tokens,
        "dtype": str(reader.dtype),
        "index": sha256(idx_path)[:16],
        "samples": samples_digest(bin_path),
        **masked,
    }


def samples_digest(path: Path) -> str:
    """A hash of at most 1024 blocks of 4096 bytes, spread evenly over the file from its first byte to its last."""
    num_bytes = path.stat().st_size
    last_start = max(0, num_bytes - _BLOCK_BYTES)
    blocks = min(_BLOCKS, -(-num_bytes // _BLOCK_BYTES))
    digest = hashlib.sha256(str(num_bytes).encode())
    with path.open("rb", buffering=0) as file:
        for i in range(blocks):
            file.seek(last_start * i // max(1, blocks - 1))
            digest.update(file.read(_BLOCK_BYTES))
    return digest.hexdigest()[:16]
