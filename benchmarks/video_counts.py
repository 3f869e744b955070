"""Arithmetic and kernels of a frame of a film at full size, counted on a machine without a GPU.

    python benchmarks/video_counts.py --models stock-standard standard lite --objects 1 5 20

Counts, not measurements: see `counting.py`. Rows named `stock-PRESET` are `transformers.Sam3VideoModel`. The frame is
one in the middle of a film: every object is found by the detector under one phrase, and was followed long enough for
the memory of the tracker to be full (7 frames, 16 pointers). Text features are given; matching is left out. `trunk` is
the ViT with the pyramids of detector and tracker; `detector` what finds one phrase, with masks of all queries in stock
and of those found here; `tracker` what follows the objects and writes their memory.
"""

import argparse
from typing import NamedTuple

import torch
from common import STOCK, TOKENS, parser, report
from counting import Counter, fake_cuda, flops
from counts import find, grid_side
from torch import nn
from transformers import Sam3VideoConfig, Sam3VideoModel
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.sam3_video.modeling_sam3_video import Sam3VideoInferenceSession

from sam3_hf import Sam3LiteVideoConfig, Sam3LiteVideoModel
from sam3_hf.checkpoints import stock_config

FRAME, FRAMES = 20, 40  # that is counted, of so many


class Part(NamedTuple):
    """What a part of the model does for a frame."""

    flop: int
    kernels: int


def build_video(name: str, image_size: int | None) -> nn.Module:
    sizes = {} if image_size is None else {"image_size": image_size}
    config = Sam3LiteVideoConfig.from_preset(name.removeprefix(STOCK), **sizes)
    if not name.startswith(STOCK):
        return Sam3LiteVideoModel(config)
    detector = stock_config(config.detector_config).to_dict()
    stock = Sam3VideoConfig(detector_config=detector, tracker_config=config.tracker_config)
    return Sam3VideoModel(stock)


def counted(call) -> tuple[Part, object]:
    with flops() as counter, Counter() as count:
        result = call()
    return Part(counter.get_total_flops(), count.kernels), result


def session_with(model: nn.Module, objects: int, features: dict) -> Sam3VideoInferenceSession:
    """A session in the middle of a film, with so many objects that have been there from its start."""
    session = Sam3VideoInferenceSession(inference_device="cuda", inference_state_device="cuda", dtype=torch.float32)
    session.processed_frames, session.obj_with_new_inputs = dict.fromkeys(range(FRAMES)), []
    session.cache.cache_vision_features(FRAME, features)
    tracker, cells = model.tracker_model, features["vision_feats"][-1].shape[0]
    for obj in range(objects):
        index = session.obj_id_to_idx(obj)
        memory = {
            "maskmem_features": torch.empty(cells, 1, tracker.mem_dim),
            "maskmem_pos_enc": torch.empty(cells, 1, tracker.mem_dim),
            "object_pointer": torch.empty(1, tracker.hidden_dim),
        }
        frames = session.output_dict_per_obj[index]
        frames["cond_frame_outputs"][0] = memory
        frames["non_cond_frame_outputs"].update(dict.fromkeys(range(1, FRAME), memory))
    return session


def count_frame(name: str, image_size: int | None, objects: int) -> dict[str, Part]:
    with fake_cuda(grid_side(name, image_size)), torch.no_grad():
        model = build_video(name, image_size).eval()
        size, width = model.config.image_size, model.config.detector_config.detr_encoder_config.hidden_size
        pixels, text = torch.empty(1, 3, size, size), torch.empty(1, TOKENS, width)
        mask, detector = torch.ones(1, TOKENS, dtype=torch.long), model.detector_model

        def trunk():
            vision = detector.get_vision_features(pixels)
            return vision, model.get_vision_features_for_tracker(vision)

        def detect():
            if name.startswith(STOCK):
                embeds = BaseModelOutputWithPooling(pooler_output=text)
                detector(vision_embeds=vision, text_embeds=embeds, attention_mask=mask)
            else:
                find(detector, vision, text, mask, objects)

        def track():
            model.run_tracker_propagation(session, FRAME, reverse=False)
            side = model.tracker_model.prompt_encoder.mask_input_size[0]
            model.run_memory_encoder(session, FRAME, torch.empty(objects, 1, side, side), torch.empty(objects, 1, 1))

        parts = {}
        parts["trunk"], (vision, (maps, positions)) = counted(trunk)
        parts["detector"], _ = counted(detect)
        session = session_with(model, objects, {"vision_feats": maps, "vision_pos_embeds": positions})
        parts["tracker"], _ = counted(track)
    return parts


def row(arguments: argparse.Namespace, name: str, objects: int) -> dict:
    parts = count_frame(name, arguments.image_size, objects)
    values = {"model": name, "objects": objects}
    values |= {f"{part} TFLOP": count.flop / 1e12 for part, count in parts.items()}
    values["TFLOP"] = sum(count.flop for count in parts.values()) / 1e12
    return values | {"kernels": sum(count.kernels for count in parts.values())}


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--models", nargs="+", default=["stock-standard", "lite"], help="presets, stock-PRESET")
    options.add_argument("--objects", nargs="+", type=int, default=[1, 5, 20], help="that are followed")
    options.add_argument("--image-size", type=int, help="side of the frames in pixels; default: the presets'")
    arguments = options.parse_args()
    rows = [row(arguments, name, count) for count in arguments.objects for name in arguments.models]
    for line in rows:
        base = next((r for r in rows if r["objects"] == line["objects"] and r["model"].startswith(STOCK)), None)
        line["stock / this"] = base and base["TFLOP"] / line["TFLOP"]
    report(arguments, rows)


if __name__ == "__main__":
    main()
