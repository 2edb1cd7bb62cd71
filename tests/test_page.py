"""The page at /status: what it says, who gets it, and what it looks like in Chromium."""

import base64
import hashlib
import json
import re
import shlex
import struct
import time
import zlib
from html.parser import HTMLParser

import pytest
from browser import Browser
from product import load, daily
from slave_support import ONE, SECRET, Slave, make_secret, signature, stop_for_good

slave = load("slave.py")
FIREFOX = "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"
CHROME = (
    "text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,image/webp,image/apng,"
    "*/*;q=0.8,application/signed-exchange;v=b3;q=0.7"
)
HTML = {"Accept": FIREFOX}
OTHERS = (
    {},
    {"Accept": "*/*"},
    {"Accept": "application/json"},
    {"Accept": "application/json, text/html;q=0.9"},
    {"Accept": "text/*"},
)
HOSTILE = (
    "<script>document.title='x'</script><img src=//127.0.0.1:1/x onerror=alert(1)>\"'&amp;"
    "</table><style>*{display:none}</style><meta http-equiv=refresh content=0>%s%(x)s{}"
)
HIDDEN = "Not good, by name: 0 of 0"
NOW = time.time()


# -- what it is made of


def record(repo="hanuman", **changes):
    fields = {
        "repo": repo,
        "update": 1000,
        "ref": None,
        "state": "live",
        "requested": NOW - 3700,
        "started": NOW - 3700,
        "finished": NOW - 3660,
        "commit": hashlib.sha1(repo.encode()).hexdigest(),
        "previous": None,
        "message": "",
        "by": "root@master",
        "tries": 1,
    }
    return dict(fields, **changes)


def bad_slave(name, outcome="unreachable", message="no route to host"):
    return {"slave": name, "outcome": outcome, "message": message}


def page(*rows):
    records = [slave.Record(**row) for row in rows]
    return slave.format_page(records, "web1:9999", is_alone=False)


class Cells(HTMLParser):
    """The rows of the page: for each {data-label or "Message": text}; all must be well formed."""

    def __init__(self, text):
        super().__init__()
        self.rows, self.tags, self.cell = [], [], None
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag == "tr":
            self.rows.append({})
        elif tag == "td":
            self.cell = dict(attributes).get("data-label", "Message")
            self.rows[-1][self.cell] = ""

    def handle_data(self, text):
        if self.cell:
            self.rows[-1][self.cell] += text

    def handle_endtag(self, tag):
        if tag == "td":
            self.cell = None


def rows_of(text):
    rows = Cells(text).rows[1:]
    return [{name: " ".join(cell.split()) for name, cell in row.items()} for row in rows]


def test_a_row():
    (row,) = rows_of(page(record(ref="v1.2", note="new prices")))
    assert row == {
        "Repository": "hanuman",
        "State": "live",
        "Commit": record()["commit"][:7],
        "Ref": "v1.2",
        "Since": time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(NOW - 3660)),
        "By": "root@masternew prices",
        # This too: see what browsers show.
        "Message": "server-update --ref v1.2 hanuman " + HIDDEN,
    }


@pytest.mark.parametrize(
    "changes, state, advice",
    [
        ({"commit": None}, "not there", "Nothing is live. If the name is right, have it made:"),
        ({"state": "failed"}, "failed", "What was live before still is. Once that is mended:"),
        (
            {"hook": 1},
            "hook failed",
            "It is live, but its hook has not done all. Once that is mended:",
        ),
        (
            {"beneath": {"live": 1, "failed": 1}},
            "beneath failed",
            "It is live here. To try those beneath again:",
        ),
        (
            {"state": "failed", "commit": None},
            "not there",
            "Nothing is live. If the name is right, have it made:",
        ),
        ({"state": "running", "finished": None}, "running", ""),
        ({"state": "queued", "finished": None}, "queued", ""),
    ],
)
def test_what_a_row_says(changes, state, advice):
    (row,) = rows_of(page(record(message="the record's own", **changes)))
    assert row["State"] == state
    bad = sum(changes.get("beneath", {}).values()) - changes.get("beneath", {}).get("live", 0)
    hidden = HIDDEN.replace("of 0", "of %d" % bad)
    expected = "the record's own %s server-update hanuman %s" % (advice, hidden)
    assert row["Message"].split() == expected.split()


def test_the_advice_asks_for_what_was_asked_for():
    pin = "1" * 40
    told = record(state="failed", ref="v1'$(id)", pin=pin)
    advice = rows_of(page(told))[0]["Message"].partition("mended: ")[2].partition(HIDDEN)[0]
    expected = ["server-update", "--ref", "v1'$(id)", "--commit", pin, "hanuman"]
    assert shlex.split(advice) == expected


def test_what_is_wrong_comes_first_and_the_title_counts():
    text = page(
        record("a"),
        record("b", state="queued", finished=None),
        record("c", state="failed"),
        record("d", hook=1),
        record("e", commit=None, state="failed"),
        record("f", commit=None),
        record("g", beneath={"failed": 1}),
        record("h", state="running", finished=None),
        record("i"),
    )
    assert [row["Repository"] for row in rows_of(text)] == list("cgdefhbai")
    summary = "1 failed, 1 beneath failed, 1 hook failed, 2 not there, 1 running, 1 queued, 2 live"
    assert "<title>%s \u2013 web1:9999</title>" % summary in text
    assert "<h1>%s</h1>" % summary in text
    assert "<h1>no repository yet</h1>" in page()


def test_slaves_beneath_are_folded_where_there_are_many():
    def folds(*rows):
        return [at for tag, at in Cells(page(*rows)).tags if tag == "details"]

    few = record("a", beneath={"failed": 3}, beneath_bad=[bad_slave("web1")] * 3)
    many = record("b", beneath={"failed": 4}, beneath_bad=[bad_slave("web1")] * 4)
    assert ["open" in fold for fold in folds(few, many)] == [True, False]
    assert ["open" in fold for fold in folds(many)] == [False], "also where it is the only one"
    named = [bad_slave("web1")]
    (told,) = rows_of(page(record("b", beneath={"live": 9, "failed": 7}, beneath_bad=named)))
    assert "Not good, by name: 1 of 7" in told["Message"]
    message = rows_of(page(few))[0]["Message"]
    assert message.endswith("web1 unreachable no route to host")


def test_hostile_texts_stay_texts():
    hostile = record(
        state="failed",
        message=HOSTILE + "\u202egnp\0\n\x1b[31m\ud800",
        ref=HOSTILE,
        by=HOSTILE,
        note=HOSTILE,
        beneath={HOSTILE: 1},
        beneath_bad=[bad_slave(HOSTILE, HOSTILE, HOSTILE)],
    )
    good = record()
    text = slave.format_page([slave.Record(**hostile)], HOSTILE, is_alone=False)
    text.encode("utf-8")
    assert "\u202e" not in text
    expected = [tag for tag, _ in Cells(page(good)).tags] + ["li", "b", "i"]
    assert [tag for tag, _ in Cells(text).tags] == expected
    assert all(not name.startswith("on") for _, at in Cells(text).tags for name in at)
    assert rows_of(text)[0]["Ref"] == HOSTILE


def test_only_the_style_of_the_page_itself_is_taken():
    (style,) = re.findall("(?s)<style>(.*)</style>", page(record()))
    wanted = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    assert "style-src 'sha256-%s'" % wanted in slave.PAGE_POLICY


# -- a slave's


def prepare(folder, rows, gone=(), **settings):
    """A slave that has all this behind it, and a tree of each repository but those of `gone`."""
    one = Slave(folder, dict({"BASE_URL": "/nowhere"}, **settings))
    one.state.mkdir(parents=True)
    for number, row in enumerate(rows):
        row = dict(row, update=row["update"] + number)
        (one.state / (row["repo"] + ".json")).write_text(json.dumps(row))
        if row["repo"] not in gone:
            git = one.repos / row["repo"] / ".git"
            git.mkdir(parents=True)
            (git / "HEAD").write_text(row["commit"] + "\n")
            (git.parent / "file").touch()
    # What is running is begun again, and goes on for longer than anybody looks.
    (one.bin / "slave-activate").write_text("#!/bin/sh\nexec sleep 600\n")
    return one.start()


@pytest.fixture
def prepared(tmp_path):
    made = []

    def make(rows, *args, **settings):
        folder = tmp_path / ("prepared-%d" % len(made))
        folder.mkdir()
        made.append(prepare(folder, rows, *args, **settings))
        return made[-1]

    yield make
    stop_for_good(*made)


def test_a_browser_gets_a_page_and_all_others_json(prepared):
    one = prepared([record("hanuman"), record("site")])
    for accept in (CHROME, "text/html", "text/html, application/json;q=0.9"):
        assert one.get("/status", headers={"Accept": accept})[2].startswith(b"<!DOCTYPE html>")
    for path, names in (("/status", ["hanuman", "site"]), ("/status?repo=site", ["site"])):
        status, headers, body = one.get(path, headers=HTML)
        assert (status, headers["Content-Type"]) == (200, "text/html; charset=utf-8")
        assert headers["Vary"] == "Accept"
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert headers["Content-Security-Policy"] == slave.PAGE_POLICY
        assert [row["Repository"] for row in rows_of(body.decode())] == names
        assert b"127.0.0.1:%d" % one.port in body
        empty = one.get(path, headers=HTML, method="HEAD")
        assert (empty[0], empty[1]["Content-Type"], empty[2]) == (
            200,
            "text/html; charset=utf-8",
            b"",
        )
        for headers in OTHERS:
            status, headers, body = one.get(path, headers=headers)
            assert (headers["Content-Type"], headers["Vary"]) == ("application/json", "Accept")
            assert json.loads(body.decode())
    assert one.get("/status?repo=other", headers=HTML)[0] == 404
    history = one.json("/status?repo=site&history=1", headers=HTML)
    assert [update["repo"] for update in history["updates"]] == ["site"]


def test_a_policy_that_lets_nothing_in():
    policy = dict(part.split(" ", 1) for part in slave.PAGE_POLICY.split("; "))
    style = policy.pop("style-src")
    assert re.fullmatch("'sha256-[A-Za-z0-9+/]{43}='", style)
    nothing = ("default-src", "base-uri", "form-action", "frame-ancestors")
    assert policy == dict.fromkeys(nothing, "'none'")


def test_with_a_secret_the_page_is_signed_or_for_view_from(prepared, tmp_path):
    secret = make_secret(tmp_path / "secret", SECRET)
    closed = prepared([record()], SECRET_FILE=secret)
    assert closed.get("/status", headers=HTML)[0] == 401
    assert closed.get("/status", headers=dict(HTML, **signature("/status")))[0] == 200
    one = prepared([record()], SECRET_FILE=secret, VIEW_FROM="127.0.0.1")
    assert one.get("/status", headers=HTML)[0] == 200
    # A browser says so of a link that is followed, too: that starts nothing.
    assert one.get("/status", headers=dict(HTML, **{"Sec-Fetch-Site": "cross-site"}))[0] == 200


def test_a_record_that_cant_be_read_is_on_the_page(prepared):
    one = prepared([record()])
    one.stop()
    (one.state / "hanuman.json").unlink()
    (one.state / "hanuman.json").mkdir()
    one.start()
    (row,) = rows_of(one.get("/status", headers=HTML)[2].decode())
    assert (row["State"], row["Repository"]) == ("failed", "hanuman")
    assert row["Message"].startswith("its record can't be read; the log says why")


# -- in Chromium

FLEET = [bad_slave("relay-berlin > web%02d.example.org:9999" % n) for n in range(1, 24)]
FLEET += [
    bad_slave("relay-paris", "beneath failed", "beneath: 10 live, 1 failed"),
    bad_slave("relay-paris > db1", "failed", "No space left on device"),
]
FORTY = [record("service-%02d" % n, ref="main", note="the evening's") for n in range(40)]
SCENES = {
    "none": [],
    "one": [record()],
    "forty": FORTY,
    "failures": [
        record("blog", state="failed", message="Repository not found"),
        record("shop", hook=1, message="live, but post-update hook failed (1): npm: not found"),
        record("gone"),
        record("no-such", state="failed", commit=None, message="Repository not found"),
        record("busy", state="running", finished=None),
        *FORTY,
    ],
    "long": [
        record("n" * 100, state="failed", message="m" * 300, ref="r" * 255, note="n" * 200),
        record("W" * 100, by="b" * 200, message="word " * 60),
        record("tree", beneath={"failed": 1}, beneath_bad=[bad_slave("s" * 250, "x", "W" * 300)]),
    ],
    "hostile": [
        record(state="failed", message=HOSTILE, ref="<b>&</b>\"'", by=HOSTILE, note=HOSTILE),
        record("relay", beneath={"failed": 1}, beneath_bad=[bad_slave(HOSTILE, "<i>", HOSTILE)]),
    ],
    "relay": [
        record(
            beneath={"live": 298, "unreachable": 23, "beneath failed": 1, "failed": 1},
            beneath_bad=FLEET,
            message="beneath: 298 live, 23 unreachable, 1 beneath failed, 1 failed",
        ),
        record("site", beneath={"live": 323}, message="beneath: 323 live"),
    ],
}
GONE = ("gone", "no-such")
# What can be seen: a rectangle that isn't empty, in what is shown.
SEEN = """
function seen(one) {
  const at = one.getBoundingClientRect();
  return one.checkVisibility() && at.width > 0 && at.height > 0;
}
function texts(selector) {
  return [...document.querySelectorAll(selector)].filter(seen).map(one => one.innerText.trim());
}
"""
# Texts that are wider than their cell, cells out of the window, and cells over one another.
MISPLACED = """(() => {
  const found = [], width = document.documentElement.clientWidth;
  for (const one of document.querySelectorAll("h1, p, td, th, li, em, i, code, summary, a")) {
    const at = one.getBoundingClientRect();
    if (at.width && (at.left < 0 || at.right > width + 1 || one.scrollWidth > at.width + 2 &&
        getComputedStyle(one).display != "inline"))
      found.push([one.tagName, one.innerText, at.left, at.right, one.scrollWidth]);
  }
  for (const row of document.querySelectorAll("tr")) {
    const cells = [...row.children].map(one => one.getBoundingClientRect()).filter(at => at.width);
    cells.forEach((a, n) => cells.slice(n + 1).forEach(b => {
      if (a.left < b.right - 1 && b.left < a.right - 1 && a.top < b.bottom - 1 &&
          b.top < a.bottom - 1)
        found.push(["over one another", row.innerText]);
    }));
  }
  if (document.documentElement.scrollWidth > width) found.push("the page itself");
  return found;
})()"""
# Short words that take more than one line.
BROKEN = """[...document.querySelectorAll("td.name a, td.commit code, td.state")]
  .map(one => one.firstChild).filter(text => text && text.data.length < 12)
  .filter(text => {
    const range = document.createRange();
    range.selectNode(text);
    return range.getClientRects().length > 1;
  }).map(text => text.data)"""
# The contrast of each text to what is behind it: WCAG 2.1, 1.4.3.
CONTRAST = """(() => {
  const parse = text => text.match(/[0-9.]+/g).map(Number);
  const light = rgb => {
    const [r, g, b] = rgb.map(v => v / 255).map(
      v => v <= .03928 ? v / 12.92 : Math.pow((v + .055) / 1.055, 2.4));
    return .2126 * r + .7152 * g + .0722 * b;
  };
  const behind = one => {
    for (; one; one = one.parentElement) {
      const rgb = parse(getComputedStyle(one).backgroundColor);
      if (rgb.length == 3) return rgb;
    }
    return [255, 255, 255];
  };
  let least = 99;
  for (const one of document.querySelectorAll("h1, p, a, td, th, i, em, code, li, b")) {
    const [a, b] = [parse(getComputedStyle(one).color).slice(0, 3), behind(one)].map(light);
    least = Math.min(least, (Math.max(a, b) + .05) / (Math.min(a, b) + .05));
  }
  return least;
})()"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    one = Browser(tmp_path_factory.mktemp("chromium"))
    yield one
    one.close()


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """{name: slave} of all scenes; they start side by side."""
    slaves = {}
    try:
        for name, rows in SCENES.items():
            slaves[name] = prepare(tmp_path_factory.mktemp(name), rows, GONE)
        yield slaves
    finally:
        stop_for_good(*slaves.values())


def texts(browser, selector):
    return browser.value("%s texts(%s)" % (SEEN, json.dumps(selector)))


def corner(png):
    """The colour of a screenshot's first pixel; see the PNG specification, 8-bit RGB or RGBA."""
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    width, height, depth, kind = struct.unpack(">IIBB", png[16:26])
    assert (depth, kind in (2, 6)) == (8, True)
    parts, at = b"", 8
    while at < len(png):
        length, name = struct.unpack(">I4s", png[at : at + 8])
        if name == b"IDAT":
            parts += png[at + 8 : at + 8 + length]
        at += length + 12
    line = zlib.decompress(parts)
    # The first pixel of the first line is as it is under each filter.
    return width, height, tuple(line[1:4])


@pytest.mark.parametrize("is_dark", daily(1, [False, True]), ids=["light", "dark"])
@pytest.mark.parametrize("width", [1200, 360])
@pytest.mark.parametrize("name", list(SCENES))
def test_it_can_be_read(browser, scenes, name, width, is_dark):
    url = scenes[name].url + "/status"
    browser.open(url, width, is_dark=is_dark)
    rows = SCENES[name]
    assert browser.value("document.querySelectorAll('tbody tr').length") == len(rows)
    assert sorted(texts(browser, "td.name")) == sorted(row["repo"] for row in rows)
    assert len(texts(browser, "td.state")) == len(rows)
    assert browser.value(MISPLACED) == []
    assert browser.value(CONTRAST) >= 4.5
    assert browser.value(BROKEN) == []
    assert browser.complaints() == []
    assert browser.asked_for() == [url], "nothing but the page itself"
    got_width, _, colour = corner(browser.screenshot())
    assert (got_width, colour) == (width, (20, 23, 26) if is_dark else (255, 255, 255))


@pytest.mark.parametrize("width", [1200, 360])
def test_what_is_wrong_is_seen_first(browser, scenes, width):
    browser.open(scenes["failures"].url + "/status", width)
    assert browser.value("document.title").startswith("1 failed, 1 hook failed, 2 not there")
    assert texts(browser, "td.name")[:5] == ["blog", "shop", "gone", "no-such", "busy"]
    advice = texts(browser, "td em")
    assert len(advice) == 4, "what is well needs none"
    assert advice[0] == "What was live before still is. Once that is mended: server-update blog"
    # All that is wrong is in the first screen of a desktop.
    if width == 1200:
        bottom = "document.querySelectorAll('tbody tr')[3].getBoundingClientRect().bottom"
        assert browser.value(bottom) < 800
    heads = ["Repository", "State", "Commit", "Ref", "Since (UTC)", "By", "Message"]
    assert texts(browser, "thead th") == (heads if width == 1200 else [])
    colour = "getComputedStyle(document.querySelectorAll('td.state')[%d]).color"
    assert browser.value(colour % 0) != browser.value(colour % 10)


@pytest.mark.parametrize("width", [1200, 360])
def test_a_fleet_has_each_bad_slave_by_name(browser, scenes, width):
    browser.open(scenes["relay"].url + "/status", width)
    assert texts(browser, "li") == [], "folded"
    assert texts(browser, "summary") == ["Not good, by name: 25 of 25"]
    browser.value("document.querySelector('summary').click()")
    shown = texts(browser, "li")
    assert shown[0] == "relay-berlin > web01.example.org:9999 unreachable no route to host"
    assert len(shown) == 25
    assert browser.value(MISPLACED) == []
    link = browser.value("document.querySelector('td.name a').href")
    browser.open(link, width)
    assert len(texts(browser, "li")) == 25, "the page of one has all unfolded"
    assert texts(browser, "td.name") == ["hanuman"]
    browser.open(browser.value("document.querySelector('p a').href"), width)
    assert texts(browser, "td.name") == ["hanuman", "site"], "and leads back"


def test_it_asks_again_by_itself(browser, scenes):
    browser.open(scenes["one"].url + "/status")
    again = browser.value("document.querySelector('meta[http-equiv=refresh]').content")
    assert again == "30"
    assert browser.value("document.scripts.length") == 0


def test_hostile_texts_are_seen_as_they_are(browser, scenes):
    browser.open(scenes["hostile"].url + "/status")
    assert browser.value("document.title") == "1 failed, 1 beneath failed \u2013 127.0.0.1:%d" % (
        scenes["hostile"].port
    )
    assert texts(browser, "td.message")[0].startswith(HOSTILE)
    assert browser.value("document.querySelectorAll('img, script, td style, td meta').length") == 0


def test_the_commit_is_told_whole(browser, scenes):
    browser.open(scenes["one"].url + "/status")
    commit = SCENES["one"][0]["commit"]
    assert texts(browser, "td.commit") == [commit[:7]]
    assert browser.value("document.querySelector('td.commit').title") == commit
    assert commit != ONE
