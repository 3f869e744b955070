"""Which concepts an image is asked for in a training step: present ones, absent ones, and boxes as prompts.

Box noise and the word for prompts without text are those of SAM 3's published training code (RandomizeInputBbox with
box_noise_std 0.1 and box_noise_max 20 at 1008 pixels; TextQueryToVisual), as is the limit of 200 objects per prompt
(max_ann_per_img).
"""

from dataclasses import dataclass

import numpy as np

from ..configuration_sam3_lite import VISUAL_PHRASE

BOX_NOISE = 0.1  # deviation of each edge, as a share of the box's width or height
LARGEST_BOX_NOISE = 20 / 1008  # share of the canvas that no edge is moved beyond
BOX_WITHOUT_TEXT = 0.5  # share of the box prompts whose text is replaced; the others keep it


@dataclass(frozen=True)
class PromptSampling:
    """How prompts are drawn for an image.

    Attributes:
        prompts_per_image: at most so many, at least 1.
        negative_ratio: share of them, 0 to 1, that asks for absent concepts; slots that present concepts leave empty
            stay empty, those that absent ones leave empty go to present ones. An image that would get no prompt gets a
            negative one.
        box_prompt_probability: chance, 0 to 1, that a prompt for a present concept gets a jittered box of one of its
            objects, half of the time instead of its text.
        negative_words: phrases that are in no image, for further negatives.
        negative_words_ratio: share of the negatives, 0 to 1, that are drawn from them; the others are absent
            categories, which a model tells from present ones by the image alone.
        max_objects: a concept with more objects in the image is not asked for.

    Raises:
        ValueError: a value is out of its range.
    """

    prompts_per_image: int = 8
    negative_ratio: float = 0.5
    box_prompt_probability: float = 0.0
    negative_words: tuple[str, ...] = ()
    negative_words_ratio: float = 0.5
    max_objects: int = 200

    def __post_init__(self):
        for name in ("prompts_per_image", "max_objects"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("negative_ratio", "negative_words_ratio", "box_prompt_probability"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be from 0 to 1, got {getattr(self, name)}")


@dataclass(frozen=True)
class Prompt:
    """One prompt of an image.

    Attributes:
        phrase: text, or "visual".
        concept: position among the dataset's concepts; None for a negative word.
        objects: positions of its objects in the row; empty for a negative.
        box: (4,) xyxy in pixels of the canvas, or None.
    """

    phrase: str
    concept: int | None
    objects: tuple[int, ...]
    box: np.ndarray | None = None


def image_rng(seed: int, epoch: int, index: int) -> np.random.Generator:
    """The source of all that is random for one image in one epoch: the same whichever worker makes it, and when."""
    return np.random.default_rng([seed, epoch, index])


def draw_prompts(
    objects_by_concept: dict[int, list[int]],
    barred: set[int],
    concepts: list[str],
    sampling: PromptSampling,
    rng: np.random.Generator,
) -> list[Prompt]:
    """Draws the prompts of one image, present concepts first.

    Args:
        objects_by_concept: {concept: positions of its objects in the row}, crowd regions left out.
        barred: concepts that count neither as present nor as absent (crowd regions).
        concepts: phrase of each concept.
    """
    too_many = {key for key, objects in objects_by_concept.items() if len(objects) > sampling.max_objects}
    present = [concept for concept in objects_by_concept if concept not in too_many]
    absent = [
        concept for concept in range(len(concepts)) if concept not in objects_by_concept and concept not in barred
    ]
    slots, words = sampling.prompts_per_image, list(sampling.negative_words)
    wanted = slots * sampling.negative_ratio
    negatives = min(int(wanted + rng.random()), len(absent) + len(words))  # rounded up or down by chance
    positives = min(slots - negatives, len(present))
    if positives + negatives == 0 and absent + words:
        negatives = 1
    chosen = [present[index] for index in rng.permutation(len(present))[:positives]]
    prompts = [Prompt(concepts[concept], concept, tuple(objects_by_concept[concept])) for concept in chosen]
    absent = [absent[index] for index in rng.permutation(len(absent))]
    words = [words[index] for index in rng.permutation(len(words))]
    for _ in range(negatives):
        if absent and (not words or rng.random() < 1 - sampling.negative_words_ratio):
            concept = absent.pop()
            prompts.append(Prompt(concepts[concept], concept, ()))
        else:
            prompts.append(Prompt(words.pop(), None, ()))
    return prompts


def draw_box(boxes: np.ndarray, canvas: int, rng: np.random.Generator) -> np.ndarray:
    """A jittered box around one of the objects.

    Args:
        boxes: (n, 4) xyxy in pixels of the canvas, n at least 1.
        canvas: side in pixels.

    Returns:
        (4,) xyxy in pixels, inside of the canvas; as it was if the noise leaves no area.
    """
    box = boxes[rng.integers(len(boxes))]
    sides = np.tile(box[2:] - box[:2], 2)
    limit = LARGEST_BOX_NOISE * canvas
    noise = np.clip(BOX_NOISE * rng.standard_normal(4) * sides, -limit, limit)
    jittered = np.clip(box + noise, 0, canvas)
    return jittered if (jittered[2:] > jittered[:2]).all() else box


def add_box(prompt: Prompt, boxes: np.ndarray, canvas: int, rng: np.random.Generator) -> Prompt:
    """The prompt with a box of one of its objects, with or instead of its text.

    Args:
        boxes: (n, 4) xyxy in pixels of the canvas, of the prompt's objects.
    """
    phrase = VISUAL_PHRASE if rng.random() < BOX_WITHOUT_TEXT else prompt.phrase
    return Prompt(phrase, prompt.concept, prompt.objects, draw_box(boxes, canvas, rng))
