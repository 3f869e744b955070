"""Random rows for the evaluation tests, made from a seed."""

import numpy as np

HEIGHT, WIDTH = 40, 56

# how the (image, concept) pairs of each case are drawn; see `random_pairs`
CASES = {
    "mixed": {"seed": 1, "images": 40, "concepts": 3, "jitter": 2},
    "boundary_scores": {"seed": 2, "images": 20, "concepts": 2, "scores": (0.5, 0.49999, 0.75)},
    "tied": {"seed": 3, "images": 20, "concepts": 3, "scores": (0.9,), "twins": True},
    "crowded": {"seed": 4, "images": 30, "concepts": 2, "crowd": 0.5},
    "only_crowds": {"seed": 5, "images": 10, "concepts": 1, "crowd": 1.0},
    "no_positives": {"seed": 6, "images": 12, "concepts": 2, "present": 0.0},
    "no_negatives": {"seed": 7, "images": 12, "concepts": 2, "present": 1.0},
    "no_predictions": {"seed": 8, "images": 12, "concepts": 2, "found": 0.0, "alarms": 0.0},
    "nothing_confident": {"seed": 9, "images": 12, "concepts": 2, "scores": (0.1, 0.4)},
    "nothing_at_all": {"seed": 10, "images": 6, "concepts": 2, "present": 0.0, "alarms": 0.0},
    "perfect": {
        "seed": 11,
        "images": 12,
        "concepts": 2,
        "found": 1,
        "alarms": 0,
        "crowd": 0,
        "jitter": 0,
        "scores": (1,),
    },
    "one_pair": {"seed": 12, "images": 1, "concepts": 1, "present": 1.0},
}


def random_pairs(
    seed, images, concepts, present=0.6, found=0.8, alarms=0.4, crowd=0.08, jitter=1, scores=None, twins=False
):
    """Pairs of shapes with whole-number boxes: [{image_id, category, objects, detections}].

    An object is (box xyxy, mask (40, 56) uint8, iscrowd), a detection (box, mask, score). A concept is present in an
    image with probability `present`; each object is found with probability `found`, its box off by up to `jitter`
    pixels; stray detections come with probability `alarms`. `twins` repeats each detection.
    """
    rng = np.random.default_rng(seed)
    pairs = []
    for image in range(images):
        for concept in range(concepts):
            objects, detections = [], []
            for _ in range(int(rng.integers(1, 6)) if rng.random() < present else 0):
                left, top = int(rng.integers(0, WIDTH - 20)), int(rng.integers(0, HEIGHT - 20))
                box = [left, top, left + int(rng.integers(8, 21)), top + int(rng.integers(8, 21))]
                round_one = bool(rng.random() < 0.5)
                objects.append((box, paint(box, round_one), int(rng.random() < crowd)))
                if rng.random() < found:
                    shift = rng.integers(-jitter, jitter + 1, size=4) if jitter else np.zeros(4, dtype=int)
                    near = legal((np.array(box) + shift).tolist())
                    detections.append((near, paint(near, round_one), pick_score(rng, scores)))
            while rng.random() < alarms:
                left, top = int(rng.integers(0, WIDTH - 20)), int(rng.integers(0, HEIGHT - 20))
                box = [left, top, left + int(rng.integers(8, 21)), top + int(rng.integers(8, 21))]
                detections.append((box, paint(box, False), pick_score(rng, scores)))
            pairs.append(
                {
                    "image_id": image + 1,
                    "category": concept + 1,
                    "objects": objects,
                    "detections": [detection for detection in detections for _ in range(1 + twins)],
                }
            )
    return pairs


def legal(box):
    left, top = min(max(box[0], 0), WIDTH - 3), min(max(box[1], 0), HEIGHT - 3)
    return [left, top, min(max(box[2], left + 2), WIDTH), min(max(box[3], top + 2), HEIGHT)]


def pick_score(rng, scores):
    return float(scores[rng.integers(len(scores))]) if scores else round(float(rng.random() ** 0.5), 3)


def paint(box, round_one):
    left, top, right, bottom = box
    mask = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
    if not round_one:
        mask[top:bottom, left:right] = 1
        return mask
    y, x = np.mgrid[:HEIGHT, :WIDTH] + 0.5
    inside = ((2 * x - left - right) / (right - left)) ** 2 + ((2 * y - top - bottom) / (bottom - top)) ** 2 <= 1
    return inside.astype(np.uint8)
