"""Addresses of inputs: where the path of a URL ends, what of it may be shown, and which filesystem reads it.

An address can hold secrets: the signature of a presigned link, a password before the host. `shown` gives it without
them, for messages, logs and files; `identity` tells two files apart, and is the same for a link that was signed again.
"""

from __future__ import annotations

import os
import re
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

from tinyllama.errors import DataError, MissingExtraError

# What brings each kind of address; huggingface_hub (hf://) and aiohttp (https://) come with the data extra.
EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs"}
WITH_QUERY = ("http", "https")  # elsewhere `?` and `#` are characters of a name
# Parameters whose values say what is asked for, not who asks. All others are shown as ***.
PLAIN_PARAMETERS = frozenset(
    (
        *("branch", "config", "dataset", "dl", "download", "file", "filename", "format", "id", "name", "page", "part"),
        *("path", "raw", "ref", "revision", "split", "version", "versionid"),
    )
)
# Parameters that every signing writes anew: S3, Google, CloudFront, Azure.
SIGNING = re.compile(
    r"x-(amz|goog|oss|cos|obs)-.*|signature|expires|awsaccesskeyid|googleaccessid|key-pair-id|policy|hmac"
    r"|s[eprtv]|si[pg]|sr[t]?|spr|sk[et]|sks|skv|skoid|sktid|access_token|token",
    re.IGNORECASE,
)
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^\s'\"<>]+")


def is_address(given: str) -> bool:
    """Whether this is an fsspec address and not a local path."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*(://|::)", given) is not None


def shown(address: str) -> str:
    """The address without a user's name, password, signature or any other parameter that may be a secret."""
    return "::".join(_shown_part(part) for part in address.split("::"))


def _shown_part(part: str) -> str:
    protocol, separator, rest = part.partition("://")
    if not separator:
        return part
    host, slash, path = rest.partition("/")
    if protocol != "github":  # there org:repository@ is a name
        host = host.rpartition("@")[2]
    if protocol not in WITH_QUERY:
        return f"{protocol}://{host}{slash}{path}"
    path, _, _ = f"{host}{slash}{path}".partition("#")
    path, question, query = path.partition("?")
    if not question:
        return f"{protocol}://{path}"
    kept = []
    for parameter in query.split("&"):
        name, equals, value = parameter.partition("=")
        plain = name.lower() in PLAIN_PARAMETERS and "://" not in unquote(value)
        if not SIGNING.fullmatch(name):
            kept.append(parameter if plain or not equals else f"{name}=***")
    # A parameter without a name may be a secret as a whole.
    kept = ["***" if "=" not in p and p.lower() not in PLAIN_PARAMETERS else p for p in kept if p]
    return f"{protocol}://{path}" + (f"?{'&'.join(kept)}" if kept else "")


def identity(address: str) -> str:
    """What tells this file from any other: the same for every signature, user and fragment. Not to be shown."""
    parts: list[str] = []
    for part in address.split("::"):
        if parts and ("://" not in part or part.startswith("file://")):
            part = os.path.realpath(part.removeprefix("file://"))  # an archive of this machine
        protocol, separator, rest = part.partition("://")
        if separator and protocol in WITH_QUERY:
            path, _, query = rest.partition("#")[0].partition("?")
            host, slash, path = path.partition("/")
            kept = sorted(p for p in query.split("&") if p and not SIGNING.fullmatch(p.partition("=")[0]))
            part = f"{protocol}://{host.rpartition('@')[2].lower()}{slash}{unquote(path)}?{'&'.join(kept)}"
        parts.append(part)
    return "::".join(parts)


def without_secrets(text: object) -> str:
    """A message, perhaps another library's, with every address in it as it may be shown; one line."""
    return " ".join(_URL.sub(lambda match: shown(match[0]), str(text)).split())


def names(address: str) -> list[str]:
    """Names that the file behind an address may have: the last part of its path, then those in its parameters."""
    first = address.partition("::")[0]
    protocol, separator, rest = first.partition("://")
    if not separator or protocol not in WITH_QUERY:
        rest = re.sub(r"\?versionId=[^/]*$", "", rest)
        return [rest.rstrip("/").rpartition("/")[2]]
    parts = urlsplit(first)
    found = [unquote(parts.path.rstrip("/").rpartition("/")[2])]
    for _, value in parse_qsl(parts.query):
        # response-content-disposition=attachment; filename="x.jsonl" of S3, file=folder/x.jsonl of others
        value = re.sub(r".*filename\*?=(?:UTF-8'')?", "", value).strip("\"'; ")
        found.append(unquote(value).rpartition("/")[2])
    return [name for name in found if name]


def parents(address: str) -> list[str]:
    """The folders above a file, nearest first, and last the host or bucket: by which two of one name are told apart."""
    first, _, rest = shown(address).partition("::")
    path = first.partition("://")[2] or first
    path = path.partition("?")[0] if first.startswith(WITH_QUERY) else path
    found = [unquote(part) for part in PurePosixPath(path).parts[:-1] if part != "/"][::-1]
    return found + ([PurePosixPath(rest.partition("?")[0]).name] if rest else [])


def filesystem(address: str) -> tuple[Any, str]:
    """The fsspec filesystem of an address and the path in it. DataError if there is none."""
    import fsspec

    protocol = address.split("://", 1)[0].split("::", 1)[0]
    try:
        return fsspec.core.url_to_fs(address)
    except ImportError as error:
        if protocol in EXTRAS:
            raise MissingExtraError(f"the package for {protocol}://", EXTRAS[protocol]) from None
        raise DataError(f"{protocol}:// needs a package that is not installed ({error})", fix="install it") from None
    except FileNotFoundError:
        raise DataError(f"input {shown(address)} does not exist", fix="check the address") from None
    except Exception as error:  # every remote store, and every kind of archive, has exceptions of its own
        raise DataError(
            f"{shown(address)} is not an address that can be read ({without_secrets(error)})", fix="check the address"
        ) from None


def with_path(address: str, path: str) -> str:
    """The address of another path in the same filesystem: what follows a `::` stays."""
    if "://" in path:
        first = address.partition("::")[0]
        return path if "://" in first else f"{first}::{path}"  # simplecache::https://…
    first, separator, rest = address.partition("::")
    return f"{first.partition('://')[0]}://{path.lstrip('/')}{separator}{rest}"
