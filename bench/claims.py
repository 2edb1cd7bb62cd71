"""What the figures are to show, each with the bound that was set beforehand."""

CLONE, OURS, LIMIT = "rm -rf && git clone", "slave-activate", "the limit"
MASTER, CURL, SLAVE = "server-update", "curl -Z", "slave.py"
SMALL = "one small commit"
BENEATH = "200 slaves that fetch one small commit from a relay"

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
    *[(f"{said}, {situation}: at most 1.6 times the limit",
       kind, situation, "seconds", OURS, LIMIT, "<=", 1.6)
      for said, kind in (("middle repository", "middle"), ("50,000 files", "files-50000"),
                         ("tiny repository", "tiny"), ("a repository like git's own", "given"))
      for situation in ("unchanged", SMALL)],
    ("10,000 slaves, 2 % dead: at most the time of curl -Z",
     "signal-10000", "delayed dead", "seconds", MASTER, CURL, "<=", 1.0),
    ("10,000 slaves, 2 % dead: at most 2.5 times the CPU of curl -Z",
     "signal-10000", "delayed dead", "cpu", MASTER, CURL, "<=", 2.5),
    ("10,000 slaves, 2 % dead: first result within 0.3 s",
     "signal-10000", "delayed dead", "first", MASTER, None, "<=", 0.3),
    ("10,000 slaves, 2 % dead: less than 60 MB",
     "signal-10000", "delayed dead", "memory", MASTER, None, "<=", 60),
    *[(f"{int(number):,} slaves, all live: at most {bound} {unit}",
       "many", number, metric, MASTER, None, "<=", bound)
      for number, metric, bound, unit in (("10000", "seconds", 9, "s"),
                                          ("100000", "seconds", 60, "s"),
                                          ("100000", "memory", 200, "MB"))],
    *[(f"{what}: within {bound} s", "prompt", "prompt", "seconds", what, None, "<=", bound)
      for what, bound in (("slave.py listens", 0.3), ("an outcome is told", 0.05),
                          ("50 requests on one connection", 1), ("a mistake is told", 1),
                          ("the first sign", 0.1), ("Ctrl-C", 0.5))],
    ("40 slaves, --at-once 8: the median slave in at most half of the time",
     "at once", SMALL, "median", "--at-once 8", "all at once", "<=", 0.5),
    ("40 slaves, --at-once 8: the whole in at most 1.25 times the time",
     "at once", SMALL, "seconds", "--at-once 8", "all at once", "<=", 1.25),
    ("from git push to 20 slaves beneath a relay: at most 1.3 times the same by hand",
     "push", SMALL, "seconds", "git push, a relay does the rest",
     "slave-activate, then server-update", "<=", 1.3),
    (f"{BENEATH}: clones that the forge sees",
     "beneath", SMALL, "clones", SLAVE, None, "<=", 1),
    (f"{BENEATH}: at most 0.4 times the CPU of git http-backend behind http.server",
     "beneath", SMALL, "cpu", SLAVE, "git http-backend", "<=", 0.4),
    (f"{BENEATH}: slave.py itself takes less than 60 MB",
     "beneath", SMALL, "memory", SLAVE, None, "<=", 60),
    ("60 clones of 100 MB at once from a relay: failures",
     "clones", "at once", "failed", SLAVE, None, "<=", 0),
    ("60 clones of 100 MB at once from a relay: slave.py itself grows by at most 40 MB",
     "clones", "at once", "grown", SLAVE, None, "<=", 40),
    ("500 fetches from a relay during 100 updates of it: failures",
     "fetches", "during updates", "failed", SLAVE, None, "<=", 0),
    ("16 clients: at least twice the signals per second that Flask takes",
     "daemon", "16", "rate", SLAVE, "Flask", ">=", 2),
    ("1,000 repositories, looked at once in 5 s: signals take at most 1.2 times as long",
     "seen", "seen", "typical", "seen once in 5 s", "nobody looks", "<=", 1.2),
    ("10,000 signals later: at most 30 MB",
     "daemon", "memory", "some", SLAVE, None, "<=", 30),
]
FOLLOWED = "10,000 slaves followed to their end: at most 1.5 times the broadcast and their 5 s"
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


def followed(groups, medians):
    """The time of an update followed to its end over the broadcast's and 5 s, or None."""
    both = [
        value_of(groups, medians, ("", kind, "delayed dead", "seconds", MASTER, None, "", 0))
        for kind in ("followed", "signal-10000")
    ]
    return both[0] / (both[1] + 5) if None not in both else None


def rows(groups, medians):
    """(what is said, what was measured, whether it holds) for each claim, as text."""
    measured = [(*claim[::7], claim[6], value_of(groups, medians, claim)) for claim in CLAIMS]
    measured.append((FOLLOWED, 1.5, "<=", followed(groups, medians)))
    found = []
    for said, bound, compare, value in measured:
        if value is None:
            found.append((said, "not measured", ""))
        else:
            held = COMPARE[compare](value, bound)
            found.append((said, f"{value:.3g}", "yes" if held else "**no**"))
    return found
