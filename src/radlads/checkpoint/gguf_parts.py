"""GGUF files as they lie on disk: one file, or one split into parts, opened and found whole."""

import importlib.util
import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gguf import GGUFReader

SUFFIX = ".gguf"
_PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")
# What the reader of the gguf package raises when bytes are missing or wrong
_DAMAGE = (ValueError, IndexError, KeyError, OverflowError, TypeError, MemoryError)


def check_gguf_package() -> None:
    """Raise ValueError if the gguf package is missing."""
    if importlib.util.find_spec("gguf") is None:
        raise ValueError("reading a GGUF file needs the gguf package: pip install 'radlads[gguf]'")


def is_later_part(file: Path) -> bool:
    """Whether a name is that of a part after the first one."""
    match = _PART.fullmatch(file.name)
    return match is not None and int(match[2]) > 1


def file_and_parts(file: Path) -> tuple[str, list[Path]]:
    """A file's name without what numbers its parts, and all of its parts. Raises ValueError if one is missing."""
    match = _PART.fullmatch(file.name)
    if match is None:
        if not file.is_file():
            raise ValueError(f"{file} does not exist: name a GGUF file, or a folder that holds one")
        return file.stem, [file]
    parts = [file.with_name(f"{match[1]}-{number:05}-of-{match[3]}.gguf") for number in range(1, int(match[3]) + 1)]
    if missing := [part.name for part in parts if not part.is_file()]:
        raise ValueError(f"{file.parent} lacks {missing[0]}: put all {len(parts)} parts of the model into one folder")
    return match[1], parts


def open_parts(parts: list[Path]) -> "list[GGUFReader]":
    """A reader for each part. Raises ValueError for one that is truncated or no GGUF file."""
    return [_opened(part) for part in parts]


def _opened(file: Path) -> "GGUFReader":
    from gguf import GGUFReader

    with file.open("rb") as start:
        if start.read(4) != b"GGUF":
            raise ValueError(f"{file} is not a GGUF file")
    try:
        reader = GGUFReader(file)
        declared = reader.fields["GGUF.tensor_count"].contents()
    except _DAMAGE as error:
        raise ValueError(f"{file} is truncated or damaged ({error}): copy it anew") from error
    if len(reader.tensors) != declared or any(tensor.data.nbytes != tensor.n_bytes for tensor in reader.tensors):
        raise ValueError(f"{file} is truncated: copy it anew")
    return reader


def joined(readers: "list[GGUFReader]", target: Path) -> Path:
    """Write the parts of a split file as one: transformers reads single files only."""
    from gguf import GGUFValueType, GGUFWriter, Keys

    fields = readers[0].fields
    writer = GGUFWriter(target, arch=fields["general.architecture"].contents())
    for field in fields.values():
        # The joined file has the writer's own architecture and alignment
        own = field.name in (Keys.General.ARCHITECTURE, Keys.General.ALIGNMENT)
        if not own and not field.name.startswith(("GGUF.", "split.")):
            is_array = field.types[0] == GGUFValueType.ARRAY
            sub_type = field.types[-1] if is_array else None
            writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=sub_type)
    tensors = [tensor for reader in readers for tensor in reader.tensors]
    for tensor in tensors:
        writer.add_tensor_info(
            tensor.name, tensor.data.shape, tensor.data.dtype, tensor.data.nbytes, tensor.tensor_type
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in tensors:
        writer.write_tensor_data(tensor.data)
    writer.close()
    return target
