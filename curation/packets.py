"""One hash for what a video stream shows, whatever file it comes in."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator

from av.packet import Packet
from av.video.stream import VideoStream


class PacketHash:
    """SHA-256 of what a video stream shows, whatever container it lies in.

    Feed it the stream's packets in file order. H.264 and HEVC packets carry lengths in some
    containers (mp4, Matroska) and start codes in others (MPEG-TS, AVI), and parameter sets and
    delimiters come and go with them: of these codecs only the coded pictures count, one by one. Of
    others the packets' bytes do.
    """

    def __init__(self, stream: VideoStream) -> None:
        self._digest = hashlib.sha256()
        context = stream.codec_context
        self._codec = context.codec.canonical_name
        header = context.extradata or b""
        self._length_bytes = 0
        # The first byte of a configuration record (ISO/IEC 14496-15) is its version, 1; start codes
        # begin with 0.
        if header[:1] == b"\x01":
            if self._codec == "h264" and len(header) > 4:
                self._length_bytes = (header[4] & 3) + 1
            elif self._codec == "hevc" and len(header) > 21:
                self._length_bytes = (header[21] & 3) + 1

    def add(self, packet: Packet[VideoStream]) -> None:
        """Take the next packet."""
        data = bytes(packet)
        if self._codec not in ("h264", "hevc"):
            self._add(data)
            return
        for unit in self._units(data):
            if unit and self._is_picture(unit[0]):
                self._add(unit)

    def hexdigest(self) -> str:
        """64 hex digits."""
        return self._digest.hexdigest()

    def _add(self, data: bytes) -> None:
        self._digest.update(len(data).to_bytes(8, "big"))
        self._digest.update(data)

    def _is_picture(self, first_byte: int) -> bool:
        """Whether a NAL unit holds a part of a picture (tables 7-1 of H.264 and of HEVC)."""
        if self._codec == "h264":
            return 1 <= first_byte & 0x1F <= 5
        return (first_byte >> 1) & 0x3F < 32

    def _units(self, data: bytes) -> Iterator[bytes]:
        """NAL units; zeros at their ends belong to the container."""
        if not self._length_bytes:
            for unit in re.split(b"\x00\x00\x01", data):
                yield unit.rstrip(b"\x00")
            return
        at = 0
        while at < len(data):
            begin = at + self._length_bytes
            at = begin + int.from_bytes(data[at:begin], "big")
            yield data[begin:at].rstrip(b"\x00")
