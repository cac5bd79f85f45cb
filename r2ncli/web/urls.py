"""How a URL is shown, without its secrets, and how it is requested, in ASCII.

A secret is a user name, a password, a token or a signature. No output, error or log line may
show one. The rest of a URL identifies an input, its query included.
"""

from __future__ import annotations

import hashlib
import os
import re
import unicodedata
from base64 import b64encode
from collections.abc import Iterator
from urllib.parse import quote, unquote, unquote_to_bytes
from urllib.request import url2pathname

LONGEST_URL = 1 << 15  # characters
SHORTEST_SECRET = 3  # shorter ones are not looked for in error messages

# Keys of a query whose values are signatures, or what a signature needs: all of the storage
# services' own, compared in lower case with "_" for "-".
_SIGNING_PREFIXES = ("x_amz_", "x_goog_", "x_oss_", "x_cos_", "q_sign_", "q_key_time")
_SECRET_KEYS = {
    *("signature", "sig", "sign", "hmac", "expires", "key_pair_id", "policy", "security_token"),
    *("awsaccesskeyid", "googleaccessid", "ossaccesskeyid"),
    *("aws_access_key_id", "aws_secret_access_key", "aws_session_token"),
    *("q_ak", "q_signature", "q_header_list", "q_url_param_list"),
    *("token", "access_token", "accesstoken", "auth_token", "authtoken", "id_token"),
    *("refresh_token", "session_token", "sas_token", "sas", "bearer", "jwt"),
    *("auth", "authorization", "credential", "credentials", "password", "passwd", "passphrase"),
    *("pwd", "api_key", "apikey", "api_secret", "app_key", "appkey", "app_secret"),
    *("subscription_key", "access_key", "accesskey", "access_key_id", "accesskeyid", "secret"),
    *("secret_key", "secretkey", "secret_access_key", "client_secret", "account_key"),
    *("connection_string", "session", "sessionid", "session_id", "jsessionid", "phpsessid"),
}
# what a shared access signature of Azure consists of besides ``sig``; alone they are plain keys
_AZURE_KEYS = {
    *("sv", "ss", "srt", "sp", "st", "se", "sr", "spr", "sip", "skoid", "sktid", "skt", "ske"),
    *("sks", "skv", "sdd", "saoid", "suoid", "scid"),
}
_DIGESTED_KEYS = ("key",)  # may be an API key or the identity of an image: a digest is shown
_CONTAINER_AS_USER = ("abfs", "abfss", "az")  # abfs://CONTAINER@ACCOUNT.dfs.core.windows.net/
_WITHOUT_PORTS = ("s3", "gs", "gcs", "hf", *_CONTAINER_AS_USER)
_WITH_HOST = ("http", "https", "ftp", *_WITHOUT_PORTS)

_CHAIN = re.compile(r"::(?=[A-Za-z][A-Za-z0-9+.-]*://)")
_URL_IN_TEXT = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^\s'\"<>]+")
_HOST_AND_PORT = re.compile(r"(\[[^\]]*\]|[^:\[\]]*)(:[0-9]*)?")


def is_web(url: str) -> bool:
    """Return whether a URL is one of http or https."""
    return re.match(r"https?://", url, re.IGNORECASE) is not None


def is_file(url: str) -> bool:
    """Return whether a URL is one of file, for a file of this machine."""
    return re.match(r"file:/", url, re.IGNORECASE) is not None


def local_path(url: str) -> str:
    """Return the path that a URL of file means: ``file:///a%20b.jpg`` is ``/a b.jpg``.

    ``file://~/x.jpg`` is below the home folder.

    Raises
    ------
    ValueError
        It names another machine, or no path.
    """
    path = url[len("file:") :]
    home = ""
    if path.startswith("//"):
        host, slash, path = path[2:].partition("/")
        path = slash + path
        if host.startswith("~"):
            home = os.path.expanduser(host)
        elif host.lower() not in ("", "localhost"):
            raise ValueError("a file URL is for this machine: expected file:///folder/file")
    if not path:
        raise ValueError("it names no file: expected file:///folder/file")
    if os.name == "nt":
        return home + url2pathname(path)
    return home + os.fsdecode(unquote_to_bytes(os.fsencode(path)))


def without_secrets(url: str) -> str:
    """Return a URL as it may be shown: no user name, no password, no token, no signature.

    The keys of its query stay, except those above; of ``key`` a digest of the value is shown. A
    chain of fsspec's (``a::b``) is taken link by link.
    """
    return "::".join("".join(shown for shown, _ in _parts(link)) for link in _CHAIN.split(url))


def scrubbed(text: str, url: str) -> str:
    """Return a text, such as a library's error message, without the secrets of a URL.

    The secrets of other URLs in the text are removed as well.
    """
    text = _URL_IN_TEXT.sub(lambda found: without_secrets(found[0]), text)
    for secret in sorted(set(_secrets(url)), key=len, reverse=True):
        text = re.sub(re.escape(secret), "***", text, flags=re.IGNORECASE)
    return text


def _secrets(url: str) -> Iterator[str]:
    """Yield what a URL hides, in the forms in which it may stand in a message."""
    for link in _CHAIN.split(url):
        for _, hidden in _parts(link):
            inner = unquote(hidden)
            # what is hidden may be a URL in another's query
            yield from _secrets(inner) if "://" in inner else _spellings(hidden)


def without_secrets_of_log(record: object) -> bool:
    """Remove the secrets from the arguments of a log record of urllib3 (a filter of `logging`)."""
    values = getattr(record, "args", None)
    if isinstance(values, tuple):
        record.args = tuple(map(_shown_in_log, values))  # type: ignore[attr-defined]
    return True


def _shown_in_log(value: object) -> object:
    if isinstance(value, int | float) or value is None:
        return value
    text = str(value)  # also of a `Retry` or an error, which may hold a URL
    if text.startswith("/"):
        return without_secrets(f"http://h{text}").removeprefix("http://h")
    return _URL_IN_TEXT.sub(lambda found: without_secrets(found[0]), text)


def _parts(url: str) -> Iterator[tuple[str, str]]:
    """Yield the parts of a URL in order: each what is shown of it, and the secret in it."""
    scheme, mark, rest = url.partition("://")
    if not mark:
        yield url, ""
        return
    scheme = scheme.lower()
    hidden, rest, _ = _split_user(scheme, rest)
    yield url[: len(scheme)] + mark, hidden
    if is_web(url):
        rest = rest.partition("#")[0]
    place, mark, query = rest.partition("?")
    for user in re.findall(r"(?<=://)[^/@]*(?=@)", place):  # a URL in the path of another one
        place = place.replace(f"{user}@", "", 1)
        yield "", user
    # /x.jpg;token=secret?key=value&…: text and separators in turn
    for text, separator in _in_turn(r"(;)(?=[^;/=]+=)", place, ""):
        pair, end, more = text.partition("/") if separator else ("", "", text)
        shown = _shown_pair(pair, False) if separator else ""
        yield separator * (shown is not None) + (shown or "") + end + more, _hidden(pair, shown)
    if mark:
        pairs = list(_in_turn("([&;#])", query, "?"))
        signed_by_azure = any(_plain_key(pair) == "sig" for pair, _ in pairs)
        first = True
        for pair, separator in pairs:
            shown = _shown_pair(pair, signed_by_azure)
            if shown is not None:
                shown, first = ("?" if first else separator) + shown, False
            yield shown or "", _hidden(pair, shown and shown[1:])


def _in_turn(separators: str, text: str, first: str) -> Iterator[tuple[str, str]]:
    """Yield the pieces of a text, each with the separator before it."""
    pieces = re.split(separators, text)
    yield from zip(pieces[::2], [first, *pieces[1::2]], strict=True)


def _hidden(pair: str, shown: str | None) -> str:
    """Return the value of ``key=value`` where it is not shown."""
    return "" if shown == pair else pair.partition("=")[2]


def _split_user(scheme: str, rest: str) -> tuple[str, str, bool]:
    """Split what follows ``://`` into the user with the password, and the rest.

    The third value says that this is a guess: an unescaped ``/``, ``?``, ``#`` or ``@`` in a
    password makes a URL that has several meanings. All that may be a password is hidden then.
    """
    authority = re.split(r"[/?#]", rest, maxsplit=1)[0]
    beyond = rest[len(authority) :]
    user, at, host = authority.rpartition("@")
    if at:
        path = re.split(r"[?#]", beyond, maxsplit=1)[0]
        if ":" in user and "@" in path:
            end = len(authority) + path.rindex("@")
            return rest[:end], rest[end + 1 :], True
        if scheme in _CONTAINER_AS_USER and ":" not in user:
            return "", rest, False
        return user, host + beyond, False
    has_port = ":" in authority and scheme in _WITHOUT_PORTS
    if "@" in beyond and (has_port or not _HOST_AND_PORT.fullmatch(authority)):
        end = rest.rindex("@")
        return rest[:end], rest[end + 1 :], True
    return "", rest, False


def _plain_key(pair: str) -> str:
    key = unquote(pair.partition("=")[0]).lower().removesuffix("[]")
    return key.strip().replace("-", "_")


def _shown_pair(pair: str, signed_by_azure: bool) -> str | None:
    """Return what is shown of ``key=value`` in a query: None if it is a secret."""
    name, _, value = pair.partition("=")
    key = _plain_key(pair)
    if key in _SECRET_KEYS or key.startswith(_SIGNING_PREFIXES):
        return None
    if signed_by_azure and key in _AZURE_KEYS:
        return None
    if key in _DIGESTED_KEYS and value:
        digest = hashlib.blake2b(unquote(value).encode(errors="surrogateescape"), digest_size=6)
        return f"{name}={digest.hexdigest()}"
    plain = unquote(value)
    if "://" in plain and (shown := without_secrets(plain)) != plain:  # a URL in another's query
        return f"{name}={quote(shown)}"
    return pair


def _spellings(hidden: str) -> Iterator[str]:
    """Yield the forms in which a secret may stand in a message."""
    password = hidden.partition(":")[2] or hidden
    for whole in (hidden, password, unquote(password), unquote(unquote(password))):
        parts = (whole, *re.split(r"[:/?#@]", whole))
        for part in (part for part in parts if len(part) >= SHORTEST_SECRET):
            yield from (part, quote(part, safe=""))


# --- requests -----------------------------------------------------------------------------


def check(url: str) -> None:
    """Check what a URL of any scheme must be, before a library takes it apart.

    Raises
    ------
    ValueError
        It is too long, has control characters, names no host, or has a password that must be
        escaped.
    """
    if len(url) > LONGEST_URL:
        raise ValueError(f"it has more than {LONGEST_URL:,} characters")
    if re.search(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]", url):
        raise ValueError("it has a control character")
    scheme, _, rest = url.partition("://")
    scheme = scheme.lower()
    if scheme in _WITH_HOST and re.match(r"([^/?#]*@)?(:[0-9]*)?([/?#]|$)", rest):
        raise ValueError("it names no host or bucket")
    if _split_user(scheme, rest)[2]:
        raise ValueError("its user name or password has a / ? # or @, to be written as %2F … %40")


def requested(url: str) -> tuple[str, dict[str, str]]:
    """Return an http(s) URL in ASCII without user, password and fragment, and the user's header.

    Raises
    ------
    ValueError
        It is not a URL that can be requested.
    """
    from urllib3.util import parse_url

    check(url)
    scheme, _, rest = url.partition("://")
    authority = re.split(r"[/?#\\]", rest, maxsplit=1)[0]
    user, at, host = authority.rpartition("@")
    beyond = rest[len(authority) :]
    parts = parse_url(f"{scheme.lower()}://{user}{at}{_ascii_host(host)}{beyond}")
    plain = parts._replace(auth=None, fragment=None).url
    if not parts.auth:
        return plain, {}
    return plain, {"Authorization": f"Basic {b64encode(unquote(parts.auth).encode()).decode()}"}


def _ascii_host(host: str) -> str:
    """Return a host name in ASCII: ``bücher.example`` is ``xn--bcher-kva.example``.

    As browsers do, and unlike Python's codec ``idna``, it keeps a ß, which is a letter of its own.
    """
    if host.isascii():
        if not host.startswith("[") and re.search(r"[\s%\"<>^`{|}\\]", host):
            raise ValueError("its host has a character that no host name can have")
        return host
    host, colon, port = re.fullmatch(r"(.*?)(?:(:)([0-9]*))?", host).groups("")  # type: ignore[union-attr]
    plain = unicodedata.normalize("NFKC", host).lower()
    plain = unicodedata.normalize("NFC", plain).replace("\u3002", ".")
    if re.search(r"[\s/?#@\\%]", plain):
        raise ValueError("its host has a character that no host name can have")
    labels = (
        label if label.isascii() else f"xn--{label.encode('punycode').decode()}"
        for label in plain.split(".")
    )
    return ".".join(labels) + colon + port
