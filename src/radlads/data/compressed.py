"""Bytes out of compressed files, by suffix; a file that is cut short or damaged raises one of DAMAGE."""

import bz2
import gzip
import io
import lzma
import zipfile
import zlib
from typing import Any, BinaryIO

SUFFIXES = (".gz", ".zst", ".zstd", ".xz", ".bz2")
DAMAGE = (EOFError, OSError, zlib.error, lzma.LZMAError, zipfile.BadZipFile)

_COMPRESSED_BYTES = 2**12  # at a time: all that they decompress to is in memory, at most some 10,000 times as much


def decompressed(file: BinaryIO, suffix: str) -> io.BufferedReader:
    """The bytes that a file holds: decompressed if `suffix` is one of SUFFIXES, else the file itself.

    Several frames or members, one after the other, are one file, as they are to the formats' own tools. Raises
    ValueError if the library for zstd is missing.
    """
    return io.BufferedReader(_opened(file, suffix), 2**16)


def _opened(file: BinaryIO, suffix: str) -> Any:
    if suffix == ".gz":
        return gzip.GzipFile(fileobj=file)
    if suffix in (".zst", ".zstd"):
        return _ZstdFrames(file)
    if suffix == ".xz":
        return lzma.LZMAFile(file)
    return bz2.BZ2File(file) if suffix == ".bz2" else file


class _ZstdFrames(io.RawIOBase):
    """All frames of a zstd file. (The library's own reader ends in silence where a file is cut short.)"""

    def __init__(self, file: BinaryIO) -> None:
        try:
            import zstandard
        except ImportError as error:
            raise ValueError("reading .zst files needs the zstandard library: pip install 'radlads[data]'") from error
        self._file, self._error = file, zstandard.ZstdError
        self._decompressor = zstandard.ZstdDecompressor()
        self._frame: Any = None  # the one that is being read
        self._compressed = b""  # what was read beyond it
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, target: Any) -> int:
        while not self._ready:
            if not self._read_on():
                return 0
        size = min(len(target), len(self._ready))
        target[:size], self._ready = self._ready[:size], self._ready[size:]
        return size

    def _read_on(self) -> bool:
        compressed = self._compressed or self._file.read(_COMPRESSED_BYTES)
        if not compressed:
            if self._frame is not None:
                raise EOFError("Compressed file ended before the end of its last frame")
            return False
        try:
            self._frame = self._frame or self._decompressor.decompressobj()
            self._ready, self._compressed = memoryview(self._frame.decompress(compressed)), b""
        except self._error as error:
            raise OSError(str(error)) from error
        if self._frame.eof:
            self._compressed, self._frame = self._frame.unused_data, None
        return True
