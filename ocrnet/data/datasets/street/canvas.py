"""A canvas that draws every shape in both image and label, without antialiasing, so that both match exactly."""

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from ocrnet.data.datasets.cityscapes import LABELS

ID = {label.name: label.id for label in LABELS}

Color = Sequence[float] | np.ndarray  # R, G, B, 0 to 255
Points = Sequence[Sequence[float]] | np.ndarray  # meters: x to the right, y up from the road, z ahead

_HAZE_METERS = 160.0  # distance at which the share of the own color has dropped to 1/e
_FAR = 30_000  # pixels; the integer part of cv2 coordinates has 16 bits


@dataclass(frozen=True)
class Camera:
    """Pinhole camera above the road: pixel = center + focal * (x + bend z^2, height - y) / z."""

    focal: float  # pixels
    center: tuple[float, float]  # row of the horizon, column of the vanishing point
    height: float = 1.5  # meters
    bend: float = 0.0  # 1/meters: curvature of the street

    def project(self, points: Points) -> np.ndarray:
        """Project points N,3 in meters to int32 N,2 pixels, column first as in OpenCV."""
        x, y, z = np.asarray(points, np.float64).T
        column = self.center[1] + self.focal * (x + self.bend * z * z) / z
        row = self.center[0] + self.focal * (self.height - y) / z
        return np.rint(np.stack([column, row], 1).clip(-_FAR, _FAR)).astype(np.int32)


class Canvas:
    """A scene that is being drawn: ``image`` uint8 H,W,3 RGB and ``label`` uint8 H,W of Cityscapes ids."""

    def __init__(self, size: tuple[int, int], camera: Camera, haze: Color) -> None:
        self.image, self.label = np.zeros((*size, 3), np.uint8), np.full(size, ID["sky"], np.uint8)
        self.camera, self.haze = camera, np.asarray(haze, np.float64)

    def brush(self, name: str, meters: float) -> "Brush":
        """Return the brush for one class at one distance in meters."""
        return Brush(self, ID[name], meters)


class Brush:
    """Draws shapes of one class at one distance; coordinates are in meters, and colors fade to the haze color."""

    def __init__(self, canvas: Canvas, label: int, meters: float) -> None:
        self.canvas, self.label = canvas, label
        self.fade = 1 - float(np.exp(-meters / _HAZE_METERS))

    def polygon(self, points: Points, color: Color) -> None:
        """Fill a polygon N,3 given in meters."""
        self.fill(self.canvas.camera.project(points), color)

    def upright(self, x: Sequence[float], y: Sequence[float], z: float, color: Color) -> None:
        """Fill a polygon that faces the camera.

        Args:
            x: Lateral positions of the corners in meters.
            y: Heights of the corners in meters.
            z: Distance in meters.
            color: RGB color.
        """
        self.polygon(np.stack([x, y, np.full(len(x), z)], 1), color)

    def panel(self, x: float, y: tuple[float, float], z: tuple[float, float], color: Color) -> None:
        """Fill a rectangle that runs along the street.

        Args:
            x: Lateral position in meters.
            y: Lower and upper height in meters.
            z: Near and far distance in meters.
            color: RGB color.
        """
        self.polygon([(x, y[0], z[0]), (x, y[1], z[0]), (x, y[1], z[1]), (x, y[0], z[1])], color)

    def plate(self, x: tuple[float, float], y: tuple[float, float], z: float, color: Color) -> None:
        """Fill a rectangle that faces the camera, at least one pixel wide.

        Args:
            x: Two lateral positions in meters.
            y: Lower and upper height in meters.
            z: Distance in meters.
            color: RGB color.
        """
        self.upright([x[0], x[1], x[1], x[0]], [y[0], y[0], y[1], y[1]], z, color)

    def disc(self, center: tuple[float, float, float], radius: float, color: Color, *, squeeze: float = 1.0) -> None:
        """Fill a disc that faces the camera.

        Args:
            center: Position x, y, z in meters.
            radius: Radius in meters.
            color: RGB color.
            squeeze: Factor on the horizontal radius.
        """
        pixels = self.canvas.camera.focal * radius / center[2]
        middle = self.canvas.camera.project([center])[0]
        axes = (max(round(pixels * squeeze), 1), max(round(pixels), 1))
        for layer, value in self._layers(color):
            cv2.ellipse(layer, middle.tolist(), axes, 0, 0, 360, value, cv2.FILLED, cv2.LINE_8)

    def stroke(self, points: Points, width: float, color: Color) -> None:
        """Draw a line.

        Args:
            points: Points N,3 in meters.
            width: Thickness at the first point in meters; at least one pixel is drawn.
            color: RGB color.
        """
        pixels = max(round(self.canvas.camera.focal * width / points[0][2]), 1)
        line = self.canvas.camera.project(points)
        for layer, value in self._layers(color):
            cv2.polylines(layer, [line], False, value, pixels, cv2.LINE_8)

    def fill(self, pixels: np.ndarray, color: Color) -> None:
        """Fill a polygon of int32 N,2 pixels, column first."""
        for layer, value in self._layers(color):
            cv2.fillPoly(layer, [pixels], value, cv2.LINE_8)

    def _layers(self, color: Color) -> list[tuple[np.ndarray, Sequence[float]]]:
        faded = np.asarray(color, np.float64) * (1 - self.fade) + self.canvas.haze * self.fade
        return [(self.canvas.image, faded.clip(0, 255).tolist()), (self.canvas.label, [float(self.label)])]
