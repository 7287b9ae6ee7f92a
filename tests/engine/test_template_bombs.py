"""Templates that try to eat memory and time end in words, and leave what comes next unharmed."""

from __future__ import annotations

import signal
import socket
import subprocess
import threading
import time
from contextlib import closing
from pathlib import Path

import pytest
from support.hostile_templates import FIXED, Hostile

from dsmoe_local.base.errors import InterruptedRunError
from dsmoe_local.engine.errors import TemplateError
from dsmoe_local.engine.prompts import renderer
from dsmoe_local.engine.prompts.choice import BUILT_IN
from dsmoe_local.engine.prompts.renderer import MAX_SECONDS
from dsmoe_local.engine.prompts.template import ChatTemplate
from dsmoe_local.engine.types import Message

TALK = (
    Message("system", "Be brief."),
    Message("user", "Hi"),
    Message("assistant", "Yo"),
    Message("user", "Why?"),
)
PROCESS = 160 << 20
"""Bytes of address space that a fresh process has, at most."""
MEMORY = 256 << 20


def template(text: str) -> ChatTemplate:
    return ChatTemplate(text, "test", bos="<s>", eos="</s>")


@pytest.fixture
def peaks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The most address space that each process for a template ever had, as it is ended."""
    found: list[int] = []
    end = renderer._end

    def measure(process: subprocess.Popen[bytes], channel: object) -> None:
        status = Path(f"/proc/{process.pid}/status").read_text() if process.poll() is None else ""
        found.extend(int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith("VmPeak"))
        end(process, channel)  # type: ignore[arg-type]

    monkeypatch.setattr(renderer, "_end", measure)
    return found


def ends(text: str) -> bool:
    """Whether there was an output; else it was refused in words."""
    refusal = None
    try:
        with closing(template(text)) as chat:
            chat.render(TALK)
    except TemplateError as error:
        refusal = str(error)
    if refusal is not None:
        assert refusal.startswith("the chat template (test) fails: ")
        assert len(refusal.splitlines()) <= 3
    return refusal is None


@pytest.mark.parametrize("bomb", FIXED)
def test_bombs_are_refused(bomb: str, monkeypatch: pytest.MonkeyPatch, peaks: list[int]) -> None:
    """Guards: a template that eats the memory or never ends; a cap that one operation evades."""
    monkeypatch.setattr(renderer, "MAX_SECONDS", 0.2)
    ends(bomb)
    assert max(peaks, default=0) < PROCESS + MEMORY


def test_what_is_too_large_or_too_slow_is_told() -> None:
    """Guards: a bomb that goes off: the memory of a machine, or its time, gone."""
    for bomb, reason in (
        ("{{ ('%(a)9999s' * 60000) % {'a': 'x'} }}", "too large"),
        (FIXED[3], "too large"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "too deep"),
        ("{% for a in range(99999) %}{{ 'x' * 99999 }}{% endfor %}", "too long"),
    ):
        with pytest.raises(TemplateError, match=reason):
            template(bomb).render(TALK)


def test_native_code_is_no_refuge(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: a clock that is only looked at between two operations."""
    chat = template("{% set x = 9 ** (messages[0].content | int) %}")
    assert chat._renderer._process is not None
    chat._renderer._process._channel.settimeout(0.3)
    with pytest.raises(TemplateError, match=r"more than \d seconds"):
        chat.render((Message("user", "99999999"),))
    monkeypatch.setattr(renderer, "MAX_SECONDS", 0.3)
    with pytest.raises(TemplateError, match=r"more than \d seconds"):
        template("{% set x = 9 ** 99999999 %}")


def test_a_template_works_on_after_a_bomb(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: one hostile message that ends the use of an honest template, or is answered for the next."""
    chat = template(
        "{{ 'a' * (messages[0].content | int) }}{{ raise_exception('b') if messages[1] else '' }}"
    )
    with pytest.raises(TemplateError, match="too large"):
        chat.render((Message("user", "9" * 12),))
    assert chat.render((Message("user", "3"),)) == "aaa"
    with pytest.raises(TemplateError, match="fails: b"):
        chat.render((Message("user", "3"), Message("user", "3")))
    process = chat._renderer._process
    assert process is not None
    process._popen.send_signal(signal.SIGKILL)
    process._popen.wait()
    with pytest.raises(TemplateError):
        chat.render((Message("user", "3"),))
    assert chat.render((Message("user", "4"),)) == "aaaa"


def test_refusals_keep_the_process() -> None:
    """Guards: ten thousand bad lines of a batch that start ten thousand processes."""
    chat = template("{% if messages[0].role == 'user' %}{{ raise_exception('no') }}{% endif %}ok")
    before = chat._renderer._process
    for _ in range(3):
        with pytest.raises(TemplateError, match="no"):
            chat.render((Message("user", "a"),))
    assert chat.render((Message("system", "a"),)) == "ok"
    assert chat._renderer._process is before


def test_stopping_ends_a_rendering() -> None:
    """Guards: a long conversation with a slow template that cannot be cancelled."""
    chat = template("{% for m in messages %}{{ m.content }}{% endfor %}{{ messages | length }}")
    talk = [Message(("user", "assistant")[at % 2], "a") for at in range(20)]
    asked: list[bool] = []

    def stopped() -> bool:
        asked.append(True)
        return len(asked) >= 3

    with pytest.raises(InterruptedRunError):
        chat.stretches(talk, range(1, 20, 2), open_end=True, stopped=stopped)
    assert len(asked) == 3
    assert len(chat.stretches(talk, range(1, 20, 2), open_end=True)) == 11


def test_closing_ends_the_process() -> None:
    """Guards: processes that stay when a model is unloaded, or its template is forgotten."""
    chat = template("ok")
    process = chat._renderer._process
    assert process is not None
    chat.close()
    assert process._popen.returncode is not None
    chat = template("ok")
    process = chat._renderer._process
    assert process is not None
    popen = process._popen
    del process, chat
    assert popen.returncode is not None


@pytest.mark.skipif(not Path("/proc").exists(), reason="shows no environment of other processes")
def test_the_process_has_no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: tokens of the hub where a template that came from there runs."""
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    chat = template("{{ strftime_now('%Y') }}")
    process = chat._renderer._process
    assert process is not None
    assert b"secret" not in Path(f"/proc/{process._popen.pid}/environ").read_bytes()
    assert chat.render([Message("user", "a")]).isdigit()
    chat.close()


def test_the_process_ends_with_its_client() -> None:
    """Guards: a process that outlives an engine that was killed."""
    chat = template("ok")
    process = chat._renderer._process
    assert process is not None
    process._channel.shutdown(socket.SHUT_RDWR)
    assert process._popen.wait(60) is not None
    chat.close()


def test_several_threads_render() -> None:
    """Guards: one thread's answer given to another."""
    chat = template("{{ messages[0].content }}")
    found: list[tuple[str, str]] = []

    def run(number: int) -> None:
        for at in range(50):
            text = f"{number}.{at}"
            found.append((text, chat.render((Message("user", text),))))

    threads = [threading.Thread(target=run, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 200
    assert all(asked == answered for asked, answered in found)


def test_a_large_conversation_has_the_memory_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: a limit on memory that refuses honest work."""
    monkeypatch.setattr(renderer, "MAX_SECONDS", 60)
    text = "word \N{ROCKET}" * 3_000_000
    chat = template(BUILT_IN["chatml"])
    segments = chat.segments((Message("user", text),))
    assert segments is not None
    assert [segment.text for segment in segments if segment.message == 0] == [text]


def test_random_hostile_templates(monkeypatch: pytest.MonkeyPatch, peaks: list[int]) -> None:
    """Guards: combinations that the fixed cases do not cover."""
    monkeypatch.setattr(renderer, "MAX_SECONDS", 0.2)
    hostile = Hostile(1)
    outcomes = {ends(hostile.template()) for _ in range(10)}
    assert outcomes == {True, False}
    assert max(peaks) < PROCESS + MEMORY


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(4))
def test_soak_random_hostile_templates(seed: int, peaks: list[int]) -> None:
    """As above, for longer."""
    hostile = Hostile(100 + seed)
    slowest, counts = 0.0, {True: 0, False: 0}
    for _ in range(300):
        started = time.monotonic()
        counts[ends(hostile.template())] += 1
        slowest = max(slowest, time.monotonic() - started)
        assert max(peaks, default=0) < PROCESS + MEMORY
    print(f"seed {seed}: {counts[True]} rendered, {counts[False]} refused, slowest {slowest:.1f} s, "
          f"peak {max(peaks) >> 20} MiB of address space")  # fmt: skip
    # To compile and to render, and to start a process.
    assert slowest < 2 * MAX_SECONDS + 10
