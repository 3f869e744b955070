"""`sam3-lite predict`: finds what prompts name in files, folders and globs of pictures."""

from __future__ import annotations

import hashlib
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from ..checkpoints import refuse_training_checkpoint
from ..errors import joined
from ..prediction.input_files import InputFile, find_pictures
from ..prediction.output_folder import PredictionFolder, UnwritableName
from ..prediction.pipeline import PredictionSettings, PreparedImage, Sam3LitePipeline, prompts_of_images
from ..reading import MAX_PIXELS, read_image
from ..visualization import LONGEST_SIDE
from .errors import model_errors, one_line_errors


def predict(
    inputs: Annotated[list[str], typer.Argument(help="Pictures: files, folders (to any depth), globs.")],
    model: Annotated[str, typer.Option(help="Folder or Hub id of a model with its processor.")],
    prompt: Annotated[list[str], typer.Option(help="What to look for; several times for several things.")],
    output: Annotated[Path, typer.Option(help="Folder to write, or to complete.")],
    overlays: Annotated[bool, typer.Option("--overlays", help="Draw the detections over the pictures.")] = False,
    masks: Annotated[bool, typer.Option("--masks", help="Write a PNG for each mask.")] = False,
    threshold: Annotated[float, typer.Option(help="Lowest score.")] = 0.3,
    mask_threshold: Annotated[float, typer.Option(help="Lowest probability of a pixel of a mask.")] = 0.5,
    max_detections: Annotated[int | None, typer.Option(help="The best so many per picture. Default: all.")] = None,
    nms_iou: Annotated[
        float, typer.Option(help="Masks of one prompt that overlap by more are one; at 1 all stay.")
    ] = PredictionSettings.nms_iou,
    tile_size: Annotated[
        int | None, typer.Option(help="Look at large pictures in tiles of this side in pixels.")
    ] = None,
    tile_overlap: Annotated[int | None, typer.Option(help="Pixels that tiles share. Default: a quarter.")] = None,
    max_pixels: Annotated[
        int, typer.Option(min=1, help="Most pixels (width x height) of a picture; larger ones are not read.")
    ] = MAX_PIXELS,
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures at once.")] = 4,
    workers: Annotated[int, typer.Option(min=0, help="Processes that decode pictures ahead.")] = 2,
    device: Annotated[str | None, typer.Option(help="Default: the GPU if there is one.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float16, bfloat16 or float32. Default: by the device.")] = None,
    revision: Annotated[str, typer.Option(help="Branch, tag or commit of the model on the Hub.")] = "main",
):
    """
    Finds what the prompts name, and writes a JSON file per picture and COCO results. The same command goes on where an
    earlier one stopped. Computes in FP16 on a GPU, in float32 on a CPU.
    """
    with one_line_errors():
        settings = PredictionSettings(threshold, mask_threshold, max_detections, nms_iou, tile_size, tile_overlap)
        prompts = list(dict.fromkeys(prompt))
        prompts_of_images(prompts, 1)  # an empty prompt is an error before anything is written
        pictures = find_pictures(inputs, exclude=output)
        with model_errors(model):
            refuse_training_checkpoint(model)
            pipe = Sam3LitePipeline.from_pretrained(model, device=device, dtype=dtype, revision=revision)
            if not pipe.model.config.mask_supervision:
                if masks:
                    raise ValueError(
                        f"{model} was trained on boxes alone and has no masks to write: leave --masks out."
                    )
                typer.echo(f"{model} was trained on boxes alone: it gives boxes, and no masks.", err=True)
            text = pipe.text_features(prompts)  # so is a word that a fixed vocabulary lacks
        record = {
            "model": model,
            "weights": fingerprint(pipe.model),
            "dtype": str(pipe.model.dtype),
            "prompts": prompts,
            **asdict(settings),
        }
        folder = PredictionFolder(output, record, overlays, masks)
        left = [picture for picture in pictures if not folder.is_complete(picture)]
        failures = predict_files(
            pipe,
            left,
            folder,
            text=text,
            settings=settings,
            max_pixels=max_pixels,
            batch_size=batch_size,
            workers=workers,
        )
        images, detections, broken = folder.write_coco()
    typer.echo(
        f"{output}: {detections} detections in {images} pictures; {len(left) - len(failures)} pictures were new, "
        f"{len(pictures) - len(left)} done before."
    )
    _list_failures(f"{len(failures)} could not be read or written:", failures)
    _list_failures(f"{len(broken)} earlier predictions are broken and left out:", broken)
    if failures or broken:
        raise typer.Exit(1)


def _list_failures(title: str, messages: list[str]) -> None:
    for line in [title, *(f"  {joined(message)}" for message in messages)] if messages else []:
        typer.echo(line, err=True)


def predict_files(
    pipe: Sam3LitePipeline,
    pictures: list[InputFile],
    folder: PredictionFolder,
    *,
    text: dict[str, tuple[torch.Tensor, torch.Tensor]],
    settings: PredictionSettings,
    max_pixels: int,
    batch_size: int,
    workers: int,
) -> list[str]:
    """
    Predicts pictures, which workers decode ahead, into a folder; returns what is wrong with those that are not.

    Args:
        text: from [`~Sam3LitePipeline.text_features`]; its phrases are the prompts.
        max_pixels: most pixels of a picture.
    """
    dataset = PictureDataset(pictures, settings, pipe.processor.image_processor, max_pixels, folder.overlays)
    loader = DataLoader(dataset, batch_size=batch_size, collate_fn=list, num_workers=workers)
    failures = []
    with tqdm(total=len(pictures), unit="picture") as bar:
        for batch in loader:
            readable = [sample for sample in batch if not isinstance(sample, str)]
            failures += [sample for sample in batch if isinstance(sample, str)]
            prepared = [image for _, image, _ in readable]
            results = pipe.detect(prepared, prompts_of_images(list(text), len(prepared)), text, settings, batch_size)
            for (index, _, small), found in zip(readable, results, strict=True):
                try:
                    folder.write(pictures[index], found, small)
                except (UnwritableName, FileNotFoundError) as error:
                    failures.append(str(error))
            bar.update(len(batch))
    return failures


class PictureDataset(Dataset):
    """
    (index, `PreparedImage`, small picture for an overlay or None) of each picture, or what is wrong with it.

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

    def __getitem__(self, index: int) -> tuple[int, PreparedImage, torch.Tensor | None] | str:
        try:
            pixels = read_image(self.pictures[index].path, max_pixels=self.max_pixels)
        except OSError as error:
            return str(error)
        small = _reduced(pixels) if self.with_small else None
        return index, self.settings.prepare(pixels, self.image_processor), small


def _reduced(pixels: torch.Tensor) -> torch.Tensor:
    """`(3, h, w)` uint8 with sides of at most 1280 pixels."""
    scale = LONGEST_SIDE[1] / max(pixels.shape[1:])
    if scale >= 1:
        return pixels
    size = [max(1, round(side * scale)) for side in pixels.shape[1:]]
    return F.interpolate(pixels[None], size=size, mode="bilinear", antialias=True)[0]


def fingerprint(model: torch.nn.Module) -> str:
    """SHA-256 of the weights in the precision they are in."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
