"""
Loads the model that a run exported, asks it for four phrases on a picture that the run never saw and saves the
answers: a word, a pair of words that training never combined, three words, and a phrase that means nothing there.

    python training/demo.py outputs/demo

For runs on composed pictures (training/configs/demo.yaml).
"""

import argparse
import logging
from pathlib import Path

from PIL import Image

from sam3_hf import Sam3LitePipeline
from sam3_hf.data.composed import compose, phrases_of_object
from sam3_hf.data.words import SEEN_PHRASES, UNSEEN_PHRASES
from sam3_hf.visualization import contact_sheet, draw_instances

logger = logging.getLogger(__name__)

SEED = 12  # no run draws with it
PIXELS = 384  # of its longer side
FIRST = 84  # index of a picture; none before has all that is asked for, and each takes a tenth of a second to draw
CONFIDENT = 0.5  # a model this small is often half sure of the wrong thing


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output_dir", type=Path, help="output folder of a finished run on composed pictures")
    folder = parser.parse_args(argv).output_dir
    logging.basicConfig(level=logging.INFO, format="%(message)s")

    pipe = Sam3LitePipeline.from_pretrained(folder / "final")
    image, asked = picture_and_phrases()
    found = pipe(image, list(asked), threshold=CONFIDENT)
    answers, titles = [], []
    for phrase, true in asked.items():
        own = found.select([index for index, label in enumerate(found.labels) if label == phrase])
        titles.append(f'"{phrase}": {len(own)} found, {true} there')
        logger.info("%s", titles[-1])
        answers.append(draw_instances(image, own.boxes, own.masks, own.labels, own.scores, tag_labels=False))
    picture = folder / "segmented.png"
    contact_sheet(answers, titles, {}, columns=len(answers)).save(picture)
    logger.info("drawn in %s", picture)


def picture_and_phrases() -> tuple[Image.Image, dict[str, int]]:
    """A picture, and four phrases with the number of objects that each of them means."""
    for index in range(FIRST, 1000):
        pixels, objects = compose("unseen", index, PIXELS, SEED)
        meant = [phrase for painted in objects for phrase in phrases_of_object(painted)]
        new_pair = next((phrase for phrase in meant if phrase in UNSEEN_PHRASES and phrase.count(" ") == 1), None)
        if new_pair is None:
            continue
        shape = new_pair.split()[-1]
        word = next((phrase for phrase in meant if phrase.count(" ") == 0 and meant.count(phrase) > 1), None)
        three = next((phrase for phrase in meant if phrase in SEEN_PHRASES and phrase.count(" ") == 2), None)
        absent = next(p for p in SEEN_PHRASES if p.count(" ") == 1 and p.endswith(shape) and p not in meant)
        if word and three and word not in (shape, three.split()[-1]):
            return Image.fromarray(pixels), {phrase: meant.count(phrase) for phrase in (word, new_pair, three, absent)}
    raise RuntimeError("none of the pictures up to 1000 has objects for a word, a new pair of words and three words")


if __name__ == "__main__":
    main()
