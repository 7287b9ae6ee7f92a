"""Where the labels of a chart go: beside their marks, over nothing else. Boxes alone; draws nothing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

_PASSES = 6
_OVERLAP, _OUTSIDE, _DISTANCE, _RANK = 1.0, 20.0, 0.35, 0.4
_AROUND = (4.0, 11.0, 20.0, 32.0)  # pixels from a mark


@dataclass(frozen=True, slots=True)
class Box:
    """A rectangle; y grows downwards."""

    left: float
    top: float
    right: float
    bottom: float

    def overlap(self, other: Box) -> float:
        """The area that both have."""
        width = min(self.right, other.right) - max(self.left, other.left)
        height = min(self.bottom, other.bottom) - max(self.top, other.top)
        return max(0.0, width) * max(0.0, height)

    @property
    def area(self) -> float:
        """Width by height."""
        return (self.right - self.left) * (self.bottom - self.top)


@dataclass(frozen=True, slots=True)
class Label:
    """A text of that size, and the marks that it may stand beside, the best first."""

    width: float
    height: float
    marks: Sequence[Box]


def place(labels: Sequence[Label], obstacles: Sequence[Box], frame: Box) -> list[Box]:
    """A place for each label, within the frame and over neither an obstacle nor another label if that can be.

    Each label in turn takes its best place given those of the others, some times over.
    """
    places: list[Box | None] = [None] * len(labels)
    for _ in range(_PASSES):
        before = list(places)
        for at, label in enumerate(labels):
            others = [box for number, box in enumerate(places) if box is not None and number != at]
            costs = [
                (cost + _cost(box, others, obstacles, frame), number, box)
                for number, (box, cost) in enumerate(_candidates(label))
            ]
            places[at] = min(costs, key=lambda each: each[:2])[2]
        if places == before:
            break
    return [box for box in places if box is not None]


def _candidates(label: Label) -> Iterator[tuple[Box, float]]:
    """Places, each with how far it is from the best."""
    for number, mark in enumerate(label.marks):
        x, y = (mark.left + mark.right) / 2, (mark.top + mark.bottom) / 2
        for distance in _AROUND:
            right, left = mark.right + distance, mark.left - distance - label.width
            below, above = mark.bottom + distance, mark.top - distance - label.height
            sides = [
                (right, y - label.height / 2),
                (x - label.width / 2, below),
                (left, y - label.height / 2),
                (x - label.width / 2, above),
                (right, below - label.height / 2),
                (left, below - label.height / 2),
                (right, above + label.height / 2),
                (left, above + label.height / 2),
            ]
            for rank, (at, top) in enumerate(sides):
                box = Box(at, top, at + label.width, top + label.height)
                yield box, _DISTANCE * (distance - _AROUND[0]) + _RANK * rank + 2 * number


def _cost(box: Box, others: Sequence[Box], obstacles: Sequence[Box], frame: Box) -> float:
    """What speaks against a place, wherever its mark is."""
    covered = sum(box.overlap(other) for other in (*others, *obstacles))
    return _OVERLAP * covered + _OUTSIDE * (box.area - box.overlap(frame))
