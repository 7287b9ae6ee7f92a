"""Session databases damaged by machine: what is not exactly what was stored is said, and nothing raises."""

from __future__ import annotations

import random
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
from support.stored import replied, said, talk

from dsmoe_local.base.errors import DsmoeError
from dsmoe_local.chat.store.sessions import SessionStore
from dsmoe_local.chat.store.states import BLOCK, StateStore
from dsmoe_local.chat.turns import Transcript

PAGE = 4096
IDS = tuple(range(2 * BLOCK))


@dataclass(frozen=True)
class Image:
    """A folder as a crash leaves it, with its log; and its transcripts by the names of their sessions."""

    folder: Path
    stored: Mapping[str, Transcript]


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Image:
    folder = tmp_path_factory.mktemp("image")
    store = SessionStore.open(folder / "open")
    stored: dict[str, Transcript] = {}
    generator = random.Random(5)
    sessions = []
    for number in range(12):
        session = store.create("m", "v", "system")
        texts = ["turn 专家 " * generator.randrange(1, 400) for _ in range(2 * generator.randrange(1, 5))]
        session.save(talk(*texts, system="system"))
        StateStore(folder / "open").keep(session.number, "f", IDS, write)
        sessions.append(session)
        if number == 7:
            # What follows is in the log alone.
            store._database.empty_log()
    for session in sessions[::3]:
        transcript = session.load("v")
        turns, undone = transcript.turns[:-2], transcript.turns[-2:]
        session.save(Transcript(turns, "system", undone=undone))
    grown = (*sessions[1].load("v").turns, said("and?"), replied("so far"))
    sessions[1].save(Transcript(grown, "system"), partial=True)
    store.fork(sessions[2])
    for name in store.names():
        stored[name] = store.find(name).load("v")
    shutil.copytree(folder / "open", folder / "crashed")
    store.close()
    assert (folder / "crashed" / "sessions.db-wal").stat().st_size > 10 * PAGE
    return Image(folder / "crashed", stored)


def write(path: Path, start: int, end: int) -> int:
    path.write_bytes(b"state" * end)
    return end


def flip(content: bytearray, generator: random.Random) -> None:
    for _ in range(generator.choice((1, 1, 8))):
        content[generator.randrange(len(content))] ^= 1 << generator.randrange(8)


def overwrite(content: bytearray, generator: random.Random) -> None:
    at = generator.randrange(len(content))
    length = len(content[at : at + generator.choice((1, 16, PAGE))])
    content[at : at + length] = generator.randbytes(length)


def zero_pages(content: bytearray, generator: random.Random) -> None:
    at = generator.randrange(-(-len(content) // PAGE)) * PAGE
    length = len(content[at : at + PAGE * generator.choice((1, 1, 3))])
    content[at : at + length] = bytes(length)


def swap_pages(content: bytearray, generator: random.Random) -> None:
    first, second = (generator.randrange(max(1, len(content) // PAGE)) * PAGE for _ in range(2))
    page = content[first : first + PAGE]
    content[first : first + PAGE] = content[second : second + PAGE]
    content[second : second + PAGE] = page


def cut(content: bytearray, generator: random.Random) -> None:
    at = generator.randrange(len(content))
    del content[at - at % generator.choice((1, PAGE)) :]


def grow(content: bytearray, generator: random.Random) -> None:
    content += generator.randbytes(generator.choice((1, PAGE)))


DAMAGES = (flip, overwrite, zero_pages, swap_pages, cut, grow)
FILES = {"sessions.db": 6, "sessions.db-wal": 3, "sessions.db-shm": 1, "sessions.tally": 1}


def damage(folder: Path, generator: random.Random) -> str:
    """Damage one file, or two; says what was done."""
    done = []
    for _ in range(generator.choice((1, 1, 1, 2))):
        (name,) = generator.choices([*FILES], [*FILES.values()])
        path = folder / name
        content = bytearray(path.read_bytes()) if path.exists() else bytearray()
        if not content or (name != "sessions.db" and generator.random() < 0.2):
            path.unlink(missing_ok=True)
            done.append(f"{name} removed")
            continue
        change = generator.choice(DAMAGES)
        change(content, generator)
        path.write_bytes(content)
        done.append(f"{name} {change.__name__}")
    return ", ".join(done)


class Reader:
    """Uses a damaged folder as chats do, and remembers whether something was said."""

    def __init__(self, image: Image, folder: Path) -> None:
        self._image = image
        self._folder = folder
        self.n_said = 0
        self.differs: list[str] = []

    def attempt(self, action: Callable[[], object]) -> None:
        """What it raises is an error of ours: three lines at most."""
        try:
            action()
        except DsmoeError as error:
            self.n_said += 1
            if len(str(error).splitlines()) not in (1, 2, 3):
                self.differs.append(f"the message {error}")

    def read(self) -> None:
        """Open it, look at everything, and go on."""
        store = SessionStore.open(self._folder)
        try:
            self.attempt(lambda: self._take(store.problems()))
            self.attempt(lambda: self._compare_names(store.names()))
            for name, transcript in self._image.stored.items():
                self.attempt(lambda name=name, transcript=transcript: self._compare(store, name, transcript))  # type: ignore[misc]
            self.attempt(lambda: store.search("turn 专家"))
            self.attempt(lambda: store.latest())
            states = StateStore(self._folder)
            for number in (1, 9):
                self.attempt(lambda number=number: states.find(number, "f", IDS))  # type: ignore[misc]
                self.attempt(lambda number=number: states.keep(number, "f", IDS, write))  # type: ignore[misc]
            self.attempt(states.tidy)
            self.attempt(lambda: store.create("m", "v", "").save(talk("new", "one")))
            self.attempt(lambda: store.delete(store.find("3")))
        finally:
            store.close()

    def _take(self, problems: list[str]) -> None:
        self.n_said += len(problems)

    def _compare_names(self, names: list[str]) -> None:
        if names != [*self._image.stored]:
            self.differs.append(f"sessions {names}")

    def _compare(self, store: SessionStore, name: str, transcript: Transcript) -> None:
        if store.find(name).load("v") != transcript:
            self.differs.append(name)


def fuzz(image: Image, folder: Path, n_damages: int, seed: int) -> tuple[int, int]:
    """Damage and read; returns how often something was said, and how often all was there."""
    n_said = n_whole = 0
    for number in range(n_damages):
        generator = random.Random(seed + number)
        shutil.copytree(image.folder, folder)
        what = f"seed {seed + number}: {damage(folder, generator)}"
        reader = Reader(image, folder)
        try:
            reader.attempt(reader.read)
        except Exception as error:
            raise AssertionError(what) from error
        assert reader.n_said or not reader.differs, f"{what}: nothing is said of {reader.differs}"
        assert not any(each.startswith("the message") for each in reader.differs), reader.differs
        n_said += reader.n_said > 0
        n_whole += not reader.differs and not reader.n_said
        shutil.rmtree(folder)
    return n_said, n_whole


def test_whole_images_are_read(image: Image, tmp_path: Path) -> None:
    """Guards: a warning about a database that nothing is wrong with."""
    shutil.copytree(image.folder, tmp_path / "copy")
    reader = Reader(image, tmp_path / "copy")
    reader.read()
    assert (reader.n_said, reader.differs) == (0, [])


@pytest.mark.parametrize("gone", ["sessions.db-wal", "sessions.db-shm", "sessions.tally"])
def test_a_file_beside_the_database_is_missing(image: Image, tmp_path: Path, gone: str) -> None:
    """Guards: turns that were in a lost log gone without a word; a word about what can be made again."""
    folder = tmp_path / "copy"
    shutil.copytree(image.folder, folder)
    (folder / gone).unlink()
    store = SessionStore.open(folder)
    problems = store.problems()
    store.close()
    if gone == "sessions.db-wal":
        (problem,) = problems
        assert problem.startswith("the last changes are lost")
    else:
        assert problems == []


def test_damage_is_never_silent(image: Image, tmp_path: Path) -> None:
    """Guards: a traceback, fewer turns, or other ones, without a word."""
    n_said, n_whole = fuzz(image, tmp_path / "copy", 40, seed=1)
    assert n_said > 10
    assert n_whole > 1


@pytest.mark.soak
def test_damage_is_never_silent_for_long(image: Image, tmp_path: Path) -> None:
    """Guards: what forty damages do not meet."""
    seed = int(time.time())
    n_said, n_whole = fuzz(image, tmp_path / "copy", 3_000, seed)
    print(f"3,000 damaged folders from seed {seed}: {n_said} told, {n_whole} whole")
