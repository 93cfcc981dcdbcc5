"""Secrets planted in real files: what is found by ours and by detect-secrets, and how fast.

    python bench/secret_recall.py [--each 20]

Twenty-three kinds of secrets, made up in the formats of their issuers, each put on a line of its
own into files of the standard library. Found means that the secret is gone (ours), or that its
lines are reported (detect-secrets, with its default plugins). The last line is one JSON object; the
lines before it are a table. detect-secrets is left out where it is not installed.
"""

from __future__ import annotations

import argparse
import base64
import json
import random
import re
import string
import sysconfig
import tempfile
import time
from pathlib import Path
from typing import Any

from codellama.data.secrets import redact

RNG = random.Random(1)
ALL = string.ascii_letters + string.digits
HEX = "0123456789abcdef"
BEGIN = "-----BEGIN RSA PRIVATE KEY-----"


def some(n: int, letters: str = ALL) -> str:
    return "".join(RNG.choices(letters, k=n))


def encoded(value: str | dict[str, Any]) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return base64.urlsafe_b64encode(text.encode()).decode().rstrip("=")


def planted() -> dict[str, str]:
    """One of each kind; the longest word of each line is the secret."""
    url, name = ALL + "_-", string.ascii_lowercase
    lines = "\n".join(some(64, ALL + "+/") for _ in range(12))
    token = f"{encoded({'alg': 'HS256'})}.{encoded({'sub': some(10)})}.{some(43, url)}"
    return {
        "Amazon id": f'AWS_ID = "AKIA{some(16, string.ascii_uppercase + "234567")}"',
        "Amazon secret": f'aws_secret_access_key = "{some(40, ALL + "/+")}"',
        "GitHub": f'gh = "ghp_{some(36)}"',
        "GitLab": f'gl = "glpat-{some(20, url)}"',
        "Slack": f's = "xoxb-{some(12, string.digits)}-{some(12, string.digits)}-{some(24)}"',
        "Stripe": f'stripe.api_key = "sk_live_{some(24)}"',
        "OpenAI": f'k = "sk-proj-{some(48)}"',
        "npm": f"//registry.npmjs.org/:_authToken=npm_{some(36)}",
        "SendGrid": f'x = "SG.{some(22, url)}.{some(43, url)}"',
        "JSON web token": f'j = "{token}"',
        "Twilio": f't = "SK{some(32, HEX)}"',
        "Google": f'g = "AIza{some(35, url)}"',
        "Hugging Face": f'h = "hf_{some(34, string.ascii_letters)}"',
        "PyPI": f'p = "pypi-AgE{some(60, url)}"',
        "Telegram": f'b = "{some(10, string.digits)}:AA{some(33, url)}"',
        "Azure": f'c = "AccountKey={some(86, ALL + "+/")}=="',
        "Discord": f'd = "{encoded(some(18, string.digits))}.{some(6)}.{some(27)}"',
        "private key": f"K = '''{BEGIN}\n{lines}\n-----END RSA PRIVATE KEY-----'''",
        "password in a URL": f'DB = "postgres://{some(6, name)}:{some(12)}@db.a{some(5)}.net/x"',
        "password": f'password = "{some(5)}{RNG.choice("!#-+")}{some(5)}{some(1, HEX[:10])}"',
        "API key": f'api_key = "{some(32, HEX)}"',
        "access token": f'access_token = "{some(30)}"',
        "e-mail": f'author = "{some(6, name)}@{some(7, name)}.com"',
    }


def detect_secrets(text: str) -> set[int]:
    """Numbers of the lines, from 1, that detect-secrets reports."""
    from detect_secrets import SecretsCollection
    from detect_secrets.settings import default_settings

    with tempfile.NamedTemporaryFile("w", suffix=".py") as file, default_settings():
        file.write(text)
        file.flush()
        found = SecretsCollection()
        found.scan_file(file.name)
        return {secret.line_number for _, secret in found}


def rate(work: Any, texts: list[str]) -> float:
    begin = time.process_time()
    for text in texts:
        work(text)
    return round(sum(map(len, texts)) / 1e6 / (time.process_time() - begin), 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--each", type=int, default=20)
    options = parser.parse_args()
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    texts = [file.read_text(encoding="utf-8", errors="ignore") for file in files]
    try:
        import detect_secrets as _

        peer = True
    except ImportError:
        peer = False
    ours, theirs = dict.fromkeys(planted(), 0), dict.fromkeys(planted(), 0)
    for _ in range(options.each):
        for kind, line in planted().items():
            lines = RNG.choice(texts)[:3000].split("\n")
            at = RNG.randrange(len(lines))
            text = "\n".join([*lines[:at], line, *lines[at:]])
            secret = max(re.findall(r"[\w/+.:!#-]{8,}", line), key=len)
            ours[kind] += secret not in redact(text)[0]
            if peer:
                reported = range(at + 1, at + 2 + line.count("\n"))
                theirs[kind] += not detect_secrets(text).isdisjoint(reported)
    print(f"| of {options.each} each | ours | detect-secrets |\n|---|---:|---:|")
    for kind in ours:
        print(f"| {kind} | {ours[kind]} | {theirs[kind] if peer else ''} |")
    n = options.each * len(ours)
    result: dict[str, Any] = {"n": n, "ours": {"recall": round(sum(ours.values()) / n, 4)}}
    result["ours"]["mb_per_cpu_s"] = rate(redact, texts)
    if peer:
        result["detect_secrets"] = {"recall": round(sum(theirs.values()) / n, 4)}
        result["detect_secrets"]["mb_per_cpu_s"] = rate(detect_secrets, texts[:20])
    print(json.dumps(result))


if __name__ == "__main__":
    main()
