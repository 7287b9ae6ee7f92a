"""The web page in an installed package."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

_ROOT = Path(__file__).parents[2]
_PAGE = "dsmoe_local/serve/page.html"


def test_the_wheel_has_the_page(tmp_path: Path) -> None:
    """Guards: status 500 at / if the package is installed without -e."""
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(build, cwd=_ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert archive.read(_PAGE) == (_ROOT / _PAGE).read_bytes()
