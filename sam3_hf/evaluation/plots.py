"""Pictures of the figures that `curves` returns."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402

from ..files import write_file  # noqa: E402
from ..plain_text import plain  # noqa: E402

MAX_NAMED = 30  # concepts that have room for names and numbers


def plot_precision_recall(curves: dict, title: str, path: Path) -> None:
    """
    One line per concept and their mean, over recall.

    Args:
        curves: T_precision_recall of `PrecisionRecall`.
    """
    figure, axes = plt.subplots(figsize=(8, 6), layout="constrained")
    recall, precision = curves["recall"], curves["precision"]
    many = len(precision) > MAX_NAMED
    for index, (name, values) in enumerate(precision.items()):
        label = None if many else f"{_shown(name)}: {np.mean(values):.2f}"
        axes.plot(recall, values, linewidth=1, alpha=0.3 if many else 0.9, color=f"C{index % 10}", label=label)
    if precision:
        mean = np.mean(list(precision.values()), axis=0)
        axes.plot(recall, mean, linewidth=2.5, color="black", label=f"mean: {mean.mean():.2f}")
        axes.legend(title="AP50", loc="upper left", bbox_to_anchor=(1, 1), fontsize=9)
    axes.set(xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(0, 1.02), title=title)
    axes.grid(alpha=0.3)
    _save(figure, path)


def plot_confusion(confusion: dict, title: str, path: Path) -> None:
    """
    Counts of what is what and was found as what; shades are shares of the row.

    Args:
        confusion: T_confusion of `Confusion`.
    """
    counts = np.array(confusion["counts"])
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    size = len(counts)
    side = min(5 + 0.35 * size, 16)
    figure, axes = plt.subplots(figsize=(side, side * 0.9), layout="constrained")
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set(xlabel="found as", ylabel="is", title=title)
    if size <= MAX_NAMED + 1:
        concepts = [_shown(concept) for concept in confusion["concepts"]]
        axes.set_xticks(range(size), [*concepts, "missed"], rotation=45, ha="right")
        axes.set_yticks(range(size), [*concepts, "nothing, double"])
        for row, column in zip(*np.nonzero(counts), strict=True):
            color = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, counts[row, column], ha="center", va="center", color=color)
    axes.axhline(size - 1.5, color="grey", linewidth=0.8)
    axes.axvline(size - 1.5, color="grey", linewidth=0.8)
    _save(figure, path)


def _shown(name: str) -> str:
    """A name for matplotlib, which would set what is between dollar signs as a formula."""
    return plain(name, 40).replace("$", r"\$")


def _save(figure, path: Path) -> None:
    write_file(path, lambda partial: figure.savefig(partial, dpi=120, format="png"))
    plt.close(figure)
