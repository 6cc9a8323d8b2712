"""What a run's report is made of: one HTML page, its curves, tables and findings.
A reader may skip this file.

The page needs nothing beside it: no script, no picture, no request. scripts/report.py and the quickstart put
together what they have to say from these parts. All text comes from files, so all text is escaped here.
"""

import html
import math
import re

from trainer.runs import Run
from trainer.symptoms import CHECKS, THRESHOLDS, find

STYLE = """
:root { color-scheme: light dark; --ink: #1f2937; --soft: #6b7280; --line: #e5e7eb; --page: #fff;
        --box: #f6f7f9; --a: #0072b2; --b: #d55e00; --bad: #b42318 }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e5e7eb; --soft: #9ca3af; --line: #374151; --page: #15181d; --box: #1f242c; --a: #56b4e9;
          --b: #f0883e; --bad: #ff8a7a } }
body { font: 16px/1.55 system-ui, sans-serif; color: var(--ink); background: var(--page);
       max-width: 62rem; margin: 2.5rem auto; padding: 0 1.2rem; overflow-wrap: anywhere }
h1 { font-size: 1.7rem; margin-bottom: .2rem } h2 { font-size: 1.15rem; margin: 2.4rem 0 .7rem }
h3 { font-size: 1rem; margin: 1.4rem 0 .4rem } .lead { color: var(--soft); margin-top: 0 }
.wide { overflow-x: auto } table { border-collapse: collapse; width: 100%; font-size: .93rem }
th, td { text-align: left; padding: .35rem .6rem; border-bottom: 1px solid var(--line); vertical-align: top }
th { color: var(--soft); font-weight: 600 }
td { white-space: pre-wrap } td:first-child { min-width: 6rem }
td.score { background: color-mix(in srgb, #22a06b calc(var(--share) * 55%), transparent); min-width: 3rem }
pre { background: var(--box); padding: .8rem 1rem; border-radius: .5rem; font-size: .84rem;
      white-space: pre-wrap }
.curves { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 19rem), 1fr)); gap: .8rem }
figure { margin: 0 } figcaption { font-size: .88rem } svg { width: 100%; height: auto; display: block }
svg text { font: 11px system-ui, sans-serif; fill: var(--soft) } .grid { stroke: var(--line) }
.a { stroke: var(--a); fill: none; stroke-width: 1.5 } .b { stroke: var(--b); fill: none; stroke-width: 1.5 }
circle.a { fill: var(--a) } circle.b { fill: var(--b) } b.a { color: var(--a) } b.b { color: var(--b) }
.finding { border-left: .25rem solid var(--bad); background: var(--box); padding: .6rem 1rem;
           margin: .7rem 0 }
.finding p { margin: .2rem 0 } summary { cursor: pointer; color: var(--soft) }
"""
UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")
TITLES = {
    "loss": "loss", "reward": "reward", "learning_rate": "learning rate",
    "grad_norm": "gradient norm before clipping", "tokens_per_second": "tokens/s",
    "accuracy": "pairs in the right order", "margin": "margin", "signal": "groups whose rewards differ",
    "cut_off": "answers cut off", "length": "tokens of an answer", "clipped": "ratios clipped",
    "bits_per_byte": "bits per byte",
}
NO_CURVE = ("step", "max_steps", "skipped", "tokens", "seconds")
MAX_CURVES = 24  # a damaged log could have thousands of names
MAX_EXPERTS = 128  # rows of the table of experts
MAX_POINTS = 200  # of a curve: more cannot be seen on a phone, and make the page large
WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 320, 150, 46, 20, 8  # of a curve, in pixels of its own


def text(value) -> str:
    """Any text, to be shown as it is and never to be read as HTML."""
    return html.escape(UNPRINTABLE.sub("\ufffd", str(value)))


def page(title: str, lead: str, *sections: str) -> str:
    """A whole page. lead and sections: HTML."""
    return (f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{text(title)}</title>\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f"<style>{STYLE}</style></head>\n<body><h1>{text(title)}</h1>\n<p class=\"lead\">{lead}</p>\n"
            + "\n".join(sections) + "\n</body></html>\n")


class Cell(str):
    """A whole <td> or more of them, as HTML. Any other string that a table gets is text."""


def table(rows: list[list], head: list | None = None) -> str:
    """Rows of text, or of Cells. head: the names of the columns."""
    lines = ["<tr>" + "".join(f"<th>{text(cell)}</th>" for cell in head) + "</tr>"] if head else []
    for row in rows:
        cells = [cell if isinstance(cell, Cell) else f"<td>{text(cell)}</td>" for cell in row]
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return f'<div class="wide"><table>{"".join(lines)}</table></div>'


# --- curves -------------------------------------------------------------------------------------------------


def curve(title: str, lines: dict[str, list[tuple[float, float]]], may_be_log: bool = True) -> str:
    """A small chart of one or two lines, {label: [(step, value), ...]}, with finite values, by step.

    may_be_log: the scale is logarithmic where the largest value is over a hundred times the smallest.
    """
    lines = {label: thinned(points) for label, points in lines.items() if points}
    values = [value for points in lines.values() for _, value in points]
    last = max(step for points in lines.values() for step, _ in points) or 1
    low, high = min(values), max(values)
    is_log = may_be_log and low > 0 and high / 100 > low
    if not is_log:
        low = 0.0 if 0 < low < high / 2 else low
        high += (high == low) * (abs(high) * 0.1 or 1)
    scale = math.log10 if is_log else float
    # Halves, so that the span of two very large numbers of different signs is finite.
    half_span = max(scale(high) / 2 - scale(low) / 2, 1e-300)

    def place(step: float, value: float) -> tuple[float, float]:
        share = (scale(value) / 2 - scale(low) / 2) / half_span
        return (LEFT + step / last * (WIDTH - LEFT - 8), HEIGHT - BOTTOM - share * (HEIGHT - BOTTOM - TOP))

    middle = math.sqrt(low) * math.sqrt(high) if is_log else low / 2 + high / 2
    drawn = ""
    for value in (low, middle, high):
        y = place(0, value)[1]
        drawn += (f'<line class="grid" x1="{LEFT}" x2="{WIDTH - 8}" y1="{y:.1f}" y2="{y:.1f}"></line>'
                  f'<text x="{LEFT - 5}" y="{y + 4:.1f}" text-anchor="end">{short(value)}</text>')
    drawn += (f'<text x="{LEFT}" y="{HEIGHT - 5}">0</text>'
              f'<text x="{WIDTH - 8}" y="{HEIGHT - 5}" text-anchor="end">step {last:,.0f}</text>')
    for color, points in zip("ab", lines.values(), strict=False):
        places = [place(*point) for point in points]
        if len(places) > 1:
            drawn += f'<polyline class="{color}" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in places)}">'
            drawn += "</polyline>"
        for x, y in places if len(places) < 12 else []:
            drawn += f'<circle class="{color}" cx="{x:.1f}" cy="{y:.1f}" r="2"></circle>'
    labels = [f'<b class="{color}">{text(label)}</b> ' for color, label in zip("ab", lines, strict=False)]
    labels = [""] if list(lines) == ["training"] else labels  # as most are
    ends = ", ".join(label + " to ".join(short(value) for _, value in points[::max(1, len(points) - 1)])
                     for label, points in zip(labels, lines.values(), strict=False))
    return (f"<figure><figcaption>{text(title)}{' (log scale)' * is_log}: {ends}</figcaption>"
            f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{text(title)}">{drawn}</svg>'
            "</figure>")


def thinned(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most about MAX_POINTS of the points. Of each stretch the lowest and the highest stay, so no spike
    is lost."""
    if len(points) <= MAX_POINTS:
        return points
    size, kept = math.ceil(len(points) / (MAX_POINTS / 2)), {0, len(points) - 1}
    for start in range(0, len(points), size):
        stretch = range(start, min(start + size, len(points)))
        kept |= {min(stretch, key=lambda i: points[i][1]), max(stretch, key=lambda i: points[i][1])}
    return [points[i] for i in sorted(kept)]


def short(value: float) -> str:
    """A number in at most seven characters or so: 0.0123, 1.2e-05, 24,740."""
    if 1000 <= abs(value) < 1e6:
        return f"{value:,.0f}"
    return f"{value:.3g}" if 0.01 <= abs(value) < 1000 or not value else f"{value:.1e}"


def curves(run: Run, *only: str) -> str:
    """Charts of all that the run logged, or of the names given: each with its value on validation data."""
    logged = dict.fromkeys(name.removeprefix("eval_") for line in run.metrics for name in line)
    names = [name for name in (*TITLES, *logged) if name in logged and name not in NO_CURVE]
    if run.learns_from_rewards:
        names.sort(key=lambda name: name != "reward")
    drawn = []
    for name in dict.fromkeys(names):
        lines = {"training": run.series(name), "validation": run.series(f"eval_{name}")}
        if name == "bits_per_byte":  # of the validation data, though its name does not begin with eval_
            lines = {"validation": run.series(name)}
        if (not only or name in only) and any(lines.values()) and len(drawn) < MAX_CURVES:
            drawn.append(curve(TITLES.get(name, name.replace("_", " ")), lines, name != "learning_rate"))
    broken = sum(not math.isfinite(value) for line in run.metrics for value in line.values())
    note = f"<p>{broken:,} logged values are not finite, and are not drawn.</p>" if broken else ""
    return f'<div class="curves">{"".join(drawn)}</div>{note}' if drawn else "<p>Nothing was logged.</p>"


def router_section(run: Run) -> str:
    """How much each expert is used, by layer and over time (model/moe.py); "" for a model without experts."""
    if not run.router_loads:
        return ""
    _, last = run.router_loads[-1]
    fair, size = len(last[0]), (len(last), len(last[0]))
    loads = [(step, load) for step, load in run.router_loads if (len(load), len(load[0])) == size]
    loads = [loads[i] for i in sorted({round(i * (len(loads) - 1) / 11) for i in range(12)})]  # at most 12
    rows, too_many = [], len(last) * fair > MAX_EXPERTS
    for layer, at_end in enumerate(last[:MAX_EXPERTS]):
        shown = sorted({at_end.index(min(at_end)), at_end.index(max(at_end))}) if too_many else range(fair)
        for expert in shown:
            shares = [load[layer][expert] * fair for _, load in loads]
            rows.append([f"layer {layer}, expert {expert}", *(
                Cell(f'<td class="score" style="--share: {min(share / 2, 1):.2f}">{share:.2f}</td>')
                for share in shares)])
    said = ("1.00 is the fair share of an expert, and 0 means that no token went there. Each column is a "
            "line of the log.")
    said += " Of each layer only the least and the most used expert of the end are shown." * too_many
    return (f"<h2>How much each expert is used</h2><p>{said}</p>"
            + table(rows, ["", *(f"step {step:,.0f}" for step, _ in loads)]))


def findings(run: Run) -> str:
    """The symptoms of a run, each with what it means and what to try."""
    found, count, needed = find(run), len(run.series("loss")), THRESHOLDS["lines"].value
    few = (f"<p>The log has {count} line{'s' * (count != 1)} with a loss, and most symptoms need {needed:g}: "
           "a smaller --log_interval shows more.</p>" if count < needed else "")
    if not found:
        return f"<p>None of the {len(CHECKS)} known symptoms shows.</p>{few}"
    return few + "".join(f'<div class="finding"><p><b>{text(one.name)}</b>: {text(one.seen)}</p>'
                         f"<p>{text(one.means)}</p><p>{text(one.try_next)}</p></div>" for one in found)
