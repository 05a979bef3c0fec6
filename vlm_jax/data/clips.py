# SPDX-License-Identifier: Apache-2.0
"""Clips: frames at even places of a folder of pictures or of a video file, which PyAV decodes.

T frames that are taken of a clip   n frames that it has
"""

import os
import re
import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from vlm_jax.data.example import BadExample, Source
from vlm_jax.data.paths import SUFFIXES
from vlm_jax.data.pictures import Unusable, one_line, open_regular

VIDEO_MARK = "<video>"  # beside <image>, where a row places its clip
NEEDED = (
    "a clip in a video file needs PyAV: pip install 'vlm_jax[video]', or make a folder of its "
    "frames as pictures"
)
WHOLE = 0.9  # of the duration in its head that a file's streams must reach
KEPT = 4  # decoded clips that a reader keeps, so that a row's frames are decoded together
# Quarter turns against the clock -> how PIL makes them.
TURNS = {
    1: Image.Transpose.ROTATE_90,
    2: Image.Transpose.ROTATE_180,
    3: Image.Transpose.ROTATE_270,
}


class Frame(NamedTuple):
    """Frame `number` of the `of` ones that are taken of a video file; `name` is what the data set
    calls the file."""

    path: str
    number: int
    of: int
    name: str

    def __str__(self) -> str:
        return f"{self.name} (frame {self.number + 1} of {self.of})"


class Clip(NamedTuple):
    """T decoded frames in RGB, and n, how many the file has."""

    pictures: list[Image.Image]
    frames: int


def sampled(n: int, T: int) -> list[int]:
    """Which T of n frames are taken: from the first to the last in even steps, rounded down.

    As LLaVA-NeXT trains with `frames_upbound` (llava/utils.py: numpy.linspace of whole numbers). A
    clip with fewer than T frames shows some of them more than once; T = 1 is the first frame.
    """
    return np.linspace(0, n - 1, T, dtype=int).tolist()


def room(data: Any) -> int:
    """M, the images of a row: data.images_per_row images or clips, each of data.frames images."""
    return data.images_per_row * max(data.frames, 1)


def check_all(source: Source, T: int) -> None:
    """Raises ValueError unless every example of a source is one clip of T frames."""
    others = [k for k in range(len(source)) if len(source[k].images) != T]
    if others:
        raise ValueError(
            f"data.frames={T}: {len(others)} of {len(source)} examples of the {source.split} split "
            f"are no clip of so many frames, the first {source[others[0]].id!r:.80}: V, FLOPs and "
            "the law of a grid's cell are of one kind of request; leave other rows out (of the "
            "embedded benchmark set data.video_share=1.0)"
        )


def frame_files(folder: str) -> list[str]:
    """The paths of a folder's pictures, sorted by name, numbers in the names by their value.

    Other files are left out. Raises Unusable for a folder that holds no picture or cannot be read.
    """
    try:
        names = [name for name in os.listdir(folder) if name.lower().endswith(SUFFIXES)]
    except OSError as error:
        raise Unusable(f"cannot be read: {one_line(error)}") from None
    if not names:
        raise Unusable(f"is a folder without a frame ({', '.join(SUFFIXES)})")
    return [os.path.join(folder, name) for name in sorted(names, key=_by_number)]


def _by_number(name: str) -> tuple[list[Any], str]:
    """A key by which frame2 comes before frame10."""
    parts = re.split(r"(\d+)", name)
    return [int(part) if k % 2 else part for k, part in enumerate(parts)], name


def library() -> Any:
    """The module `av`. Raises ValueError, with the way to install it, if it is missing."""
    try:
        import av
    except ImportError as error:
        raise ValueError(f"{NEEDED} ({error})") from None
    return av


def decoded(path: str, T: int, *, exif: str = "ignore") -> Clip:
    """T frames of a video file; `exif` "apply" turns them as the file's display matrix says.

    Raises Unusable for a file that is no video, or is damaged or cut short anywhere.
    """
    av = library()
    open_regular(path).close()
    try:
        n = _counted(av, path)
        for _ in range(2):  # a file may hold packets that are never shown: then n is corrected once
            clip = _taken(av, path, n, T, exif)
            if clip.frames == n:
                return clip
            n = clip.frames
    except av.error.FFmpegError as error:
        raise Unusable(f"cannot be decoded: {one_line(error)}") from None
    raise Unusable("cannot be decoded: it has another number of frames each time")


def stream_of(container: Any) -> Any:
    """The video of an opened file. Raises Unusable for a file without one."""
    if not container.streams.video:
        raise Unusable("holds no video")
    stream = container.streams.video[0]
    stream.thread_type = "AUTO"
    return stream


def _counted(av: Any, path: str) -> int:
    """The frames that a file's packets promise, without decoding; Unusable if some are missing."""
    with av.open(path) as container:
        stream = stream_of(container)
        packets, shown, end = 0, 0, 0.0
        for packet in container.demux():
            if not packet.size:
                continue
            if packet.pts is not None:
                last = packet.pts + (packet.duration or 0)
                end = max(end, float(last * packet.time_base))
            if packet.stream.index != stream.index:
                continue
            if packet.is_corrupt:
                raise Unusable(f"is cut short or damaged at frame {packets + 1}")
            packets += 1
            shown += not packet.is_discard
        if packets < stream.frames:
            raise Unusable(f"is cut short: {packets} of its {stream.frames} frames are there")
        # Matroska has no number of frames, and a duration in its head.
        known = "matroska" in container.format.name and container.duration
        long = known / av.time_base if known else 0.0
        if end < WHOLE * long:
            raise Unusable(f"is cut short: {end:.1f} of its {long:.1f} seconds are there")
    if not shown:
        raise Unusable("is a video without a frame")
    return shown


def _taken(av: Any, path: str, n: int, T: int, exif: str) -> Clip:
    """The frames at the places of n, and how many there were."""
    places = sampled(n, T)
    wanted, found, count = set(places), {}, 0
    with av.open(path) as container:
        for frame in container.decode(stream_of(container)):
            if count in wanted:
                picture = frame.to_image()
                turns = round(frame.rotation / 90) % 4 if exif == "apply" else 0
                found[count] = picture.transpose(TURNS[turns]) if turns else picture
            count += 1
    if not count:
        raise Unusable("is a video without a frame that can be decoded")
    return Clip([found[place] for place in places] if count == n else [], count)


def pictures(
    path: str, T: int, *, way_out: str = "give another clip", exif: str = "ignore"
) -> list[Image.Image | str]:
    """T frames of a clip: paths of pictures for a folder, pictures for a video file.

    Raises BadExample for a clip that cannot be used, FileNotFoundError for none.
    """
    if not os.path.lexists(path):
        raise FileNotFoundError(f"there is no clip {path}")
    try:
        if os.path.isdir(path):
            files = frame_files(path)
            return [files[k] for k in sampled(len(files), T)]
        return list(decoded(path, T, exif=exif).pictures)
    except Unusable as error:
        raise BadExample(f"clip {path} {error}; {way_out}") from None


class Reader:
    """Reads frames of video files; the last few clips stay decoded, for their other frames.

    Each process that it is sent to begins with none.
    """

    def __init__(self, exif: str):
        self.exif = exif
        self._clips: dict[tuple[str, int], Clip] = {}
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {"exif": self.exif}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)

    def clip(self, path: str, T: int) -> Clip:
        """T frames of a video file. Raises as `decoded`."""
        key = path, T
        with self._lock:
            known = self._clips.get(key)
        if known is None:
            known = decoded(path, T, exif=self.exif)
            with self._lock:
                self._clips[key] = known
                while len(self._clips) > KEPT:
                    del self._clips[next(iter(self._clips))]
        return known

    def picture(self, frame: Frame, owner: str, way_out: str) -> Image.Image:
        """One frame. Raises BadExample, with the row that `owner` describes, if any."""
        try:
            return self.clip(frame.path, frame.of).pictures[frame.number]
        except Unusable as error:
            reason = str(error)
        raise BadExample(f"{owner}{': ' * bool(owner)}clip {frame.name} {reason}; {way_out}")


def places(path: str, T: int, name: str) -> tuple[Sequence[str | Frame], int | None]:
    """Where the T frames of a clip lie, and n if it is known without decoding.

    Raises Unusable for a folder without a picture.
    """
    if os.path.isdir(path):
        files = frame_files(path)
        return [files[k] for k in sampled(len(files), T)], len(files)
    return [Frame(path, k, T, name) for k in range(T)], None
