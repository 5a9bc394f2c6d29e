"""Files laid out as `torch.save` does it, without torch: stored zip entries that begin at multiples of 64.

For the benchmark only, when torch cannot be had: tensors lie where torch puts them and under the names that
it gives them, but what describes them is not what torch writes, and torch cannot load it.
"""

import json
import struct
import zipfile
from pathlib import Path

import numpy as np

_ALIGNMENT = 64
_LOCAL_HEADER_BYTES = 30
#: Header of an extra field: its id, and how many bytes follow.
_EXTRA = struct.Struct("<HH")
_PADDING_ID = 0x4246  # "FB", as in torch


def save(state: dict[str, np.ndarray], path: Path) -> None:
    """Write the tensors; the name of the file is part of the name of every entry."""
    described = {
        name: [f"data/{number}", str(array.dtype), array.shape]
        for number, (name, array) in enumerate(state.items())
    }
    with path.open("wb") as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        _add(archive, f"{path.stem}/data.pkl", json.dumps(described).encode())
        _add(archive, f"{path.stem}/byteorder", b"little")
        for number, array in enumerate(state.values()):
            _add(archive, f"{path.stem}/data/{number}", np.ascontiguousarray(array).tobytes())
        _add(archive, f"{path.stem}/version", b"3\n")


def _add(archive: zipfile.ZipFile, name: str, content: bytes) -> None:
    entry = zipfile.ZipInfo(name)
    begin = archive.fp.tell() + _LOCAL_HEADER_BYTES + len(name) + _EXTRA.size
    padding = -begin % _ALIGNMENT
    entry.extra = _EXTRA.pack(_PADDING_ID, padding) + b"Z" * padding
    archive.writestr(entry, content)
