"""The page itself: where its parts are, and what happens when one is used. Needs gradio; what it shows does not."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from typing import NamedTuple

import gradio as gr

from .asking import LOWEST_SCORE, Finder, as_line, ask
from .clips import MAX_FRAMES, follow_clip
from .phrases import example_text, split_phrases
from .pictures import ASSETS, MAX_BYTES, Example, as_url, open_picture
from .results import LAYERS, as_error, show

LOCAL = "127.0.0.1"
KEPT = 3600  # seconds that uploads and answers are kept
SESSIONS = 64  # whose pictures and answers are kept
OWN_PROMPT = "a thing without a phrase"
QUIET = {"api_visibility": "private", "show_progress": "hidden"}


class AskingSide(NamedTuple):
    """What the user brings: a picture, phrases and boxes."""

    upload: gr.File
    gallery: gr.HTML
    canvas: gr.HTML
    phrases: gr.Textbox
    of: gr.Dropdown
    button: gr.Button


class AnsweringSide(NamedTuple):
    """What is seen of the answers, and how."""

    threshold: gr.Slider
    layers: gr.CheckboxGroup
    status: gr.HTML
    results: gr.HTML


def build_page(finders: Sequence[Finder], examples: Sequence[Example], threshold: float, max_pixels: int) -> gr.Blocks:
    """
    Args:
        finders: one model, or two that are compared.
        threshold: where the slider begins.
        max_pixels: most pixels of an upload.
    """
    # Nothing is told to others: no telemetry here, no fonts of others in `serve`.
    with gr.Blocks(title="sam3-lite", analytics_enabled=False, delete_cache=(KEPT, KEPT), fill_width=True) as page:
        picture, answers = gr.State(time_to_live=KEPT), gr.State(time_to_live=KEPT)
        gr.HTML(_head(finders), apply_default_css=False, elem_id="head")
        with gr.Tab("Pictures"), gr.Row():
            with gr.Column(scale=2, min_width=340):
                asking = _asking_side(examples, finders[0].vocabulary)
            with gr.Column(scale=3, min_width=340):
                answering = _answering_side(threshold)
        with gr.Tab("Clips"):
            _follow_things(finders[0], threshold, max_pixels)
        state = [picture, asking.canvas, answers, answering.status, answering.results]
        _choose_pictures(asking, state, examples, max_pixels)
        _find_things(asking, answering, picture, answers, finders)
    return page


def _asking_side(examples: Sequence[Example], vocabulary: list[str] | None) -> AskingSide:
    with gr.Row():
        upload = gr.File(label="Picture", file_types=["image"], height=150, scale=3, min_width=180, elem_id="upload")
        with gr.Column(scale=2, min_width=140):
            gallery = gr.HTML(
                _gallery(examples), js_on_load=_asset("examples.js"), apply_default_css=False, elem_id="examples"
            )
    canvas = gr.HTML(
        [],
        html_template=_asset("canvas.html"),
        js_on_load=_asset("canvas.js"),
        apply_default_css=False,
        elem_id="canvas",
        picture="",
        positive=True,
    )
    phrases = _phrases(vocabulary, "phrases")
    of = gr.Dropdown([OWN_PROMPT], value=OWN_PROMPT, label="The boxes are examples of", elem_id="of")
    button = gr.Button("Find", variant="primary", elem_id="find")
    return AskingSide(upload, gallery, canvas, phrases, of, button)


def _phrases(vocabulary: list[str] | None, name: str) -> gr.Textbox:
    return gr.Textbox(
        label="Phrases, separated by commas",
        placeholder=example_text(vocabulary) if vocabulary else "red car, person with a hat",
        max_length=1000,
        elem_id=name,
    )


def _answering_side(threshold: float) -> AnsweringSide:
    with gr.Row():
        slider = gr.Slider(LOWEST_SCORE, 0.95, threshold, step=0.01, label="Lowest score", elem_id="threshold")
        layers = gr.CheckboxGroup(LAYERS, value=LAYERS, label="Show", elem_id="layers")
    status = gr.HTML(apply_default_css=False, elem_id="status")
    results = gr.HTML(apply_default_css=False, elem_id="results")
    return AnsweringSide(slider, layers, status, results)


def _choose_pictures(asking: AskingSide, state: list, examples: Sequence[Example], max_pixels: int) -> None:
    """
    Args:
        state: what a new picture changes: it, the canvas, the answers, what went wrong, what is shown.
    """

    def cleared():
        return None, _canvas(), None, "", ""

    def uploaded(path: str):
        try:
            picture = open_picture(Path(path), max_pixels)
        except Exception as error:
            return None, _canvas(), None, as_error(as_line(error)), ""
        return picture, _canvas(as_url(picture.shown)), None, "", ""

    def taken(event: gr.EventData):
        example = examples[event.index]
        words = example.phrases or gr.skip()
        return example.picture, _canvas(as_url(example.picture.shown)), None, "", "", None, words

    asking.upload.upload(uploaded, asking.upload, state, **QUIET)
    asking.upload.clear(cleared, None, state, **QUIET)
    asking.gallery.click(taken, None, [*state, asking.upload, asking.phrases], **QUIET)


def _find_things(
    asking: AskingSide, answering: AnsweringSide, picture: gr.State, answers: gr.State, finders: Sequence[Finder]
) -> None:
    def found(picture, phrases, drawn, of, threshold, layers):
        try:
            answers = ask(finders, picture, phrases, drawn, of)
            return answers, "", show(answers, threshold, layers)
        except Exception as error:
            return None, as_error(as_line(error)), ""

    def shown(answers, threshold, layers):
        return show(answers, threshold, layers) if answers else ""

    def named(phrases, of):
        words = split_phrases(phrases)
        return gr.Dropdown([OWN_PROMPT, *words], value=of if of in words else OWN_PROMPT)

    view = [answering.threshold, answering.layers]
    asking.phrases.change(named, [asking.phrases, asking.of], asking.of, trigger_mode="always_last", **QUIET)
    gr.on(
        [asking.button.click, asking.phrases.submit],
        found,
        [picture, asking.phrases, asking.canvas, asking.of, *view],
        [answers, answering.status, answering.results],
        api_visibility="private",
    )
    gr.on(
        [control.change for control in view],
        shown,
        [answers, *view],
        answering.results,
        trigger_mode="always_last",
        **QUIET,
    )


def _follow_things(finder: Finder, threshold: float, max_pixels: int) -> None:
    with gr.Row():
        with gr.Column(scale=2, min_width=340):
            name = f"Clip; the first {MAX_FRAMES} frames count"
            clip = gr.File(label=name, file_types=["video"], height=150, elem_id="clip")
            phrases = _phrases(finder.vocabulary, "clip-phrases")
            lowest = gr.Slider(
                LOWEST_SCORE, 0.95, threshold, step=0.01, label="Lowest score to begin with", elem_id="clip-threshold"
            )
            button = gr.Button("Follow", variant="primary", elem_id="follow")
        with gr.Column(scale=3, min_width=340):
            status = gr.HTML(apply_default_css=False, elem_id="clip-status")
            film = gr.Video(label="What was followed", interactive=False, elem_id="film")

    def followed(clip: str | None, phrases: str, threshold: float) -> Iterator[tuple[str | None, str]]:
        with tempfile.TemporaryDirectory() as folder:  # gradio copies the film from it when it is yielded
            try:
                path = Path(clip) if clip else None
                shown, said = follow_clip(finder, path, phrases, threshold, Path(folder), max_pixels)
                yield str(shown), said
            except Exception as error:
                yield None, as_error(as_line(error))

    gr.on([button.click, phrases.submit], followed, [clip, phrases, lowest], [film, status], api_visibility="private")


def serve(page: gr.Blocks, *, port: int | None = None, share: bool = False) -> tuple[str, str | None]:
    """
    Serves the page to this machine alone, or through a public link of gradio's as well; returns at once.

    Args:
        port: default: the first free one from 7860 on.
        share: makes the public link.

    Returns:
        The local address and the public one.

    Raises:
        OSError: the port is taken.
    """
    page.queue(max_size=32)
    theme = gr.themes.Default(
        primary_hue="blue", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
    )
    try:
        _, local, public = page.launch(
            server_name=LOCAL,
            server_port=port,
            share=share,
            max_file_size=MAX_BYTES,
            state_session_capacity=SESSIONS,
            footer_links=[],
            theme=theme,
            css_paths=ASSETS / "page.css",
            prevent_thread_lock=True,
            quiet=True,
        )
    except OSError as error:
        if "empty port" not in str(error):
            raise
        raise OSError(f"port {port or 'from 7860 on'} is taken: choose another --port") from error
    return local, public


def _canvas(url: str = "") -> gr.HTML:
    """Another picture to draw on, without boxes."""
    return gr.HTML([], picture=url)


def _asset(name: str) -> str:
    return (ASSETS / name).read_text(encoding="utf-8")


def _head(finders: Sequence[Finder]) -> str:
    names = " beside ".join(f"<b>{escape(finder.name)}</b>" for finder in finders)
    return f'<div class="sam3-head"><h1>sam3-lite</h1><p>{names}</p></div>'


def _gallery(examples: Sequence[Example]) -> str:
    buttons = "".join(
        f'<button type="button" data-index="{index}" title="{escape(example.phrases or example.picture.name)}">'
        f'<img src="{as_url(example.picture.shown, 128)}" alt="example {index + 1}"></button>'
        for index, example in enumerate(examples)
    )
    return f'<div class="sam3-examples"><span>Examples</span>{buttons}</div>'
