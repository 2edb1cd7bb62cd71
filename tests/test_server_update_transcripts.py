"""Golden transcripts: all that stays on a screen or goes into a pipe, for fleets of five sizes.

They are in tests/transcripts, with ESC as a visible sign, ports, seconds and paths replaced. To
write them again after a change that is meant: TRANSCRIPTS=write sh tests/run THIS_FILE; look at
what git diff says.
"""

import json
import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from farm import COMMIT, PREVIOUS, Farm, at_once, error, http, raw, record, updates
from product import daily
from terminal import Run

FOLDER = Path(__file__).resolve().parent / "transcripts"
SIZES, MANY = (1, 3, 50, 51), 10000
BY_DAY = daily(2, [3, 51, 1, 50, MANY])
PORT = ":PPPPP"
KINDS = [  # those at the head of a list of 50 and 51; the others go live
    error("403 Forbidden", "address not allowed"),
    raw(b"oops"),
    updates(state="failed", message="Dateisystem gr\u00fc\u00dft: Platte voll", commit=PREVIOUS),
    updates(previous=COMMIT),
]
OUTPUTS = {"pipe": None, "80": 80, "40": 40}
PLAIN = {name: (name, [], {}) for name in OUTPUTS}
VARIANTS = {  # name: output, options, environment
    "quiet": ("pipe", ["-q"], {}),
    "quiet-80": ("80", ["-q"], {}),
    "verbose": ("pipe", ["-v"], {}),
    "verbose-80": ("80", ["-v"], {}),
    "verbose-40": ("40", ["-v"], {}),
    "json": ("pipe", ["--json"], {}),
    "json-80": ("80", ["--json"], {}),
    "no-color": ("80", [], {"NO_COLOR": "1"}),
    "color-always": ("pipe", ["--color=always"], {}),
    "dumb": ("80", [], {"TERM": "dumb"}),
    "locale-c": ("pipe", [], {"LC_ALL": "C"}),
    "locale-c-80": ("80", [], {"LC_ALL": "C"}),
}


def fleet(farm, size):
    """The entries of a list of that size; at 10,000, 250 are refused and the others go live."""
    if size == MANY:
        kinds = KINDS[:1] * 250
    elif size == 3:
        kinds = [KINDS[2], KINDS[3]]
    else:
        kinds = KINDS if size > 3 else []
    return [farm.add(kind) for kind in kinds + [updates()] * (size - len(kinds))]


def in_order(text):
    """Its results in the order of the list, whatever the order in which they came."""
    if text.startswith("{"):
        start, *results, summary = text.splitlines()
        counts = json.loads(summary.replace('"seconds": S', '"seconds": "S"'))
        for name in ("outcomes", "commits"):
            counts[name] = dict(sorted(counts[name].items()))
        summary = json.dumps(counts).replace('"seconds": "S"', '"seconds": S')
        return "\n".join([start, *sorted(results, key=address), summary, ""])
    results, empty, totals = text.partition("\n\n")
    first, *others = re.split(r"(?m)^(?=127\.77\.)", results + "\n")
    return "".join([first, *sorted(others, key=address)])[:-1] + empty + totals


def address(text):
    """The numbers of the first slave in a text."""
    return [int(number) for number in re.search(r"127\.77\.(\d+)\.(\d+)", text).groups()]


class Shown:
    """What a run printed: on a terminal all of it, else standard output; and its exit code."""

    def __init__(self, folder, entries, output, options, env):
        folder.mkdir()
        # one request at a time, so that outcomes come in the order of the list
        arguments = [*options, "--parallel", "1", "--retries", "0"]
        run = Run(folder, entries, *arguments, columns=OUTPUTS[output], env=env)
        self.raw = run.wait(300)
        self.code, self.errors = run.code, run.errors
        text = re.sub("[^\n]*\r\x1b\\[K", "", self.raw.replace("\r\n", "\n"))
        assert "\r" not in text
        again = r"server-update \1 ..."
        text = re.sub(r"(?<=: )\S*/server-update (--(?:ref|limit) .*) --list .*", again, text)
        text = re.sub(r":\d{5}\b", PORT, text)
        text = re.sub(r'("seconds": )[\d.]+', r"\1S", text)
        text = re.sub(r"( *)\d+\.\d(\s+s\b)", self.seconds, text)
        self.text = in_order(text.replace("\x1b", "\u241b"))

    @staticmethod
    def seconds(found):
        """As many columns as there were, where it is a column."""
        before, after = found.groups()
        width = len(found.group(0)) - len(after)
        return ("S.S".rjust(width) if len(before) > 1 else before + "S.S") + after


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    """shown(size, name) -> Shown; those of a size are made side by side, most is waiting."""
    farm, base, runs = Farm(), tmp_path_factory.mktemp("transcripts"), {}
    lists = {size: fleet(farm, size) for size in (*SIZES, MANY)}
    with ThreadPoolExecutor(6) as pool:

        def start(size):
            for name, (output, options, env) in {**PLAIN, **VARIANTS}.items():
                if size == MANY and name in ("verbose", "json"):
                    options = [*options, "--no-wait"]
                elif size == MANY and name not in OUTPUTS:
                    continue
                folder = base / ("%d-%s" % (size, name))
                runs[size, name] = pool.submit(Shown, folder, lists[size], output, options, env)

        def get(size, name):
            if (size, name) not in runs:
                start(size)
            return runs[size, name].result()

        yield get
    farm.close()


def golden(name, text):
    """The stored transcript; it is written first where the environment says so, and that fails."""
    path = FOLDER / (name + ".txt")
    if os.environ.get("TRANSCRIPTS") == "write":
        FOLDER.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
        pytest.fail("written: %s" % path)
    return path.read_text(encoding="utf-8")


def unwrapped(text):
    return " ".join(without_color(text).split())


def without_color(text):
    return re.sub("\u241b\\[[0-9]+m", "", text)


def without_waiting(errors):
    """Standard error without the line that comes once a minute, on a machine that is slow."""
    return re.sub("(?m)^server-update: waiting for .* ended after .*\n", "", errors)


@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("size", BY_DAY)
def test_what_is_seen(shown, size, output):
    one = shown(size, output)
    assert one.text == golden("%d-%s" % (size, output), one.text)
    assert one.code == (0 if size == 1 else 1)
    if not OUTPUTS[output]:
        assert without_waiting(one.errors) == ""
    assert ("\x1b[K" in one.raw) == bool(OUTPUTS[output])
    if OUTPUTS[output]:
        lines = [part for line in one.raw.split("\n") for part in line.split("\r")]
        wide = [line for line in lines if not line.startswith("to ")]  # commands to be pasted
        plain = [re.sub("\x1b\\[[0-9]*[mK]", "", line) for line in wide]
        assert max(map(len, plain)) <= OUTPUTS[output]


@pytest.mark.parametrize("name", ["quiet", "json"])
@pytest.mark.parametrize("size", BY_DAY[:-1])
def test_quiet_and_json(shown, size, name):
    one, colored = shown(size, name), shown(size, name + "-80")
    assert one.text == golden("%d-%s" % (size, name), one.text)
    assert unwrapped(colored.text) == unwrapped(one.text)
    assert "\x1b[K" not in shown(size, "quiet-80").raw
    assert one.code == colored.code == shown(size, "pipe").code


@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("size", BY_DAY[:-1])
def test_verbose_has_a_line_for_each_above_50_too(shown, size, output):
    one = shown(size, {"pipe": "verbose"}.get(output, "verbose-" + output))
    name = "%d-verbose-%s" % (size, output) if size > 50 else "%d-%s" % (size, output)
    assert one.text == golden(name, one.text)


@pytest.mark.parametrize("size", BY_DAY[:-1])
def test_what_the_environment_says_about_colours(shown, size):
    plain, colored = shown(size, "pipe").text, shown(size, "80").text
    assert without_color(colored) != colored
    for name in ("no-color", "dumb"):
        assert shown(size, name).text == without_color(colored)
        assert ("\x1b[K" in shown(size, name).raw) == (name == "no-color")
    always = shown(size, "color-always").text
    assert without_color(always) == plain
    marked = re.compile("\u241b\\[[0-9]+m[^\u241b]*\u241b\\[0m")
    assert marked.findall(always) == marked.findall(colored)


@pytest.mark.parametrize("size", BY_DAY[:-1])
def test_the_c_locale_shows_the_same(shown, size):
    assert shown(size, "locale-c").text == shown(size, "pipe").text
    assert shown(size, "locale-c-80").text == shown(size, "80").text


@pytest.mark.slow
def test_ten_thousand_one_by_one(shown):
    """With -v and --json each of them is there."""
    *lines, empty, totals, again = shown(MANY, "verbose").text.splitlines()
    assert len(lines) == len({line.split()[0] for line in lines}) == MANY
    assert {re.sub(r"^127\.77\.\S+ *", "", line) for line in lines} == {
        "refused      -        -              S.S s  address not allowed (HTTP 403)",
        "signalled    -        -              S.S s",
    }
    assert (empty, totals) == ("", "hanuman: 9750 signalled, 250 refused of 10000, S.S s")
    assert again == "to try them again: add --write-failed FILE, and then --list FILE"
    lines = shown(MANY, "json").text.replace(": S", ": 0").splitlines()
    start, *results, summary = map(json.loads, lines)
    assert (start["slaves"], len({one["slave"] for one in results})) == (MANY, MANY)
    assert summary["outcomes"] == {"refused": 250, "signalled": 9750}


# Outcomes between good and bad, and other questions.


def told_history(*records):
    """A kind that answers the question for the last updates."""
    body = json.dumps({"repo": "hanuman", "updates": records})
    return lambda request: at_once(http("200 OK", body))


AT = 1700000000  # 2023-11-14 22:13:20Z
RELAY = {"live": 298, "unreachable": 2}
SAID = "beneath: 298 live, 2 unreachable"
BELOW = [
    {"slave": "web%d" % n, "outcome": "unreachable", "message": "connection refused"}
    for n in (17, 18)
]
STORIES = {  # name: what the slaves do, the options
    "outcomes": (
        [
            updates(hook=None),
            updates(hook=1, message="nginx: [emerg] bad config in line 7"),
            updates(hook=None, beneath=RELAY, beneath_bad=BELOW, message=SAID),
            raw(http("200 OK", "<h1>Log in</h1>", "text/html")),
            updates(hook=None, pin=None, ref="v2"),
        ],
        [],
    ),
    "canary": (
        [updates(hook=1, message="nginx: [emerg] bad config in line 7")]
        + [updates(hook=None)] * 6,
        ["--batch", "1,2"],
    ),
    "status": (
        [
            updates(hook=None, finished=AT),
            updates(hook=1, finished=AT, message="nginx: [emerg] bad config in line 7"),
            updates(hook=None, finished=AT, commit=None),
            updates(state="failed", finished=AT, commit=PREVIOUS, message="no space left"),
            updates(state="running", finished=None),
            updates(hook=None, finished=AT, commit=PREVIOUS),
            error("404 Not Found", "no such update was asked for here"),
        ],
        ["--status"],
    ),
    "history": (
        [
            told_history(
                record(requested=AT, by="anna@master", note="for the fair", hook=None),
                record("failed", requested=AT - 90, by="relay", message="no space left", ref="v2"),
                record(requested=AT - 4000, by=None),
            ),
            error("404 Not Found", "no such update was asked for here"),
            raw(b"oops"),
        ],
        ["--history"],
    ),
}


@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("name", STORIES)
def test_a_story(farm, tmp_path, name, output):
    kinds, options = STORIES[name]
    entries = [farm.add(kind) for kind in kinds]
    one = Shown(tmp_path / "run", entries, output, options, {})
    if OUTPUTS[output] is None:
        one.text = one.errors + one.text
    assert one.text == golden("%s-%s" % (name, output), one.text)
    assert one.code == 1
