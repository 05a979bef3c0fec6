# SPDX-License-Identifier: Apache-2.0
"""What an operator allows: sizes, times, hosts of images, keys."""

import hashlib
import hmac
from dataclasses import asdict, dataclass
from pathlib import Path

MB = 2**20


@dataclass(frozen=True)
class Limits:
    """The largest request, and the longest wait.

    Attributes:
      body_bytes: of a request, images in base64 included.
      bodies_bytes: of all requests that are read, wait and are answered.
      values: of the JSON of one request, by its commas and opening brackets: parsed ones take time
        in which nobody is answered, and many times the memory of the body.
      images: of a conversation.
      pixels: of one image, before it is resized: a file of a few kB may hold billions.
      deadline_seconds: from the arrival of a request to the end of its answer.
      body_seconds: in which a request has to arrive.
      requests: that are read, wait and are answered at once; the next one gets status 429.
      send_seconds: that a client may take for one piece of an answer.
    """

    body_bytes: int = 32 * MB
    bodies_bytes: int = 512 * MB
    values: int = 500_000
    images: int = 16
    pixels: int = 40_000_000
    deadline_seconds: float = 300.0
    body_seconds: float = 30.0
    requests: int = 64
    send_seconds: float = 30.0

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not 0 < value < float("inf"):
                raise ValueError(f"the limit {name}={value:g}: more than 0, and finite")


@dataclass(frozen=True)
class Keys:
    """The keys of clients, as hashes; without any, everybody is answered."""

    hashes: tuple[bytes, ...] = ()

    @classmethod
    def of_file(cls, path: str | Path) -> "Keys":
        """One key a line. Raises ValueError for a file without any, or with a short key."""
        try:
            # Editors of Windows begin a file with a mark, which would be part of the first key.
            lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
        except UnicodeDecodeError:
            lines = []
        keys = [line.strip() for line in lines]
        keys = [key for key in keys if key and not key.startswith("#")]
        if not keys or min(map(len, keys)) < 16:
            raise ValueError(
                f"--api-key-file={path}: one key a line of UTF-8, each of at least 16 characters"
            )
        return cls(tuple(hashlib.sha256(key.encode()).digest() for key in keys))

    def allow(self, header: str) -> bool:
        """Whether a header Authorization holds one of the keys; all are compared, in equal time."""
        if not self.hashes:
            return True
        scheme, _, key = header.partition(" ")
        # The bytes that came, which are UTF-8 as those of the file.
        given = hashlib.sha256(key.strip(" \t").encode("latin-1")).digest()
        same = [hmac.compare_digest(given, known) for known in self.hashes]
        return scheme.lower() == "bearer" and any(same)
