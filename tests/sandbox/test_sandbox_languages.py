"""Other languages: a program that reads a line in each, and attacks where processes are allowed."""

import os
from pathlib import Path

import pytest

from codellama.sandbox.languages import LANGUAGES, commands_of

REVERSE = {
    "python": "print(input()[::-1])",
    "bash": "read -r x; rev=''; for ((i=${#x}-1; i>=0; i--)); do rev+=${x:i:1}; done; echo $rev",
    "cpp": "#include <algorithm>\n#include <iostream>\nint main() { std::string s; std::cin >> s; "
    "std::reverse(s.begin(), s.end()); std::cout << s << std::endl; }",
    "java": "import java.util.*;\npublic class Main { public static void main(String[] a) { "
    "System.out.println(new StringBuilder(new Scanner(System.in).nextLine()).reverse()); } }",
    "javascript": "const s = require('fs').readFileSync(0, 'utf8').trim();\n"
    "console.log([...s].reverse().join(''))",
    "typescript": "declare const require: any;\n"
    "const s: string = require('fs').readFileSync(0, 'utf8').trim();\n"
    "console.log(s.split('').reverse().join(''))",
    "php": '<?php echo strrev(trim(fgets(STDIN))), "\\n";',
    "csharp": "using System; class P { static void Main() { "
    "var c = Console.ReadLine().ToCharArray(); Array.Reverse(c); "
    "Console.WriteLine(new string(c)); } }",
    "go": 'package main\nimport "fmt"\nfunc main() { var s string; fmt.Scan(&s); r := ""\n'
    "for _, c := range s { r = string(c) + r }\nfmt.Println(r) }",
    "rust": "fn main() { let mut s = String::new(); std::io::stdin().read_line(&mut s).unwrap(); "
    'println!("{}", s.trim().chars().rev().collect::<String>()); }',
    "ruby": "puts gets.strip.reverse",
    "lua": "print(string.reverse(io.read('*l')))",
}
FAILING = {"bash": "exit 3", "cpp": "int main() { return 3; }", "javascript": "process.exit(3)"}


def test_every_language_is_tried():
    assert set(REVERSE) == set(LANGUAGES)


@pytest.mark.parametrize("name", REVERSE)
def test_language(name, pool):
    outcome = pool.run(REVERSE[name], "hello\n", language=name, timeout_s=20)
    if missing := commands_of(LANGUAGES[name])[1]:
        assert outcome.status == "refused"
        assert repr(missing) in outcome.message
    else:
        assert (outcome.status, outcome.stdout.strip()) == ("passed", "olleh"), outcome


@pytest.mark.parametrize("name", FAILING)
def test_exit_status(name, pool):
    if commands_of(LANGUAGES[name])[1]:
        pytest.skip(f"no toolchain for {name}")
    outcome = pool.run(FAILING[name], language=name, timeout_s=20)
    assert (outcome.status, outcome.exit_code) == ("failed", 3)


ATTACKS = {
    "fork bomb": ("f() { f | f & }; f; sleep 0.3; echo done", {"passed", "failed", "timeout"}),
    "daemon": ("(setsid sleep 98765 > /dev/null 2>&1 &) ; echo started", {"passed"}),
    "traps": ("trap '' TERM INT HUP; while :; do :; done", {"timeout"}),
    "network": ("echo > /dev/tcp/127.0.0.1/22 && echo THROUGH; true", {"passed"}),
    "host files": ("cat /etc/passwd /etc/shadow && echo THROUGH; true", {"passed"}),
    "host processes": ("kill -9 @pid@ && echo THROUGH; true", {"passed"}),
    "namespaces": ("unshare -Ur true && echo THROUGH; true", {"passed"}),
    "write": ("for d in / /usr /dev /proc; do echo > $d/x && echo THROUGH; done; true", {"passed"}),
    "memory of one": ("x=$(head -c 900000000 /dev/zero | tr '\\0' x); echo ${#x} THROUGH",
                      {"memory", "failed", "timeout"}),
    "flood": ("yes", {"output"}),
}  # fmt: skip


@pytest.mark.parametrize("name", ATTACKS)
def test_attack(name, pool):
    script, statuses = ATTACKS[name]
    script = script.replace("@pid@", str(os.getpid()))
    timeout_s = 1.0 if "timeout" in statuses else 10
    outcome = pool.run(script, language="bash", timeout_s=timeout_s, memory_bytes=128 << 20)
    assert outcome.status in statuses, outcome
    assert "THROUGH" not in outcome.stdout
    running = [p.read_bytes() for p in Path("/proc").glob("[0-9]*/cmdline") if p.exists()]
    assert not any(b"98765" in line for line in running)


def test_memory_of_a_tree(pool):
    """No process alone takes too much; together they do."""
    grow = "x=$(head -c 40000000 /dev/zero | tr '\\\\0' x); sleep 9"
    script = f'for i in 1 2 3 4 5 6; do bash -c "{grow}" & done; wait; echo THROUGH'
    script = script.replace("x=$(", "x=\\$(")
    outcome = pool.run(script, language="bash", timeout_s=20, memory_bytes=160 << 20)
    assert outcome.status == "memory", outcome


def test_the_first_process_of_a_run_is_out_of_reach(pool):
    """It sleeps in the zygote's memory, and other languages see it in /proc."""
    script = (
        "for name in mem maps environ auxv syscall fd/0 root/usr cwd/. map_files ns/mnt; do\n"
        '  [ -n "$(head -c1 /proc/1/$name 2>&1 >/dev/null)" ] || echo THROUGH $name\n'
        "done\n"
        "(echo x > /proc/1/mem) 2>&1 | grep -q . || echo THROUGH write\n"
        "kill -9 1; kill -TERM 1; [ -d /proc/1 ] && echo alive\n"
    )
    outcome = pool.run(script, language="bash", timeout_s=20)
    assert outcome.stdout == "alive\n"
