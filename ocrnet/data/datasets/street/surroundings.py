"""The surroundings of a street: sky, ground, houses, trees, hedges, walls and fences, drawn from far to near."""

from dataclasses import dataclass

import cv2
import numpy as np

from ocrnet.data.datasets.street.canvas import Brush, Canvas, Color

NEAR, FAR = 1.2, 170.0  # meters

FACADES = ((168, 84, 66), (196, 176, 148), (150, 142, 136), (214, 204, 186), (176, 128, 94), (140, 96, 84))
ROOFS = ((120, 62, 48), (92, 84, 82), (138, 80, 58))
LEAVES = ((62, 98, 44), (78, 112, 50), (52, 86, 50), (92, 116, 48))


@dataclass(frozen=True)
class Street:
    """Cross-section of a street, in meters to the right of the camera's path."""

    road: tuple[float, float]
    walk: tuple[float, float]  # outer edges of the two sidewalks
    line: tuple[float, float]  # position of fences and walls; houses are slightly behind them
    tracks: tuple[float, float] | None  # strip of the road with rails

    def edges(self, side: int) -> tuple[float, float, float]:
        """Return x of the sidewalk's inner and outer edge and of the walls; ``side`` 0 is left, 1 is right."""
        return self.road[side], self.walk[side], self.line[side]


def sky(canvas: Canvas, rng: np.random.Generator, zenith: Color) -> None:
    """Fill the image with a gradient from ``zenith`` to the haze, and clouds; the label is already sky.

    Args:
        canvas: Canvas to draw on.
        rng: Random generator of the scene.
        zenith: RGB color at the top.
    """
    height, width = canvas.label.shape
    part = (np.arange(height) / max(canvas.camera.center[0], 1)).clip(0, 1)[:, None, None]
    base = np.asarray(zenith) * (1 - part) + canvas.haze * part
    coarse = rng.random((5, 9), np.float32) + 0.4 * cv2.resize(rng.random((11, 19), np.float32), (9, 5))
    cloud = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)[..., None]
    cover = ((cloud - rng.uniform(0.6, 1.0)) * 1.6).clip(0, 0.7)
    canvas.image[:] = (base * (1 - cover) + np.asarray((236, 238, 240)) * cover).clip(0, 255)


def ground(canvas: Canvas, rng: np.random.Generator, street: Street) -> None:
    """Draw grass, sidewalks, road, rails and lane markings.

    Args:
        canvas: Canvas to draw on.
        rng: Random generator of the scene.
        street: Cross-section of the street.
    """
    grass = rng.uniform((96, 108, 48), (142, 138, 76))
    asphalt = rng.uniform(84, 116) + np.array((0, 0, 4))
    paving = rng.uniform(138, 172) + np.array((6, 2, -6))
    _strip(canvas, "terrain", (-60, 60), grass)
    for side in (0, 1):
        inner, outer, _ = street.edges(side)
        _strip(canvas, "sidewalk", (inner, outer), paving)
        _strip(canvas, "sidewalk", (inner, inner + (0.16 if side else -0.16)), paving + 28)
        for z in np.geomspace(3, 60, 30):
            canvas.brush("sidewalk", z).stroke([(inner, 0, z), (outer, 0, z)], 0.015, paving - 26)
    _strip(canvas, "road", street.road, asphalt)
    if street.tracks:
        _strip(canvas, "rail track", street.tracks, asphalt + 12)
        for x in (street.tracks[0] + 0.6, street.tracks[1] - 0.6):
            _strip(canvas, "rail track", (x - 0.06, x + 0.06), (72, 66, 64))
    _markings(canvas, rng, street)


def _markings(canvas: Canvas, rng: np.random.Generator, street: Street) -> None:
    left, right = street.road
    white = rng.uniform(196, 232) + np.array((0, 0, -8))
    middle = (left + right) / 2
    for z in np.arange(rng.uniform(2, 6), 110, 8)[::-1]:
        _strip(canvas, "road", (middle - 0.07, middle + 0.07), white, (z, z + 3.5))
    for x in (left + 2.2, right - 2.2):
        _strip(canvas, "road", (x - 0.05, x + 0.05), white - 20)
    if rng.random() < 0.4:  # a crossing
        z = rng.uniform(14, 26)
        for x in np.arange(left + 0.4, right - 0.4, 1.0):
            _strip(canvas, "road", (x, x + 0.5), white, (z, z + 3))


def _strip(
    canvas: Canvas, name: str, x: tuple[float, float], color: Color, z: tuple[float, float] = (NEAR, FAR)
) -> None:
    """Fill the ground between two lateral positions, in segments that follow the bend and fade with distance."""
    cuts = np.geomspace(*z, max(int(np.log(z[1] / z[0]) * 5), 1) + 1)
    for near, far in zip(cuts[-2::-1], cuts[:0:-1], strict=True):
        corners = [(x[0], 0, near), (x[1], 0, near), (x[1], 0, far), (x[0], 0, far)]
        canvas.brush(name, (near + far) / 2).polygon(corners, color)


def skyline(canvas: Canvas, rng: np.random.Generator) -> None:
    """Draw distant trees and houses at the end of the street."""
    z = FAR
    for x in np.arange(-150, 150, 14):
        if rng.random() < 0.5:
            brush = canvas.brush("building", z * 0.8)
            brush.plate((x, x + rng.uniform(10, 18)), (-1, rng.uniform(6, 18)), z, rng.choice(FACADES))
        tree(canvas, rng, (x + 5, z), rng.uniform(7, 13))


def row(canvas: Canvas, rng: np.random.Generator, street: Street, side: int) -> None:
    """Draw houses and trees along one side, then walls, fences and hedges in front of them.

    Args:
        canvas: Canvas to draw on.
        rng: Random generator of the scene.
        street: Cross-section of the street.
        side: 0 is left, 1 is right.
    """
    line, out = street.line[side], 1 if side else -1
    z = FAR
    while z > NEAR:
        length = rng.uniform(9, 20)
        near = max(z - length, NEAR)
        if rng.random() < 0.78:
            house(canvas, rng, line + out * rng.uniform(0.6, 1.4), (near, z))
        else:
            for spot in np.arange(near + 2, z, 5)[::-1]:
                tree(canvas, rng, (line + out * rng.uniform(3, 4), spot), rng.uniform(5, 9))
        z = near
    for kind in rng.permutation(["fence", "wall", "hedge", "fence", "wall"]):
        begin = rng.uniform(4, 40)
        barrier(canvas, rng, kind, (line, begin, begin + rng.uniform(8, 18)))


def house(canvas: Canvas, rng: np.random.Generator, x: float, z: tuple[float, float]) -> None:
    """Draw a house along the street: gable end, facade, roof, windows.

    Args:
        canvas: Canvas to draw on.
        rng: Random generator of the scene.
        x: Lateral position of the facade in meters.
        z: Near and far end in meters.
    """
    brush, facade = canvas.brush("building", z[0]), rng.choice(FACADES) * rng.uniform(0.85, 1.1)
    floors, out = int(rng.integers(2, 6)), np.sign(x)
    top = 3.1 * floors + rng.uniform(0.6, 1.2)
    brush.plate((x, x + out * 11), (0, top), z[0], facade * 0.72)
    if rng.random() < 0.6:
        ridge, tiles = (x + out * 4, top + 3.2), rng.choice(ROOFS)
        brush.polygon([(x, top, z[0]), (*ridge, z[0]), (*ridge, z[1]), (x, top, z[1])], tiles)
        brush.upright([x, ridge[0], x + out * 8], [top, ridge[1], top], z[0], facade * 0.72)
    brush.panel(x, (0, top), z, facade)
    brush.panel(x, (0, 0.5), z, facade * 0.7)
    brush.panel(x, (top - 0.35, top), z, facade * 1.15)
    _windows(brush, rng, (x, floors), z, facade)


def _windows(
    brush: Brush, rng: np.random.Generator, position: tuple[float, int], z: tuple[float, float], facade: np.ndarray
) -> None:
    x, floors = position
    glass, frame = rng.uniform((50, 62, 76), (104, 122, 140)), facade * 0.5 + 120
    wide, shop = rng.uniform(1.0, 1.5), rng.random() < 0.4
    for floor in range(floors):
        low, high = 3.1 * floor + 1.0, 3.1 * floor + 2.6
        for begin in np.arange(z[0] + 0.8, z[1] - wide, wide + rng.uniform(0.9, 1.4))[::-1]:
            if floor == 0 and shop:
                brush.panel(x, (0.4, 2.7), (begin, begin + wide * 1.4), glass * 0.8)
                continue
            if begin < 60:
                brush.panel(x, (low - 0.12, high + 0.12), (begin - 0.12, begin + wide + 0.12), frame)
            brush.panel(x, (low, high), (begin, begin + wide), glass * rng.uniform(0.7, 1.25))


def barrier(canvas: Canvas, rng: np.random.Generator, kind: str, position: tuple[float, float, float]) -> None:
    """Draw a wall, a fence or a hedge along the street.

    Args:
        canvas: Canvas to draw on.
        rng: Random generator of the scene.
        kind: ``wall``, ``fence`` or ``hedge``.
        position: Lateral position, near end and far end in meters.
    """
    x, near, far = position
    names = {"wall": "wall", "fence": "fence", "hedge": "vegetation"}
    brush, z, top = canvas.brush(names[kind], near), (near, far), rng.uniform(1.3, 2.2)
    if kind == "wall":
        stone = rng.uniform((150, 140, 132), (184, 178, 172))
        brush.panel(x, (0, top + 0.4), z, stone)
        for y in np.arange(0.35, top + 0.3, 0.35):
            brush.stroke([(x, y, near), (x, y, far)], 0.03, stone * 0.78)
        brush.panel(x, (top + 0.25, top + 0.4), z, stone * 1.15)
    elif kind == "fence":
        wood = rng.choice([(122, 88, 58), (92, 104, 96), (146, 118, 92)]) * rng.uniform(0.85, 1.15)
        brush.panel(x, (0, top), z, wood * 0.5)
        for spot in np.arange(near, far, 0.28)[::-1]:
            brush.panel(x, (0, top), (spot, spot + 0.16), wood * rng.uniform(0.9, 1.1))
        brush.panel(x, (top * 0.7, top * 0.76), z, wood * 1.25)
    else:
        leaf = rng.choice(LEAVES)
        brush.panel(x, (0, top), z, leaf * 0.8)
        for spot in np.arange(near, far, 0.6)[::-1]:
            brush.disc((x, top, spot), rng.uniform(0.25, 0.5), leaf * rng.uniform(0.8, 1.2))


def tree(canvas: Canvas, rng: np.random.Generator, position: tuple[float, float], height: float) -> None:
    """Draw a tree: trunk and crown, which both have the class vegetation, as in Cityscapes.

    Args:
        canvas: Canvas to draw on.
        rng: Random generator of the scene.
        position: x and z in meters.
        height: Height in meters.
    """
    x, z = position
    brush, leaf = canvas.brush("vegetation", z), rng.choice(LEAVES) * rng.uniform(0.85, 1.15)
    brush.plate((x - 0.14, x + 0.14), (0, height * 0.5), z, (84, 66, 50))
    radius = height * 0.3
    for shade in (0.72, 0.86, 1.0, 1.14):  # dark leaves below and behind, bright ones above
        for _ in range(5):
            dx, dy = rng.normal(0, 0.45, 2) * radius
            spot = (x + dx, height * 0.68 + dy + (shade - 0.9) * radius, z)
            brush.disc(spot, radius * rng.uniform(0.3, 0.62), leaf * shade * rng.uniform(0.94, 1.06))


def street_tree(canvas: Canvas, rng: np.random.Generator, x: float, z: float) -> None:
    """Draw a tree of a size that is typical along streets.

    Args:
        canvas: Canvas to draw on.
        rng: Random generator of the scene.
        x: Lateral position in meters, positive to the right.
        z: Distance in meters.
    """
    tree(canvas, rng, (x, z), rng.uniform(4.5, 7.5))
