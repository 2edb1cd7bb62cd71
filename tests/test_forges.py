"""What slave.py makes of a forge's push, as functions: keys, proofs, what a body says."""

import http.client
import io
import json
import time

import pytest
from forge_support import (
    AFTER,
    BEFORE,
    FORGES,
    GONE,
    azure,
    bitbucket,
    encode,
    encode_form,
    github,
    github_headers,
    gitlab,
    make_key,
)
from slave_support import SECRET

ALL = sorted(FORGES)


def parse(headers):
    """Headers as slave.py gets them."""
    lines = "".join("%s: %s\r\n" % one for one in headers.items()) + "\r\n"
    return http.client.parse_headers(io.BytesIO(lines.encode("utf-8")))


def why_ignored(slave, told, ref=None):
    """Why a push is ignored; where it is not, the commit."""
    text = told if isinstance(told, bytes) else encode(told)
    try:
        return slave.find_pushed_commit(text, ref)
    except slave.Ignored as ignored:
        return str(ignored)


def make(forge, *args):
    return FORGES[forge][0](*args)


# -- what a body says


@pytest.mark.parametrize("forge", ALL)
@pytest.mark.parametrize("ref, name, found", [
    (None, "refs/heads/main", AFTER),
    ("main", "refs/heads/main", AFTER),
    ("refs/heads/main", "refs/heads/main", AFTER),
    ("v1", "refs/tags/v1", AFTER),
    ("refs/tags/v1", "refs/tags/v1", AFTER),
    ("a/b", "refs/heads/a/b", AFTER),
    ("main", "refs/heads/other", "another branch or tag"),
    ("main", "refs/heads/main2", "another branch or tag"),
    ("main", "refs/heads/a/main", "another branch or tag"),
    ("refs/heads/v1", "refs/tags/v1", "another branch or tag"),
    ("v1", "refs/tags/v10", "another branch or tag"),
    (None, "refs/tags/v1", "another branch or tag"),
])
def test_the_ref_that_was_pushed(slave, forge, ref, name, found):
    assert why_ignored(slave, make(forge, name), ref) == found


@pytest.mark.parametrize("forge", ALL)
def test_without_a_ref_it_is_the_default_branch_or_any(slave, forge):
    other = make(forge, "refs/heads/other", AFTER, "main")
    expected = AFTER if forge == "Bitbucket" else "another branch or tag"
    assert why_ignored(slave, other) == expected
    if forge != "Bitbucket":
        assert why_ignored(slave, make(forge, "refs/heads/x", AFTER, "x")) == AFTER


@pytest.mark.parametrize("forge", ALL)
def test_a_deletion(slave, forge):
    assert why_ignored(slave, make(forge, "refs/heads/main", GONE)) == "a deletion"
    assert why_ignored(slave, make(forge, "refs/heads/main", GONE), "main") == "a deletion"
    longer = json.dumps(make(forge)).replace(AFTER, "0" * 64)
    assert why_ignored(slave, longer.encode()) == "a deletion"


def test_of_several_changes_one_is_enough(slave):
    told = bitbucket("refs/heads/other")
    told["push"]["changes"] += bitbucket("refs/heads/gone", GONE)["push"]["changes"]
    assert why_ignored(slave, told, "main") == "another branch or tag"
    assert why_ignored(slave, told, "gone") == "a deletion"
    told["push"]["changes"] += bitbucket("refs/tags/v1", "c" * 40)["push"]["changes"]
    assert why_ignored(slave, told, "v1") == "c" * 40
    assert why_ignored(slave, told) == AFTER
    told = azure("refs/heads/other")
    told["resource"]["refUpdates"] += azure("refs/heads/main", BEFORE)["resource"]["refUpdates"]
    assert why_ignored(slave, told) == BEFORE


def test_azure_says_in_the_body_what_it_is(slave):
    told = dict(azure(), eventType="git.pullrequest.created")
    assert why_ignored(slave, told) == "no push"


def change(told, *path):
    """A copy of what was said with something else, the last one, at a place."""
    *keys, last, value = path
    told = json.loads(json.dumps(told))
    inner = told
    for key in keys:
        inner = inner[key]
    inner[last] = value
    return told


ODD = [None, True, 7, 1.5, "", [], {}, "refs", ["refs/heads/main"], {"ref": "refs/heads/main"}]
PLACES = [
    (github, "after"), (github, "ref"), (github, "repository"),
    (github, "repository", "default_branch"), (gitlab, "project"),
    (gitlab, "project", "default_branch"), (bitbucket, "push"), (bitbucket, "push", "changes"),
    (bitbucket, "push", "changes", 0), (bitbucket, "push", "changes", 0, "new", "type"),
    (bitbucket, "push", "changes", 0, "new", "name"),
    (bitbucket, "push", "changes", 0, "new", "target"),
    (bitbucket, "push", "changes", 0, "new", "target", "hash"),
    (azure, "resource"), (azure, "resource", "refUpdates"), (azure, "resource", "refUpdates", 0),
    (azure, "resource", "refUpdates", 0, "name"), (azure, "resource", "repository"),
    (azure, "resource", "refUpdates", 0, "newObjectId"),
]


@pytest.mark.parametrize("place", PLACES, ids=lambda place: ".".join(map(str, place[1:])))
def test_what_is_not_as_documented_is_in_doubt_an_update(slave, place):
    make_body, *keys = place
    for odd in ODD:
        told = change(make_body(), *keys, odd)
        for ref in (None, "main"):
            got = why_ignored(slave, told, ref)
            if keys[-1] in ("ref", "name") and isinstance(odd, str):
                continue  # a text may be a name
            if keys[-1] in ("changes", "refUpdates") and odd in ([], {}, ""):
                assert got == "another branch or tag", "no change is one of another"
                continue
            if keys[-1] in ("repository", "default_branch", "project", "push", "resource"):
                assert got in (None, AFTER, "another branch or tag"), (odd, ref)
            else:
                assert got is None, (odd, ref)


HOSTILE = [
    b"", b"\0", b"null", b"7", b'"push"', b"[]", b"[[[", b"{", b"\xff\xfe", b"\xef\xbb\xbf{}",
    b"[" * 200000, b'{"a":' * 50000, b'{"ref": ' + b"9" * 250000 + b"}",
    b'{"ref": "refs/heads/main", "after": NaN}', b'{"ref": "\\ud800", "after": "\\u0000"}',
    b'{"push": {"changes": ' + b"[" * 100000, b"payload=", b"payload=%", b"payload=%7B%7D",
    b'{"ref": "refs/heads/main", "after": 1e999, "repository": {}}',
]


@pytest.mark.parametrize("body", HOSTILE, ids=lambda body: repr(body[:12]) + str(len(body)))
def test_a_hostile_body_is_nothing_known_and_soon(slave, body):
    before = time.process_time()
    assert why_ignored(slave, bytes(slave.find_payload(body)), None) is None
    assert time.process_time() - before < 20


def test_of_duplicate_keys_the_last_one_counts(slave):
    body = b'{"ref": "refs/heads/x", ' + encode(github())[1:]
    assert why_ignored(slave, body, "main") == AFTER


def test_a_form(slave):
    told = dict(github(), note="a+b & c=ü%20")
    assert json.loads(slave.find_payload(encode_form(told)).decode()) == told
    for body in (b"{}", b"x=payload=1", b"[1]"):
        assert slave.find_payload(body) is body


# -- headers


@pytest.mark.parametrize("event, is_push", [
    ("push", True), ("Push Hook", True), ("Tag Push Hook", True), ("System Hook", True),
    ("repo:push", True), ("git.push", True), ("ping", False), ("issues", False), ("", False),
    ("Issue Hook", False), ("push Hook", False), ("push\n", False), ("repo:updated", False),
])
def test_which_events_are_pushes(slave, event, is_push):
    if is_push:
        slave.check_event(event)
    else:
        with pytest.raises(slave.Ignored, match="^no push$"):
            slave.check_event(event)


@pytest.mark.parametrize("forge", ALL)
def test_there_is_one_proof_in_what_a_forge_sends(slave, forge):
    given = slave.read_proofs(parse(FORGES[forge][1]("key", b"body")))
    assert len(given) == 1


@pytest.mark.parametrize("headers, given", [
    ({}, []),
    ({"X-Hub-Signature": "sha1=" + "a" * 40}, []),
    ({"X-Gitea-Signature": "a" * 64}, []),
    ({"Authorization": "Basic eDp5"}, [b"y"]),
    ({"Authorization": "basic eDp5OnA="}, [b"y:p"]),
    ({"Authorization": "Basic !"}, [b""]),
    ({"Authorization": "Basic é"}, [b""]),
    ({"Authorization": ""}, [b""]),
    ({"Authorization": "Basic eDp5", "X-Gitlab-Token": "t"}, [b"t"]),
    ({"X-Hub-Signature": "sha512=1", "X-Gitlab-Token": "t"}, [b"sha512=1", b"t"]),
])
def test_proofs(slave, headers, given):
    assert slave.read_proofs(parse(headers)) == given


def test_every_proof_that_is_given_must_be_right(slave):
    keys, right = [b"one", b"two"], github_headers("two", b"body")["X-Hub-Signature-256"].encode()
    macs = [slave.hmac.new(key, b"body", "sha256") for key in keys]
    for given in ([right], [b"one"], [b"one", b"two", right]):
        slave.check_proofs(given, keys, macs)
    for given in ([b""], [b"on"], [right[:-1]], [right, b"three"], [b"\xff"], [right.upper()],
                  [right[len(b"sha256="):]]):
        with pytest.raises(slave.Refusal) as refused:
            slave.check_proofs(given, keys, macs)
        assert refused.value.args == (401, "proof missing or wrong")


def test_the_key_is_of_repository_and_ref(slave):
    secret = SECRET.encode()
    assert slave.make_hook_key(secret, "hanuman", None).decode() == make_key()
    assert slave.make_hook_key(secret, "hanuman", "é/x").decode() == make_key("hanuman", "é/x")
