"""The slave list: every form, every mistake, and what is the same slave."""

import time

import pytest
from product import ROOT


@pytest.mark.parametrize(
    ("entry", "origin", "path", "query"),
    [
        ("web1", "http://web1:9999", "/", ""),
        ("WEB1.Example.COM", "http://web1.example.com:9999", "/", ""),
        ("web1.example.com.", "http://web1.example.com.:9999", "/", ""),
        ("web_1:8080", "http://web_1:8080", "/", ""),
        ("192.0.2.7", "http://192.0.2.7:9999", "/", ""),
        ("192.0.2.7:1", "http://192.0.2.7:1", "/", ""),
        ("[2001:DB8::7]", "http://[2001:db8::7]:9999", "/", ""),
        ("[2001:db8::7]:65535", "http://[2001:db8::7]:65535", "/", ""),
        ("http://web1", "http://web1:80", "/", ""),
        ("HTTPS://web1/", "https://web1:443", "/", ""),
        ("https://web1:9999/get/", "https://web1:9999", "/get/", ""),
        ("http://[::1]:8080/a/b?c=d&e=%20", "http://[::1]:8080", "/a/b", "c=d&e=%20"),
        ("http://web1?key=1", "http://web1:80", "/", "key=1"),
        ("bücher.example", "http://xn--bcher-kva.example:9999", "/", ""),
        ("https://例え.jp/x", "https://xn--r8jz45g.jp:443", "/x", ""),
    ],
)
def test_every_form(server_update, entry, origin, path, query):
    slave = server_update.parse_slave(entry)
    assert slave == (entry, origin, path, query, ())


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("web1:80x", "bad port '80x'"),
        ("web1:", "bad port ''"),
        ("web1:0", "bad port '0'"),
        ("web1:65536", "bad port '65536'"),
        ("web1:99999", "bad port '99999'"),
        ("web1:-1", "bad port '-1'"),
        ("web1:٨٠", "bad port '٨٠'"),
        ("http://web1:80x/", "bad port '80x'"),
        (":80", "bad host ':80'"),
        ("-web1", "bad host '-web1'"),
        ("web..1", "bad host 'web..1'"),
        ("web1,web2", "bad host 'web1,web2'"),
        ("user@web1", "a slave takes no user and password: write its host alone"),
        ("user:secret@web1", "a slave takes no user and password: write its host alone"),
        ("user:sec/ret@web1", "a slave takes no user and password: write its host alone"),
        ("http://user:sec/ret@web1", "a slave takes no user and password: write its host alone"),
        ("http://user:secret@web1/", "a slave takes no user and password: write its host alone"),
        ("a" * 64, "bad host '%s'" % ("a" * 64)),
        ("1.2.3.400", "bad host '1.2.3.400'"),
        ("1.2.3", "bad host '1.2.3'"),
        ("300", "bad host '300'"),
        ("[::1", "bad slave '[::1' (host, host:port, [IPv6]:port or a URL)"),
        ("[::g]", "bad host '[::g]'"),
        ("[fe80::1%eth0]", "bad host '[fe80::1%eth0]'"),
        ("[127.0.0.1]", "bad host '[127.0.0.1]'"),
        ("::1", "bad host '::1'"),
        ("2001:db8::1", "bad host '2001:db8::1'"),
        ("http://", "bad host 'http://'"),
        ("http:///x", "bad host 'http:///x'"),
        ("ftp://web1/", "bad slave 'ftp://web1/' (host, host:port, [IPv6]:port or a URL)"),
        ("web1/get/", "bad slave 'web1/get/' (host, host:port, [IPv6]:port or a URL)"),
        ("web1 web2", "bad host 'web1 web2'"),
        ("http://web1/a b", "bad slave 'http://web1/a b' (host, host:port, [IPv6]:port or a URL)"),
        (
            "http://web1/\u202e",
            r"bad slave 'http://web1/\u202e' (host, host:port, [IPv6]:port or a URL)",
        ),
        ("web\x001", r"bad host 'web\x001'"),
        ("web1\x1b[2J", r"bad slave 'web1\x1b[2J' (host, host:port, [IPv6]:port or a URL)"),
        ("\udcff", r"bad host '\udcff'"),
    ],
)
def test_every_mistake(server_update, entry, message):
    with pytest.raises(ValueError) as caught:
        server_update.parse_slave(entry)
    assert str(caught.value) == message


def test_the_whole_list_is_read_and_each_mistake_is_told_with_its_line(server_update):
    with pytest.raises(ValueError) as caught:
        server_update.parse_slavelists(
            [("l", b"web1\n# web2:80x\nweb2:80x\n\n  \nweb3\nweb_4! # no")]
        )
    assert str(caught.value) == "l:3: bad port '80x'\nl:7: bad host 'web_4!'"


@pytest.mark.parametrize("data", [b"", b"\n", b"# web1\n\n   # web2", b"\xef\xbb\xbf"])
def test_a_list_without_a_slave_is_a_mistake(server_update, data):
    with pytest.raises(ValueError, match="^l: no slave in the list"):
        server_update.parse_slavelists([("l", data)])


def test_crlf_byte_order_mark_comments_and_no_last_newline(server_update):
    data = b"\xef\xbb\xbfweb1\r\n  web2:80\t# the second\r\n\r\n#web3\r\nb\xc3\xbccher.example"
    slaves = server_update.parse_slavelists([("l", data)])
    assert [slave.entry for slave in slaves] == ["web1", "web2:80", "bücher.example"]


def test_what_is_not_utf_8_is_a_mistake_with_its_line_but_for_comments(server_update):
    with pytest.raises(ValueError) as caught:
        server_update.parse_slavelists([("l", b"web1 # caf\xe9\nw\xe9b2\n")])
    assert str(caught.value) == r"l:2: bad host 'w\udce9b2'"


@pytest.mark.parametrize(
    "spellings",
    [
        ("web1", "web1:9999", "http://web1:9999/", "WEB1", "http://Web1:9999", "HTTP://web1:9999"),
        ("http://web1", "http://web1:80/", "web1:80"),
        ("https://web1/", "https://web1:443"),
        ("[::1]", "[0:0:0:0:0:0:0:1]:9999", "http://[::1]:9999/"),
        ("bücher.example", "xn--bcher-kva.example", "BÜCHER.example"),
    ],
)
def test_a_slave_in_other_spellings_is_one_slave(server_update, spellings):
    slaves = server_update.parse_slavelists([("l", "\n".join(spellings).encode())])
    assert [slave.entry for slave in slaves] == [spellings[0]]


@pytest.mark.parametrize(
    "spellings",
    [
        ("web1", "http://web1/"),
        ("http://web1/", "https://web1/"),
        ("http://web1/", "http://web1/a"),
        ("http://web1/", "http://web1/?a"),
        ("web1", "web1."),
    ],
)
def test_what_could_be_two_slaves_is_two(server_update, spellings):
    assert len(server_update.parse_slavelists([("l", "\n".join(spellings).encode())])) == 2


def test_ten_thousand_lines_take_some_ten_times_as_long_as_a_thousand(server_update):
    """Of the processor's time; what compares each line with each would take a hundred times."""

    def shortest_s(lines):
        data = b"".join(b"web%d.example.com:8080  # rack %d\n" % (n, n % 7) for n in range(lines))
        times = []
        for _ in range(5):
            begun = time.process_time()
            assert len(server_update.parse_slavelists([("l", data)])) == lines
            times.append(time.process_time() - begun)
        return min(times)

    assert shortest_s(10000) < 40 * shortest_s(1000)


def test_limit_takes_the_entries_that_match(server_update, tmp_path):
    path = tmp_path / "l"
    path.write_text("web1\nweb2:80\ndb1\n[::1]\n")

    def entries(*globs):
        return [slave.entry for slave in server_update.read_slavelists([str(path)], globs)]

    assert entries() == ["web1", "web2:80", "db1", "[::1]"]
    assert entries("web*") == ["web1", "web2:80"]
    assert entries("db?", "web1") == ["web1", "db1"]
    with pytest.raises(ValueError, match=r"^no slave in \S+/l matches --limit web2 x$"):
        entries("web2", "x")


@pytest.mark.parametrize(
    ("glob", "expected"),
    [
        ("[::1]:9999", ["[::1]:9999"]),
        ("[::1]*", ["[::1]:9999"]),
        ("[2001:db8::[78]]", ["[2001:db8::7]"]),
        ("[2001:db8::7]:9999", ["[2001:db8::7]"]),  # as it is connected to
        ("[2001:DB8::7]", []),  # neither as listed nor as that
        ("web1:9999", ["WEB1"]),
        ("web[12]:80", ["web2:80"]),
        ("http://web3/*", ["http://web3/get/?k=[a:b]"]),
        ("http://web3/get/?k=[a:b]", ["http://web3/get/?k=[a:b]"]),
    ],
)
def test_limit_matches_an_entry_as_listed_or_as_host_and_port(server_update, glob, expected):
    """Brackets with a colon in them are an IPv6 address, not a set of characters."""
    lines = ["[::1]:9999", "[2001:db8::7]", "WEB1", "web2:80", "http://web3/get/?k=[a:b]"]
    slaves = server_update.parse_slavelists([("l", "\n".join(lines).encode())])
    assert [slave.entry for slave in server_update.choose_slaves(slaves, [glob])] == expected


def test_several_lists_are_one_and_each_slave_is_signalled_once(server_update):
    lists = [("a", b"web1\nweb2"), ("b", b"http://web1:9999/\nweb3"), ("c", b"# none")]
    slaves = server_update.parse_slavelists(lists)
    assert [slave.entry for slave in slaves] == ["web1", "web2", "web3"]
    with pytest.raises(ValueError) as caught:
        server_update.parse_slavelists([("a", b"web1:x"), ("b", b"web2"), ("c", b"\nweb3:y")])
    assert str(caught.value) == "a:1: bad port 'x'\nc:2: bad port 'y'"
    with pytest.raises(ValueError, match="^a, b: no slave in the list$"):
        server_update.parse_slavelists([("a", b""), ("b", b"# web2")])


def test_the_template_is_a_list_without_active_slaves(server_update):
    text = (ROOT / "slavelist.txt").read_bytes()
    with pytest.raises(ValueError, match="no slave in the list"):
        server_update.parse_slavelists([("slavelist.txt", text)])
    examples = [
        line.split()[1]
        for line in text.decode().split("\n")
        if line.startswith("#   ") and len(line.split()) > 1
    ]
    assert len(examples) >= 5
    for entry in examples:
        assert server_update.parse_slavelists([("l", entry.encode())])


# -- ranges and groups


def entries_of(server_update, text, *globs):
    slaves = server_update.parse_slavelists([("l", text.encode())])
    return [slave.entry for slave in server_update.choose_slaves(slaves, globs)]


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ("web[01-03].example.org", "web01.example.org web02.example.org web03.example.org"),
        ("db[1-3,7]:8000", "db1:8000 db2:8000 db3:8000 db7:8000"),
        ("web[8-11]", "web8 web9 web10 web11"),
        ("web[08-11]", "web08 web09 web10 web11"),
        ("web[098-101]", "web098 web099 web100 web101"),
        ("web[5]", "web5"),
        ("r[1-2]n[3-4]", "r1n3 r1n4 r2n3 r2n4"),
        ("[1-2]web", "1web 2web"),
        ("10.0.0.[9-11]", "10.0.0.9 10.0.0.10 10.0.0.11"),
        ("https://web[1-2]/x[1-2]?y=[3]", "https://web1/x[1-2]?y=[3] https://web2/x[1-2]?y=[3]"),
        ("http://[::1]:8000/", "http://[::1]:8000/"),
        ("[::1]", "[::1]"),
    ],
)
def test_ranges(server_update, entry, expected):
    """Padded as the first one is; in host names only."""
    assert entries_of(server_update, entry) == expected.split()


BAD_RANGE = "bad range '[%s]' (like [01-40] or [1-3,7])"
ANSIBLE = "%r is ansible's; here: a slave or a [GROUP] a line"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("web[]", BAD_RANGE % ""),
        ("web[7-3]", BAD_RANGE % "7-3"),
        ("web[a-c]", BAD_RANGE % "a-c"),
        ("web[1,]", BAD_RANGE % "1,"),
        ("web[-1]", BAD_RANGE % "-1"),
        ("web[1-2-3]", BAD_RANGE % "1-2-3"),
        ("web[1 - 2]", BAD_RANGE % "1 - 2"),
        ("web[١-٣]", BAD_RANGE % "١-٣"),
        ("web[1234567890]", BAD_RANGE % "1234567890"),
        ("[1web]", BAD_RANGE % "1web"),
        ("[]", BAD_RANGE % ""),
        ("web[1-", "bad slave 'web[1-' (host, host:port, [IPv6]:port or a URL)"),
        ("web1:[80-81]", "bad port '[80-81]'"),
        ("10.0.0.[255-256]", "bad host '10.0.0.256'"),
        ("web[0-999999999]", "more than 1000000 slaves"),
        ("web[0-999][0-1000]", "more than 1000000 slaves"),
        ("[web:vars]", ANSIBLE % "[web:vars]"),
        ("[web:children]", ANSIBLE % "[web:children]"),
        ("web1 ansible_host=10.0.0.1", ANSIBLE % "web1 ansible_host=10.0.0.1"),
        ("web\u200b1", r"bad host 'web\u200b1'"),
    ],
)
def test_mistakes_in_ranges_and_groups_have_their_line(server_update, line, message):
    with pytest.raises(ValueError) as caught:
        server_update.parse_slavelists([("l", ("web1\n\n%s # x\nweb2" % line).encode())])
    assert str(caught.value) == "l:3: " + message


def test_no_more_than_a_million_slaves_over_all_lines(server_update, monkeypatch):
    monkeypatch.setattr(server_update, "MAX_SLAVES", 10)
    assert len(entries_of(server_update, "web[1-5]\nweb[3-8]\ndb[1-2]")) == 10
    with pytest.raises(ValueError, match="^more than 10 slaves$"):
        entries_of(server_update, "web[1-5]\nweb[3-8]\ndb[1-3]")


LIST = """first
[web]
web[1-3]
[db-1]
db1:8000
db[2-3]
[both_2]
http://web1:9999/
db1:8000
"""


@pytest.mark.parametrize(
    ("globs", "expected"),
    [
        ("", "first web1 web2 web3 db1:8000 db2 db3"),
        ("web", "web1 web2 web3"),
        ("db-?", "db1:8000 db2 db3"),
        ("both_2", "web1 db1:8000"),  # in several groups, and signalled once
        ("both_2 db-1", "web1 db1:8000 db2 db3"),
        ("!web", "first db1:8000 db2 db3"),
        ("web !web2", "web1 web3"),
        ("!web2 web", "web1 web3"),
        ("!web !db-1", "first"),
        ("* !*[13]* !web2:9999", "first"),
        ("first", "first"),
    ],
)
def test_limit_takes_groups_and_leaves_out(server_update, globs, expected):
    assert entries_of(server_update, LIST, *globs.split()) == expected.split()


def test_a_group_ends_with_its_list(server_update):
    lists = [("a", b"[web]\nweb1"), ("b", b"web2")]
    slaves = server_update.parse_slavelists(lists)
    assert [slave.groups for slave in slaves] == [("web",), ()]


def test_a_hundred_thousand_slaves_from_one_line(server_update):
    begun = time.process_time()
    assert len(entries_of(server_update, "web[00001-100000].example.org")) == 100000
    assert time.process_time() - begun < 30  # 1 s on an idle machine


def test_names_beneath_ranges_are_told_plain(run_script, tmp_path):
    (tmp_path / "l").write_text("[web]\nweb[1-2]:8000\ndb1\n")
    done = run_script("server-update", "--dry-run", "--list", tmp_path / "l", "hanuman")
    assert (done.returncode, done.stdout) == (0, "web1:8000\nweb2:8000\ndb1\n")
