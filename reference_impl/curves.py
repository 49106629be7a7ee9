"""A run's curves as one HTML page: inline SVG, light and dark, nothing loaded from elsewhere."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import NamedTuple

__all__ = ["PANELS", "Panel", "page", "svg"]


class Panel(NamedTuple):
    """One chart: which metric, what it is called, the unit of its axis, and a line to compare with."""

    metric: str
    title: str
    unit: str
    line: float | None = None


PANELS = (
    Panel("score", "Proxy: the reward model's score", "standard deviations"),
    Panel("gold", "Gold: the true preference (dashed: the optimum)", "mean tone, less 1 if malformed", 1.0),
    Panel("kl", "KL of the policy from the reference", "nats a response"),
    Panel("entropy", "Entropy of the policy", "nats a token"),
    Panel("explained_variance", "Critic: explained variance of the returns", "share", 0.0),
    Panel("clip_fraction", "Tokens whose update was clipped", "share"),
    Panel("eos_rate", "Responses that ended by themselves", "share"),
    Panel("response_length", "Response length", "tokens"),
)
Rows = Sequence[Mapping[str, float]]
W, H, LEFT, RIGHT, TOP, BOTTOM = 460, 250, 58, 12, 10, 42  # of a chart and its margins, in pixels
STYLE = """
:root{color-scheme:light dark;--ink:#1f2328;--soft:#59636e;--grid:#d8dee4;--page:#fff;
--c0:#0b62c4;--c1:#b3541e;--c2:#1a7f37;--c3:#8250df;--c4:#9a6700;--c5:#c1121f}
@media(prefers-color-scheme:dark){:root{--ink:#e6edf3;--soft:#9198a1;--grid:#30363d;--page:#0d1117;
--c0:#58a6ff;--c1:#f0883e;--c2:#3fb950;--c3:#bc8cff;--c4:#d29922;--c5:#ff7b72}}
body{background:var(--page);color:var(--ink);font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:960px;
padding:0 1rem}h1{font-size:1.4rem;margin:0}p{color:var(--soft);margin:.3rem 0 1rem}
main{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,400px),1fr));gap:1.2rem}
figure{margin:0}figcaption{font-weight:600}svg{width:100%;height:auto}text{fill:var(--soft);font-size:12px}
.grid{stroke:var(--grid)}.line{stroke:var(--soft);stroke-dasharray:5 4}
.run{fill:none;stroke-width:2;stroke-linejoin:round}.raw{stroke-width:1;opacity:.3}
.key{margin-right:1.2rem;white-space:nowrap}.key i{display:inline-block;width:1.4em;border-top:3px solid;
vertical-align:middle;margin-right:.4em}
"""


def _ticks(low: float, high: float) -> list[float]:
    """Four to eight round numbers that hold the range."""
    raw = (high - low) / 5
    power = 10 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw)
    return [i * step for i in range(math.floor(low / step), math.ceil(high / step) + 1)]


def _smooth(values: Sequence[float]) -> list[float]:
    """Means over a window of about a twentieth of the run, narrower at its ends."""
    half = len(values) // 40
    parts = (values[i - min(i, half, len(values) - 1 - i) : i + min(i, half, len(values) - 1 - i) + 1]
             for i in range(len(values)))  # fmt: skip
    return [sum(part) / len(part) for part in parts]


def svg(panel: Panel, runs: Mapping[str, Rows]) -> str:
    """The panel's metric over the iterations, one colour a run: thin as logged, thick smoothed."""
    lines = {name: [(r["step"], r[panel.metric]) for r in rows if math.isfinite(r.get(panel.metric, math.nan))]
             for name, rows in runs.items()}  # fmt: skip
    steps = [x for points in lines.values() for x, _ in points]
    shown = [y for points in lines.values() for _, y in points] + ([] if panel.line is None else [panel.line])
    low, high = min(shown), max(shown)
    below, above = ((t := _ticks(low, high if high > low else low + 1))[0], t[-1])
    first, last = min(steps), max(*steps, min(steps) + 1)

    def at(x: float, y: float) -> str:
        right, down = (x - first) / (last - first), (above - y) / (above - below)
        return f"{LEFT + right * (W - LEFT - RIGHT):.1f} {TOP + down * (H - TOP - BOTTOM):.1f}"

    def path(points: Sequence[tuple[float, float]], css: str, color: int = 0) -> str:
        return f'<path class="{css}" style="stroke:var(--c{color % 6})" d="M{"L".join(at(*p) for p in points)}"/>'

    parts = [f'<svg viewBox="0 0 {W} {H}" role="img" aria-label="{escape(panel.title)}">']
    for y in t:
        parts.append(f'<path class="grid" d="M{at(first, y)}L{at(last, y)}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{at(first, y).split()[1]}" dy="4" text-anchor="end">{y:.4g}</text>')
    for x in (x for x in _ticks(first, last) if first <= x <= last):
        parts.append(f'<text x="{at(x, 0).split()[0]}" y="{H - BOTTOM + 16}" text-anchor="middle">{x:.4g}</text>')
    if panel.line is not None:
        parts.append(f'<path class="line" d="M{at(first, panel.line)}L{at(last, panel.line)}"/>')
    for color, points in enumerate(lines.values()):
        if points:
            smooth = list(zip((x for x, _ in points), _smooth([y for _, y in points]), strict=True))
            parts += [path(points, "run raw", color), path(smooth, "run", color)]
    parts += [f'<text x="{(LEFT + W) / 2}" y="{H - 6}" text-anchor="middle">PPO iteration</text>',
              f'<text x="{-(H - BOTTOM) / 2}" y="14" transform="rotate(-90)" text-anchor="middle">{panel.unit}</text>',
              "</svg>"]  # fmt: skip
    return "".join(parts)


def page(title: str, note: str, runs: Mapping[str, Rows]) -> str:
    """The page: `runs` are rows of metrics by the run's name. A metric that no row has gets no chart."""
    logged = [p for p in PANELS if any(math.isfinite(row.get(p.metric, math.nan)) for r in runs.values() for row in r)]
    keys = "".join(f'<span class="key"><i style="border-color:var(--c{i % 6})"></i>{escape(name)}</span>'
                   for i, name in enumerate(runs))  # fmt: skip
    figures = "".join(f"<figure><figcaption>{escape(p.title)}</figcaption>{svg(p, runs)}</figure>" for p in logged)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><link rel="icon" href="data:,">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body><h1>{escape(title)}</h1>"
        f"<p>{escape(note)}</p><p>{keys}</p><main>{figures}</main></body></html>\n"
    )
