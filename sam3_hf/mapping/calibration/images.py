"""Images to calibrate with: the user's, or drawn ones where there are none."""

import math
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS

from ...reading import read_image


def load_pixels(images: str | os.PathLike | Sequence, count: int, processor, seed: int) -> tuple[Tensor, ...]:
    """
    A random choice of images, ready for the model.

    Args:
        images: a folder (searched recursively), or a list of what [`~sam3_hf.reading.read_image`] takes.
        count: how many to take at most.
        processor: of the model.
        seed: of the choice.

    Returns:
        `(3, height, width)` float, one each.

    Raises:
        ValueError: there is no image.
        OSError: an image file cannot be read.
    """
    images = list_images(images)
    chosen = np.random.default_rng(seed).permutation(len(images))[:count]
    return tuple(
        processor.image_processor(read_image(images[i]), return_tensors="pt")["pixel_values"][0] for i in chosen
    )


def list_images(images: str | os.PathLike | Sequence) -> Sequence:
    """
    The image files of a folder (searched recursively), or the list that was given.

    Raises:
        ValueError: there is no image.
    """
    if isinstance(images, (str, os.PathLike)):
        folder = Path(images)
        if not folder.is_dir():
            raise ValueError(f"{folder} is not a folder of images.")
        images = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMG_EXTENSIONS)
        if not images:
            raise ValueError(f"{folder} holds no image file.")
    if not len(images):
        raise ValueError("There are no images to calibrate with.")
    return images


def draw_images(count: int, size: int, seed: int) -> list[Image.Image]:
    """
    Pictures with the statistics of natural ones and no content: by turns dead leaves (opaque discs and boxes whose
    radius has a density of 1/r^3, the law under which the picture looks the same at every scale: Lee, Mumford and
    Huang 2001) and noise with an amplitude of 1/frequency.

    Args:
        size: side in pixels.
    """
    generator = np.random.default_rng(seed)
    return [(_dead_leaves if i % 2 == 0 else _pink_noise)(size, generator) for i in range(count)]


def _dead_leaves(size: int, generator: np.random.Generator) -> Image.Image:
    picture = Image.new("RGB", (size, size), tuple(generator.integers(0, 256, 3).tolist()))
    draw = ImageDraw.Draw(picture)
    smallest, largest = max(size / 50, 1.5), size / 3
    for _ in range(300):
        # Inverse of the distribution function of 1/r^3 between the two radii.
        share = generator.uniform()
        radius = 1 / math.sqrt(share / largest**2 + (1 - share) / smallest**2)
        x, y = generator.uniform(0, size, 2)
        stretch = generator.uniform(0.6, 1.6)
        box = (x - radius * stretch, y - radius / stretch, x + radius * stretch, y + radius / stretch)
        color = tuple(generator.integers(0, 256, 3).tolist())
        (draw.ellipse if generator.uniform() < 0.5 else draw.rectangle)(box, fill=color)
    noise = generator.normal(0, 6, (size, size, 3))
    return Image.fromarray(np.clip(np.asarray(picture) + noise, 0, 255).astype(np.uint8))


def _pink_noise(size: int, generator: np.random.Generator) -> Image.Image:
    frequency = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size)[None])
    frequency[0, 0] = np.inf
    spectrum = np.fft.rfft2(generator.normal(size=(3, size, size))) / frequency
    channels = np.fft.irfft2(spectrum, s=(size, size))
    channels = channels / channels.std(axis=(1, 2), keepdims=True)
    # Channels of photographs are alike: two thirds of the variance is brightness.
    mixed = math.sqrt(2 / 3) * channels.mean(0) * math.sqrt(3) + math.sqrt(1 / 3) * channels
    pixels = generator.uniform(90, 165, (3, 1, 1)) + generator.uniform(30, 60) * mixed
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8).transpose(1, 2, 0))


def batches(pixels: Sequence[Tensor], size: int) -> list[Tensor]:
    """`(at most size, 3, height, width)` each."""
    return [torch.stack(tuple(pixels[start : start + size])) for start in range(0, len(pixels), size)]
