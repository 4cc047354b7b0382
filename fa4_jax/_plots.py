# SPDX-License-Identifier: Apache-2.0
"""Pictures of what `fa4_jax.bench` measured. Needs matplotlib."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import Any

# Of NVIDIA's data sheets: 10^12 16-bit operations a second, dense, and 10^12 bytes a second.
PEAKS = {
    "H200": (989.0, 4.8),
    "H100": (989.0, 3.35),
    "B200": (2250.0, 8.0),
    "GB200": (2500.0, 8.0),
}

Rows = Sequence[dict[str, Any]]


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _distinct(rows: Rows, column: str) -> list[Any]:
    return list(dict.fromkeys(row[column] for row in rows))


def bars(rows: Rows, title: str, path: pathlib.Path) -> None:
    """TFLOP/s: one panel per pass, one group of bars per case."""
    pyplot = _pyplot()
    names, passes = _distinct(rows, "name"), _distinct(rows, "pass")
    implementations = _distinct(rows, "implementation")
    figure, panels = pyplot.subplots(
        len(passes),
        1,
        figsize=(max(6.0, 1.3 * len(names)), 2.8 * len(passes) + 1),
        squeeze=False,
        sharex=True,
        layout="constrained",
    )
    width = 0.8 / len(implementations)
    for axes, timed in zip(panels[:, 0], passes, strict=True):
        for i, implementation in enumerate(implementations):
            drawn = [
                (names.index(row["name"]) + (i - (len(implementations) - 1) / 2) * width, row)
                for row in rows
                if (row["pass"], row["implementation"]) == (timed, implementation)
            ]
            container = axes.bar(
                [x for x, _ in drawn],
                [row["tflops"] or 0.0 for _, row in drawn],
                width,
                label=implementation,
            )
            labels = [f"{row['tflops']:.3g}" if row["tflops"] else "" for _, row in drawn]
            axes.bar_label(container, labels, fontsize=7)
        axes.set(ylabel=f"{timed}, TFLOP/s")
        axes.margins(y=0.12)
    panels[-1, 0].set_xticks(range(len(names)), names, rotation=30, ha="right")
    panels[0, 0].legend(ncols=len(implementations))
    figure.suptitle(title)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def roofline(rows: Rows, title: str, path: pathlib.Path) -> None:
    """TFLOP/s over FLOP per byte, under what the device's arithmetic and memory allow.

    Bytes are those of operands and results, each read or written once, so a point's distance to
    the roof is what better kernels could gain at most. Ceilings are drawn for devices in `PEAKS`.
    """
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(figsize=(8, 5.5), layout="constrained")
    timed = [row for row in rows if row["tflops"]]
    passes = _distinct(timed, "pass")
    markers = dict(zip(passes, "os^Dv", strict=False))
    for implementation in _distinct(timed, "implementation"):
        colour = None
        for name, marker in markers.items():
            points = [
                (row["flops"] / row["bytes"], row["tflops"])
                for row in timed
                if (row["pass"], row["implementation"]) == (name, implementation)
            ]
            if points:
                label = f"{implementation}, {name}"
                (line,) = axes.plot(
                    *zip(*points, strict=True), marker, color=colour, label=label, alpha=0.8
                )
                colour = line.get_color()
    # The longest name that fits: GB200 is no B200.
    device = max((key for key in PEAKS if key in title), key=len, default="")
    if device and timed:
        compute, memory = PEAKS[device]
        intensities = [row["flops"] / row["bytes"] for row in timed]
        ends = min(*intensities, compute / memory) / 2, max(*intensities, compute / memory) * 2
        steps = [ends[0] * (ends[1] / ends[0]) ** (i / 100) for i in range(101)]
        axes.plot(
            steps,
            [min(compute, memory * x) for x in steps],
            "k-",
            linewidth=1,
            label=f"{device}: {compute:g} TFLOP/s, {memory:g} TB/s",
        )
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="arithmetic intensity, FLOP per byte of operands and results",
        ylabel="TFLOP/s",
        title=title,
    )
    axes.grid(which="both", alpha=0.2)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
