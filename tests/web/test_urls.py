"""How a URL is shown and requested: no secret of it is ever seen."""

from __future__ import annotations

import logging

import pytest

from r2ncli.web import without_secrets
from r2ncli.web.urls import check, local_path, requested, scrubbed, without_secrets_of_log

PLAIN = [
    "http://h/x.jpg",
    "http://h/x.jpg?id=1",
    "http://h/x.jpg?id=1&size=640;crop=2",
    "http://h/a@b/x.jpg",
    "http://h:8080/@user/x.jpg",
    "http://h/x.jpg?mail=a@b.example",
    "http://h/x.jpg?640",
    "http://[::1]:80/x",
    "http://h/x;v=1/y.jpg",
    "http://h/x.jpg?sp=1&st=2&sv=3",  # keys of Azure's signatures, without a signature
    "s3://bucket/x?.jpg",
    "s3://bucket/a#1.jpg",
    "hf://datasets/user/set@main/a.jpg",
    "abfs://container@account.dfs.core.windows.net/x.jpg",
    "file:///a%20b.jpg",
    "file:/a.jpg",
]
SECRET = "S3cr%2Bet"
WITH_SECRET = [
    (f"https://u:{SECRET}@h:8080/x.jpg?id=1#f", "https://h:8080/x.jpg?id=1"),
    (f"http://{SECRET}@h", "http://h"),
    (f"HTTP://u:{SECRET}@h/x", "HTTP://h/x"),
    (f"http://u:{SECRET}@[::1]:80/x", "http://[::1]:80/x"),
    (f"s3://key:{SECRET}@bucket/x?.jpg", "s3://bucket/x?.jpg"),
    (f"ftp://u:{SECRET}@h/x", "ftp://h/x"),
    # characters that must be escaped in a password, and are not
    (f"http://u:a/{SECRET}@h/x", "http://h/x"),
    (f"http://u:a@{SECRET}@h/x", "http://h/x"),
    (f"http://u:a@b/{SECRET}@h/x", "http://h/x"),
    (f"http://u:a?{SECRET}@h/x", "http://h/x"),
    (f"http://u:a#{SECRET}@h/x", "http://h/x"),
    (f"s3://AKIA:12/{SECRET}@bucket/x", "s3://bucket/x"),
    (f"abfs://c:{SECRET}@a.dfs.core.windows.net/x", "abfs://a.dfs.core.windows.net/x"),
    # chains
    (f"zip://a.jpg::https://u:{SECRET}@h/a.zip?token={SECRET}", "zip://a.jpg::https://h/a.zip"),
    (f"simplecache::s3://k:{SECRET}@bucket/x", "simplecache::s3://bucket/x"),
    (f"zip://a::zip://u:{SECRET}@b::http://u:{SECRET}@h/x", "zip://a::zip://b::http://h/x"),
    # queries
    (f"http://h/x?X-Amz-Signature={SECRET}&id=1&X-Amz-Date=2", "http://h/x?id=1"),
    (f"http://h/x?a=1&x-goog-signature={SECRET}", "http://h/x?a=1"),
    (f"http://h/x?X-Amz-%53ignature={SECRET}", "http://h/x"),
    (f"http://h/x?Signature={SECRET}&Expires=1&Key-Pair-Id=K&Policy=p", "http://h/x"),
    (f"http://h/x?AWSAccessKeyId=A&Signature={SECRET}&v=2", "http://h/x?v=2"),
    (f"http://h/x?sv=2020&se=1&sr=b&sp=r&sig={SECRET}&v=2", "http://h/x?v=2"),
    (f"http://h/x?a=1;access_token={SECRET};b=2", "http://h/x?a=1;b=2"),
    (f"http://h/x?api_key={SECRET}", "http://h/x"),
    (f"http://h/x?token[]={SECRET}", "http://h/x"),
    (f"http://h/x;token={SECRET}/y;v=1", "http://h/x/y;v=1"),
    (f"s3://b/x?aws_secret_access_key={SECRET}", "s3://b/x"),
    # a URL inside another one
    (f"http://h/?u=http%3A%2F%2Fu%3A{SECRET}%40i%2Fx", "http://h/?u=http%3A//i/x"),
    (f"http://h/?u=http://i/x?token={SECRET}", "http://h/?u=http%3A//i/x"),
    (f"http://h/http://u:{SECRET}@i/x", "http://h/http://i/x"),
]


@pytest.mark.parametrize("url", PLAIN)
def test_a_url_without_secrets_is_shown_as_it_is(url: str) -> None:
    assert without_secrets(url) == url


@pytest.mark.parametrize(("url", "shown"), WITH_SECRET)
def test_what_is_shown_has_no_user_password_token_or_signature(url: str, shown: str) -> None:
    assert without_secrets(url) == shown


@pytest.mark.parametrize("url", [url for url, _ in WITH_SECRET])
def test_no_secret_of_a_url_is_left_in_a_message_about_it(url: str) -> None:
    for secret in (SECRET, "S3cr+et"):
        message = f"cannot open {url} ('{secret}' is no port; asked for /x?sig={secret})"
        for text in (message, message.lower()):
            assert secret.lower() not in scrubbed(text, url).lower()
    assert scrubbed("no such bucket", url) == "no such bucket"


def test_the_value_of_key_is_shown_as_a_digest() -> None:
    one, other = (without_secrets(f"http://h/x?key={value}") for value in ("abc", "abd"))
    assert one != other
    assert "abc" not in one
    assert one == without_secrets("http://h/x?key=abc")


@pytest.mark.parametrize(
    ("record", "said"),
    [
        (('%s "%s"', "GET", "/x?id=1&sig=secret"), 'GET "/x?id=1"'),
        (
            ("%s -> %s", "http://u:secret@h/x", "http://h/y?token=secret"),
            "http://h/x -> http://h/y",
        ),
        (("%d of %s", 3, "h"), "3 of h"),
    ],
)
def test_log_lines_of_urllib3_have_no_secret(record: tuple[object, ...], said: str) -> None:
    text, *values = record
    line = logging.LogRecord("urllib3", 10, "", 0, text, tuple(values), None)
    assert without_secrets_of_log(line)
    assert line.getMessage() == said


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("http://", "names no host"),
        ("http:///x", "names no host"),
        ("http://:80/x", "names no host"),
        ("http://u:p@/x", "names no host"),
        ("http://?x", "names no host"),
        ("s3://", "names no host or bucket"),
        ("ftp:///x", "names no host or bucket"),
        ("http://h/\0", "control character"),
        ("http://h/\nHost: x", "control character"),
        ("http://h/\x9b", "control character"),
        ("http://h/" + "x" * 40_000, "more than 32,768 characters"),
        ("http://u:a/b@h/x", "%2F"),
        ("http://u:a@b/c@h/x", "%2F"),
    ],
)
def test_what_is_no_url_is_said_before_a_library_takes_it_apart(url: str, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        check(url)


@pytest.mark.parametrize("host", ["h:port", "h:99999", "[::1", "[zz]", "a b", "%%%", "h:-1"])
def test_a_malformed_host_or_port_cannot_be_requested(host: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        requested(f"http://{host}/x")


@pytest.mark.parametrize(
    ("host", "sent"),
    [
        ("bücher.example", "xn--bcher-kva.example"),
        ("BÜCHER.example", "xn--bcher-kva.example"),
        ("bu\u0308cher.example", "xn--bcher-kva.example"),  # decomposed
        ("пример.рф", "xn--e1afmkfd.xn--p1ai"),
        ("例え。テスト", "xn--r8jz45g.xn--zckzah"),
        ("straße.example", "xn--strae-oqa.example"),
        ("\uff45xample.org", "example.org"),
        ("xn--bcher-kva.example", "xn--bcher-kva.example"),
        ("😀.example", "xn--e28h.example"),
    ],
)
def test_an_international_host_name_is_sent_in_ascii(host: str, sent: str) -> None:
    plain, headers = requested(f"http://us:pa@{host}:8080/é x.jpg?q=é")
    assert plain == f"http://{sent}:8080/%C3%A9%20x.jpg?q=%C3%A9"
    assert headers["Authorization"] == "Basic dXM6cGE="


@pytest.mark.parametrize("host", ["\u2100.example", "a\uff0fb", "a\uff20b", "a\uff1fb"])
def test_a_host_does_not_become_another_one_by_normalisation(host: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        requested(f"http://{host}/x")


@pytest.mark.parametrize(
    ("url", "path"),
    [
        ("file:///a%20b.jpg", "/a b.jpg"),
        ("file:/a.jpg", "/a.jpg"),
        ("FILE://localhost/a.jpg", "/a.jpg"),
        ("file:///%C3%A9.jpg", "/é.jpg"),
        ("file:///a?b#c.jpg", "/a?b#c.jpg"),
        ("file:///caf%E9", "/caf\udce9"),
        ("file:///", "/"),
    ],
)
def test_a_url_of_file_means_a_path(url: str, path: str) -> None:
    assert local_path(url) == path


@pytest.mark.parametrize("url", ["file://host/x", "file://", "file://localhost"])
def test_a_url_of_file_for_another_machine_or_without_a_path_says_so(url: str) -> None:
    with pytest.raises(ValueError, match="expected file:///folder/file"):
        local_path(url)
