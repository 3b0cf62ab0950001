"""Street scenes: choose the objects, draw them from far to near, add lighting and texture noise."""

from collections.abc import Callable

import cv2
import numpy as np

from ocrnet.data.datasets.street import actors
from ocrnet.data.datasets.street.canvas import ID, Camera, Canvas
from ocrnet.data.datasets.street.surroundings import Street, ground, row, sky, skyline, street_tree

Actor = tuple[float, float, Callable]  # x, z, drawing function

LARGE = (actors.truck, actors.bus, actors.train, actors.motorcyclist)

# Standard deviation of fine and coarse texture noise by class, in gray levels.
GRAIN = {
    "road": (7, 5), "sidewalk": (8, 6), "building": (4, 5), "wall": (10, 9), "fence": (6, 5), "vegetation": (14, 16),
    "terrain": (13, 14), "sky": (1, 0), "car": (2, 4), "truck": (2, 3), "bus": (2, 3), "train": (2, 3),
}  # fmt: skip


def draw(size: tuple[int, int], rng: np.random.Generator, *, index: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw one scene.

    Args:
        size: Height and width in pixels.
        rng: Random generator of the scene.
        index: Number of the scene. It selects the rare vehicle: truck, bus, train or motorcycle in turn.

    Returns:
        Image, uint8 H,W,3 RGB, and label, uint8 H,W Cityscapes ids.
    """
    height, width = size
    camera = Camera(
        focal=0.95 * float(np.sqrt(width * height * 2)),
        center=(height * rng.uniform(0.38, 0.46), width * rng.uniform(0.42, 0.58)),
        bend=rng.uniform(-8e-4, 8e-4),
    )
    zenith, haze = _weather(rng)
    canvas, street = Canvas(size, camera, haze), _street(rng, with_tracks=index % 4 == 2)
    sky(canvas, rng, zenith)
    skyline(canvas, rng)
    ground(canvas, rng, street)
    for side in (0, 1):
        row(canvas, rng, street, side)
    for x, z, actor in sorted(_cast(rng, street, index), key=lambda entry: -entry[1]):
        actor(canvas, rng, x, z)
    _own_car(canvas, rng)
    _light(canvas, rng)
    return canvas.image, canvas.label


def _weather(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Return random RGB colors of the zenith and the haze, for clear, gray or evening weather."""
    clear, gray = ((72, 122, 190), (206, 220, 232)), ((158, 166, 176), (214, 216, 218))
    evening = (84, 96, 150), (240, 204, 170)
    zenith, haze = (clear, gray, evening)[rng.choice(3, p=(0.5, 0.35, 0.15))]
    return zenith + rng.uniform(-10, 10, 3), haze + rng.uniform(-8, 8, 3)


def _street(rng: np.random.Generator, *, with_tracks: bool) -> Street:
    left, right = -rng.uniform(4.5, 7.0) - 3 * with_tracks, rng.uniform(3.6, 5.2)
    walk = left - rng.uniform(2.0, 3.4), right + rng.uniform(2.0, 3.4)
    green = np.where(rng.random(2) < 0.3, rng.uniform(4, 9, 2), rng.uniform(0.3, 2.5, 2))
    tracks = (left + 2.4, left + 5.4) if with_tracks else None
    return Street(road=(left, right), walk=walk, line=(walk[0] - green[0], walk[1] + green[1]), tracks=tracks)


def _cast(rng: np.random.Generator, street: Street, index: int) -> list[Actor]:
    """Choose objects and their positions in meters: vehicles, people, poles and signs."""
    (left, right), cast = street.road, []
    rare = LARGE[index % 4]
    lane = (left + right) / 4
    if rare is actors.train and street.tracks:
        cast.append((sum(street.tracks) / 2, rng.uniform(13, 22), rare))
    elif rare is actors.motorcyclist:
        cast.append((rng.uniform(-1.5, 1.2), rng.uniform(7, 13), rare))
    else:
        cast.append((right - 1.5 if rng.random() < 0.5 else left + 1.6, rng.uniform(13, 24), rare))
    busy = cast[0]
    for x in (left + 1.1, right - 1.1):  # parked
        for z in np.arange(rng.uniform(5, 12), 70, 6.2):
            if rng.random() < 0.55 and not _near(busy, x, z, 11):
                cast.append((x + rng.uniform(-0.15, 0.15), z, actors.car))
    for x in (-abs(lane) - 0.8, right / 2 - 0.6):  # driving
        for z in np.arange(rng.uniform(14, 26), 90, 16):
            if rng.random() < 0.6 and not _near(busy, x, z, 12):
                cast.append((x + rng.uniform(-0.3, 0.3), z, actors.car))
    for kind, chance in ((actors.truck, 0.25), (actors.bus, 0.25), (actors.motorcyclist, 0.4)):
        if rng.random() < chance:
            cast.append((rng.uniform(left * 0.5, right * 0.3), rng.uniform(30, 55), kind))
    return [*cast, *_walkers(rng, street), *_posts(rng, street)]


def _near(other: Actor, x: float, z: float, meters: float) -> bool:
    return abs(other[0] - x) < 2.4 and -meters < z - other[1] < meters * 1.5


def _walkers(rng: np.random.Generator, street: Street) -> list[Actor]:
    cast: list[Actor] = []
    for side in (0, 1):
        inner, outer, _ = street.edges(side)
        for _ in range(int(rng.integers(2, 7))):
            cast.append((inner + (outer - inner) * rng.random(), rng.uniform(8, 34), actors.person))
        if rng.random() < 0.6:
            cast.append((inner * 0.85 + outer * 0.15, rng.uniform(8, 18), actors.bicycle))
    for _ in range(int(rng.integers(1, 4))):
        x = rng.choice([street.road[0] + 2.6, street.road[1] - 2.4]) + rng.uniform(-0.3, 0.3)
        cast.append((x, rng.uniform(8, 20), actors.cyclist))
    if rng.random() < 0.3:  # a person crosses
        cast.append((rng.uniform(-2, 2), rng.uniform(12, 25), actors.person))
    return cast


def _posts(rng: np.random.Generator, street: Street) -> list[Actor]:
    cast: list[Actor] = []
    for side, out in ((0, -1), (1, 1)):
        kerb = street.road[side] + out * 0.45
        cast += [(kerb, z, actors.lamp_post) for z in np.arange(rng.uniform(9, 18), 80, 20)]
        lawn = (street.walk[side] + street.line[side]) / 2
        cast += [(lawn, z, street_tree) for z in rng.uniform(8, 60, int(rng.integers(0, 4)))]
        cast += [(kerb, rng.uniform(9, 30), actors.traffic_light)]
        cast += [(kerb + out * 0.2, z, actors.sign) for z in rng.uniform(8, 36, int(rng.integers(1, 4)))]
    return cast


def _own_car(canvas: Canvas, rng: np.random.Generator) -> None:
    """Draw the hood of the ego vehicle and, in most scenes, a border with the id ``out of roi`` in the label."""
    height, width = canvas.label.shape
    top, x = height * rng.uniform(0.90, 0.94), np.linspace(0, width, 32)
    edge = top + (height - top) * (2 * np.abs(x / width - 0.5)) ** 3 * 0.9
    outline = np.array([*zip(x, edge, strict=True), (width, height), (0, height)])
    brush, paint = canvas.brush("ego vehicle", 0.0), rng.uniform(18, 60)
    brush.fill(np.rint(outline).astype(np.int32), np.full(3, paint))
    outline[:32, 1] += height * 0.02
    brush.fill(np.rint(outline).astype(np.int32), np.full(3, paint * 1.5))
    if rng.random() < 0.8:
        border = max(height // 128, 1)
        inside = canvas.label[border : height - border, border : width - border].copy()
        canvas.label[:] = ID["out of roi"]
        canvas.label[border : height - border, border : width - border] = inside


def _light(canvas: Canvas, rng: np.random.Generator) -> None:
    """Add texture noise, uneven lighting, a color cast and slight blur to the image."""
    height, width = size = canvas.label.shape
    strength = np.full((2, 256), 3, np.float32)
    for name, pair in GRAIN.items():
        strength[:, ID[name]] = pair
    fine = rng.standard_normal(size, np.float32)
    small = rng.standard_normal((max(height // 5, 2), max(width // 5, 2)), np.float32)
    coarse = cv2.resize(small, (width, height), interpolation=cv2.INTER_LINEAR)
    grain = fine * strength[0][canvas.label] + coarse * strength[1][canvas.label]
    broad = cv2.resize(rng.uniform(0.86, 1.1, (3, 4)).astype(np.float32), (width, height))
    gain = broad * np.float32(rng.uniform(0.8, 1.12))
    tint = rng.uniform(0.95, 1.05, 3).astype(np.float32)
    lit = (canvas.image + grain[..., None]) * (gain[..., None] * tint)
    canvas.image = cv2.GaussianBlur(np.clip(lit, 0, 255).astype(np.uint8), (3, 3), 0.6)
