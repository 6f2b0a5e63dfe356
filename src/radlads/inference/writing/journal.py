"""The folder in which replies are kept while they are written, token by token, so that a killed run goes on.

`NAME.partial` holds what was asked for (request.json) and every token as it came (tokens.bin: pairs of int32, the
reply's number and a token, or -1 where the reply ended by itself). A pair that a kill has cut in two is dropped.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from radlads.checkpoint.atomic import locked, partial_name
from radlads.checkpoint.own_files import MARK, check_marked, check_names, mark, refuse_links, remove_folder
from radlads.config.compare import differences
from radlads.files import naming, read_json, write_text
from radlads.inference.writing.replies import Reply

REQUEST, TOKENS = "request.json", "tokens.bin"
_ENDED = -1
_PAIR = np.dtype("<i4")


class Journal:
    """The tokens of replies, appended as they come. num_tokens: how many there are."""

    def __init__(self, file: BinaryIO, num_tokens: int):
        self._file, self.num_tokens = file, num_tokens

    def add(self, step: Sequence[tuple[Reply, int | None]]) -> None:
        """Append what a step has added to replies."""
        pairs = [(reply.number, _ENDED if token is None else token) for reply, token in step]
        self._file.write(np.array(pairs, dtype=_PAIR).tobytes())
        self._file.flush()
        self.num_tokens += sum(token is not None for _, token in step)


@contextmanager
def open_journal(stem: Path, request: Mapping[str, Any], replies: Sequence[Reply]) -> Iterator[Journal]:
    """The journal of the corpus that `stem` will be, begun, or gone on with: the replies then have their tokens.

    It is removed once the block ends without an exception. Raises ValueError if another process is writing it, if it is
    of another request, saying what differs, or if something of somebody else's is in its place.
    """
    folder = partial_name(stem)
    refuse_links(folder)
    folder.mkdir(parents=True, exist_ok=True)
    check_marked(folder)
    with locked(folder, f"{folder} is being written by another process: wait for it, or choose another --out"):
        check_names(folder, (REQUEST, TOKENS))
        if not (folder / MARK).is_file():
            mark(folder)
        _claim(folder, dict(request))
        path = folder / TOKENS
        path.touch()
        num_tokens = _take_up(path, replies)
        with naming(path), path.open("ab") as file:
            yield Journal(file, num_tokens)
        remove_folder(folder, (REQUEST, TOKENS))


def _claim(folder: Path, request: dict[str, Any]) -> None:
    path = folder / REQUEST
    if not path.is_file():
        write_text(path, json.dumps(request, indent=2) + "\n")
    elif different := differences(read_json(path), request):
        raise ValueError(
            f"{folder} holds replies to another request ({'; '.join(different)}): set back what differs, remove it, or "
            "choose another --out"
        )


def _take_up(path: Path, replies: Sequence[Reply]) -> int:
    """Give the replies the tokens in a journal, and return how many there are."""
    whole = path.stat().st_size // (2 * _PAIR.itemsize) * 2
    os.truncate(path, whole * _PAIR.itemsize)
    pairs = np.fromfile(path, _PAIR).reshape(-1, 2)
    if len(pairs) and not 0 <= pairs[:, 0].min() <= pairs[:, 0].max() < len(replies):
        raise ValueError(f"{path} is damaged: it has tokens of replies that were never asked for; remove its folder")
    for number, token in pairs.tolist():
        if token == _ENDED:
            replies[number].has_ended = True
        else:
            replies[number].tokens.append(token)
    return int((pairs[:, 1] != _ENDED).sum())
