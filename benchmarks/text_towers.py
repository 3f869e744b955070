"""
Text encoders: what smaller ones keep of a larger one's words, and what each costs at full size.

    python benchmarks/text_towers.py kept sam3_hf/assets/tiny-standard
    python benchmarks/text_towers.py cost

`kept` makes the text encoder of a teacher smaller, from phrases alone: mapped, fitted, then distilled. Of each it says
how near its features come to the teacher's on phrases of the same world that it did not learn from, and the scores of
the whole model, all else of which stays the teacher's, in the composed world; one of its splits is of word pairs that
neither the teacher's training nor the phrases of the fit combine.

`cost` takes random weights at full size: parameters, bytes, and the seconds of processor time, on one core, of loading
and of 20 phrases, in float32.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from common import RESULTS, report
from composed_scores import composed_split
from safetensors.torch import load_file, save_file
from torch import nn

from sam3_hf import Sam3LiteConfig, Sam3LiteModel, Sam3LiteProcessor
from sam3_hf.checkpoints.text_encoder import text_parts
from sam3_hf.data.words import SEEN_PHRASES, absent_phrases
from sam3_hf.phrases import everyday_phrases, plural
from sam3_hf.presets_sam3_lite import TEXT_ENCODERS
from sam3_hf.training.text_distillation import TextSettings, TextSide, detector_scores, distill_text, read_teacher

SPLITS = ("seen", "unseen")
FEW = 20  # phrases that are timed


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    kept = commands.add_parser("kept", help="what a smaller text encoder keeps")
    kept.add_argument("teacher", nargs="?", default="sam3_hf/assets/tiny-standard", help="folder or Hub id")
    kept.add_argument("--images", type=int, default=100, help="pictures of each split")
    kept.add_argument("--text-hidden-size", type=int, default=16)
    kept.add_argument("--text-intermediate-size", type=int)
    kept.add_argument("--text-num-hidden-layers", type=int)
    kept.add_argument("--steps", type=int, default=2000, help="of the distillation")
    kept.add_argument("--learning-rate", type=float, default=TextSettings.learning_rate)
    kept.add_argument("--seed", type=int, default=0)
    kept.set_defaults(run=measure_kept)
    cost = commands.add_parser("cost", help="what each text encoder costs at full size")
    cost.add_argument("--preset", default="lite")
    cost.add_argument("--repeats", type=int, default=5, help="the median of so many is taken")
    cost.set_defaults(run=measure_cost)
    for name, command in (("kept", kept), ("cost", cost)):
        default = RESULTS / f"text_towers_{name}.json"
        command.add_argument("--output", type=Path, default=default, help="JSON file to write; default: %(default)s")
    arguments = parser.parse_args(argv)
    if arguments.output.exists():
        parser.error(f"{arguments.output} exists already: choose another name, or delete it")
    run: Callable[[argparse.Namespace], tuple[list[dict], dict]] = vars(arguments).pop("run")
    rows, more = run(arguments)
    report(arguments, rows, **more)


def measure_kept(arguments: argparse.Namespace) -> tuple[list[dict], dict]:
    """A row for the teacher, and for each way to a smaller text encoder."""
    teacher = Sam3LiteModel.from_pretrained(arguments.teacher, preset="same", dtype=torch.float32)
    processor = Sam3LiteProcessor.of_source(arguments.teacher, teacher.config)
    phrases = known_phrases()
    rows, more = [], {"phrases": len(phrases)}
    with tempfile.TemporaryDirectory() as folder:
        size = teacher.config.image_size
        data = {split: composed_split(Path(folder), split, arguments.images, size) for split in SPLITS}
        for name, model, cosine in students(arguments, teacher, processor, phrases):
            row = {"text": name, "parameters": words_of(model), "share": words_of(model) / words_of(teacher)}
            row |= {"cosine": cosine}
            for split, dataset in data.items():
                for score, value in detector_scores(model, processor, dataset).items():
                    if score.startswith("segm"):
                        row[f"{split} {score}"] = value
                        whole = (rows or [row])[0][f"{split} {score}"]
                        row[f"{split} {score} kept"] = value / whole if whole else None
            rows.append(row)
            sys.stdout.write(f"{row}\n")
    return rows, more


def students(
    arguments: argparse.Namespace, teacher: Sam3LiteModel, processor: Sam3LiteProcessor, phrases: list[str]
) -> Iterator[tuple[str, Sam3LiteModel, float]]:
    """Name, model and cosine on held-out phrases of the teacher and of each smaller text encoder."""
    yield "teacher", teacher, 1.0
    names = ("text_hidden_size", "text_intermediate_size", "text_num_hidden_layers")
    sizes = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    options = {"preset": "same", "dtype": torch.float32, **sizes}
    mapped = Sam3LiteModel.from_pretrained(arguments.teacher, mapping="isometry", **options)
    fitted = Sam3LiteModel.from_pretrained(arguments.teacher, text_phrases=phrases, **options)
    said = fitted.mapping_report.calibration["text"]
    yield "mapped", mapped, said["cosine_before_fit"]
    yield "mapped and fitted", fitted, said["cosine"]
    side = TextSide(fitted.text_encoder, fitted.text_projection, processor.tokenizer)
    settings = TextSettings(arguments.steps, learning_rate=arguments.learning_rate, seed=arguments.seed)
    figures = distill_text(side, read_teacher(arguments.teacher), phrases, settings)
    yield f"and distilled, {arguments.steps} steps", fitted, figures["cosine_after"]


def known_phrases() -> list[str]:
    """The words of the composed world as far as training has combined them, in the plural too, and absent phrases."""
    return list(dict.fromkeys([*SEEN_PHRASES, *map(plural, SEEN_PHRASES), *absent_phrases()]))


def words_of(model: Sam3LiteModel) -> int:
    """Parameters of the text encoder, with its projection."""
    return sum(p.numel() for part in (model.text_encoder, model.text_projection) for p in part.parameters())


@torch.no_grad()
def measure_cost(arguments: argparse.Namespace) -> tuple[list[dict], dict]:
    """A row for each text encoder; times are of all of them in turn, again and again."""
    torch.set_num_threads(1)
    configs = {text: Sam3LiteConfig.from_preset(arguments.preset, text=text) for text in reversed(TEXT_ENCODERS)}
    configs = {text: configs[text] for text in ("standard", *[text for text in configs if text != "standard"])}
    with tempfile.TemporaryDirectory() as folder:
        files = {text: Path(folder) / f"{text}.safetensors" for text in configs}
        towers = {text: saved_tower(config, files[text]) for text, config in configs.items()}
        times: dict[str, dict[str, list[float]]] = {text: {"load": [], "phrases": []} for text in configs}
        tokens = {text: Sam3LiteProcessor.from_config(config)(text=few()) for text, config in configs.items()}
        for text in list(configs) * (arguments.repeats + 1):
            parts, file, phrases = towers[text], files[text], tokens[text]
            times[text]["load"].append(seconds(partial(load, parts, file)))
            times[text]["phrases"].append(seconds(partial(say, parts, phrases)))
        rows = [cost_row(text, towers[text], files[text], times) for text in configs]
    return rows, {"phrases": few()}


def few() -> list[str]:
    phrases = everyday_phrases()
    return list(phrases[:: len(phrases) // FEW][:FEW])


def saved_tower(config: Sam3LiteConfig, file: Path) -> nn.ModuleDict:
    """A text encoder and its projection with random weights, saved in FP16."""
    torch.manual_seed(0)
    parts = text_parts(config.text_config, config.detr_encoder_config.hidden_size).eval()
    for parameter in parts.parameters():
        nn.init.normal_(parameter, std=0.02)
    save_file({name: tensor.half() for name, tensor in parts.state_dict().items()}, file)
    return parts


def load(parts: nn.ModuleDict, file: Path) -> None:
    parts.load_state_dict(load_file(file))


def say(parts: nn.ModuleDict, tokens) -> None:
    parts["text_projection"](parts["text_encoder"](tokens["input_ids"], tokens["attention_mask"]).last_hidden_state)


def seconds(function: Callable[[], object]) -> float:
    """Of the processor, which other processes on it do not lengthen as they do those of the clock."""
    start = time.process_time()
    function()
    return time.process_time() - start


def cost_row(text: str, parts: nn.ModuleDict, file: Path, times: dict) -> dict:
    def median(name: str, of: str) -> float:
        values = sorted(times[name][of][1:])  # the first one warms up
        return values[len(values) // 2]

    row = {
        "text": text,
        "parameters": sum(p.numel() for p in parts.parameters()),
        "fp16_mb": file.stat().st_size / 1e6,
        "load_s": median(text, "load"),
        "ms_20_phrases": 1000 * median(text, "phrases"),
    }
    return row | {f"{of}_ratio": median("standard", of) / median(text, of) for of in ("load", "phrases")}


if __name__ == "__main__":
    main()
