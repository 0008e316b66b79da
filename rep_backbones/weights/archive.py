"""The archive that `torch.save` writes, opened only if it is one: true sizes, and the same contents for every reader."""

from __future__ import annotations

import struct
import zipfile
from pathlib import Path

START = b"PK\x03\x04"  # by which PyTorch tells an archive from a bare pickle
DAMAGED = "copy or download it again, or save it anew"

# the end of a zip: the record of its table of contents in 64 bits, where that record is, and the same in 32 bits
_END64, _PLACE, _END = (struct.Struct(form) for form in ("<4sQHHIIQQQQ", "<4sIQI", "<4sHHHHIIH"))
_TAIL = struct.Struct(f"{_END64.size + _PLACE.size + _END.size}s")


class Unsound(ValueError):
    """An archive that is not read: why, and what to do."""

    def __init__(self, reason: str, remedy: str) -> None:
        super().__init__(f"{reason}; {remedy}")
        self.reason, self.remedy = reason, remedy


def opened(path: Path) -> tuple[zipfile.ZipFile, str]:
    """The archive, for the caller to close, and the folder in it in which everything lies.

    Its records are not compressed and no larger together than the file, so reading them takes no more memory than that.

    Raises:
        Unsound: for an archive that is damaged, that `torch.save` does not write, or that PyTorch would read differently.
        OSError: for a file that cannot be read.
    """
    try:
        archive = zipfile.ZipFile(path)
    except (zipfile.BadZipFile, NotImplementedError, ValueError, OverflowError, struct.error) as error:
        raise Unsound(f"its archive is truncated or damaged ({error})", DAMAGED) from None
    try:
        return archive, _root(archive, path)
    except BaseException:
        archive.close()
        raise


def _root(archive: zipfile.ZipFile, path: Path) -> str:
    infos = archive.infolist()
    names = [info.filename for info in infos]
    for name in names:
        if name.startswith("/") or "\\" in name or ".." in name.split("/"):
            raise Unsound(f"its archive holds the path {name!r}, which points outside", "do not use this file")
    if any(info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1 for info in infos):
        raise Unsound("its archive is compressed or encrypted, which torch.save never does", "save it with torch.save")
    if len(set(names)) != len(names) or sum(info.file_size for info in infos) > path.stat().st_size:
        raise Unsound("records of its archive overlap, or claim more bytes than the file has", "do not use this file")
    pickles = [name for name in names if name.count("/") == 1 and name.endswith("/data.pkl")]
    if any("/code/" in name.lower() or name.lower().endswith("/constants.pkl") for name in names):
        raise Unsound("it is a TorchScript archive (an export), not a checkpoint", "give the .pt file it was made from")
    if len(pickles) != 1:
        raise Unsound(
            "it is a zip archive, but not of torch.save (no data.pkl)", "give a file of torch.save, such as best.pt"
        )
    root = pickles[0].split("/")[0]
    _check_unambiguous(archive, path, root)
    return root


def _check_unambiguous(archive: zipfile.ZipFile, path: Path, root: str) -> None:
    """Whether PyTorch's own reader sees the same archive: it ignores case in names, and believes other offsets."""
    infos = archive.infolist()
    names = {info.filename.lower() for info in infos}
    plain_names = all(info.filename == info.orig_filename and info.filename.isascii() for info in infos)
    if len(names) != len(infos) or not plain_names or any(not info.filename.startswith(f"{root}/") for info in infos):
        raise Unsound("its archive has names that are read in two ways", "do not use this file")
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(len(START))
        file.seek(-min(size, _TAIL.size), 2)
        tail = file.read()
    if start != START or not _ends_where_it_says(tail, size, archive.start_dir, len(infos)):
        raise Unsound("its archive has a table of contents that is read in two ways", "do not use this file")


def _ends_where_it_says(tail: bytes, size: int, start: int, entries: int) -> bool:
    """Whether the table of contents at `start`, of so many `entries`, is the one that each record at the end names."""
    end = size - _END.size
    mark, _, _, _, count, length, offset, comment = _END.unpack(tail[-_END.size :])
    if mark != b"PK\x05\x06" or comment:
        return False
    place = tail[-_PLACE.size - _END.size : -_END.size]
    if place[:4] == b"PK\x06\x07":
        end -= _PLACE.size + _END64.size
        record = _END64.unpack(tail[: _END64.size])
        count, length, offset = record[7], record[8], record[9]
        if record[0] != b"PK\x06\x06" or _PLACE.unpack(place)[2] != end:
            return False
    return (offset, count) == (start, entries) and offset + length == end
