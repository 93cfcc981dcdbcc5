"""Secrets and personal data: keys, tokens, passwords, e-mail and IP addresses out of a text.

Each is replaced by a placeholder of its type, and nothing else of the text changes. The patterns
are those that the issuers document, and tight: a name that merely looks random stays.

In: a text. Out: the text and how many of each type were replaced.
"""

from __future__ import annotations

import ipaddress
import re
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

import re2


class Detector(NamedTuple):
    """One kind of secret: what to look for, and what to put in its place."""

    placeholder: str
    quick: str
    """For RE2, which looks neither ahead nor behind: matches in every text with a match."""
    pattern: str
    """What its group `secret` matches is replaced."""
    is_secret: Callable[[str], bool] = bool
    """Of what was matched; by default all of it is."""


def _is_person(address: str) -> bool:
    """Whether an address can be somebody's: not one of documentation, robots or git remotes."""
    name, _, domain = address.lower().rpartition("@")
    reserved = ("example.com", "example.org", "example.net", "users.noreply.github.com")
    if domain.endswith(reserved) or domain.rpartition(".")[2] in _NO_DOMAINS:
        return False
    return name not in ("git", "noreply", "no-reply", "user", "username", "name", "you", "foo")


# Reserved (RFC 2606), or the ending of a file or attribute: `logo@2x.png`, `user@host.local`.
_NO_DOMAINS = frozenset({"example", "test", "invalid", "localhost", "local", "png", "jpg", "svg"})
_NO_DOMAINS |= {"gif", "py", "js", "ts", "css", "html", "md", "json", "txt", "internal", "corp"}


def _is_public_address(text: str) -> bool:
    """Whether an address is one of the public net; resolvers that everybody uses are not secret."""
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return False
    return address.is_global and not address.is_multicast and text not in _RESOLVERS


_RESOLVERS = frozenset({"8.8.8.8", "8.8.4.4", "1.1.1.1", "1.0.0.1", "9.9.9.9", "208.67.222.222"})


def _is_password(value: str) -> bool:
    """Whether a literal behind `password =` can be one: mixed characters and no obvious filler."""
    if len(set(value)) < 5 or re.search(r"(?i)pass|secret|changeme|example|test|xxx|your", value):
        return False
    kinds = (r"[a-z]", r"[A-Z]", r"[0-9]", r"[^A-Za-z0-9_]")
    return sum(bool(re.search(kind, value)) for kind in kinds) >= 2 and not re.search(
        r"[\s<>{}$%()]|^[./]|://", value
    )


# Amazon, GitHub, GitLab, Slack, Google, Stripe, OpenAI and Anthropic, Hugging Face, PyPI, npm,
# SendGrid, Twilio, DigitalOcean, JSON web tokens, Databricks, Shopify, Mailchimp, Grafana, Vault,
# Linear, age, Postman, Square, Telegram, and Discord (a number in base64, a time, a hash).
_TOKEN = (
    r"(?:AKIA|ASIA|ABIA|ACCA)[A-Z2-7]{16}|gh[opusr]_[A-Za-z0-9]{36,}|github_pat_\w{60,}"
    r"|glpat-[\w-]{20,}|xox[abeoprs]-[A-Za-z0-9-]{10,}|AIza[\w-]{35}|ya29\.[\w-]{30,}"
    r"|[sr]k_live_[A-Za-z0-9]{20,}|sk-(?:proj-|ant-)?[A-Za-z0-9_-]{40,}|hf_[A-Za-z]{34}"
    r"|pypi-AgE[\w-]{50,}|npm_[A-Za-z0-9]{36}|SG\.[\w-]{22}\.[\w-]{43}|SK[0-9a-f]{32}"
    r"|dop_v1_[0-9a-f]{64}|eyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]{10,}"
    r"|dapi[0-9a-f]{32}|shp(?:at|ca|pa|ss)_[0-9a-fA-F]{32}|[0-9a-f]{32}-us\d{1,2}"
    r"|glsa_[A-Za-z0-9]{32}_[0-9a-f]{8}|hvs\.[\w-]{90,}|lin_api_[A-Za-z0-9]{40}"
    r"|AGE-SECRET-KEY-1[0-9A-Z]{58}|PMAK-[0-9a-f]{24}-[0-9a-f]{34}|sq0(?:atp|csp)-[\w-]{22,43}"
    r"|\d{8,10}:AA[\w-]{33}"
    r"|(?:[MNO][DTjz][AEIMQUYcgk][w-z0-5]){6}\w{0,4}\.[\w-]{6}\.[\w-]{27,38}"
)
_AWS = (
    r"(?:(?i:aws.?secret\w{0,20})[\"']?\s{0,4}[:=]|SecretAccessKey[\"']?\s{0,4}[:=>])"
    r"\s{0,4}[\"']?"
)
_PLACES = r"AccountKey=|hooks\.slack\.com/services/"  # of Azure, of Slack
_NAMED = (
    r"(?i:passw(?:or)?d|pwd|secret|api_?key|(?:auth|access)_?token)\w{0,10}[\"']?"
    r"\s{0,4}(?:=|:|=>)\s{0,4}[\"']"
)
_USER = r"://[\w.-]{1,40}:"
_DETECTORS = (
    Detector(
        "<KEY>",
        "-----BEGIN",
        r"-----BEGIN (?:[A-Z0-9]+ )*PRIVATE KEY(?: BLOCK)?-----(?P<secret>[^-]{64,}?)-----END",
    ),
    Detector("<KEY>", _TOKEN, rf"(?<![\w-])(?P<secret>{_TOKEN})(?!\w)"),
    Detector("<KEY>", _PLACES, rf"(?:{_PLACES})(?P<secret>[\w+/]{{40,}}={{0,2}})"),
    Detector("<KEY>", _AWS, _AWS + r"(?P<secret>[A-Za-z0-9/+]{40})\b"),
    Detector(
        "<PASSWORD>",
        _NAMED + r"[^\"'\n]{8}",
        _NAMED + r"(?P<secret>[^\"'\n]{8,80})[\"']",
        _is_password,
    ),
    Detector(
        "<PASSWORD>",
        _USER + r"[^\s/@:]{4,60}@",
        r"[a-z][a-z+]{1,15}" + _USER + r"(?P<secret>[^\s/@:\"'<>{}$%]{4,60})@",
        _is_password,
    ),
    Detector(
        "<EMAIL>",
        r"\S@[A-Za-z0-9-]+\.[A-Za-z]",
        r"(?<![\w.+/@:-])(?P<secret>\w[\w.+-]{0,62}@(?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,61})\.){1,4}"
        r"[A-Za-z]{2,24})(?![\w@(/])",
        _is_person,
    ),
    Detector(
        "<IP_ADDRESS>",
        r"\d\.\d{1,3}\.\d{1,3}\.\d",
        r"(?<![\w.+/-])(?<!v )(?<!ersion )(?P<secret>(?:(?:25[0-5]|2[0-4]\d|1?\d?\d)\.){3}"
        r"(?:25[0-5]|2[0-4]\d|1?\d?\d))(?![\w.-])",
        _is_public_address,
    ),
    Detector(
        "<IP_ADDRESS>",
        r":[0-9A-Fa-f]{1,4}:[0-9A-Fa-f]{0,4}:|[0-9A-Fa-f]::[0-9A-Fa-f]",
        r"(?<![\w:.])(?P<secret>(?:[0-9A-Fa-f]{1,4}:){2,7}(?::?[0-9A-Fa-f]{1,4}){1,6})(?![\w:.])",
        _is_public_address,
    ),
)
_QUICK = [re2.compile(detector.quick) for detector in _DETECTORS]
_ANY = re2.compile("|".join(detector.quick for detector in _DETECTORS))


def redact(text: str) -> tuple[str, Counter[str]]:
    """Replace what is secret or personal; the counts are by placeholder."""
    counts: Counter[str] = Counter()
    if not _ANY.search(text):
        return text, counts
    for detector, quick in zip(_DETECTORS, _QUICK, strict=True):

        def replaced(found: re.Match[str], detector: Detector = detector) -> str:
            if not detector.is_secret(found["secret"]):
                return found[0]
            counts[detector.placeholder] += 1
            begin, end = (position - found.start() for position in found.span("secret"))
            return found[0][:begin] + detector.placeholder + found[0][end:]

        if quick.search(text):
            text = re.sub(detector.pattern, replaced, text)
    return text, counts
