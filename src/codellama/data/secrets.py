"""Secrets and personal data: keys, tokens, passwords, e-mail and IP addresses out of a text.

Each is replaced by a placeholder of its type, and nothing else of the text changes. The patterns
are those that the issuers document, and tight: a name that merely looks random stays. Each has
plain words that must occur before its expression is tried, which is what makes it fast.

In: a text. Out: the text and how many of each type were replaced.
"""

from __future__ import annotations

import ipaddress
import re
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple


class Detector(NamedTuple):
    """One kind of secret: what to look for, and what to put in its place."""

    placeholder: str
    words: tuple[str, ...]
    """One of them occurs in every text with a match."""
    pattern: str
    """What its group `secret` matches is replaced."""
    is_secret: Callable[[str], bool] = bool
    """Of what was matched; by default all of it is."""
    quick: str = ""
    """Matches in every text with a match, and is fast."""


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


_TOKENS = (
    (r"(?:AKIA|ASIA|ABIA|ACCA)[A-Z2-7]{16}", "AKIA ASIA ABIA ACCA"),  # Amazon
    (r"gh[opusr]_[A-Za-z0-9]{36,}|github_pat_\w{60,}", "gho_ ghp_ ghu_ ghs_ ghr_ github_pat_"),
    (r"glpat-[\w-]{20,}", "glpat-"),  # GitLab
    (r"xox[abeoprs]-[A-Za-z0-9-]{10,}", "xox"),  # Slack
    (r"AIza[\w-]{35}", "AIza"),  # Google
    (r"ya29\.[\w-]{30,}", "ya29."),
    (r"[sr]k_live_[A-Za-z0-9]{20,}", "k_live_"),  # Stripe
    (r"sk-(?:proj-|ant-)?[A-Za-z0-9_-]{40,}", "sk-"),  # OpenAI, Anthropic
    (r"hf_[A-Za-z]{34}", "hf_"),
    (r"pypi-AgE[\w-]{50,}", "pypi-AgE"),
    (r"npm_[A-Za-z0-9]{36}", "npm_"),
    (r"SG\.[\w-]{22}\.[\w-]{43}", "SG."),  # SendGrid
    (r"SK[0-9a-f]{32}", "SK"),  # Twilio
    (r"dop_v1_[0-9a-f]{64}", "dop_v1_"),  # DigitalOcean
    (r"eyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]{10,}", "eyJ"),  # JSON web tokens
)

_PASSWORD_WORDS = ("passw", "PASSW", "Passw", "pwd", "secret", "SECRET", "token", "TOKEN")
_PASSWORD_WORDS += ("api_key", "API_KEY", "apikey")
_DETECTORS = (
    Detector(
        "<KEY>",
        ("-----BEGIN",),
        r"-----BEGIN (?:[A-Z0-9]+ )*PRIVATE KEY(?: BLOCK)?-----(?P<secret>[^-]{64,}?)-----END",
    ),
    *(
        Detector("<KEY>", tuple(words.split()), rf"(?<![\w-])(?P<secret>{p})(?!\w)")
        for p, words in _TOKENS
    ),
    Detector(
        "<KEY>",
        ("aws_secret", "AWS_SECRET", "aws-secret", "SecretAccessKey", "secretAccessKey"),
        r"(?i)aws.?secret\w{0,20}[\"']?\s{0,4}[:=]\s{0,4}[\"']?(?P<secret>[A-Za-z0-9/+]{40})\b"
        r"|SecretAccessKey[\"']?\s{0,4}[:=>]\s{0,4}[\"']?(?P<other>[A-Za-z0-9/+]{40})\b",
    ),
    Detector(
        "<PASSWORD>",
        _PASSWORD_WORDS,
        r"(?i)(?:passw(?:or)?d|pwd|secret|api_?key|(?:auth|access)_?token)\w{0,10}[\"']?"
        r"\s{0,4}(?:=|:|=>)\s{0,4}[\"'](?P<secret>[^\"'\n]{8,80})[\"']",
        _is_password,
    ),
    Detector(
        "<PASSWORD>",
        ("://",),
        r"[a-z][a-z+]{1,15}://[\w.-]{1,40}:(?P<secret>[^\s/@:\"'<>{}$%]{4,60})@",
        _is_password,
    ),
    Detector(
        "<EMAIL>",
        ("@",),
        r"(?<![\w.+/@:-])(?P<secret>\w[\w.+-]{0,62}@(?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,61})\.){1,4}"
        r"[A-Za-z]{2,24})(?![\w@(/])",
        _is_person,
        r"@[A-Za-z0-9-]+\.[A-Za-z]",
    ),
    Detector(
        "<IP_ADDRESS>",
        (".",),
        r"(?<![\w.+/-])(?<!v )(?<!ersion )(?P<secret>(?:(?:25[0-5]|2[0-4]\d|1?\d?\d)\.){3}"
        r"(?:25[0-5]|2[0-4]\d|1?\d?\d))(?![\w.-])",
        _is_public_address,
        r"\d\.\d{1,3}\.\d{1,3}\.\d",
    ),
    Detector(
        "<IP_ADDRESS>",
        (":",),
        r"(?<![\w:.])(?P<secret>(?:[0-9A-Fa-f]{1,4}:){2,7}(?::?[0-9A-Fa-f]{1,4}){1,6})(?![\w:.])",
        _is_public_address,
        r":[0-9A-Fa-f]{1,4}:[0-9A-Fa-f]{0,4}:|[0-9A-Fa-f]::[0-9A-Fa-f]",
    ),
)


def redact(text: str) -> tuple[str, Counter[str]]:
    """Replace what is secret or personal; the counts are by placeholder."""
    counts: Counter[str] = Counter()
    for detector in _DETECTORS:
        if not any(word in text for word in detector.words):
            continue
        if not re.search(detector.quick, text):
            continue

        def replaced(found: re.Match[str], detector: Detector = detector) -> str:
            name = next(n for n, value in found.groupdict().items() if value is not None)
            if not detector.is_secret(found[name]):
                return found[0]
            counts[detector.placeholder] += 1
            begin, end = (position - found.start() for position in found.span(name))
            return found[0][:begin] + detector.placeholder + found[0][end:]

        text = re.sub(detector.pattern, replaced, text)
    return text, counts
