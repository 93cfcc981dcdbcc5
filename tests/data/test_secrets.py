"""Real formats of secrets, made up; joined so that no scanner of this repository takes them."""

import sysconfig
from pathlib import Path

import pytest

from codellama.data.secrets import redact

KEY_BLOCK = "-----BEGIN " + "RSA PRIVATE KEY-----"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('k = "AKIA' + 'IOSFODNN7EXAMPLQ"', 'k = "<KEY>"'),
        ("token: ghp_" + "a1B2" * 9, "token: <KEY>"),
        ("xoxb-" + "123456789012-abcdefghijkl", "<KEY>"),
        ("AIza" + "SyA1234567890abcdefghijklmnopqrstuv", "<KEY>"),
        ("sk_live_" + "4eC39HqLyjWDarjtT1zdp7dc", "<KEY>"),
        ("hf_" + "AbCdEfGhIjKlMnOpQrStUvWxYzAbCdEfGh", "<KEY>"),
        ("eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0." + "dozjgNryP4J3jVmNHl0w5N_XgL0n3I9P", "<KEY>"),
        ("bot = '110201543:AA" + "HdqTcvCH1vGWJxfSeofSAs0K5PALDsawQ'", "bot = '<KEY>'"),
        ("MTk4NjIyNDgzNDcxOTI1MjQ4" + ".Cl2FMQ.ZnCjm1XVW7vRze4b7Cq4se7kKWs", "<KEY>"),
        ("AccountKey=" + "aB3+/x" * 14 + "Zz==;Endpoint", "AccountKey=<KEY>;Endpoint"),
        (
            "aws_secret_access_key = " + "wJalrXUtnFEMI/K7MDENG/bPxRfiCYzzzzzzzKEY",
            "aws_secret_access_key = <KEY>",
        ),
        (f"{KEY_BLOCK}\n{'MIIE' * 30}\n-----END", f"{KEY_BLOCK}<KEY>-----END"),
        ('password = "hunter2!xQ"', 'password = "<PASSWORD>"'),
        ('"db_passwd": "k3J-9z.Q"', '"db_passwd": "<PASSWORD>"'),
        ("postgres://user:s3cr3tQ@host/db", "postgres://user:<PASSWORD>@host/db"),
        ("mail jane.roe@some-company.net now", "mail <EMAIL> now"),
        ("# Jane Roe <jane@roe.name>", "# Jane Roe <<EMAIL>>"),
        ("server 93.184.216.34:80", "server <IP_ADDRESS>:80"),
        ("at 2606:2800:220:1:248:1893:25c8:1946", "at <IP_ADDRESS>"),
    ],
)
def test_secrets_become_placeholders(text: str, expected: str) -> None:
    found, counts = redact(f"before\n{text}\nafter")
    assert found == f"before\n{expected}\nafter"
    assert sum(counts.values()) == 1
    assert redact(found) == (found, {})


@pytest.mark.parametrize(
    "text",
    [
        'password = "password"',
        'password = "your-password-here"',
        "password = get_password(user)",
        'token = "{token}"',
        'secret = "$SECRET_KEY"',
        "user@example.com and git@github.com:a/b.git and noreply@company.com",
        "@app.route('/x')\n@pytest.mark.slow",
        "a @ b.T and logo@2x.png",
        "10.0.0.1, 127.0.0.1, 192.168.1.1, 0.0.0.0, 8.8.8.8",
        "version 1.2.3.4, v1.2.3.4, numpy-1.2.3.4",
        "12:30:45, a[1:2:3], ::1, fe80::1, std::vector, {a:b:c}",
        "task-queue sk-learn SKILL",
        "MultivariateNormalTestCase2.device.with_very_long_attribute_name",
        "sha256: " + "0123456789abcdef" * 4,
    ],
)
def test_what_only_looks_like_one_stays(text: str) -> None:
    assert redact(text) == (text, {})


def test_little_of_ordinary_code_changes() -> None:
    n_bytes = n_keys = 0
    for file in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        text = file.read_bytes().decode("utf-8", "ignore")
        _, counts = redact(text)
        n_bytes += len(text)
        n_keys += counts["<KEY>"] + counts["<PASSWORD>"] + counts["<IP_ADDRESS>"]
    assert n_bytes > 3_000_000
    assert n_keys <= 10
