"""A run's curves as one HTML page: inline SVG, light and dark, nothing loaded from elsewhere."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

__all__ = ["PANELS", "page", "svg"]

# Each chart's metric, its name, the unit of its axis, and a value to draw a dashed line at.
PANELS: tuple[tuple[str, str, str, float | None], ...] = (
    ("score", "Proxy: the reward model's score", "standard deviations", None),
    ("gold", "Gold: the true preference (dashed: the optimum)", "mean tone, less 1 if malformed", 1.0),
    ("kl", "KL of the policy from the reference", "nats a response", None),
    ("entropy", "Entropy of the policy", "nats a token", None),
    ("explained_variance", "Critic: explained variance of the returns", "share", 0.0),
    ("clip_fraction", "Tokens whose update was clipped", "share", None),
    ("eos_rate", "Responses that ended by themselves", "share", None),
    ("response_length", "Response length", "tokens", None),
)
Rows = Sequence[Mapping[str, float]]
W, H, LEFT, RIGHT, TOP, BOTTOM = 460, 250, 58, 12, 10, 42  # of a chart and its margins, in pixels
STYLE = """
:root{color-scheme:light dark;--ink:#1f2328;--soft:#59636e;--grid:#d8dee4;--page:#fff;
--c0:#0b62c4;--c1:#b3541e;--c2:#1a7f37;--c3:#8250df;--c4:#9a6700;--c5:#c1121f}
@media(prefers-color-scheme:dark){:root{--ink:#e6edf3;--soft:#9198a1;--grid:#30363d;--page:#0d1117;
--c0:#58a6ff;--c1:#f0883e;--c2:#3fb950;--c3:#bc8cff;--c4:#d29922;--c5:#ff7b72}}
body{background:var(--page);color:var(--ink);font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:960px;
padding:0 1rem}h1{font-size:1.4rem;margin:0}p{color:var(--soft);margin:.3rem 0 1rem}figcaption{font-weight:600}
main{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,400px),1fr));gap:1.2rem}figure{margin:0}
svg{width:100%;height:auto}text{fill:var(--soft);font-size:12px}.grid{stroke:var(--grid)}
.line{stroke:var(--soft);stroke-dasharray:5 4}.run{fill:none;stroke-width:1.7;stroke-linejoin:round;opacity:.85}
b{margin-right:1.2rem;white-space:nowrap}
"""


def _ticks(low: float, high: float) -> list[float]:
    """Four to eight round numbers that hold the range."""
    power = 10 ** math.floor(math.log10((high - low) / 5))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= (high - low) / 5)
    return [i * step for i in range(math.floor(low / step), math.ceil(high / step) + 1)]


def svg(runs: Mapping[str, Rows], metric: str, title: str, unit: str, line: float | None = None) -> str:
    """The metric over the iterations, one colour a run; what is not finite is left out. "" for nothing to show."""
    points = [
        [(r["step"], r[metric]) for r in rows if math.isfinite(r.get(metric, math.nan))] for rows in runs.values()
    ]
    steps, shown = ([p[i] for run in points for p in run] for i in (0, 1))
    if not shown:
        return ""
    first, last = min(steps), max(*steps, min(steps) + 1)
    low, high = (f([*shown, *([] if line is None else [line])]) for f in (min, max))
    ticks = _ticks(low, high if high > low else low + 1)

    def at(x: float, y: float) -> str:
        right, down = (x - first) / (last - first), (ticks[-1] - y) / (ticks[-1] - ticks[0])
        return f"{LEFT + right * (W - LEFT - RIGHT):.1f} {TOP + down * (H - TOP - BOTTOM):.1f}"

    def text(x: object, y: object, what: object, more: str = "") -> str:
        return f'<text x="{x}" y="{y}" text-anchor="middle" {more}>{what}</text>'

    parts = [f'<path class="grid" d="M{at(first, y)}L{at(last, y)}"/>' for y in ticks]
    parts += [text(LEFT - 24, at(first, y).split()[1], f"{y:.4g}", 'dy="4"') for y in ticks]
    parts += [text(at(x, 0).split()[0], H - BOTTOM + 16, f"{x:.4g}") for x in _ticks(first, last) if first <= x <= last]
    parts += [] if line is None else [f'<path class="line" d="M{at(first, line)}L{at(last, line)}"/>']
    for color, run in enumerate(points):
        path = "L".join(at(*p) for p in run) or "0 0"
        parts.append(f'<path class="run" style="stroke:var(--c{color % 6})" d="M{path}"/>')
    parts += [
        text((LEFT + W) / 2, H - 6, "PPO iteration"),
        text(-(H - BOTTOM) / 2, 14, unit, 'transform="rotate(-90)"'),
    ]
    return f'<svg viewBox="0 0 {W} {H}" role="img" aria-label="{escape(title)}">{"".join(parts)}</svg>'


def page(title: str, note: str, runs: Mapping[str, Rows]) -> str:
    """The page: `runs` are rows of metrics by the run's name. A metric that no row has gets no chart."""
    names = (f'<b style="color:var(--c{i % 6})">{escape(name)}</b>' for i, name in enumerate(runs))
    charts = ((panel[1], svg(runs, *panel)) for panel in PANELS)
    figures = (f"<figure><figcaption>{escape(name)}</figcaption>{chart}</figure>" for name, chart in charts if chart)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><link rel="icon" href="data:,">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body><h1>{escape(title)}</h1>"
        f"<p>{escape(note)}</p><p>{' '.join(names)}</p><main>{''.join(figures)}</main></body></html>\n"
    )
