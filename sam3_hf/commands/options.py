"""Options that several commands have: their types and help, while defaults stay with the commands."""

from typing import Annotated

import typer

Inputs = Annotated[list[str], typer.Argument(help="Pictures: files, folders (to any depth), globs.")]
Model = Annotated[str, typer.Option(help="Folder or Hub id of a model with its processor, or a .pt of Meta's.")]
Prompts = Annotated[list[str], typer.Option(help="What to look for; several times for several things.")]
Overlays = Annotated[bool, typer.Option("--overlays", help="Draw the detections over the pictures.")]
Threshold = Annotated[float, typer.Option(help="Lowest score.")]
MaskThreshold = Annotated[float, typer.Option(help="Lowest probability of a pixel of a mask.")]
MaxDetections = Annotated[int | None, typer.Option(help="The best so many per picture. Default: all.")]
NmsIou = Annotated[float, typer.Option(help="Masks of one prompt that overlap by more are one; at 1 all stay.")]
TileSize = Annotated[int | None, typer.Option(help="Look at large pictures in tiles of this side in pixels.")]
TileOverlap = Annotated[int | None, typer.Option(help="Pixels that tiles share. Default: a quarter.")]
MaxPixels = Annotated[
    int, typer.Option(min=1, help="Most pixels (width x height) of a picture; larger ones are not read.")
]
BatchSize = Annotated[int, typer.Option(min=1, help="Pictures at once.")]
Workers = Annotated[int, typer.Option(min=0, help="Processes that decode pictures ahead.")]
Device = Annotated[str | None, typer.Option(help="Default: the GPU if there is one.")]
Dtype = Annotated[str | None, typer.Option(help="fp16, bf16 or fp32. Default: by the device.")]
Revision = Annotated[str, typer.Option(help="Branch, tag or commit of the model on the Hub.")]
RevisionB = Annotated[str | None, typer.Option(help="That of the second model, where it is another one.")]
