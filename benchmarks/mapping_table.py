"""The mapping benchmark's results as Markdown, from the files of its runs alone."""

import statistics

from mapping_measures import SCORES
from mapping_students import IDENTITY, PARTS, STRATEGIES

MORE_SPLITS = ("unseen", "dense")  # of the composed world
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
    more = [split for split in MORE_SPLITS if split in teacher]
    curve = ", ".join(f"{float(share):.1%}: {energy:.1%}" for share, energy in teacher["captured_energy"].items())
    lines = [
        f"Teacher `{teacher['name']}`: " + ", ".join(f"{name} {teacher['scores'][name]:.3f}" for name in SCORES) + ".",
        f"Energy of its residual stream in the strongest directions: {curve}.",
        "",
        "| start | FPN cosine ×4 / ×2 / ×1 | segm AP | cgF1 | presence AUC |"
        + "".join(f" {split}: segm AP |" for split in more)
        + " LR | steps to 80% | 90% | 95% |",
        "|---|---|---|---|---|" + "---|" * len(more) + "---|---|---|---|",
    ]
    for strategy in (IDENTITY, *STRATEGIES, *PARTS):
        own = [record for record in records if record["strategy"] == strategy]
        started = [record for record in own if record["kind"] == "start"]
        if started:
            cells = [strategy, *start_cells(teacher, started, more), *run_cells(teacher, constant_runs(own))]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, *schedule_lines(teacher, records, more)]) + "\n"


def constant_runs(records: list[dict]) -> list[dict]:
    """Those of runs with a constant learning rate."""
    return [record for record in records if record["kind"] == "run" and "schedule" not in record]


def schedule_lines(teacher: dict, records: list[dict], more: list[str]) -> list[str]:
    """A second table, of what runs with a schedule end with; none where there were no such runs."""
    ended = [record for record in records if "schedule" in record]
    if not ended:
        return []
    lines = ["", "| start | schedule | LR | segm AP |" + "".join(f" {split}: segm AP |" for split in more)]
    lines.append("|---|---|---|---|" + "---|" * len(more))
    for strategy in (*STRATEGIES, *PARTS):
        own = [record for record in ended if record["strategy"] == strategy]
        for steps, rate in sorted({(int(record["curve"][-1][0]), record["learning_rate"]) for record in own}):
            alike = [each for each in own if (each["curve"][-1][0], each["learning_rate"]) == (steps, rate)]
            scores = [score_cell(teacher, alike, split, "segm_AP") for split in ("scores", *more)]
            schedule = f"{alike[0]['schedule']}, {steps} steps"
            lines.append(f"| {' | '.join([strategy, schedule, f'{rate:g}', *scores])} |")
    return lines


def start_cells(teacher: dict, started: list[dict], more: list[str]) -> list[str]:
    """Cosines per level, then each score, and segm AP on more splits, with its share of the teacher's."""
    levels = zip(*(record["fpn_cosines"] for record in started), strict=True)
    cells = [" / ".join(f"{statistics.mean(level):.3f}" for level in levels)]
    cells += [score_cell(teacher, started, "scores", name) for name in SCORES]
    return cells + [score_cell(teacher, started, split, "segm_AP") for split in more]


def score_cell(teacher: dict, records: list[dict], split: str, name: str) -> str:
    """Mean of a score over seeds, its deviation, and its share of the teacher's."""
    values = [record[split][name] for record in records]
    mean, reference = statistics.mean(values), teacher[split][name]
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    share = f" ({mean / reference:.0%})" if reference > 0 else ""
    return f"{mean:.3f}{spread}{share}"


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
