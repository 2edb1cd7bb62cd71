"""Draws time and memory over the number of slaves and over a repository's size, as one SVG."""

import math

WIDTH, HEIGHT = 330, 230
LEFT, RIGHT, TOP, BOTTOM = 58, 12, 34, 40
LEGEND = 64

# axis of the groups' "plot" facts: its name, who is drawn in which colour
PANELS = {
    "slaves": (
        "slaves",
        {"server-update": "#0969da", "curl -Z": "#57606a", "xargs -P64 curl": "#bc4c00"},
    ),
    "followed": ("slaves, each for 5 s", {"server-update": "#0969da"}),
    "files": (
        "files in the tree",
        {
            "slave-activate": "#0969da",
            "the limit": "#57606a",
            "git pull": "#1a7f37",
            "rm -rf && git clone": "#bc4c00",
        },
    ),
    "objects": (
        "objects in the history",
        {
            "slave-activate": "#0969da",
            "the limit": "#57606a",
            "git pull": "#1a7f37",
            "rm -rf && git clone": "#bc4c00",
        },
    ),
}
ROWS = {"seconds": ("time", "s"), "memory": ("memory", "MB")}


def escape(text):
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def series(groups, medians, axis, metric, whos):
    """{who: sorted [(x, y)]} of the groups that have this axis; nought cannot be drawn."""
    found = {}
    for group in groups:
        x = (group.get("plot") or {}).get(axis)
        if not x:
            continue
        for who, values in medians(group).items():
            if who in whos and values.get(metric):
                found.setdefault(who, []).append((x, values[metric]))
    return {who: sorted(found[who]) for who in whos if who in found}


def decades(values):
    """The powers of ten around the values; at least one decade."""
    low = math.floor(math.log10(min(values)) + 1e-9)
    return low, max(low + 1, math.ceil(math.log10(max(values)) - 1e-9))


def label(value):
    for size, letter in ((1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:g}{letter}"
    return f"{value:g}"


def line(x1, y1, x2, y2, style="stroke='#d0d7de'"):
    return f"<line x1='{x1:.1f}' y1='{y1:.1f}' x2='{x2:.1f}' y2='{y2:.1f}' {style}/>"


def words(x, y, text, anchor="middle", style=""):
    return f"<text x='{x:.1f}' y='{y:.1f}' text-anchor='{anchor}' {style}>{escape(text)}</text>"


def panel(left, top, title, xlabel, unit, curves, colours):
    """One plot with both axes logarithmic."""
    points = [point for curve in curves.values() for point in curve]
    (x0, x1), (y0, y1) = (decades([point[axis] for point in points]) for axis in (0, 1))
    wide, high = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM

    def place(x, y):
        return (
            left + LEFT + (math.log10(x) - x0) / (x1 - x0) * wide,
            top + TOP + (1 - (math.log10(y) - y0) / (y1 - y0)) * high,
        )

    out = [
        words(left + LEFT, top + 20, title, "start", "font-weight='bold'"),
        words(left + LEFT + wide / 2, top + HEIGHT - 6, xlabel),
    ]
    for power in range(x0, x1 + 1):
        x, y = place(10.0**power, 10.0**y0)
        out += [line(x, y, x, top + TOP), words(x, y + 15, label(10.0**power))]
    for power in range(y0, y1 + 1):
        x, y = place(10.0**x0, 10.0**power)
        out += [
            line(x, y, x + wide, y),
            words(x - 5, y + 4, f"{label(10.0**power)} {unit}", "end"),
        ]
    for who, curve in curves.items():
        places = [place(*point) for point in curve]
        dash = " stroke-dasharray='5 3'" if colours[who] == "#57606a" else ""
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        out.append(
            f"<polyline points='{path}' fill='none'"
            f" stroke='{colours[who]}' stroke-width='2'{dash}/>"
        )
        out += [
            f"<circle cx='{x:.1f}' cy='{y:.1f}' r='3' fill='{colours[who]}'/>" for x, y in places
        ]
    return out


def legend(left, top, colours):
    """The names, two a line."""
    out = []
    for number, (who, colour) in enumerate(colours.items()):
        x, y = left + LEFT + number % 2 * 130, top + 18 + number // 2 * 18
        dash = " stroke-dasharray='5 3'" if colour == "#57606a" else ""
        out += [
            line(x, y - 4, x + 18, y - 4, f"stroke='{colour}' stroke-width='2'{dash}"),
            words(x + 23, y, who, "start"),
        ]
    return out


def picture(groups, medians):
    """The SVG's text; a column of panels for each axis that there are results for."""
    out, left = [], 0
    for axis, (xlabel, colours) in PANELS.items():
        drawn = set()
        for row, (metric, (title, unit)) in enumerate(ROWS.items()):
            curves = series(groups, medians, axis, metric, colours)
            if curves:
                out += panel(left, row * HEIGHT, title, xlabel, unit, curves, colours)
                drawn |= set(curves)
        if drawn:
            out += legend(
                left, len(ROWS) * HEIGHT, {who: colours[who] for who in colours if who in drawn}
            )
            left += WIDTH
    width, height = max(left, WIDTH), len(ROWS) * HEIGHT + LEGEND
    head = (
        f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {width} {height}'"
        f" width='{width}' height='{height}'"
        " font-family='sans-serif' font-size='11' fill='#24292f'>\n"
        f"<rect width='{width}' height='{height}' fill='white'/>\n"
    )
    return head + "\n".join(out) + "\n</svg>\n"
