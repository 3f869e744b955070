"""The page itself: where its parts are, and what happens when one is used. Needs gradio; what it shows does not."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

import gradio as gr

from .asking import LOWEST_SCORE, Finder, as_line, ask, split_phrases
from .pictures import ASSETS, MAX_BYTES, Example, as_url, open_picture
from .results import LAYERS, as_error, show

LOCAL = "127.0.0.1"
KEPT = 3600  # seconds that uploads and answers are kept
SESSIONS = 64  # whose pictures and answers are kept
OWN_PROMPT = "a thing without a phrase"


def build_page(finders: Sequence[Finder], examples: Sequence[Example], threshold: float, max_pixels: int) -> gr.Blocks:
    """
    Args:
        finders: one model, or two that are compared.
        threshold: where the slider begins.
        max_pixels: most pixels of an upload.
    """
    known = finders[0].vocabulary
    # Nothing is told to others: no telemetry here, no fonts of others in `serve`.
    with gr.Blocks(title="sam3-lite", analytics_enabled=False, delete_cache=(KEPT, KEPT), fill_width=True) as page:
        picture, answers = gr.State(time_to_live=KEPT), gr.State(time_to_live=KEPT)
        gr.HTML(_head(finders), apply_default_css=False, elem_id="head")
        with gr.Row():
            with gr.Column(scale=2, min_width=340):
                with gr.Row():
                    upload = gr.File(
                        label="Picture", file_types=["image"], height=150, scale=3, min_width=180, elem_id="upload"
                    )
                    with gr.Column(scale=2, min_width=140):
                        gallery = gr.HTML(
                            _gallery(examples),
                            js_on_load=_asset("examples.js"),
                            apply_default_css=False,
                            elem_id="examples",
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
                phrases = gr.Textbox(
                    label="Phrases, separated by commas",
                    placeholder=", ".join(known) if known else "red car, person with a hat",
                    max_length=1000,
                    elem_id="phrases",
                )
                of = gr.Dropdown([OWN_PROMPT], value=OWN_PROMPT, label="The boxes are examples of", elem_id="of")
                button = gr.Button("Find", variant="primary", elem_id="find")
            with gr.Column(scale=3, min_width=340):
                with gr.Row():
                    slider = gr.Slider(
                        LOWEST_SCORE, 0.95, threshold, step=0.01, label="Lowest score", elem_id="threshold"
                    )
                    layers = gr.CheckboxGroup(LAYERS, value=LAYERS, label="Show", elem_id="layers")
                status = gr.HTML(apply_default_css=False, elem_id="status")
                results = gr.HTML(apply_default_css=False, elem_id="results")

        def cleared():
            return None, _canvas(), None, "", ""

        def uploaded(path: str):
            try:
                chosen = open_picture(Path(path), max_pixels)
            except Exception as error:
                return None, _canvas(), None, as_error(as_line(error)), ""
            return chosen, _canvas(as_url(chosen.shown)), None, "", ""

        def taken(event: gr.EventData):
            example = examples[event.index]
            words = example.phrases or gr.skip()
            return example.picture, _canvas(as_url(example.picture.shown)), None, "", "", None, words

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

        quiet = {"api_visibility": "private", "show_progress": "hidden"}
        state = [picture, canvas, answers, status, results]
        upload.upload(uploaded, upload, state, **quiet)
        upload.clear(cleared, None, state, **quiet)
        gallery.click(taken, None, [*state, upload, phrases], **quiet)
        phrases.change(named, [phrases, of], of, trigger_mode="always_last", **quiet)
        gr.on(
            [button.click, phrases.submit],
            found,
            [picture, phrases, canvas, of, slider, layers],
            [answers, status, results],
            api_visibility="private",
        )
        gr.on(
            [slider.change, layers.change],
            shown,
            [answers, slider, layers],
            results,
            trigger_mode="always_last",
            **quiet,
        )
    return page


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
