"""What forges send when somebody pushes, after their documentation, and how they prove it."""

import base64
import hashlib
import hmac
import http.client
import json
from urllib.parse import quote_plus

from slave_support import SECRET

BEFORE = "b" * 40
AFTER = "a" * 40
GONE = "0" * 40


def make_key(repo="hanuman", ref="", secret=SECRET):
    """The key of a hook, made without any of the product's code."""
    text = "server-update-hook-1\n%s\n%s" % (repo, ref)
    return hmac.new(secret.encode(), text.encode(), hashlib.sha256).hexdigest()


def sign_body(key, body, algorithm="sha256"):
    return "%s=%s" % (algorithm, hmac.new(key.encode(), body, algorithm).hexdigest())


# -- bodies of a push of one ref


def github(ref="refs/heads/main", after=AFTER, default="main"):
    """docs.github.com: webhook events and payloads, push; Gitea's and Forgejo's are like it."""
    is_gone = after == GONE
    commit = {"id": after, "message": "Change", "timestamp": "2024-05-01T10:00:00+02:00",
              "author": {"name": "Pusher", "email": "pusher@example.org", "username": "pusher"},
              "added": [], "removed": [], "modified": ["index.html"], "distinct": True}
    return {
        "ref": ref, "before": BEFORE, "after": after, "base_ref": None,
        "created": False, "deleted": is_gone, "forced": False,
        "compare": "https://forge.example.org/o/hanuman/compare/b...a",
        "commits": [] if is_gone else [commit], "head_commit": None if is_gone else commit,
        "repository": {"id": 1, "name": "hanuman", "full_name": "o/hanuman", "private": False,
                       "default_branch": default, "master_branch": default, "size": 22},
        "pusher": {"name": "pusher", "email": "pusher@example.org"},
        "sender": {"login": "pusher", "id": 2, "type": "User"},
    }


def gitea(ref="refs/heads/main", after=AFTER, default="main"):
    """docs.gitea.com: webhooks; Forgejo's is the same."""
    told = github(ref, after, default)
    for key in ("base_ref", "created", "deleted", "forced", "compare"):
        del told[key]
    user = {"id": 2, "login": "pusher", "full_name": "", "username": "pusher"}
    return dict(told, compare_url="", total_commits=1, pusher=user, sender=user)


def gitlab(ref="refs/heads/main", after=AFTER, default="main"):
    """docs.gitlab.com: webhook events, push and tag events."""
    kind = "tag_push" if ref.startswith("refs/tags/") else "push"
    return {
        "object_kind": kind, "event_name": kind, "before": BEFORE, "after": after, "ref": ref,
        "ref_protected": True, "checkout_sha": None if after == GONE else after, "message": None,
        "user_id": 4, "user_name": "A Pusher", "user_username": "pusher", "project_id": 15,
        "project": {"id": 15, "name": "A Title of Hanuman", "default_branch": default,
                    "path_with_namespace": "o/hanuman", "ci_config_path": None},
        "commits": [], "total_commits_count": 1, "push_options": {},
        "repository": {"name": "A Title of Hanuman", "visibility_level": 0},
    }


def bitbucket(ref="refs/heads/main", after=AFTER, default=None):
    """support.atlassian.com: Bitbucket Cloud, event payloads, push; no default branch is told."""
    kinds = {"refs/heads/": "branch", "refs/tags/": "tag"}
    kind, name = next((kinds[start], ref[len(start):]) for start in kinds if ref.startswith(start))
    old = {"type": kind, "name": name, "target": {"type": "commit", "hash": BEFORE}}
    new = None
    if after != GONE:
        new = {"type": kind, "name": name, "target": {"type": "commit", "hash": after,
                                                      "message": "Change\n"}}
    change = {"old": old, "new": new, "created": False, "closed": new is None, "forced": False,
              "commits": [], "truncated": False}
    return {"actor": {"type": "user", "nickname": "pusher", "display_name": "A Pusher"},
            "repository": {"type": "repository", "full_name": "o/hanuman", "name": "hanuman"},
            "push": {"changes": [change]}}


def azure(ref="refs/heads/main", after=AFTER, default="main"):
    """learn.microsoft.com: Azure DevOps, service hooks events, code pushed."""
    return {
        "subscriptionId": "00000000-0000-0000-0000-000000000000", "notificationId": 1,
        "id": "03c164c2-8912-4d5e-8009-3707d5f83734", "eventType": "git.push",
        "publisherId": "tfs", "message": {"text": "somebody pushed updates to main."},
        "resource": {
            "commits": [{"commitId": after, "comment": "Change", "url": "https://x.example.org"}],
            "refUpdates": [{"name": ref, "oldObjectId": BEFORE, "newObjectId": after}],
            "repository": {"id": "x", "name": "hanuman", "defaultBranch": "refs/heads/" + default,
                           "remoteUrl": "https://x.example.org/_git/hanuman"},
            "pushedBy": {"displayName": "A Pusher", "uniqueName": "pusher@example.org"},
            "pushId": 14, "date": "2024-05-01T10:00:00Z",
        },
        "resourceVersion": "1.0", "createdDate": "2024-05-01T10:00:01Z",
    }


# -- the request around it


def github_headers(key, body, event="push"):
    return {"X-GitHub-Event": event, "X-GitHub-Delivery": "d", "User-Agent": "GitHub-Hookshot/1",
            "Content-Type": "application/json", "X-GitHub-Hook-ID": "1",
            "X-Hub-Signature": sign_body(key, body, "sha1"),
            "X-Hub-Signature-256": sign_body(key, body)}


def gitea_headers(key, body, event="push"):
    bare = sign_body(key, body).partition("=")[2]
    return dict(github_headers(key, body, event), **{
        "User-Agent": "Go-http-client/1.1", "X-Gitea-Event": event, "X-Gitea-Event-Type": event,
        "X-Gogs-Event": event, "X-Gitea-Signature": bare, "X-Gogs-Signature": bare})


def forgejo_headers(key, body, event="push"):
    return dict(gitea_headers(key, body, event), **{"X-Forgejo-Event": event})


def gitlab_headers(key, body, event="Push Hook"):
    return {"X-Gitlab-Event": event, "X-Gitlab-Token": key, "X-Gitlab-Event-UUID": "d",
            "Content-Type": "application/json", "User-Agent": "GitLab/17.0.0",
            "X-Gitlab-Instance": "https://forge.example.org", "Idempotency-Key": "d"}


def bitbucket_headers(key, body, event="repo:push"):
    return {"X-Event-Key": event, "X-Hub-Signature": sign_body(key, body), "X-Hook-UUID": "d",
            "Content-Type": "application/json", "X-Attempt-Number": "1"}


def azure_headers(key, body, event=None):
    basic = base64.b64encode(("anybody:" + key).encode()).decode()
    return {"Authorization": "Basic " + basic, "Content-Type": "application/json; charset=utf-8"}


FORGES = {  # its body, its headers, how it calls something else, as whom it asks
    "GitHub": (github, github_headers, "issues"),
    "Gitea": (gitea, gitea_headers, "issues"),
    "Forgejo": (gitea, forgejo_headers, "issues"),
    "GitLab": (gitlab, gitlab_headers, "Issue Hook"),
    "Bitbucket": (bitbucket, bitbucket_headers, "issue:created"),
    "Azure DevOps": (azure, azure_headers, None),
}


def encode(told):
    return json.dumps(told).encode()


def encode_form(told):
    return b"payload=" + quote_plus(json.dumps(told)).encode()


def post(slave, path, body, headers, timeout=300):
    """One POST: (status, headers, what the answer says)."""
    connection = http.client.HTTPConnection("127.0.0.1", slave.port, timeout=timeout)
    try:
        connection.request("POST", path, body=body, headers=headers)
        answer = connection.getresponse()
        return answer.status, answer.headers, json.loads(answer.read().decode("ascii"))
    finally:
        connection.close()


def push(slave, forge="GitHub", repo="hanuman", hook_ref="", key=None, event=None, **changes):
    """What `forge` sends to the hook of `repo`: (status, what the answer says)."""
    make, make_headers, _ = FORGES[forge]
    body = encode(make(**changes))
    key = key or make_key(repo, hook_ref)
    path = "/hook?repo=%s%s" % (repo, "&ref=" + hook_ref if hook_ref else "")
    events = [event] if event else []
    status, _, said = post(slave, path, body, make_headers(key, body, *events))
    return status, said
