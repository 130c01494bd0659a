"""Drawing rules shared by all figures: one palette, one typography, the same bytes each time.

A figure is drawn once, in the light palette, and saved as SVG and PNG. Inside the page its
colours become CSS variables, so the same drawing is readable on a dark background. Only names
that the study file was checked for and numbers enter a figure, never text of examples.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from iprox.report.artifacts import Study

INK, SOFT, GRID, PAPER = "#1a1d21", "#5c6670", "#e3e6ea", "#ffffff"
CHANCE = "#868e96"
"""Colour of random selection; the target is drawn in ink."""

SERIES = ("#0072b2", "#d55e00", "#009e73", "#a8418f", "#8a6d00", "#2f8fb3", "#6f5bb5", "#b2475b")
"""Colours of runs, apart in hue and lightness for all common kinds of colour blindness
(after Okabe & Ito 2008)."""

CSS_VARIABLES = {
    INK: "--ink",
    SOFT: "--soft",
    GRID: "--grid",
    PAPER: "--paper",
    CHANCE: "--chance",
    **{colour: f"--series-{i}" for i, colour in enumerate(SERIES)},
}

WIDTH = 390
"""Width of a figure in points: one figure fills a phone, two or more stand side by side."""

_RC = {
    "svg.fonttype": "none",
    "font.family": "DejaVu Sans",
    "font.size": 10.5,
    "axes.edgecolor": GRID,
    "axes.labelcolor": SOFT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.titlelocation": "left",
    "axes.labelsize": 10.5,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "text.color": INK,
    "figure.facecolor": PAPER,
    "axes.facecolor": PAPER,
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "butt",
    "axes.unicode_minus": True,
    "text.parse_math": False,
}


@dataclass(frozen=True)
class Chart:
    """A finished figure.

    Attributes:
        name: File name without ending.
        title: What it shows; also its alternative text.
        svg: Standalone SVG.
        png: The same at twice the resolution of a screen.
    """

    name: str
    title: str
    svg: str
    png: bytes

    def inline(self) -> str:
        """SVG for the page: colours as CSS variables, ids unique to this figure."""
        body = self.svg[self.svg.index("<svg") :]
        body = re.sub(r"<style.*?</style>", "", body, flags=re.DOTALL)
        body = re.sub(r"font-family:[^;\"]*;?", "", body)
        for colour, variable in CSS_VARIABLES.items():
            body = body.replace(colour, f"var({variable})")
        body = re.sub(r'\bid="', f'id="{self.name}-', body)
        body = re.sub(r'href="#', f'href="#{self.name}-', body)
        body = body.replace("url(#", f"url(#{self.name}-")
        body = re.sub(r'(<svg[^>]*?) width="[^"]*" height="[^"]*"', r"\1", body, count=1)
        return body.replace("<svg", f'<svg class="chart" role="img" aria-label="{self.title}"', 1)


def colours(study: Study) -> dict[str, str]:
    """Colour of every group of runs, and of ``base``: the same in all figures and tables."""
    series = iter(SERIES * (1 + len(study.groups) // len(SERIES)))
    chosen = {"base": SOFT}
    for group, members in study.groups.items():
        if members[0].is_random:
            chosen[group] = CHANCE
        elif members[0].is_target:
            chosen[group] = INK
        else:
            chosen[group] = next(series)
    return chosen


class Canvas:
    """A figure being drawn, its axes, and in the end the finished chart."""

    def __init__(self, figure: Any, axes: Any) -> None:
        self.figure, self.axes = figure, axes
        self.chart: Chart


@contextmanager
def drawing(name: str, title: str, height: float, unit: str = "") -> Iterator[Canvas]:
    """A figure with one pair of axes, titled; after the block ``canvas.chart`` is the result.

    Args:
        name: File name, also the seed of all ids in the SVG.
        title: Shown above the axes and read out for the figure.
        height: Points.
        unit: What is drawn, smaller, below the title.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context({**_RC, "svg.hashsalt": name}):
        figure: Any = Figure(figsize=(WIDTH / 72, height / 72), layout="constrained")
        room = (36 if unit else 22) / height
        figure.get_layout_engine().set(rect=(0, 0, 1, 1 - room))
        canvas = Canvas(figure, figure.add_subplot())
        yield canvas
        place = {"x": 3 / WIDTH, "va": "top", "in_layout": False}
        figure.text(y=1 - 2 / height, s=title, fontsize=11.5, fontweight="bold", **place)
        figure.text(y=1 - 18 / height, s=unit, fontsize=10.5, color=SOFT, **place)
        canvas.chart = Chart(name, title, _svg(figure), _png(figure))


def _svg(figure: Any) -> str:
    stream = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(stream, format="svg", metadata=nothing)
    return stream.getvalue()


def _png(figure: Any) -> bytes:
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=144, metadata={"Software": None})
    return stream.getvalue()


def short(name: str, limit: int = 22) -> str:
    """A run's name as it fits beside a drawing: long ones lose their middle."""
    if len(name) <= limit:
        return name
    tail = limit // 2 - 1
    return f"{name[: limit - tail - 1]}\N{HORIZONTAL ELLIPSIS}{name[-tail:]}"


def label_ends(axes: Any, ends: Sequence[tuple[float, float, str, str]], size: float = 10) -> None:
    """Name lines at their right ends, moved up or down so that no two names overlap.

    Args:
        axes: Axes whose limits are final.
        ends: Last point, name and colour of each line: (x, y, name, colour).
        size: Font size in points.
    """
    if not ends:
        return
    axes.figure.draw_without_rendering()
    height = axes.bbox.height * 72 / axes.figure.dpi
    low, high = axes.get_ylim()
    wanted = [(y - low) / (high - low) * height for _, y, _, _ in ends]
    placed = spread_out(wanted, size * 1.25, 0, height)
    for (x, y, name, colour), at in zip(ends, placed, strict=True):
        level = low + at / height * (high - low)
        axes.annotate(
            short(name),
            (x, y),
            (1.05, level),
            textcoords=("axes fraction", "data"),
            va="center",
            color=colour,
            fontsize=size,
            annotation_clip=False,
            arrowprops={
                "arrowstyle": "-",
                "color": colour,
                "lw": 0.6,
                "relpos": (0, 0.5),
                "shrinkA": 1,
                "shrinkB": 2,
            },
        )


def spread_out(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Positions at least ``gap`` apart, in the order of ``wanted`` and near it, inside low..high.

    When they do not fit they are spaced evenly.
    """
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    if len(order) > 1 and gap * (len(order) - 1) > high - low:
        gap = (high - low) / (len(order) - 1)
    placed = [0.0] * len(wanted)
    floor = low
    for i in order:
        placed[i] = floor = max(floor, wanted[i])
        floor += gap
    ceiling = high
    for i in reversed(order):
        placed[i] = min(placed[i], ceiling)
        ceiling = placed[i] - gap
    return placed


def label_points(
    axes: Any,
    points: Sequence[tuple[float, float, str, str]],
    size: float = 10,
    lines: Sequence[tuple[float, float, float, float]] = (),
) -> None:
    """Name points of a scatter, each on the side where it hides least.

    Args:
        axes: Axes whose limits are final.
        points: Position, name and colour: (x, y, name, colour).
        size: Font size in points.
        lines: Lines (x0, y0, x1, y1) along an axis that names should keep off.
    """
    axes.figure.draw_without_rendering()
    scale = 72 / axes.figure.dpi
    frame = axes.bbox
    at = [axes.transData.transform((x, y)) * scale for x, y, _, _ in points]
    taken = [(x - 5, y - 5, x + 5, y + 5) for x, y in at]
    for x0, y0, x1, y1 in lines:
        ends = sorted(tuple(axes.transData.transform(p) * scale) for p in ((x0, y0), (x1, y1)))
        taken.append((ends[0][0] - 1, ends[0][1] - 1, ends[1][0] + 1, ends[1][1] + 1))
    for (px, py), (x, y, name, colour) in zip(at, points, strict=True):
        name = short(name, 30)
        width, height = 0.62 * size * len(name), 1.2 * size
        best: tuple[float, float, float, tuple[float, float, float, float]] | None = None
        for rank, (dx, dy) in enumerate(_sides(width, height)):
            box = (px + dx, py + dy, px + dx + width, py + dy + height)
            hidden = sum(_overlap(box, other) for other in taken)
            outside = width * height - _overlap(
                box, (frame.x0 * scale, frame.y0 * scale, frame.x1 * scale, frame.y1 * scale)
            )
            cost = hidden + 2 * outside + 0.5 * rank
            if best is None or cost < best[0]:
                best = (cost, dx, dy, box)
        assert best is not None
        taken.append(best[3])
        axes.annotate(
            name,
            (x, y),
            (best[1], best[2]),
            textcoords="offset points",
            va="bottom",
            color=colour,
            fontsize=size,
            annotation_clip=False,
        )


def _sides(width: float, height: float) -> list[tuple[float, float]]:
    """Offsets of a label's lower left corner from its point, the preferred first."""
    middle = -height / 2
    return [
        (9, middle),
        (9, 5),
        (9, -height - 4),
        (-width - 9, middle),
        (-width - 9, 5),
        (-width - 9, -height - 4),
        (-width / 2, 9),
        (-width / 2, -height - 9),
    ]


def _overlap(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    """Area that two boxes (x0, y0, x1, y1) share."""
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
