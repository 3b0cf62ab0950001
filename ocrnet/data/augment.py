"""Random scale, crop, flip and color change of an image and its label, both uint8.

The window of the crop is cut out before resizing, so that only the pixels of the crop are computed.
"""

import cv2
import numpy as np

from ocrnet.config import Data

IGNORE = 255

# Ranges of RandomColor in the MindSpore implementation; each change has probability 0.5. By mistake, that
# implementation draws the saturation from the contrast range; here saturation has its own range.
BRIGHTNESS = 32.0
CONTRAST = (0.4, 1.6)
SATURATION = (0.5, 1.5)
HUE = 18


def train(image: np.ndarray, label: np.ndarray, rng: np.random.Generator, data: Data) -> tuple[np.ndarray, np.ndarray]:
    """Return a random training crop with random flip and color.

    Args:
        image: Image, uint8 H,W,3 RGB.
        label: Class indices, uint8 H,W.
        rng: Random generator of the sample.
        data: Augmentation settings.

    Returns:
        Image, uint8 crop_h,crop_w,3 RGB, and label, uint8 crop_h,crop_w (255 where padded).
    """
    image, label = scale_and_crop(image, label, rng, data)
    if data.flip and rng.random() < 0.5:
        image, label = cv2.flip(image, 1), cv2.flip(label, 1)
    if data.color:
        image = vary_color(image, rng)
    return image, label


def scale_and_crop(
    image: np.ndarray, label: np.ndarray, rng: np.random.Generator, data: Data
) -> tuple[np.ndarray, np.ndarray]:
    """Cut out a random window of size crop_size / scale, and resize it to crop_size.

    If the window exceeds the image, the crop is padded with the mean color, and the label with 255.

    Args:
        image: Image, uint8 H,W,3 RGB.
        label: Class indices, uint8 H,W.
        rng: Random generator of the sample.
        data: Augmentation settings.

    Returns:
        Image, uint8 crop_h,crop_w,3 RGB, and label, uint8 crop_h,crop_w (255 where padded).
    """
    scale = rng.uniform(*data.scale_range)
    spans = []
    for axis in (0, 1):
        size, crop = image.shape[axis], data.crop_size[axis]
        axis_scale = scale * (data.base_size[axis] / size if data.base_size else 1)
        spans.append(_span(size, crop, axis_scale, rng))
    (rows, height, top), (columns, width, left) = spans
    image = cv2.resize(image[rows, columns], (width, height), interpolation=cv2.INTER_LINEAR)
    # mutation: resize-labels-nearest-exact
    label = cv2.resize(label[rows, columns], (width, height), interpolation=cv2.INTER_NEAREST_EXACT)
    padding = (top, data.crop_size[0] - top - height, left, data.crop_size[1] - left - width, cv2.BORDER_CONSTANT)
    mean = [round(255 * value) for value in data.mean]
    return cv2.copyMakeBorder(image, *padding, value=mean), cv2.copyMakeBorder(label, *padding, value=[IGNORE])


def _span(size: int, crop: int, scale: float, rng: np.random.Generator) -> tuple[slice, int, int]:
    """Choose the random window along one axis.

    Args:
        size: Number of pixels of the image.
        crop: Number of pixels of the crop.
        scale: Scale factor from image to crop.
        rng: Random generator of the sample.

    Returns:
        The slice of image pixels, the number of crop pixels that they fill, and the index of the first of these.
    """
    window = max(1, round(crop / scale))
    if window <= size:
        start = int(rng.integers(size - window + 1))
        return slice(start, start + window), crop, 0
    filled = min(crop, max(1, round(size * scale)))
    return slice(0, size), filled, int(rng.integers(crop - filled + 1))


def vary_color(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Randomly change brightness, contrast, saturation and hue of a uint8 RGB image.

    The contrast is changed before or after saturation and hue, with equal probability.
    """
    brightness, contrast, saturation, hue = rng.random(4) < 0.5
    contrast_first = rng.random() < 0.5
    shift = rng.uniform(-BRIGHTNESS, BRIGHTNESS)
    gain, saturation_gain = rng.uniform(*CONTRAST), rng.uniform(*SATURATION)
    hue_shift = int(rng.integers(-HUE, HUE + 1))
    if brightness:
        image = _linear(image, 1, shift)
    if contrast and contrast_first:
        image = _linear(image, gain, 0)
    if saturation or hue:
        hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
        table = np.arange(256, dtype=np.int64)[None, :, None].repeat(3, axis=2)
        if hue:
            table[0, :, 0] = (table[0, :, 0] + hue_shift) % 180
        if saturation:
            table[0, :, 1] = np.clip(np.round(table[0, :, 1] * saturation_gain), 0, 255)
        image = cv2.cvtColor(cv2.LUT(hsv, table.astype(np.uint8)), cv2.COLOR_HSV2RGB)
    if contrast and not contrast_first:
        image = _linear(image, gain, 0)
    return image


def _linear(image: np.ndarray, gain: float, shift: float) -> np.ndarray:
    """Return image * gain + shift, rounded and clipped to 0..255."""
    table = np.clip(np.round(np.arange(256) * gain + shift), 0, 255).astype(np.uint8)
    return cv2.LUT(image, table)
