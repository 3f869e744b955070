"""How training pictures are varied: a preset, and what shall differ from it."""

from dataclasses import dataclass
from typing import Literal

from .fields import check_finite, check_range, option

PRESETS = {
    "none": {
        "horizontal_flip": 0.0,
        "vertical_flip": 0.0,
        "rotation": 0.0,
        "crop": 0.0,
        "smallest_crop": 0.5,
        "smallest_side": 1.0,
        "color_jitter": 0.0,
        "mosaic": 0.0,
    },
    "light": {
        "horizontal_flip": 0.5,
        "vertical_flip": 0.0,
        "rotation": 0.0,
        "crop": 0.5,
        "smallest_crop": 0.5,
        "smallest_side": 0.476,
        "color_jitter": 0.2,
        "mosaic": 0.0,
    },
    "strong": {
        "horizontal_flip": 0.5,
        "vertical_flip": 0.0,
        "rotation": 15.0,
        "crop": 0.75,
        "smallest_crop": 0.3,
        "smallest_side": 0.3,
        "color_jitter": 0.4,
        "mosaic": 0.3,
    },
}
CHANCES = ("horizontal_flip", "vertical_flip", "crop", "mosaic")
# What must be as in "none" for pictures to come again as they were, and what more of it if it was asked for.
STILL, STILL_AS_WELL = ("crop", "smallest_side", "color_jitter"), ("rotation", "mosaic")


@dataclass
class AugmentationArguments:
    """How training pictures are varied; what is not given is as in the preset."""

    _argument_group_name = "augmentation (what is not given is as in the preset of --augmentation)"

    augmentation: Literal["none", "light", "strong"] = option(
        "light", "preset; 'strong' also turns pictures by up to 15 degrees and joins four into a mosaic"
    )
    horizontal_flip: float | None = option(
        None, "chance, 0 to 1, that a training image is mirrored; 0 if phrases tell left from right"
    )
    vertical_flip: float | None = option(None, "chance, 0 to 1, that it is upside down; 0 in all presets")
    rotation: float | None = option(
        None,
        "degrees, 0 to 180, that it is turned by at most, to either side; where an object has a box alone, it is not",
    )
    crop: float | None = option(None, "chance, 0 to 1, that only a part of a training image is shown")
    smallest_crop: float | None = option(
        None, "how wide and high that part is at least, as a share of the image, above 0 to 1"
    )
    smallest_side: float | None = option(
        None, "training images are shrunk to at least this share of the model's side, above 0 to 1, and padded"
    )
    color_jitter: float | None = option(
        None, "brightness, contrast and saturation change by up to this share, 0 to below 1"
    )
    mosaic: float | None = option(
        None, "chance, 0 to 1, that four training images are shown at once, each in a quarter; needs labels"
    )

    def __post_init__(self):
        for name, value in PRESETS[self.augmentation].items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        check_finite(self)
        for name in (*CHANCES, "smallest_crop", "smallest_side", "color_jitter"):
            check_range(self, name, 0, 1)
        check_range(self, "rotation", 0, 180)
        for name in ("smallest_crop", "smallest_side"):
            if getattr(self, name) == 0:
                raise ValueError(f"{name} must be above 0: at 0 nothing of an image would be left")
        if self.color_jitter == 1:
            raise ValueError("color_jitter must be below 1: at 1 an image may turn black")

    def settings(self) -> dict[str, float]:
        """What `sam3_hf.data.Augmentation` takes."""
        return {name: getattr(self, name) for name in PRESETS["none"]}

    def check_pictures_come_again(self) -> None:
        """
        Raises:
            ValueError: pictures are varied by more than mirroring; names what to set.
        """
        names = [*STILL, *(name for name in STILL_AS_WELL if getattr(self, name))]
        needed = {name: PRESETS["none"][name] for name in names}
        given = {name: getattr(self, name) for name in names}
        if given != needed:
            raise ValueError(
                f"teacher_cache needs pictures that come again as they were: set {_listed(needed)} "
                f"(now {_listed(given)}), or leave it out"
            )


def _listed(settings: dict) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in settings.items())
