"""How diskcache keeps a block: a row that names a file, and the file that holds the bytes."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import stat
from collections.abc import Callable
from dataclasses import dataclass

from diskcache import UNKNOWN, Disk
from diskcache.core import MODE_BINARY

from kvtier.codec import StoredFile
from kvtier.errors import CorruptBlock, TierUnavailable
from kvtier.hashing import HASH_BYTES

KEY_BYTES = 2 * HASH_BYTES
"""A key is the namespace's id followed by the block's hash."""

FILE_NAME = re.compile(r"[0-9a-f]/([0-9a-f]{32})-([0-9a-f]{12})\.val", re.ASCII)
"""Names that may stand in a row, relative to the shard: the first digit of a block's hash, then the hash
and a random part. Nothing else is ever opened or removed, whatever the database says."""

_FILE_SYSTEM_BLOCK = 4096
_RANDOM_BITS = 48
_MAX_LENGTH = 1 << 32
_PASSING = {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EINTR}
_WRITE_FLAGS = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
# O_NONBLOCK: a FIFO that somebody put in a file's place must not stall the reader.
_READ_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


@dataclass(frozen=True, slots=True)
class BlockFile:
    """What diskcache takes for a value: the file of one block.

    Attributes:
        name: Relative to the shard.
        length: Bytes of the payload.
    """

    name: str
    length: int

    @property
    def tag(self) -> int:
        """What, with the block's hash, says which file it is: length and the name's random part; else 0."""
        name = FILE_NAME.fullmatch(self.name)
        if name is None or not 0 < self.length <= _MAX_LENGTH:
            return 0
        return self.length << _RANDOM_BITS | int(name[2], 16)

    @classmethod
    def of(cls, block_hash: bytes, tag: int) -> BlockFile:
        """Return the file of a block by its tag."""
        digits = block_hash.hex()
        random = tag & (1 << _RANDOM_BITS) - 1
        return cls(f"{digits[0]}/{digits}-{random:0{_RANDOM_BITS // 4}x}.val", tag >> _RANDOM_BITS)


class BlockFiles(Disk):  # type: ignore[misc]
    """A diskcache `Disk` of raw keys and values that are files; nothing is ever pickled or unpickled.

    A file is complete before its row is committed, and a row is gone before its file is removed, so a crash
    leaves whole blocks, and files without a row. Files are written and read apart from the rows, so that the
    database is in use for microseconds only.

    Attributes:
        on_remove: Called with the hash of every block whose file was removed, that is, evicted, deleted or
            replaced.
    """

    def __init__(
        self, directory: str, min_file_size: int = 0, pickle_protocol: int = 0, max_payload_bytes: int = 0
    ) -> None:
        """Take diskcache's settings `disk_*`; `min_file_size` and `pickle_protocol` mean nothing here."""
        super().__init__(directory)
        self.max_payload_bytes = max_payload_bytes
        self.on_remove: Callable[[bytes], object] = lambda block_hash: None

    def put(self, key: bytes) -> tuple[bytes, bool]:
        """Return the key as it stands in the database, and that it is raw."""
        if type(key) is not bytes:
            raise TypeError(f"keys are bytes, not {type(key).__name__}")
        return key, True

    def get(self, key: object, raw: bool) -> bytes:
        """Return a key from the database.

        Raises:
            CorruptBlock: It is not one that `put` made.
        """
        if not raw or not isinstance(key, bytes):
            raise CorruptBlock("a key in the disk tier's database is not raw bytes")
        return key

    def store(self, value: BlockFile, read: bool, key: bytes = UNKNOWN) -> tuple[int, int, str, int]:
        """Return a row's columns: size on the file system in bytes, mode, file name, exact length."""
        size = -(-value.length // _FILE_SYSTEM_BLOCK) * _FILE_SYSTEM_BLOCK
        return size, MODE_BINARY, value.name, value.length

    def fetch(self, mode: object, filename: object, value: object, read: bool) -> BlockFile:
        """Return the file that a row names.

        Raises:
            CorruptBlock: The row is not one that `store` made.
        """
        if (
            mode != MODE_BINARY
            or not isinstance(filename, str)
            or not FILE_NAME.fullmatch(filename)
            or type(value) is not int
            or not 0 <= value <= self.max_payload_bytes
        ):
            raise CorruptBlock("a row in the disk tier's database does not describe a block")
        return BlockFile(filename, value)

    def name(self, block_hash: bytes) -> str:
        """Return a new name for a block's file."""
        digits = block_hash.hex()
        return f"{digits[0]}/{digits}-{os.urandom(6).hex()}.val"

    def write(self, name: str, payload: memoryview) -> BlockFile:
        """Write a new file.

        Raises:
            OSError: It could not be written; what there is of it is for the caller to remove.
        """
        path = os.path.join(self._directory, name)
        try:
            descriptor = os.open(path, _WRITE_FLAGS, 0o600)
        except FileNotFoundError:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            descriptor = os.open(path, _WRITE_FLAGS, 0o600)
        try:
            rest = payload
            while rest:
                rest = rest[os.write(descriptor, rest) :]
        finally:
            os.close(descriptor)
        return BlockFile(name, payload.nbytes)

    def open(self, file: BlockFile) -> StoredFile:
        """Open a file for reading; whoever calls closes it.

        Raises:
            FileNotFoundError: It is gone: evicted a moment ago.
            CorruptBlock: It has another length than its row says, is no file, or cannot be opened.
            TierUnavailable: The process has no descriptor or memory left to open it.
        """
        try:
            descriptor = os.open(os.path.join(self._directory, file.name), _READ_FLAGS)
        except FileNotFoundError:
            raise
        except OSError as error:
            kind = TierUnavailable if error.errno in _PASSING else CorruptBlock
            raise kind(f"a block's file cannot be opened: {error}") from error
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode) or found.st_size != file.length:
            os.close(descriptor)
            raise CorruptBlock(f"a block's file has {found.st_size} bytes, its row says {file.length}")
        return StoredFile(descriptor, file.length)

    def remove(self, file_path: object) -> None:
        """Remove a block's file, if it is there and its name is one that `store` made."""
        name = FILE_NAME.fullmatch(file_path) if isinstance(file_path, str) else None
        if name is None:
            return
        # What cannot be removed now is an orphan, which the next sweep finds.
        with contextlib.suppress(OSError):
            os.unlink(os.path.join(self._directory, name[0]))
        self.on_remove(bytes.fromhex(name[1]))
