"""`sam3-lite demo`: a page in the browser to try a model on."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..page.pictures import MAX_PIXELS, find_examples
from .errors import one_line_errors
from .options import Device, Dtype, Revision, RevisionB

GRADIO = "gradio>=6.31,<7"  # the extra `demo`


def demo(
    model: Annotated[
        str, typer.Argument(help="Folder or Hub id of a model or of what `export` wrote, or .pt of Meta's.")
    ],
    compare: Annotated[str | None, typer.Option(metavar="MODEL", help="A second model beside the first.")] = None,
    examples: Annotated[
        Path | None, typer.Option(help="Folder of pictures to offer as examples. Default: drawn shapes.")
    ] = None,
    threshold: Annotated[float, typer.Option(min=0.05, max=0.95, help="Lowest score to begin with.")] = 0.3,
    max_pixels: Annotated[int, typer.Option(min=1, help="Most pixels (width x height) of an upload.")] = MAX_PIXELS,
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="Default: the first free one from 7860 on.")
    ] = None,
    share: Annotated[
        bool, typer.Option("--share", help="Make a public link; who has it can use this machine for the model.")
    ] = False,
    device: Device = None,
    dtype: Dtype = None,
    revision: Revision = "main",
    revision_b: RevisionB = None,
):
    """
    Opens a page to try a model on: upload a picture, type phrases or draw boxes, and see what is found. Only this
    machine can reach it, unless --share is given.
    """
    with one_line_errors():
        try:
            import gradio  # noqa: F401  before a model is loaded in vain
        except ModuleNotFoundError as error:
            raise ImportError(f"the page needs gradio: pip install '{GRADIO}' (the extra sam3-hf[demo])") from error
        from ..page.asking import Finder
        from ..page.layout import build_page, serve

        finders = [Finder.open(model, device, dtype, revision)]
        if compare is not None:
            finders.append(Finder.open(compare, device, dtype, revision if revision_b is None else revision_b))
        pictures = find_examples(examples, finders[0].vocabulary, max_pixels)
        page = build_page(finders, pictures, threshold, max_pixels)
        local, public = serve(page, port=port, share=share)
    typer.echo(f"The page is at {local}{f' and, for everybody, at {public}' if public else ''}; Ctrl+C ends it.")
    if share and public is None:
        typer.echo("There is no public link: gradio's servers could not be reached.", err=True)
    page.block_thread()
