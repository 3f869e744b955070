"""Whether a checkpoint fits the settings of the run that goes on from it."""

import logging

logger = logging.getLogger(__name__)

# Settings without which a checkpoint's weights or its place in the data mean something else.
FIXED = (
    "preset",
    "image_size",
    "num_queries",
    "model_overrides",
    "train_text_encoder",
    "seed",
    "weight_decay",
    "vit_layer_decay",
    "lora_rank",
    "lora_alpha",
    "lora_targets",
)
# What a finished run still goes by, as it writes and pushes its model anew.
OF_THE_MODEL = ("freeze_vocabulary", "merge_adapter", "push_to_hub")


def check_compatible(saved: dict, current: dict, finished: bool = False) -> None:
    """
    Compares the settings of a checkpoint with those of the run that goes on from it, and logs harmless differences.

    Args:
        saved, current: "arguments" (flat), "images_per_step" and "dataset" of trainer_state.json.
        finished: no step is left, so that other settings change nothing.

    Raises:
        ValueError: they differ in what the checkpoint depends on; the message names all such settings.
    """
    before, now = saved["arguments"], current["arguments"]
    wrong = [f"{name}: {before.get(name)} there, {now[name]} here" for name in FIXED if before.get(name) != now[name]]
    if bool(before["ema_decay"]) != bool(now["ema_decay"]):
        wrong.append(f"ema_decay: {before['ema_decay']} there, {now['ema_decay']} here")
    if before.get("merge_adapter", True) and not now["merge_adapter"]:  # the base may have no name
        wrong.append("merge_adapter: true there, false here")
    if bool(before.get("teacher")) != bool(now["teacher"]):
        wrong.append(f"teacher: {before.get('teacher')} there, {now['teacher']} here")
    if saved["dataset"] != current["dataset"]:
        wrong.append(f"data: {_differences(saved['dataset'], current['dataset'])}")
    if saved["images_per_step"] != current["images_per_step"]:
        wrong.append(
            f"images per step (batch_size x gradient_accumulation_steps x processes): {saved['images_per_step']} "
            f"there, {current['images_per_step']} here"
        )
    if wrong:
        raise ValueError(
            "cannot resume, the checkpoint was made with other settings:\n  "
            + "\n  ".join(wrong)
            + "\ngive the same ones, or start anew in another --output_dir (--init takes weights from a final/ folder)"
        )
    new = [name for name in now if now[name] != before.get(name, now[name])]
    new = [name for name in new if name not in (*FIXED, "resume", "output_dir")]
    if finished:
        _warn_of_no_steps({name: (before[name], now[name]) for name in new})
        return
    for name in new:
        logger.warning("%s was %s up to the checkpoint and is %s from here on", name, before[name], now[name])


def _warn_of_no_steps(new: dict[str, tuple]) -> None:
    """
    Args:
        new: {setting: its value in the finished run, its value now}.
    """
    idle = [name for name in new if name not in OF_THE_MODEL and not name.startswith("hub_")]
    if idle:
        logger.warning(
            "the run is finished, and nothing is trained with other settings: %s; raise --epochs or --max_steps to "
            "train on with them, or start anew in another --output_dir",
            ", ".join(f"{name} (it had {new[name][0]}, now {new[name][1]})" for name in idle),
        )


def _differences(before: dict, now: dict) -> str:
    return "; ".join(f"{key} {before[key]} there, {now[key]} here" for key in before if before[key] != now[key])
