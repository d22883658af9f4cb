"""Pages in a real browser."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

BROWSER = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)
needs_browser = pytest.mark.skipif(
    BROWSER is None, reason="needs Chromium or Chrome on the PATH (apt-get install chromium)"
)


def browse(page: Path, profile: Path, *arguments: str) -> tuple[str, str]:
    """(standard output, errors) of one headless visit; the page notes its errors on its root element."""
    command = [
        str(BROWSER),
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--hide-scrollbars",
        f"--user-data-dir={profile}",
        "--virtual-time-budget=8000",
        "--enable-logging=stderr",
        "--v=0",
        *arguments,
        page.as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    root = re.search(r"<html[^>]*>", done.stdout)
    errors = root[0] if root and "data-errors" in root[0] else ""
    return done.stdout, errors + "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)
