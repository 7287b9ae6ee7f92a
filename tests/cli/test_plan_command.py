"""`dsmoe plan`: the page, the options and the mistakes."""

from __future__ import annotations

import json
from typing import Any

import pytest
from click.testing import CliRunner
from support.configured import complaint
from support.models import tiny_model

from dsmoe_local.cli.commands import load_command
from dsmoe_local.evaluate.speed import machine
from dsmoe_local.evaluate.speed.machine import Bandwidth

SPEED = ("--read-speed", "50GB/s")


def planned(*arguments: str) -> dict[str, Any]:
    result = CliRunner().invoke(load_command("plan"), [*arguments, "--json"], catch_exceptions=False)
    found: dict[str, Any] = json.loads(result.stdout)
    return found


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine whose memory is read with 32 GB/s."""
    monkeypatch.setattr(machine, "measure_bandwidth", lambda *_: Bandwidth(32e9, 2, 1 << 28, 0))


@pytest.mark.usefixtures("measured")
@pytest.mark.parametrize("columns", [60, 80, 120])
@pytest.mark.parametrize("name", ["deepseekmoe-145b", "deepseek-v3", "qwen3-235b-a22b"])
def test_the_page(name: str, columns: int) -> None:
    """Guards: a plan that is cut off, or longer than a screen; machines in another order."""
    arguments = [name, "--memory", "192GiB,128GiB,128GiB", "--bandwidth", "2.5GbE"]
    result = CliRunner().invoke(load_command("plan"), arguments, env={"COLUMNS": str(columns)})
    assert result.exit_code == 0
    lines = [line.rstrip() for line in result.stdout.splitlines()]
    assert len(lines) <= 24
    assert max(map(len, lines)) <= columns
    assert all(name in result.stdout for name in ("free", "buffers")) == (columns >= 80)
    assert ("Wider terminals" in result.stdout) == (columns < 80)
    assert "…" not in result.stdout
    machines = [line.split()[0] for line in lines if line.startswith((" this one", " worker"))]
    assert machines == ["this", "worker", "worker"]
    text = " ".join(result.stdout.split())
    assert "Assumed: every machine reads 16 GB to 32 GB per second" in text
    assert "tokens/s at the start of a chat" in text
    assert ("2.5GbE: 2 round trips" if name == "deepseek-v3" else "It fits on this machine") in text


@pytest.mark.usefixtures("measured")
def test_read_speeds() -> None:
    """Guards: a speed for the wrong machine; a range for a speed that the user knows."""
    arguments = ("deepseekmoe-16b", "--memory", "1GiB,9GiB,9GiB")
    assert [each["read_bytes_per_second"] for each in planned(*arguments)["machines"]] == [[16e9, 32e9]] * 3
    given = planned(*arguments, "--read-speed", "9GB, 4GB/s")["machines"]
    assert [each["read_bytes_per_second"] for each in given] == [[9e9, 9e9], [4e9, 4e9], [4e9, 4e9]]


def test_the_memory_of_this_machine_is_measured() -> None:
    """Guards: a plan that needs more options than the memory."""
    found = planned(str(tiny_model()), "--memory", "1GiB", "-c", "256")
    least, most = found["machines"][0]["read_bytes_per_second"]
    assert 1e8 < least == most / 2 < 1e13


def test_options() -> None:
    """Guards: an option without effect."""
    two = ("deepseekmoe-16b", "--memory", "6GiB,6GiB")
    base = planned(*two, *SPEED)
    seconds = [machine["seconds_per_token"] for machine in base["machines"]]
    small = planned(*two, *SPEED, "--type", "q4-small")
    assert small["machines"][0]["layers"] > base["machines"][0]["layers"]
    short = planned(*two, *SPEED, "-c", "1024")
    assert short["machines"][0]["kv_bytes"] < base["machines"][0]["kv_bytes"]
    fast = planned(*two, "--read-speed", "50GB, 100GB/s")
    assert [machine["seconds_per_token"] for machine in fast["machines"]] == [
        seconds[0],
        pytest.approx([each / 2 for each in seconds[1]]),
    ]
    slow = planned(*two, *SPEED, "--bandwidth", "WiFi")
    assert slow["network_seconds_per_token"][0] > base["network_seconds_per_token"][1]
    assert slow["tokens_per_second_at_start"][1] < base["tokens_per_second_at_start"][0]
    assert base["tokens_per_second_in_full_context"][1] < base["tokens_per_second_at_start"][0]


def test_a_file() -> None:
    """Guards: sizes of a type that the file does not have; a type that is ignored."""
    model = (str(tiny_model()), "--memory", "1GiB", "-c", "256", *SPEED)
    (found,) = planned(*model)["machines"]
    assert 0.9 < found["weights_bytes"] / tiny_model().stat().st_size < 1
    assert planned(*model, "--type", "q8")["machines"][0]["weights_bytes"] < found["weights_bytes"]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("deepseek-v3", "--memory", "300GiB,16GiB"), "--type q4-small fits"),
        (("deepseek-v3", "--memory", "24GiB,16GiB"), "no type fits"),
        (("deepseek-v3", "--memory", "24GiB,16GiB"), "in Q3_K_S, the smallest"),
        (("deepseek-v3", "--memory", "300GiB,16GiB"), "does not fit on 2 machines: "),
        (("deepseek-v3", "--memory", "24,16"), "24 is 24 bytes: write a unit, as in 24MB or 24GiB"),
        (("deepseek-v3", "--memory", "1TB", "--read-speed", "60"), "write a unit, as in 60MB"),
        (("deepseek-v3", "--memory", "much"), "not a size"),
        (("deepseek-v3", "--memory", "1GiB,"), "not a size"),
        (("deepseek-v3", "--memory", "0"), "write a size above 0"),
        (("deepseek-v3", "--memory", "1TB", "--read-speed", "0GB"), "write a size above 0"),
        (("deepseek-v3", "--memory", "1GiB", "--read-speed", "1GB,2GB"), "--read-speed has 2 values"),
        (("deepseek-v3", "--memory", "1TB", "--bandwidth", "fast"), "is not a bandwidth"),
        (("deepseek-v3", "--memory", "1TB", "--type", "q3.5"), "is not a type"),
        (("deepseek-v3", "--memory", "1TB", "--type", "q5"), "did you mean Q5_K_M or Q5_K_S or"),
        (("deepseek-v4", "--memory", "1GiB"), "deepseek-v3"),
        (("gshard-137b", "--memory", "1TB"), "llama.cpp cannot load"),
        (("deepseek-v3",), "--memory"),
    ],
)
def test_mistakes(arguments: tuple[str, ...], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Guards: a traceback, or a message without a remedy."""
    speed = () if "--read-speed" in arguments else SPEED
    assert told in complaint(capsys, "plan", *arguments, *speed)
