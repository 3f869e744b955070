"""The mapping benchmark's results as Markdown, from the files of its runs alone."""

import statistics

from mapping_measures import SCORES
from mapping_students import IDENTITY, STRATEGIES

TARGETS = (0.8, 0.9, 0.95)  # shares of the teacher's segm AP


def steps_to_share(curve: list[list[float]], teacher_ap: float, share: float) -> int | None:
    """First step of `[[step, segm AP], ...]` at which the AP is at least `share` of the teacher's; None if none is."""
    return next((int(step) for step, ap in curve if ap >= share * teacher_ap), None)


def best_learning_rate(runs: list[dict], teacher_ap: float) -> float:
    """
    The rate of the sweep that reaches 90% of the teacher soonest: most seeds first, then fewest steps; where none
    does, the rate with the highest AP at any step. Compared on the seeds that all rates were run with.

    Args:
        runs: records of one strategy, at least one.

    Raises:
        ValueError: no seed was run with all rates.
    """
    by_rate: dict[float, dict[int, dict]] = {}
    for run in runs:
        by_rate.setdefault(run["learning_rate"], {})[run["seed"]] = run
    common = set.intersection(*(set(seeds) for seeds in by_rate.values()))
    if not common:
        rates = ", ".join(f"{rate:g}" for rate in sorted(by_rate))
        raise ValueError(f"{runs[0]['strategy']}: no seed was run with each of the learning rates {rates}")

    def cost(rate: float) -> tuple:
        curves = [by_rate[rate][seed]["curve"] for seed in common]
        steps = [found for curve in curves if (found := steps_to_share(curve, teacher_ap, 0.9)) is not None]
        highest = statistics.mean(max(ap for _, ap in curve) for curve in curves)
        return -len(steps), sum(steps), -highest

    return min(sorted(by_rate), key=cost)


def table(teacher: dict, records: list[dict]) -> str:
    """
    Markdown for one teacher.

    Args:
        teacher: its record.
        records: those of its students and of their runs.
    """
    curve = ", ".join(f"{float(share):.1%}: {energy:.1%}" for share, energy in teacher["captured_energy"].items())
    lines = [
        f"Teacher `{teacher['name']}`: " + ", ".join(f"{name} {teacher['scores'][name]:.3f}" for name in SCORES) + ".",
        f"Energy of its residual stream in the strongest directions: {curve}.",
        "",
        "| start | FPN cosine ×4 / ×2 / ×1 | segm AP | cgF1 | presence AUC | LR | steps to 80% | 90% | 95% |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for strategy in (IDENTITY, *STRATEGIES):
        own = [record for record in records if record["strategy"] == strategy]
        started = [record for record in own if record["kind"] == "start"]
        if started:
            runs = [record for record in own if record["kind"] == "run"]
            lines.append(f"| {' | '.join([strategy, *start_cells(teacher, started), *run_cells(teacher, runs)])} |")
    return "\n".join(lines) + "\n"


def start_cells(teacher: dict, started: list[dict]) -> list[str]:
    """Cosines per level, then each score with its share of the teacher's; means over seeds."""
    levels = zip(*(record["fpn_cosines"] for record in started), strict=True)
    cells = [" / ".join(f"{statistics.mean(level):.3f}" for level in levels)]
    for name in SCORES:
        values = [record["scores"][name] for record in started]
        mean, reference = statistics.mean(values), teacher["scores"][name]
        spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
        share = f" ({mean / reference:.0%})" if reference > 0 else ""
        cells.append(f"{mean:.3f}{spread}{share}")
    return cells


def run_cells(teacher: dict, runs: list[dict]) -> list[str]:
    """The best learning rate, then the steps to each of `TARGETS` with it."""
    if not runs:
        return ["–"] * (1 + len(TARGETS))
    rate = best_learning_rate(runs, teacher["curve_AP"])
    chosen = [run for run in runs if run["learning_rate"] == rate]
    return [f"{rate:g}", *(steps_cell(chosen, teacher["curve_AP"], share) for share in TARGETS)]


def steps_cell(runs: list[dict], teacher_ap: float, share: float) -> str:
    """Mean and range of the steps to a share over seeds; which of them did not get there within how many steps."""
    found = [steps_to_share(run["curve"], teacher_ap, share) for run in runs]
    reached = sorted(steps for steps in found if steps is not None)
    late = [int(run["curve"][-1][0]) for run, steps in zip(runs, found, strict=True) if steps is None]
    if not reached:
        return f"not within {min(late)}"
    text = f"{statistics.mean(reached):.0f}"
    if reached[0] != reached[-1]:
        text += f" ({reached[0]}–{reached[-1]})"
    return f"{text}; {len(late)} of {len(runs)} not within {min(late)}" if late else text
