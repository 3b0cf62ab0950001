"""Objects in a street: vehicles, people, cycles, and poles with lights and signs."""

from dataclasses import dataclass

import numpy as np

from ocrnet.data.datasets.street.canvas import Brush, Canvas, Color

PAINT = ((172, 30, 32), (34, 58, 122), (206, 208, 210), (38, 40, 44), (128, 132, 136), (28, 92, 74), (188, 160, 106))
CLOTHES = ((154, 44, 48), (44, 58, 104), (38, 38, 42), (182, 176, 160), (60, 96, 66), (120, 72, 104), (196, 140, 58))
SKIN = ((226, 184, 152), (186, 136, 102), (120, 82, 60))
GLASS, TYRE, CHROME = np.array((44, 54, 64)), np.array((26, 26, 28)), np.array((190, 192, 194))


@dataclass(frozen=True)
class Box:
    """Bounding box of a vehicle: its center x, near z, width, height and length in meters."""

    x: float
    z: float
    width: float
    height: float
    length: float

    @property
    def sides(self) -> tuple[float, float]:
        """Left and right x."""
        return self.x - self.width / 2, self.x + self.width / 2

    @property
    def visible_side(self) -> float:
        """The x of the long side that is visible from the camera."""
        return self.sides[0] if self.x > 0 else self.sides[1]

    @property
    def ends(self) -> tuple[float, float]:
        """Near and far z."""
        return self.z, self.z + self.length


def shadow(canvas: Canvas, box: Box) -> None:
    """Darken the ground under a vehicle in the image; the label is unchanged."""
    brush, (left, right), (near, far) = canvas.brush("road", box.z), box.sides, box.ends
    corners = [(left - 0.1, 0, near), (right + 0.1, 0, near), (right + 0.1, 0, far), (left - 0.1, 0, far)]
    below = canvas.label.copy()
    brush.polygon(corners, (40, 40, 44))
    canvas.label[:] = below


def car(canvas: Canvas, rng: np.random.Generator, x: float, z: float) -> None:
    """Draw a parked or moving car: lower body, cabin, windows, wheels, lights, plate.

    Args:
        canvas: Canvas to draw on.
        rng: Random generator of the scene.
        x: Lateral position in meters, positive to the right.
        z: Distance in meters.
    """
    box = Box(x, z, rng.uniform(1.7, 1.85), rng.uniform(1.42, 1.62), rng.uniform(3.9, 4.6))
    shadow(canvas, box)
    brush, paint = canvas.brush("car", z), rng.choice(PAINT) * rng.uniform(0.85, 1.15)
    (left, right), (near, far), waist = box.sides, box.ends, box.height * 0.6
    _wheels(brush, box, 0.32)
    brush.panel(box.visible_side, (0.25, waist), box.ends, paint * 0.8)
    inset = 0.14 if box.visible_side == left else -0.14
    cabin = [
        (box.visible_side, waist, near + 0.1),
        (box.visible_side, waist, far - 1.0),
        (box.visible_side + inset, box.height, far - 1.9),
        (box.visible_side + inset, box.height, near + 0.7),
    ]
    brush.polygon(cabin, GLASS * 1.1)
    brush.upright([left, right, right - 0.14, left + 0.14], [waist, waist, box.height, box.height], near, paint * 1.05)
    glass = [waist + 0.04, waist + 0.04, box.height - 0.08, box.height - 0.08]
    brush.upright([left + 0.12, right - 0.12, right - 0.24, left + 0.24], glass, near, GLASS)
    brush.plate((left, right), (0.22, waist), near, paint)
    brush.plate((left, right), (0.22, 0.38), near, paint * 0.5)
    lamp = (196, 30, 26) if x > 0 else (236, 232, 206)
    for side in (left, right - 0.3):
        brush.plate((side, side + 0.3), (waist - 0.26, waist - 0.08), near, lamp)
    brush.plate((x - 0.26, x + 0.26), (0.42, 0.54), near, (222, 222, 214))


def truck(canvas: Canvas, rng: np.random.Generator, x: float, z: float) -> None:
    """Draw a truck: a tall box behind a colored cab, a dark frame and wheels.

    Args:
        canvas: Canvas to draw on.
        rng: Random generator of the scene.
        x: Lateral position in meters, positive to the right.
        z: Distance in meters.
    """
    box = Box(x, z, 2.5, rng.uniform(3.2, 3.8), rng.uniform(7, 9))
    shadow(canvas, box)
    brush, cab = canvas.brush("truck", z), rng.choice(PAINT[:3]) * 1.0
    load = rng.choice([(224, 222, 214), (92, 118, 160), (196, 170, 92)]) * rng.uniform(0.9, 1.08)
    left, right = box.sides
    _wheels(brush, box, 0.5)
    brush.panel(box.visible_side, (0.45, box.height - 0.5), (z + box.length, z + box.length + 2), cab * 0.9)
    brush.panel(box.visible_side, (1.0, box.height), box.ends, load * 0.8)
    brush.panel(box.visible_side, (0.5, 1.0), box.ends, (52, 52, 54))
    for y in np.arange(1.4, box.height, 0.6):
        brush.panel(box.visible_side, (y, y + 0.05), box.ends, load * 0.68)
    brush.plate((left, right), (0.5, box.height), z, load)
    brush.plate((left, right), (0.5, 1.0), z, (58, 58, 60))
    brush.plate((x - 0.03, x + 0.03), (1.0, box.height), z, load * 0.6)
    brush.plate((left, left + 0.3), (0.7, 0.9), z, (190, 40, 32))
    brush.plate((right - 0.3, right), (0.7, 0.9), z, (190, 40, 32))


def bus(canvas: Canvas, rng: np.random.Generator, x: float, z: float) -> None:
    """Draw a city bus: one color, a long band of windows, a destination sign.

    Args:
        canvas: Canvas to draw on.
        rng: Random generator of the scene.
        x: Lateral position in meters, positive to the right.
        z: Distance in meters.
    """
    box = Box(x, z, 2.5, 3.0, rng.uniform(9, 12))
    paint = rng.choice([(204, 40, 36), (220, 160, 30), (198, 60, 90)]) * rng.uniform(0.9, 1.08)
    _coach(canvas.brush("bus", z), canvas, box, (paint, paint * 0.86))


def train(canvas: Canvas, rng: np.random.Generator, x: float, z: float) -> None:
    """Draw a tram, which has the class train: two colors, very long, a pantograph on the roof.

    Args:
        canvas: Canvas to draw on.
        rng: Random generator of the scene.
        x: Lateral position in meters, positive to the right.
        z: Distance in meters.
    """
    box = Box(x, z, 2.5, 3.5, rng.uniform(20, 30))
    brush = canvas.brush("train", z)
    paint = rng.choice([(40, 122, 84), (36, 96, 142), (86, 150, 150)]) * rng.uniform(0.9, 1.08)
    _coach(brush, canvas, box, (np.array((228, 228, 216)), paint))
    for joint in np.arange(z + 7, z + box.length, 7)[::-1]:
        brush.panel(box.visible_side, (0.4, box.height), (joint, joint + 0.5), (60, 62, 66))
    brush.stroke([(x - 0.8, box.height, z + 4), (x, box.height + 1.1, z + 4), (x + 0.8, box.height, z + 4)], 0.1, TYRE)


def _coach(brush: Brush, canvas: Canvas, box: Box, paint: tuple[np.ndarray, np.ndarray]) -> None:
    shadow(canvas, box)
    (left, right), top, (upper, lower) = box.sides, box.height, paint
    _wheels(brush, box, 0.45)
    brush.panel(box.visible_side, (0.3, top), box.ends, upper * 0.82)
    brush.panel(box.visible_side, (0.3, 1.2), box.ends, lower * 0.82)
    for begin in np.arange(box.z + 0.4, box.z + box.length - 1.2, 1.5)[::-1]:
        brush.panel(box.visible_side, (1.35, top - 0.6), (begin, begin + 1.3), GLASS * 1.2)
    brush.plate((left, right), (0.3, top), box.z, upper)
    brush.plate((left, right), (0.3, 1.2), box.z, lower)
    brush.plate((left + 0.15, right - 0.15), (1.25, top - 0.65), box.z, GLASS)
    brush.plate((left + 0.5, right - 0.5), (top - 0.5, top - 0.15), box.z, (236, 176, 40))
    for side in (left + 0.1, right - 0.45):
        brush.plate((side, side + 0.35), (0.55, 0.8), box.z, (244, 236, 204))


def _wheels(brush: Brush, box: Box, radius: float) -> None:
    left, right = box.sides
    for x in (left, right - 0.22):
        brush.plate((x, x + 0.22), (0, radius * 2), box.z + 0.3, TYRE)
    for part in (0.82, 0.2):
        z = box.z + box.length * part
        squeeze = min(abs(box.visible_side) / z + 0.15, 1.0)
        brush.disc((box.visible_side, radius, z), radius, TYRE, squeeze=squeeze)
        brush.disc((box.visible_side, radius, z), radius * 0.5, CHROME * 0.7, squeeze=squeeze)


def person(canvas: Canvas, rng: np.random.Generator, x: float, z: float) -> None:
    """Draw a standing or walking person: legs, torso, arms, head, hair.

    Args:
        canvas: Canvas to draw on.
        rng: Random generator of the scene.
        x: Lateral position in meters, positive to the right.
        z: Distance in meters.
    """
    brush, tall = canvas.brush("person", z), rng.uniform(1.5, 1.9)
    trousers, coat = rng.choice(CLOTHES) * 0.8, rng.choice(CLOTHES) * 1.1
    stride, hip, neck = rng.uniform(0.05, 0.32), tall * 0.48, tall * 0.84
    for foot in (x - stride, x + stride):
        legs = [x - 0.13, x + 0.13, foot + 0.1, foot - 0.08]
        brush.upright(legs, [hip, hip, 0, 0], z, trousers)
    for arm in (-1, 1):
        hand = x + arm * (0.26 + stride * 0.5)
        brush.stroke([(x + arm * 0.2, neck - 0.06, z), (hand, hip - 0.02, z)], 0.1, coat * 0.8)
    brush.upright([x - 0.19, x + 0.19, x + 0.23, x - 0.23], [hip - 0.08, hip - 0.08, neck, neck], z, coat)
    _head(brush, rng, (x, neck + 0.13, z), (52, 40, 32))


def _head(brush: Brush, rng: np.random.Generator, position: tuple[float, float, float], cap: Color) -> None:
    x, y, z = position
    brush.disc((x, y, z), 0.14, cap, squeeze=0.85)
    brush.disc((x, y - 0.04, z), 0.09, rng.choice(SKIN), squeeze=0.85)


def cyclist(canvas: Canvas, rng: np.random.Generator, x: float, z: float) -> None:
    """Draw a person on a bicycle, from the side or nearly from behind.

    Args:
        canvas: Canvas to draw on.
        rng: Random generator of the scene.
        x: Lateral position in meters, positive to the right.
        z: Distance in meters.
    """
    across = rng.uniform(0.45, 1.0) * rng.choice([-1.0, 1.0])
    bicycle(canvas, rng, x, z, across=across)
    _rider(canvas, rng, (x, z), across, rng.uniform((196, 60, 30), (250, 200, 90)))


def bicycle(canvas: Canvas, rng: np.random.Generator, x: float, z: float, *, across: float | None = None) -> None:
    """Draw a bicycle: two wheels with spokes, a frame, handlebars.

    Args:
        canvas: Canvas to draw on.
        rng: Random generator of the scene.
        x: Lateral position in meters, positive to the right.
        z: Distance in meters.
        across: Horizontal scale factor of its length, negative if mirrored; None: random.
    """
    across = rng.uniform(0.5, 1.0) if across is None else across
    brush, paint = canvas.brush("bicycle", z), rng.choice(PAINT) * 1.2
    for hub in (-0.52, 0.52):
        spot = (x + hub * across, 0.34, z)
        brush.disc(spot, 0.34, TYRE * 1.3, squeeze=abs(across))
        brush.disc(spot, 0.27, (112, 112, 112), squeeze=abs(across))
        brush.disc(spot, 0.06, CHROME, squeeze=abs(across))
    frame = [(-0.52, 0.34), (-0.12, 0.34), (0.38, 0.82), (-0.2, 0.82), (-0.12, 0.34), (-0.2, 0.82), (-0.52, 0.34)]
    brush.stroke([(x + dx * across, y, z) for dx, y in frame], 0.07, paint)
    bars = [(0.52, 0.34), (0.38, 0.82), (0.34, 1.02), (0.5, 1.04)]
    brush.stroke([(x + dx * across, y, z) for dx, y in bars], 0.06, TYRE)


def motorcyclist(canvas: Canvas, rng: np.random.Generator, x: float, z: float) -> None:
    """Draw a motorcycle, with a rider or parked: wide wheels, tank, seat, lamp.

    Args:
        canvas: Canvas to draw on.
        rng: Random generator of the scene.
        x: Lateral position in meters, positive to the right.
        z: Distance in meters.
    """
    across = rng.uniform(0.5, 1.0) * rng.choice([-1.0, 1.0])
    brush, paint = canvas.brush("motorcycle", z), rng.choice(PAINT[:2]) * 1.2
    for hub in (-0.7, 0.7):
        brush.disc((x + hub * across, 0.34, z), 0.35, TYRE, squeeze=max(abs(across), 0.6))
        brush.disc((x + hub * across, 0.34, z), 0.14, CHROME, squeeze=max(abs(across), 0.6))
    body = [(-0.85, 0.8), (-0.6, 0.45), (0.4, 0.4), (0.75, 0.85), (0.4, 1.08), (0.05, 0.98), (-0.2, 0.82)]
    brush.upright([x + dx * across for dx, _ in body], [y for _, y in body], z, paint)
    brush.upright([x + dx * across for dx in (-0.35, 0.3, 0.2, -0.3)], [0.3, 0.3, 0.58, 0.58], z, CHROME * 0.6)
    brush.stroke([(x + dx * across, y, z) for dx, y in ((0.7, 0.34), (0.5, 1.0), (0.35, 1.14))], 0.1, CHROME)
    brush.disc((x + 0.62 * across, 0.88, z), 0.1, (244, 236, 190))
    if rng.random() < 0.7:
        _rider(canvas, rng, (x, z), across, (34, 34, 40))


def _rider(
    canvas: Canvas, rng: np.random.Generator, position: tuple[float, float], across: float, helmet: Color
) -> None:
    x, z = position
    brush, coat, trousers = canvas.brush("rider", z), rng.choice(CLOTHES) * 1.1, rng.choice(CLOTHES) * 0.8
    for knee, foot in (((0.18, 0.66), (-0.02, 0.26)), ((0.06, 0.5), (-0.16, 0.14))):
        leg = [(-0.2, 0.92), knee, foot]
        brush.stroke([(x + dx * across, y, z) for dx, y in leg], 0.15, trousers)
    torso = [(-0.32, 0.86), (-0.08, 0.86), (0.24, 1.4), (0.0, 1.48)]
    brush.upright([x + dx * across for dx, _ in torso], [y for _, y in torso], z, coat)
    brush.stroke([(x + 0.1 * across, 1.36, z), (x + 0.2 * across, 1.12, z), (x + 0.4 * across, 1.04, z)], 0.1, coat)
    _head(brush, rng, (x + 0.18 * across, 1.6, z), helmet)


def lamp_post(canvas: Canvas, rng: np.random.Generator, x: float, z: float) -> None:
    """Draw a street lamp that extends over the road.

    Args:
        canvas: Canvas to draw on.
        rng: Random generator of the scene.
        x: Lateral position in meters, positive to the right.
        z: Distance in meters.
    """
    brush, metal, tall = canvas.brush("pole", z), rng.uniform(92, 136) + np.array((0, 2, 4)), rng.uniform(5, 7)
    over = -np.sign(x) * 1.4
    brush.plate((x - 0.08, x + 0.08), (0, tall), z, metal)
    brush.plate((x - 0.13, x + 0.13), (0, 0.9), z, metal * 0.85)
    brush.stroke([(x, tall, z), (x + over, tall + 0.3, z)], 0.1, metal)
    brush.stroke([(x + over * 0.7, tall + 0.22, z), (x + over, tall + 0.3, z)], 0.2, metal * 1.2)


def traffic_light(canvas: Canvas, rng: np.random.Generator, x: float, z: float) -> None:
    """Draw a traffic light with one of three lamps lit.

    Args:
        canvas: Canvas to draw on.
        rng: Random generator of the scene.
        x: Lateral position in meters, positive to the right.
        z: Distance in meters.
    """
    canvas.brush("pole", z).plate((x - 0.07, x + 0.07), (0, 2.5), z, (84, 86, 88))
    brush, lit = canvas.brush("traffic light", z), int(rng.integers(3))
    brush.plate((x - 0.22, x + 0.22), (2.3, 3.4), z, (28, 32, 30))
    for i, lamp in enumerate(((40, 220, 120), (250, 190, 40), (240, 40, 36))):
        brush.disc((x, 2.52 + 0.34 * i, z), 0.14, np.array(lamp) * (1.0 if i == lit else 0.3))


def sign(canvas: Canvas, rng: np.random.Generator, x: float, z: float) -> None:
    """Draw a traffic sign: round, triangular, square or octagonal.

    Args:
        canvas: Canvas to draw on.
        rng: Random generator of the scene.
        x: Lateral position in meters, positive to the right.
        z: Distance in meters.
    """
    top = rng.uniform(2.3, 2.9)
    canvas.brush("pole", z).plate((x - 0.04, x + 0.04), (0, top), z, (140, 142, 144))
    brush, sides, size = canvas.brush("traffic sign", z), int(rng.choice([3, 4, 8, 30])), rng.uniform(0.38, 0.5)
    rim, field = {
        3: ((206, 32, 36), (240, 236, 226)),
        4: ((236, 236, 232), (28, 82, 172)),
        8: ((240, 238, 234), (200, 26, 34)),
        30: ((210, 30, 34), (240, 240, 236)),
    }[sides]
    angle = np.arange(sides) * 2 * np.pi / sides + (np.pi / 2 if sides == 3 else np.pi / sides)
    for part, color in ((1.0, rim), (0.74, field)):
        brush.upright(x + size * part * np.cos(angle), top + size * part * np.sin(angle), z, color)
    brush.plate((x - 0.12, x + 0.12), (top - 0.06, top + 0.06), z, (38, 38, 44) if sides in (3, 30) else rim)
