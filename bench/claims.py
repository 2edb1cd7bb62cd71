"""What the figures are to show, each with the bound that was set beforehand."""

CLONE, OURS, LIMIT = "rm -rf && git clone", "slave-activate", "the limit"
SMALL = "one small commit"

# What is said; the kind and the situation of the group it is read from; the metric; whose value,
# divided by whose (None: as it is); the bound.
CLAIMS = [
    ("middle repository, one small commit: a clone takes at least 8 times as long",
     "middle", SMALL, "seconds", CLONE, OURS, ">=", 8),
    ("a repository like git's own, one small commit: a clone takes at least 20 times as long",
     "given", SMALL, "seconds", CLONE, OURS, ">=", 20),
    ("tiny repository, one small commit: at most 1.5 times a clone",
     "tiny", SMALL, "seconds", OURS, CLONE, "<=", 1.5),
    ("middle repository, one small commit: at most 0.1 MB over the wire",
     "middle", SMALL, "wire", OURS, None, "<=", 0.1),
    ("middle repository, one small commit: milliseconds missing or mixed",
     "middle", SMALL, "broken", OURS, None, "<=", 0),
    ("middle repository, unchanged: at most 1.6 times the limit",
     "middle", "unchanged", "seconds", OURS, LIMIT, "<=", 1.6),
    ("middle repository, one small commit: at most 1.6 times the limit",
     "middle", SMALL, "seconds", OURS, LIMIT, "<=", 1.6),
    ("50,000 files, one small commit: at most 1.6 times the limit",
     "files-50000", SMALL, "seconds", OURS, LIMIT, "<=", 1.6),
    ("a repository like git's own, one small commit: at most 1.6 times the limit",
     "given", SMALL, "seconds", OURS, LIMIT, "<=", 1.6),
]
COMPARE = {">=": lambda value, bound: value >= bound, "<=": lambda value, bound: value <= bound}


def value_of(groups, medians, claim):
    """The claim's figure, or None where the run did not measure it."""
    _, kind, situation, metric, who, other, _, _ = claim
    for group in groups:
        if (group.get("kind"), group.get("situation")) == (kind, situation):
            found = medians(group)
            value = found.get(who, {}).get(metric)
            if other is None or value is None:
                return value
            base = found.get(other, {}).get(metric)
            return value / base if base else None
    return None


def rows(groups, medians):
    """(what is said, what was measured, whether it holds) for each claim, as text."""
    found = []
    for claim in CLAIMS:
        value = value_of(groups, medians, claim)
        if value is None:
            found.append((claim[0], "not measured", ""))
        else:
            held = COMPARE[claim[6]](value, claim[7])
            found.append((claim[0], f"{value:.3g}", "yes" if held else "**no**"))
    return found
