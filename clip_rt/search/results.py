"""What a search finds."""

from __future__ import annotations

import datetime
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Hit:
    """An image that was found."""

    path: str
    """Of the file, absolute, or `shard.tar/member`; the first by name where there are copies."""
    score: float
    """Cosine of its embedding with that of the query."""
    sha256: str
    """Of the content, hex."""
    size_bytes: int
    mtime_ns: int
    """When the file was last changed, since 1970, UTC."""
    width_px: int
    height_px: int
    """As the file has them, before its EXIF orientation is applied."""
    copies: tuple[str, ...] = ()
    """Other files of the same content."""

    @property
    def modified(self) -> str:
        """When the file was last changed, as ISO 8601 in UTC, to the second."""
        seconds = datetime.datetime.fromtimestamp(self.mtime_ns // 10**9, datetime.timezone.utc)
        return seconds.isoformat().replace("+00:00", "Z")
