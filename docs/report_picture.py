"""Photographs the top of a run's report for README.md with headless Chromium: `python docs/report_picture.py RUN`."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from flexlora.report import write_report

PICTURE = Path(__file__).parent / "pictures" / "report.png"
WIDTH, HEIGHT = 1280, 1115
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--hide-scrollbars")
OFFLINE = ("quic", "background-networking", "component-update", "sync")


def photograph(page: Path, picture: Path, width: int = WIDTH, height: int = HEIGHT) -> None:
    """The first `height` pixels of a page, as a PNG. Needs Chromium on the PATH."""
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        sys.exit("no Chromium found: install one, it draws the report's charts")
    with tempfile.TemporaryDirectory() as profile:
        words = [chromium, *FLAGS, *(f"--disable-{what}" for what in OFFLINE), f"--user-data-dir={profile}"]
        words += [f"--window-size={width},{height}", "--virtual-time-budget=20000", f"--screenshot={picture}"]
        subprocess.run([*words, page.resolve().as_uri()], check=True, capture_output=True, timeout=120)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        photograph(write_report([Path(sys.argv[1])], Path(scratch) / "report.html"), PICTURE)
    print(PICTURE)
