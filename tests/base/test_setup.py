"""tools/setup_venv.py, which `make demo` runs."""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "tools" / "setup_venv.py"


@pytest.mark.parametrize(
    ("failure", "status", "told"),
    [
        (KeyboardInterrupt(), 130, "setup: interrupted: run the same command again to continue"),
        (subprocess.CalledProcessError(2, ["pip"]), 1, "setup: failed with exit status 2: pip"),
    ],
)
def test_a_step_that_fails(
    failure: BaseException,
    status: int,
    told: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Guards: a traceback after Ctrl-C, which does not say that the work can be continued."""

    def fail(*_: object, **__: object) -> None:
        raise failure

    monkeypatch.setattr(subprocess, "run", fail)
    arguments = ["--venv", str(tmp_path / "venv"), "--cache", str(tmp_path / "cache")]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *arguments])
    with pytest.raises(SystemExit) as ending:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert ending.value.code == status
    said = capsys.readouterr().err.splitlines()
    assert said[0].startswith("setup: step 1 of 3: ")
    assert said[-1] == told
