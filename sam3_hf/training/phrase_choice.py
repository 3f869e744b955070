"""Which phrases a teacher is asked for each picture, by what it said of this one and of others."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor

from ..data.unlabelled import UnlabelledDataset

UNKNOWN, ABSENT, PRESENT = 0, 1, 2
CURIOSITY = 0.25  # share of the prompts for present phrases that go to phrases not asked yet, while there are some
ROUNDS = 4  # that a teacher is asked at most for what a picture shows, before its prompts are drawn
PROMISING = 0.25  # present phrases that a round must be expected to find
STREAM = 1  # keeps these random numbers apart from those of augmentation, which start from the same three


class PhraseChoice:
    """
    Draws the prompts of pictures without labels such that a share of them is absent.

    What the teacher says of a picture and a phrase counts from the next epoch on, in all processes. What is drawn
    depends on seed, epoch, picture, the epochs before, and what the teacher says of the picture in between: a resumed
    run draws the same, and one of several processes as one of one.

    Of many phrases most are absent from any picture. So the teacher can be asked for more than are drawn; and of those
    that a picture was not asked for yet, one comes with a probability that grows with the share of other pictures in
    which it was found. In the first epoch nothing is known of that, and phrases are drawn evenly.

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

    def ask(self, batch: dict, sees: Callable[[dict], Tensor] | None = None) -> dict:
        """
        The batch with "phrases" and "image_index". All processes call it for batches of the same epoch.

        Args:
            batch: as collated from samples with a key.
            sees: what says of prompts, "phrases" and "image_index", whether their concepts are present: (prompts,)
                bool. With it, pictures of which too little is known are asked for up to `ROUNDS` times
                `prompts_per_image` phrases before, as long as that promises something.
        """
        keys = batch["keys"]
        if keys[0][0] != self.epoch:
            self._learn(self._all_answers())
            self.epoch, self.answers = keys[0][0], []
        known = self.known[[picture for _, picture in keys]]
        rngs = [np.random.default_rng([self.seed, *key, STREAM]) for key in keys]
        orders = [self._likely(rng) for rng in rngs]
        for _ in range(0 if sees is None else ROUNDS):
            candidates = [self._candidates(order, row) for order, row in zip(orders, known, strict=True)]
            if not any(candidates):
                break
            prompts = self._prompts(candidates)
            present = sees(prompts)
            self.note(batch | prompts, present)
            owners = prompts["image_index"].numpy()
            numbers = [number for row in candidates for number in row]
            known[owners, numbers] = np.where(present.cpu().numpy(), PRESENT, ABSENT)
        return batch | self._prompts([self._draw(*each) for each in zip(rngs, orders, known, strict=True)])

    def _prompts(self, numbers: list[list[int]]) -> dict:
        """Phrases for each picture of a batch."""
        counts = torch.tensor([len(own) for own in numbers])
        return {
            "phrases": [self.phrases[number] for own in numbers for number in own],
            "image_index": torch.repeat_interleave(torch.arange(len(numbers)), counts),
        }

    def _candidates(self, order: np.ndarray, known: np.ndarray) -> list[int]:
        """
        Phrases to ask a picture for before any are drawn: none if all will be, if enough are known, or if none are
        promising.
        """
        if self.count == len(self.phrases):
            return []
        unknown = order[known[order] == UNKNOWN][: self.count]
        enough = self.count - int(self.count * self.negative_ratio)
        if np.count_nonzero(known == PRESENT) >= enough or self.prevalence[unknown].sum() < PROMISING:
            return []
        return unknown.tolist()

    def _likely(self, rng: np.random.Generator) -> np.ndarray:
        """
        All phrases in random order, those of high prevalence first: sampling without replacement in proportion to
        weights, by algorithm A of Efraimidis and Spirakis (2006).
        """
        return np.argsort(rng.exponential(size=len(self.phrases)) / self.prevalence)

    def _draw(self, rng: np.random.Generator, order: np.ndarray, known: np.ndarray) -> list[int]:
        """
        Positions of the phrases to ask a picture for, all different, in random order.

        Args:
            order: of `_likely`: those not asked yet are taken in it.
            known: of the picture: (phrases,).
        """
        pools = [rng.permutation(np.flatnonzero(known == state)).tolist() for state in range(3)]
        pools[UNKNOWN] = order[known[order] == UNKNOWN].tolist()
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
