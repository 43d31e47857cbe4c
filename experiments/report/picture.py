"""A picture of an HTML page, by a Chromium that is installed on this machine."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from merging.errors import InputError

NAMES = ("chromium", "chromium-browser", "google-chrome")
SIZE = (1100, 1500)  # pixels: the methods, the experts and the pairs of a plan's page
SECONDS = 120


def browser() -> str:
    """The program, or an InputError where there is none."""
    found = next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        raise InputError(
            f"a picture is taken by one of {', '.join(NAMES)}, and none is installed",
            hint="leave picture out; the page itself needs any browser",
        )
    return found


def take(html: Path, picture: Path) -> None:
    """Write the top of a page as a PNG file, in light colours; nothing is fetched."""
    options = ["--headless", "--disable-gpu", "--hide-scrollbars", "--host-resolver-rules=MAP * ~."]
    options += ["--no-sandbox"] * (os.geteuid() == 0)  # which Chromium asks of root
    picture.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=picture.parent) as folder:
        partial = Path(folder) / "page.png"
        line = [browser(), *options, f"--user-data-dir={folder}/profile"]
        line += [f"--window-size={SIZE[0]},{SIZE[1]}", f"--screenshot={partial}"]
        try:
            done = subprocess.run(
                [*line, html.resolve().as_uri()], capture_output=True, text=True, timeout=SECONDS
            )
            said = done.stderr.strip().splitlines()
        except subprocess.TimeoutExpired:
            said = [f"it took longer than {SECONDS} s"]
        if not partial.exists():
            raise InputError(f"{line[0]} took no picture of {html}: {' '.join(said[-1:])}")
        os.replace(partial, picture)
