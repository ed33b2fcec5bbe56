"""Spatial relations of two objects: true, false, or too close to call."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from cobra.data.scenes import Item, Scene

MARGIN = 0.14  # of the picture's side, between two centres that count as one left of the other


def _along(axis: int, sign: int) -> Callable[[Item, Item, int], bool | None]:
    def holds(one: Item, other: Item, size: int) -> bool | None:
        distance = sign * (other.center[axis] - one.center[axis])
        return None if abs(distance) < MARGIN * size else distance > 0

    return holds


DIRECTIONS: dict[str, Callable[[Item, Item, int], bool | None]] = {
    "left of": _along(0, 1),
    "right of": _along(0, -1),
    "above": _along(1, 1),
    "below": _along(1, -1),
}
PHRASES = {"left of": "to the left of", "right of": "to the right of", "above": "above", "below": "below"}


def pairs(scene: Scene) -> Iterator[tuple[Item, Item]]:
    """Yield every two objects, in both orders."""
    return ((one, other) for one in scene.items for other in scene.items if one is not other)


def extreme(scene: Scene, direction: str) -> Item | None:
    """Return the object that stands in this direction of all others, by a clear distance."""
    holds = DIRECTIONS[direction]
    return next(
        (
            item
            for item in scene.items
            if len(scene.items) > 1 and all(holds(item, one, scene.size) for one in scene.items if one is not item)
        ),
        None,
    )
