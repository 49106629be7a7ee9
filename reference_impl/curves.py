"""A run's curves as one HTML page: inline SVG, light and dark, nothing loaded from elsewhere."""

import math
from collections.abc import Mapping, Sequence
from html import escape

PANELS = {  # what each metric's chart is called, with its unit
    "score": "Proxy: the reward model's score, in standard deviations",
    "gold": "Gold: the true preference, of which 1 is the optimum",
    "kl": "KL of the policy from the reference, in nats a response",
    "entropy": "Entropy of the policy, in nats a token",
    "explained_variance": "Critic: explained variance of the returns, a share",
    "clip_fraction": "Tokens whose update was clipped, a share",
    "eos_rate": "Responses that ended by themselves, a share",
    "response_length": "Response length, in tokens",
}
Rows = Sequence[Mapping[str, float]]
COLORS = ("#2f81f7", "#d9622b", "#2e9e4f", "#9a6ae0", "#b07d00", "#e0475b")  # seen on white and on black
LEFT, RIGHT, TOP, BOTTOM = 50, 450, 10, 210  # edges of the plot, in a picture of 460 by 240 pixels
STYLE = """:root{color-scheme:light dark}body{font:15px/1.5 system-ui;margin:2rem auto;max-width:960px;padding:0 1rem}
main{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,400px),1fr));gap:1.2rem}figure{margin:0}
svg{width:100%;font-size:12px;fill:currentColor}path{fill:none;stroke-width:1.7}.grid{stroke:#8884;stroke-width:1}
b{margin-right:1.2rem;white-space:nowrap}"""


def svg(runs: Mapping[str, Rows], metric: str) -> str:
    """The metric over the iterations, one colour a run; what is not finite is left out. "" for nothing to show."""
    lines = [[(r["step"], r[metric]) for r in rows if math.isfinite(r.get(metric, math.nan))] for rows in runs.values()]
    x, y = ([point[i] for line in lines for point in line] for i in (0, 1))
    if not x:
        return ""
    (first, last), (low, high) = ((min(z), max(z) if max(z) > min(z) else min(z) + 1) for z in (x, y))
    wide, tall = (RIGHT - LEFT) / (last - first), (TOP - BOTTOM) / (high - low)  # pixels of a unit
    across = [(first + i * (last - first) / 4, LEFT + i * (RIGHT - LEFT) / 4) for i in range(5)]
    up = [(low + i * (high - low) / 4, BOTTOM + i * (TOP - BOTTOM) / 4) for i in range(5)]
    parts = [f'<path class="grid" d="M{LEFT} {at}H{RIGHT}"/>' for _, at in up]
    parts += [f'<text x="{LEFT - 6}" y="{at + 4}" text-anchor="end">{value:.3g}</text>' for value, at in up]
    parts += [f'<text x="{at}" y="{BOTTOM + 20}" text-anchor="middle">{value:.4g}</text>' for value, at in across]
    for i, line in enumerate(lines):
        points = (f"{LEFT + (a - first) * wide:.1f} {BOTTOM + (b - low) * tall:.1f}" for a, b in line)
        parts += [f'<path class="run" stroke="{COLORS[i % 6]}" d="M{"L".join(points)}"/>'] if line else []
    return f'<svg viewBox="0 0 460 240" role="img" aria-label="{escape(metric)}">{"".join(parts)}</svg>'


def page(title: str, note: str, runs: Mapping[str, Rows]) -> str:
    """The page: `runs` are rows of metrics by the run's name. A metric that no row has gets no chart."""
    names = (f'<b style="color:{COLORS[i % 6]}">{escape(name)}</b>' for i, name in enumerate(runs))
    charts = ((name, svg(runs, metric)) for metric, name in PANELS.items())
    figures = (f"<figure><figcaption>{escape(name)}</figcaption>{chart}</figure>" for name, chart in charts if chart)
    return f"""<!doctype html><html lang="en"><head><meta charset="utf-8"><link rel="icon" href="data:,">
<meta name="viewport" content="width=device-width,initial-scale=1"><title>{escape(title)}</title><style>{STYLE}</style>
</head><body><h1>{escape(title)}</h1><p>{escape(note)} The horizontal axis counts PPO iterations.</p>
<p>{"".join(names)}</p><main>{"".join(figures)}</main></body></html>\n"""
