"""Pictures from files through the pipeline into a folder."""

from __future__ import annotations

import hashlib
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from ..exporting.model import ExportedModel
from ..picture_files import InputFile
from ..reading import read_image
from ..visualization import LONGEST_SIDE
from .output_folder import PredictionFolder, UnwritableName
from .pipeline import PredictionSettings, PreparedImage, Prompt, Sam3LitePipeline
from .processes import Outcome, Processes


def predict_files(
    pipe: Sam3LitePipeline,
    pictures: list[InputFile],
    folder: PredictionFolder,
    processes: Processes,
    *,
    prompts: list[Prompt],
    text: dict[str, tuple[torch.Tensor, torch.Tensor]],
    settings: PredictionSettings,
    max_pixels: int,
    batch_size: int,
    workers: int,
) -> Outcome:
    """
    Predicts this process's share of the pictures, which workers decode ahead, into a folder.

    Batches are cut by the place of a picture among all, whatever is done already: rounding depends on what is computed
    together, so that a prediction made after an interruption or by another process is the same to the last bit.

    Args:
        text: from [`~Sam3LitePipeline.text_features`], of all phrases in `prompts`.
        max_pixels: most pixels of a picture.
    """
    starts = range(0, len(pictures), batch_size)
    batches = processes.share([range(start, min(start + batch_size, len(pictures))) for start in starts])
    left = {index for batch in batches for index in batch if not folder.is_complete(pictures[index])}
    outcome = Outcome(before=sum(map(len, batches)) - len(left))
    dataset = PictureDataset(pictures, settings, pipe.processor.image_processor, max_pixels, folder.overlays)
    open_batches = [batch for batch in batches if not left.isdisjoint(batch)]
    loader = DataLoader(dataset, batch_sampler=open_batches, collate_fn=list, num_workers=workers)
    with tqdm(total=len(left), unit="picture", disable=not processes.is_main) as bar:
        for samples in loader:
            readable = [sample for sample in samples if sample.fault is None]
            outcome.failures |= {
                sample.index: sample.fault for sample in samples if sample.fault and sample.index in left
            }
            prepared = [sample.image for sample in readable]
            results = pipe.detect(prepared, [prompts] * len(prepared), text, settings, batch_size)
            for sample, found in zip(readable, results, strict=True):
                if sample.index not in left:
                    continue
                try:
                    folder.write(pictures[sample.index], found, sample.small)
                    outcome.new += 1
                except (UnwritableName, FileNotFoundError) as error:
                    outcome.failures[sample.index] = str(error)
            bar.update(sum(sample.index in left for sample in samples))
    return outcome


class Sample(NamedTuple):
    """A picture on its way to the pipeline, or what is wrong with it."""

    index: int
    image: PreparedImage | None
    small: torch.Tensor | None  # (3, h, w) uint8, for an overlay
    fault: str | None


class PictureDataset(Dataset):
    """
    A [`Sample`] of each picture.

    Args:
        max_pixels: most pixels of a picture.
        with_small: the picture as well, reduced to the size of drawings.
    """

    def __init__(
        self,
        pictures: list[InputFile],
        settings: PredictionSettings,
        image_processor,
        max_pixels: int,
        with_small: bool,
    ):
        self.pictures, self.settings, self.image_processor = pictures, settings, image_processor
        self.max_pixels, self.with_small = max_pixels, with_small

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> Sample:
        try:
            pixels = read_image(self.pictures[index].path, max_pixels=self.max_pixels)
        except OSError as error:
            return Sample(index, None, None, str(error))
        small = _reduced(pixels) if self.with_small else None
        return Sample(index, self.settings.prepare(pixels, self.image_processor), small, None)


def _reduced(pixels: torch.Tensor) -> torch.Tensor:
    """`(3, h, w)` uint8 with sides of at most 1280 pixels."""
    scale = LONGEST_SIDE[1] / max(pixels.shape[1:])
    if scale >= 1:
        return pixels
    size = [max(1, round(side * scale)) for side in pixels.shape[1:]]
    return F.interpolate(pixels[None], size=size, mode="bilinear", antialias=True)[0]


def fingerprint(model: torch.nn.Module) -> str:
    """SHA-256 of the weights in the precision they are in; of an exported model, of its files."""
    if isinstance(model, ExportedModel):
        return model.fingerprint
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
