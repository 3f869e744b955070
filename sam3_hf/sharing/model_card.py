"""The model card of a saved folder: what its files say about the model, put into assets/model_card.md."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from urllib.parse import quote

import torch
import transformers
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from safetensors import safe_open
from transformers.utils import cached_file

from ..checkpoints import TRACKER, TRACKER_NECK, source_config, weight_files
from ..configuration_sam3_lite import Sam3LiteConfig, context_length
from ..configuration_video_sam3_lite import Sam3LiteVideoConfig
from ..errors import missing_source
from ..mapping import REPORT_FILE
from ..mapping.video import of_parts
from ..plain_text import LONGEST, markdown, markdown_code, plain, python_literal
from ..sources_sam3_lite import config_fields, read_json
from ..version import __version__
from .sizes import preset_of, sizes_of, text_encoder_of

ASSETS = Path(__file__).parents[1] / "assets"
PROVENANCE_FILE = "provenance.json"
EXAMPLE_FILE = "example.png"
LICENSE_FILE = "LICENSE"
CARD_FILE = "README.md"
SAM_LICENSE_TEXT = ASSETS / "SAM_LICENSE.txt"
VIDEO_MODEL_TYPE = Sam3LiteVideoConfig.model_type
# Stands for the folder in the card's snippet, and for the repository once it is pushed.
PLACEHOLDER = "path/to/this/folder"
SAM_LICENSE = "sam-license"
SAM_LICENSE_LINK = "https://github.com/facebookresearch/sam3/blob/main/LICENSE"
# Scores of an evaluation that the card shows, with the task of the Hub that each belongs to.
SCORES = {
    "segm_AP": "image-segmentation",
    "segm_AP50": "image-segmentation",
    "segm_cgF1": "image-segmentation",
    "bbox_AP": "object-detection",
    "bbox_AP50": "object-detection",
    "bbox_cgF1": "object-detection",
    "IL_MCC": "image-classification",
}
TAGS = ("sam3", "sam3_lite", "image-segmentation", "instance-segmentation")
VIDEO_TAGS = ("sam3", VIDEO_MODEL_TYPE, "video-segmentation", "object-tracking")
# Settings of a run that the card shows.
SETTINGS = (
    "teacher",
    "epochs",
    "learning_rate",
    "vision_learning_rate",
    "text_learning_rate",
    "weight_decay",
    "ema_decay",
    "mixed_precision",
    "lora_rank",
    "lora_targets",
    "train_text_encoder",
    "prompts_per_image",
    "negative_ratio",
    "box_prompt_probability",
    "seed",
)


@dataclass(frozen=True)
class Origin:
    """
    Where the weights of a model started from.

    Args:
        base: Hub id, folder or file of another model; `None` for random weights, or if that is not known.
        derived: whether the weights derive from those of SAM 3; `None` if that is not known.
        on_hub: whether `base` is a Hub id.
    """

    base: str | None
    derived: bool | None
    on_hub: bool = False


RANDOM_WEIGHTS = Origin(None, False)
UNKNOWN = Origin(None, None)


def origin_of(source: str | os.PathLike, text_encoder: str | os.PathLike | None = None, **hub_arguments) -> Origin:
    """
    The origin of weights that start from a checkpoint.

    Args:
        source: what [`~Sam3LiteModel.from_pretrained`] takes.
        text_encoder: as there: the weights derive from SAM 3 if those of either do.
        hub_arguments: `revision`, `token`, `cache_dir`, ... as there.

    Raises:
        OSError: there is no such folder or repository.
        ValueError: it is a model of another kind.
    """
    if text_encoder is not None:
        shared = {key: value for key, value in hub_arguments.items() if key not in ("revision", "subfolder")}
        origin, words = origin_of(source, **hub_arguments), origin_of(text_encoder, **shared)
        known = (origin.derived, words.derived)
        return replace(origin, derived=True if True in known else None if None in known else False)
    source = os.fspath(source)
    if os.path.isfile(source):
        folder = os.path.dirname(source)
        beside = os.path.isfile(os.path.join(folder, "config.json"))
        return Origin(source, origin_of(folder).derived if beside else True)
    on_hub = not os.path.isdir(source)
    config = source_config(source, **hub_arguments)

    def read(name: str) -> dict | None:
        path = cached_file(source, name, _raise_exceptions_for_missing_entries=False, **hub_arguments)
        return None if path is None else read_json(path)

    provenance = read(PROVENANCE_FILE)
    if provenance is None and not isinstance(config, Sam3LiteConfig):
        return Origin(source, True, on_hub)
    return Origin(source, _recorded(provenance, read(REPORT_FILE)).derived, on_hub)


def folder_origin(folder: Path) -> Origin:
    """Where the weights in a model folder come from, by its files."""
    return _recorded(_read(folder / PROVENANCE_FILE), _read(folder / REPORT_FILE))


def _recorded(provenance: dict | None, report: dict | None) -> Origin:
    """
    The origin that a lite model's own files tell of.

    Raises:
        ValueError: a file does not hold what it should.
    """
    try:
        name = PROVENANCE_FILE
        if provenance is not None:
            return Origin(**provenance["origin"])
        name = REPORT_FILE
        if report is None:
            return UNKNOWN
        on_hub = not os.path.exists(report["source"])
        return Origin(report["source"], None if report.get("source_is_lite") else True, on_hub)
    except (KeyError, TypeError) as error:
        raise ValueError(f"{name} does not say where the weights come from ({error!r}): it is damaged.") from error


def versions() -> dict[str, str]:
    """Of the packages that a model's behaviour depends on."""
    return {"sam3-hf": __version__, "transformers": transformers.__version__, "torch": torch.__version__}


def write_card(folder: str | os.PathLike, provenance: dict, example: str | os.PathLike | None = None) -> None:
    """
    Writes what a model folder needs to be passed on: `provenance.json`, the card `README.md`, a copy of the SAM
    License if the weights derive from SAM 3, and an example picture.

    Args:
        folder: holds config and safetensors weights, and `mapping_report.json` if they were mapped.
        provenance: `origin` (the fields of an [`Origin`]) and `versions`; of a training run also `arguments` (flat),
            `steps`, `epochs`, `images_per_step`, `dataset` (`name`, `hub_id`, `training images`, `concepts`) and
            `best` (`step`, `epoch`, `scores`) or None. Of a distilled text encoder `text_distilled`: `teacher`,
            `teacher_on_hub` and the figures of `distill_text`.
        example: PNG file to show.
    """
    folder = Path(folder)
    (folder / PROVENANCE_FILE).write_text(json.dumps(provenance, indent=1) + "\n", encoding="utf-8")
    if example is not None:
        shutil.copyfile(example, folder / EXAMPLE_FILE)
    if provenance["origin"]["derived"]:
        shutil.copyfile(SAM_LICENSE_TEXT, folder / LICENSE_FILE)
    model_card(folder).save(folder / CARD_FILE)


def model_card(folder: str | os.PathLike) -> ModelCard:
    """
    The card of a model folder, from its files.

    Raises:
        OSError: the folder has no configuration or no weights.
    """
    folder = Path(folder)
    fields = config_fields(folder)
    if fields is None:
        raise missing_source(folder)
    config = source_config(folder, fields)
    provenance, report = _read(folder / PROVENANCE_FILE), _read(folder / REPORT_FILE)
    provenance = provenance or {"origin": asdict(folder_origin(folder)), "versions": versions()}
    shapes, dtypes, size = _weights(folder)
    video = fields["model_type"] == VIDEO_MODEL_TYPE
    return _render(
        config.vocabulary,
        sizes=_sizes(config, of_parts(shapes), f"{size / 1e6:.0f} MB of safetensors, {' and '.join(dtypes)}"),
        provenance=provenance,
        report=report,
        example=(folder / EXAMPLE_FILE).is_file(),
        text_replaced=config.vocabulary is not None and report is not None and _has_text_encoder(report),
        mask_supervision=config.mask_supervision,
        video=video,
    )


def preset_card(preset: str, shapes: dict[str, tuple[int, ...]]) -> ModelCard:
    """
    The card of a preset before anybody trained it: its sizes, and how its weights are made.

    Args:
        shapes: of its tensors by name, from [`~Sam3LiteModel.parameter_shapes`].
    """
    config = Sam3LiteConfig.from_preset(preset)
    megabytes = 2 * sum(map(math.prod, shapes.values())) / 1e6
    miniature = preset.startswith("tiny")
    origin = RANDOM_WEIGHTS if miniature else Origin("facebook/sam3", True, on_hub=True)
    return _render(
        config.vocabulary,
        sizes=_sizes(config, shapes, f"{megabytes:.0f} MB in FP16"),
        provenance={"origin": asdict(origin), "versions": {"sam3-hf": __version__}},
        report=None,
        example=False,
        preset=preset,
    )


def _render(
    vocabulary: list[str] | None,
    *,
    sizes: dict,
    provenance: dict,
    report: dict | None,
    example: bool,
    preset: str | None = None,
    text_replaced: bool = False,
    mask_supervision: bool = True,
    video: bool = False,
) -> ModelCard:
    origin, trained = _recorded(provenance, None), "arguments" in provenance
    best = provenance.get("best")
    kind = f", preset {preset}" if preset else ", fine-tuned" if trained else " with its tracker" if video else ""
    name = f"Lite SAM 3{kind}"
    scores = {key: best["scores"][key] for key in SCORES if key in best["scores"]} if best else {}
    concepts = provenance["dataset"]["concepts"] if trained else []
    phrases = vocabulary or concepts or ["red blood cell"]
    return ModelCard.from_template(
        _metadata(name, origin, provenance.get("dataset"), scores, VIDEO_TAGS if video else TAGS),
        template_path=str(ASSETS / "model_card.md"),
        title=name,
        summary=_summary(trained, video),
        video=video,
        example=example,
        sizes=sizes,
        placeholder=PLACEHOLDER,
        phrases=_phrases(phrases),
        origin=_origin_text(origin, trained, preset, report, provenance.get("text_distilled")),
        mapping=_mapping_rows(report),
        text_replaced=text_replaced,
        dataset=_dataset_text(provenance["dataset"]) if trained else "",
        training=_settings(provenance) if trained else [],
        scores=[(key, f"{value:.4f}") for key, value in scores.items()],
        where=f"On the validation split, with the weights of step {best['step']} (epoch {best['epoch']:.1f}), which "
        "were chosen by them. AP is COCO's, cgF1 and IL_MCC are SAM 3's; all in parts of 1."
        if best
        else "",
        limits=_limits(sizes, vocabulary, origin, trained, _mapped(preset, report), mask_supervision, video),
        license_text=_license_text(origin),
        versions=", ".join(f"{key} {value}" for key, value in provenance["versions"].items()),
    )


def _metadata(
    name: str, origin: Origin, dataset: dict | None, scores: dict[str, float], tags: Sequence[str]
) -> ModelCardData:
    sam_license = {"license": "other", "license_name": SAM_LICENSE, "license_link": SAM_LICENSE_LINK}
    hub_id = dataset["hub_id"] if dataset else None
    results = [
        EvalResult(
            task_type=SCORES[key],
            dataset_type=hub_id or "custom",
            dataset_name=plain(dataset["name"]),
            dataset_split="validation",
            metric_type=key,
            metric_name=key.replace("_", " "),
            metric_value=round(value, 4),
        )
        for key, value in scores.items()
    ]
    return ModelCardData(
        library_name="transformers",
        pipeline_tag="mask-generation",
        tags=[*tags],
        base_model=origin.base if origin.on_hub else None,
        datasets=[hub_id] if hub_id else None,
        model_name=name if results else None,
        eval_results=results or None,
        **(sam_license if origin.derived else {}),
    )


def _summary(trained: bool, video: bool) -> str:
    if video:
        return (
            "Finds every instance of a concept that is named by a phrase in a film and follows each through it: SAM "
            "3's tracker around a detector with the architecture of SAM 3 at the sizes below. Made with sam3-hf."
        )
    return (
        "Finds and segments every instance of a concept that is named by a phrase or shown by a box, with the "
        "architecture of SAM 3 at the sizes below"
        + (", fine-tuned on the data below." if trained else ".")
        + " Made with sam3-hf."
    )


def _sizes(config: Sam3LiteConfig, shapes: dict[str, tuple[int, ...]], weights: str) -> dict:
    preset, sizes = preset_of(config), sizes_of(config)
    counts = {name: math.prod(shape) for name, shape in shapes.items()}
    text = sum(count for name, count in counts.items() if name.startswith("text_encoder."))
    tracker = sum(count for name, count in counts.items() if name.startswith((f"{TRACKER}.", f"{TRACKER_NECK}.")))
    other = text_encoder_of(config) if text else None
    text_encoder = f" with text encoder `{other}`" if other not in (None, "standard") else ""
    return {
        "preset": f"`{preset}`{text_encoder}" if preset else "none, own sizes",
        "vit": f"{sizes['vision_width']} × {sizes['vision_layers']} × {sizes['vision_heads']}",
        "detr": f"{sizes['detr_encoder_layers']} + {sizes['detr_decoder_layers']}",
        "pixels": sizes["image_size"],
        "parameters": f"{sum(counts.values()) / 1e6:.1f}M",
        "without_text": f"{(sum(counts.values()) - text) / 1e6:.1f}M",
        "tracker": f"{tracker / 1e6:.1f}M" if tracker else None,
        "weights": weights,
        "queries": sizes["queries"],
        "tokens": context_length(config.text_config),
    }


def _weights(folder: Path) -> tuple[dict[str, tuple[int, ...]], list[str], int]:
    """Shapes by name, dtypes and bytes of a folder's weights, from their headers."""
    shapes, dtypes, size = {}, set(), 0
    for path in weight_files(folder):
        size += path.stat().st_size
        with safe_open(path, framework="pt") as file:
            for name in file.keys():
                tensor = file.get_slice(name)
                shapes[name] = tuple(tensor.get_shape())
                dtypes.add(tensor.get_dtype())
    return shapes, sorted(dtypes), size


def _read(path: Path) -> dict | None:
    return read_json(path) if path.is_file() else None


def _phrases(phrases: list[str]) -> str:
    """Up to three of them as Python code; long ones only where there are no others."""
    short = [phrase for phrase in phrases if len(phrase) <= LONGEST]
    return f"[{', '.join(map(python_literal, short[:3] or phrases[:1]))}]"


def _link(name: str, kind: str = "") -> str:
    return f"[{markdown(name)}](https://huggingface.co/{kind}{quote(name)})"


def _shown(origin: Origin) -> str:
    """The base as a link; of a path only the last part, as the rest is the author's business."""
    return _link(origin.base) if origin.on_hub else markdown_code(Path(origin.base).name)


def _origin_text(
    origin: Origin, trained: bool, preset: str | None, report: dict | None, distilled: dict | None = None
) -> str:
    if preset and origin.derived:
        command = f"`sam3-lite convert {origin.base} OUTPUT --preset {preset}`"
        if preset == "standard":
            return f"Weights of this size are those of {_shown(origin)}, copied by {command}."
        return (
            f"Weights of this size are made from {_shown(origin)}, without data, by {command}: a starting point for "
            "training, not a finished model."
        )
    if origin == RANDOM_WEIGHTS:
        return "Random weights" + (", trained as below." if trained else ", for tests and demonstrations.")
    if origin.base is None:
        return "It is not recorded where the weights come from."
    text = f"They started from {_shown(origin)}."
    if distilled is not None:
        teacher = Origin(distilled["teacher"], None, distilled["teacher_on_hub"])
        text += (
            f" Text distilled from {_shown(teacher)} on {distilled['phrases_fitted']} phrases: the cosine of its "
            f"features on {distilled['phrases_held_out']} others went from {distilled['cosine_before']:.3f} to "
            f"{distilled['cosine_after']:.3f}."
        )
    if report is not None:
        if report.get("text_source"):
            words = report["text_source"]
            text += f" Their text encoder is that of {_shown(Origin(words, None, not os.path.exists(words)))}."
        fitted = report.get("calibration", {}).get("text")
        if fitted:
            text += f" Their text encoder was made smaller and fitted to {fitted['phrases_fitted']} phrases."
        data = "on unlabelled images" if report["strategy"] == "calibrated" else "without data"
        text += f" To fit these sizes they were mapped with the strategy {markdown_code(report['strategy'])}, {data}:"
    return text


def _mapped(preset: str | None, report: dict | None) -> bool:
    """Whether the weights were fitted to sizes that are not those of their source."""
    return preset != "standard" if preset else report is not None and report["strategy"] != "copy"


def _mapping_rows(report: dict | None) -> list[tuple[str, int, str]]:
    if report is None:
        return []
    return [
        (action, total["tensors"], f"{total['parameters'] / 1e6:.2f}M") for action, total in report["totals"].items()
    ]


def _has_text_encoder(report: dict) -> bool:
    """Whether the mapping made a model with a text encoder."""
    return any(row["group"].startswith("text_encoder.") and row["target_shape"] for row in report["rows"])


def _dataset_text(dataset: dict) -> str:
    hub_id = dataset["hub_id"]
    name = _link(hub_id, "datasets/") if hub_id else markdown_code(dataset["name"])
    concepts = ", ".join(map(markdown, dataset["concepts"][:20]))
    more = f" and {len(dataset['concepts']) - 20} more" if len(dataset["concepts"]) > 20 else ""
    objects = "with masks" if dataset["has masks"] else "with boxes"
    return f"On {name}: {dataset['training images']} training images, {objects}. Concepts: {concepts}{more}."


def _settings(provenance: dict) -> list[tuple[str, str]]:
    arguments = provenance["arguments"]
    rows = [("steps", provenance["steps"]), ("images per step", provenance["images_per_step"])]
    rows += [(name.replace("_", " "), arguments[name]) for name in SETTINGS if arguments.get(name) is not None]
    after = (provenance.get("best") or {}).get("scores", {})
    for name, before in (provenance.get("retained_before") or {}).items():
        if name in after and name.endswith("cgF1"):
            score = name.removeprefix("retention_")
            said = f"agreement with the teacher on phrases that were not trained ({score}), before and after"
            rows.append((said, f"{before:.3f}, {after[name]:.3f}"))
    return [(name, markdown(value)) for name, value in rows]


def _limits(
    sizes: dict,
    vocabulary: list[str] | None,
    origin: Origin,
    trained: bool,
    mapped: bool,
    mask_supervision: bool,
    video: bool,
) -> list[str]:
    limits = []
    if not mask_supervision:
        limits.append("It was trained on boxes alone: it gives boxes. Its masks mean nothing and are not shown.")
    if vocabulary is not None:
        limits.append("Its vocabulary is fixed: it refuses phrases that `model.config.vocabulary` does not list.")
    if trained:
        if vocabulary is None:
            limits.append("It was trained on the concepts above; other phrases may find nothing, or the wrong things.")
        if origin == RANDOM_WEIGHTS:
            limits.append("It started from random weights: it knows no word that was not in its training data.")
    elif origin == RANDOM_WEIGHTS:
        limits.append("Untrained, it finds nothing.")
    elif mapped and video:
        limits.append(
            "Its weights were mapped to these sizes. Unless a detector that was trained since was put into it "
            "(`replace_detector`), fine-tune the detector and do so before use."
        )
    elif mapped:
        limits.append("It was not trained since its weights were mapped to these sizes: fine-tune it before use.")
    pixels, seen = sizes["pixels"], "Frames" if video else "Pictures"
    return [
        *limits,
        f"{seen} are resized to {pixels} × {pixels} px: what is only a few pixels wide there is not found.",
        f"It returns at most {sizes['queries']} instances per prompt{' and frame' if video else ''}.",
        "A score says how sure the model is of itself. How often it is right on your pictures, measure on your "
        "pictures. It was not evaluated for decisions about people's health, safety or rights.",
    ]


def _license_text(origin: Origin) -> str:
    link = f"[SAM License]({SAM_LICENSE_LINK})"
    if origin.derived:
        return (
            f"The weights derive from SAM 3 by Meta and fall under Meta's {link}; `{LICENSE_FILE}` beside them is a "
            "copy. Who passes them on, changed or not, does so under the same agreement and adds a copy of it; who "
            "publishes results obtained with them acknowledges the use of the SAM Materials. The agreement excludes, "
            "among other uses, military and nuclear ones, espionage, weapons, and what trade controls forbid. Read it "
            "for the exact terms."
        )
    if origin.derived is None:
        return (
            f"Not stated. If the weights derive from SAM 3, they fall under Meta's {link}, which wants a copy of "
            "itself beside them."
        )
    return "No weights of SAM 3 are in this model. Its author has not chosen a licence for the weights yet."
