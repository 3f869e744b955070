"""Which phrases a teacher is asked for each picture, by what it said of the picture in earlier epochs."""

from collections.abc import Sequence

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor

from ..data.unlabelled import UnlabelledDataset

UNKNOWN, ABSENT, PRESENT = 0, 1, 2
CURIOSITY = 0.25  # share of the prompts for present phrases that go to phrases not asked yet, while there are some
STREAM = 1  # keeps these random numbers apart from those of augmentation, which start from the same three


class PhraseChoice:
    """
    Draws the prompts of pictures without labels such that a share of them is absent.

    In the first epoch nothing is known, and phrases are drawn evenly. What the teacher then says of a picture and a
    phrase counts from the next epoch on, in all processes: what is drawn depends on seed, epoch, picture and the
    epochs before alone, so that a resumed run draws the same, and one of several processes as one of one.

    Of many phrases most are absent from any picture. So of those that a picture was not asked for yet, one is drawn
    for a present one with a probability that grows with the share of other pictures in which it was found.

    Args:
        pictures: how many there are.
        phrases: all that may be asked for.
        prompts_per_image: drawn for each picture, fewer if there are fewer phrases.
        negative_ratio: share of them, in [0, 1], that is absent as far as is known.
        seed: 0 or more.
    """

    def __init__(
        self, pictures: int, phrases: Sequence[str], prompts_per_image: int, negative_ratio: float, seed: int
    ):
        self.phrases, self.seed = list(phrases), seed
        self.number = {phrase: index for index, phrase in enumerate(self.phrases)}
        self.count = min(prompts_per_image, len(self.phrases))
        self.negative_ratio = negative_ratio
        self.known = np.zeros((pictures, len(self.phrases)), dtype=np.int8)
        self.prevalence = self._prevalence()
        self.epoch = 0
        self.answers: list[tuple[int, int, bool]] = []  # of this process in this epoch: picture, phrase, presence

    def ask(self, batch: dict) -> dict:
        """
        The batch with "phrases" and "image_index". All processes call it for batches of the same epoch.

        Args:
            batch: as collated from samples with a key.
        """
        epoch = batch["keys"][0][0]
        if epoch != self.epoch:
            self._learn(self._all_answers())
            self.epoch, self.answers = epoch, []
        drawn = [self.draw(*key) for key in batch["keys"]]
        counts = torch.tensor([len(numbers) for numbers in drawn])
        return batch | {
            "phrases": [self.phrases[number] for numbers in drawn for number in numbers],
            "image_index": torch.repeat_interleave(torch.arange(len(drawn)), counts),
        }

    def draw(self, epoch: int, picture: int) -> list[int]:
        """Positions of the phrases to ask for, all different, in random order."""
        rng = np.random.default_rng([self.seed, epoch, picture, STREAM])
        # Sampling without replacement, in proportion to weights: Efraimidis and Spirakis (2006), algorithm A.
        likely = np.argsort(rng.exponential(size=len(self.phrases)) / self.prevalence)
        pools = [rng.permutation(np.flatnonzero(self.known[picture] == state)).tolist() for state in range(3)]
        pools[UNKNOWN] = likely[self.known[picture][likely] == UNKNOWN].tolist()
        absent = int(self.count * self.negative_ratio + rng.random())
        curious = int((self.count - absent) * CURIOSITY + rng.random())
        chosen: list[int] = []

        def take(count: int, *states: int) -> None:
            pool = [number for state in states for number in pools[state] if number not in chosen]
            chosen.extend(pool[:count])

        take(self.count - absent - curious, PRESENT, UNKNOWN)
        take(self.count - absent - len(chosen), UNKNOWN, PRESENT)
        pools[UNKNOWN].reverse()
        take(absent, ABSENT, UNKNOWN)
        take(self.count - len(chosen), UNKNOWN, PRESENT, ABSENT)
        return [chosen[index] for index in rng.permutation(len(chosen))]

    def note(self, batch: dict, present: Tensor) -> None:
        """
        Remembers answers of the teacher.

        Args:
            batch: of `ask`.
            present: (prompts,) bool.
        """
        owners = [batch["keys"][image][1] for image in batch["image_index"].tolist()]
        numbers = [self.number[phrase] for phrase in batch["phrases"]]
        self.answers += list(zip(owners, numbers, present.tolist(), strict=True))

    def _learn(self, answers: Sequence[tuple[int, int, bool]]) -> None:
        for picture, number, present in answers:
            # one picture may be seen twice in an epoch: present in one crop is present
            self.known[picture, number] = max(self.known[picture, number], PRESENT if present else ABSENT)
        self.prevalence = self._prevalence()

    def _prevalence(self) -> np.ndarray:
        """
        Of each phrase the share of pictures that show it, of those that were asked, with the share of all phrases for
        one more picture: (phrases,) in (0, 1).
        """
        asked, found = (self.known != UNKNOWN).sum(0), (self.known == PRESENT).sum(0)
        of_all = (found.sum() + 0.5) / (asked.sum() + 1)
        return (found + of_all) / (asked + 1)

    def _all_answers(self) -> list[tuple[int, int, bool]]:
        return gather_object(self.answers) if PartialState().num_processes > 1 else self.answers

    def state_dict(self) -> dict:
        """For a checkpoint; called by every process."""
        answers = torch.tensor(self._all_answers(), dtype=torch.int64).reshape(-1, 3)
        return {"known": torch.from_numpy(self.known.copy()), "epoch": self.epoch, "answers": answers}

    def load_state_dict(self, state: dict) -> None:
        """
        Goes on from a checkpoint; called by every process, the main one of which takes the answers of all.

        Raises:
            ValueError: it is of other pictures or phrases.
        """
        if state["known"].shape != self.known.shape:
            (pictures, phrases), (own_pictures, own_phrases) = state["known"].shape, self.known.shape
            raise ValueError(
                f"the checkpoint knows {pictures} pictures and {phrases} phrases, this run has {own_pictures} and "
                f"{own_phrases}: give the same --data and --phrases, or start anew in another --output_dir"
            )
        self.known, self.epoch = state["known"].numpy().copy(), state["epoch"]
        self.prevalence = self._prevalence()
        self.answers = (
            [tuple(answer) for answer in state["answers"].tolist()] if PartialState().is_main_process else []
        )


def phrase_choice(data: UnlabelledDataset) -> PhraseChoice:
    """For the pictures, phrases and settings of a dataset."""
    sampling = data.sampling
    return PhraseChoice(len(data), data.concepts, sampling.prompts_per_image, sampling.negative_ratio, data.seed)
