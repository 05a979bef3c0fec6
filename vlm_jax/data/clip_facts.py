# SPDX-License-Identifier: Apache-2.0
"""What the frame of a video file is, for `vlm-jax data check`: that of a folder is an image file.

It finds the same clips unreadable as `clips.decoded`; the first frame of a clip speaks for it.
"""

import hashlib
import os
from functools import lru_cache
from typing import NamedTuple

from vlm_jax.data import clips
from vlm_jax.data.image_facts import ImageFacts
from vlm_jax.data.pictures import Place, Unusable, one_line, read_bytes


class Film(NamedTuple):
    """A video file: its coding, the pixels of a frame, frames (0: not counted), bytes and sha256.

    `problem` is why it cannot be used: the end of a sentence that begins with its name.
    """

    codec: str = ""
    width: int = 0
    height: int = 0
    frames: int = 0
    size: int = 0
    sha256: str = ""
    problem: str = ""


@lru_cache(maxsize=4)  # the frames of a clip come one after another
def film(path: str, T: int, *, whole: bool) -> Film:
    """What the file at a path is; `whole` decodes all of it, otherwise its head is read."""
    av, size, digest = clips.library(), 0, ""
    try:
        size = os.path.getsize(path)
        if whole:
            digest = hashlib.sha256(read_bytes(Place(path))).hexdigest()
        with av.open(path) as container:
            stream = clips.stream_of(container)
            about = stream.codec_context.name, stream.width, stream.height
        frames = clips.decoded(path, T).frames if whole else 0
    except Unusable as error:
        return Film(size=size, sha256=digest, problem=str(error))
    except Exception as error:  # of the library
        problem = f"cannot be decoded: {one_line(error)}"
        return Film(size=size, sha256=digest, problem=problem)
    return Film(*about, frames, size, digest)


def clip_facts(frame: clips.Frame, *, whole: bool = True) -> ImageFacts:
    """What the clip of a frame is, told at its first frame; bytes count there alone."""
    found = film(frame.path, frame.of, whole=whole)
    kinds = []
    if frame.number == 0:
        kinds += ["corrupt_clip"] * bool(found.problem)
        kinds += ["short_clip"] * (0 < found.frames < frame.of)
    # No two frames have the same bytes, and a clip is known by all of them.
    own = f"{found.sha256} {frame.number}/{frame.of}".encode()
    return ImageFacts(
        found.codec,
        "RGB" if found.codec else "",
        found.width,
        found.height,
        0 if frame.number else found.size,
        hashlib.sha256(own).hexdigest() if found.sha256 else "",
        tuple(kinds),
        found.problem,
    )
