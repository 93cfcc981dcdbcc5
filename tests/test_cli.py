"""The commands as people use them: output, exit codes, one line for whatever goes wrong."""

import io
import json
import os
import pty
import re
import resource
import select
import shutil
import signal
import subprocess
import sys
import time
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import torch

from codellama import cli
from codellama.commands import options
from codellama.model.checkpoint import save_checkpoint
from codellama.model.config import ModelConfig
from codellama.model.source import LOAD_DTYPES
from codellama.model.transformer import Transformer
from codellama.tokenizer import Tokenizer
from codellama.weights import FORMATS

ROOT = Path(__file__).resolve().parent.parent
COMMAND = [sys.executable, "-m", "codellama"]
RECIPE = """
name = "test"
work = "{work}"
[corpus]
sources = [{{ name = "tree", path = "{tree}" }}]
[model]
name = "tiny"
[stages.code]
steps = 1
batch_tokens = 512
micro_batch = 1
peak_lr = 1e-3
[stages.long]
init = "code"
steps = 1
batch_tokens = 512
micro_batch = 1
peak_lr = 1e-3
"""


@pytest.fixture(scope="session")
def models(small_tokenizer, tmp_path_factory):
    """The same random weights, which never end a text, with three kinds of tokenizer."""
    folder = tmp_path_factory.mktemp("models")
    config = ModelConfig(64, 2, 4, 2, 128, small_tokenizer.vocab_size, max_position_embeddings=4096)
    model = Transformer(config.replace(initializer_range=0.4))
    model.initialise(torch.Generator().manual_seed(5))
    weights = model.state_dict()
    weights["lm_head.weight"][small_tokenizer.eos_id] = 0
    tokenizers = {
        "base": small_tokenizer,
        "inst": small_tokenizer.with_chat_format("inst"),
        "python": Tokenizer(small_tokenizer.file, infilling=False),
    }
    for name, tokenizer in tokenizers.items():
        save_checkpoint(folder / name, config, weights, write_more=tokenizer.save)
    damaged = folder / "damaged"
    save_checkpoint(damaged, config, weights, write_more=small_tokenizer.save)
    content = (damaged / "model.safetensors").read_bytes()
    (damaged / "model.safetensors").write_bytes(content[: len(content) // 2])
    return folder


@pytest.fixture
def call(models, tmp_path, monkeypatch, capsys):
    """Run a command in this process: (exit code, standard output, lines on standard error)."""
    monkeypatch.chdir(tmp_path)
    tree = tmp_path / "tree"
    tree.mkdir()
    (tmp_path / "r.toml").write_text(RECIPE.format(work=tmp_path / "w", tree=tree))

    def run(*arguments, stdin=b""):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), newline=""))
        places = {f"{{{path.name}}}": str(path) for path in models.iterdir()}
        code = cli.run_command([places.get(argument, argument) for argument in arguments])
        out, err = capsys.readouterr()
        return code, out, err.splitlines()

    return run


# -- what it does ---------------------------------------------------------------------------------


def test_complete_prints_the_new_text_alone(call):
    given = ("complete", "def f(", "--model", "{base}", "--max-tokens", "12")
    code, out, err = call(*given)
    assert (code, err) == (0, [])
    code, shown, _ = call(*given, "--json")
    result = json.loads(shown)
    assert shown.count("\n") == 1
    assert result["prompt"] == "def f("
    assert result["completions"][0]["text"].rstrip("\n") == out.rstrip("\n")
    assert len(result["completions"][0]["logprobs"]) == 12
    assert result["usage"]["completion_tokens"] == 12


def test_alternatives(call):
    given = ("complete", "x", "--model", "{base}", "--max-tokens", "6", "--n", "3")
    sampled = (*given, "--temperature", "1", "--seed", "4")
    code, out, _ = call(*sampled, "--json")
    texts = [c["text"] for c in json.loads(out)["completions"]]
    assert (code, len(texts), len(set(texts))) == (0, 3, 3)
    code, out, _ = call(*sampled)
    assert out == "".join(f"--- {n} ---\n{text}\n" for n, text in enumerate(texts, start=1))


def test_no_tokens_are_no_error(call):
    code, out, _ = call("complete", "x", "--model", "{base}", "--max-tokens", "0", "--json")
    assert code == 0
    assert json.loads(out)["completions"][0]["text"] == ""
    assert call("complete", "", "--model", "{base}", "--max-tokens", "2")[0] == 0


def test_infill_keeps_every_byte_around_the_gap(call, monkeypatch, tmp_path):
    written = io.TextIOWrapper(io.BytesIO(), "utf-8", "surrogateescape", newline="")
    monkeypatch.setattr(sys, "stdout", written)
    prefix, suffix = b"a = 1\r\n\xff\xfe", b"\r\n\xe9 = 2\r\n"
    model = ("--model", "{base}", "--max-tokens", "5")
    code, _, err = call("infill", *model, stdin=prefix + b"<FILL_ME>" + suffix)
    assert (code, err) == (0, [])
    out = written.buffer.getvalue()
    assert out.startswith(prefix)
    assert out.endswith(suffix)
    (tmp_path / "p").write_bytes(prefix)
    (tmp_path / "s").write_bytes(suffix)
    call("infill", "--prefix-file", "p", "--suffix-file", "s", *model)
    assert written.buffer.getvalue() == out + out
    call("infill", "--suffix-first", *model, stdin=prefix + b"<FILL_ME>" + suffix)
    assert written.buffer.getvalue()[2 * len(out) :].startswith(prefix)


def test_chat_answers_one_question(call):
    given = ("chat", "hello", "--system", "Be short.", "--max-tokens", "6")
    code, out, err = call(*given, "--model", "{inst}")
    assert (code, err) == (0, [])
    code, shown, _ = call(*given, "--model", "{inst}", "--json")
    result = json.loads(shown)
    assert [m["role"] for m in result["messages"]] == ["system", "user"]
    assert result["completions"][0]["text"].strip() == out.strip()
    code, from_stdin, _ = call("chat", "-", *given[2:], "--model", "{inst}", stdin=b"hello")
    assert from_stdin == out


def test_a_base_model_chats_with_a_warning(call):
    code, out, err = call("chat", "hello", "--model", "{base}", "--max-tokens", "4")
    assert code == 0
    assert out.strip()
    assert len(err) == 1
    assert "base model" in err[0]


def test_tokenizer_there_and_back(call):
    code, out, _ = call("tokenizer", "encode", "-", "--model", "{base}", stdin="é = 1\n".encode())
    assert code == 0
    assert call("tokenizer", "decode", "--model", "{base}", stdin=out.encode())[1] == "é = 1\n\n"
    assert call("tokenizer", "decode", *out.split(), "--model", "{base}")[1] == "é = 1\n\n"
    _, shown, _ = call("tokenizer", "encode", "x", "--bos", "--model", "{base}", "--json")
    assert json.loads(shown)["ids"][0] == 1


def test_convert_and_inspect(call):
    code, out, _ = call("convert", "{inst}", "m.gguf", "--to", "gguf", "--dtype", "bfloat16")
    assert (code, out) == (0, "m.gguf\n")
    code, out, _ = call("inspect", "m.gguf", "--json")
    facts = json.loads(out)
    assert (code, facts["kind"], facts["format"], facts["context"]) == (0, "model", "gguf", 4096)
    assert (facts["infilling"], facts["chat_format"]) == (True, "inst")
    texts = [call("complete", "x", "--model", m, "--max-tokens", "5") for m in ("{inst}", "m.gguf")]
    assert texts[0] == texts[1]
    assert "context" in call("inspect", "{base}")[1]
    code, _, error = call("convert", "{inst}", "x", "--to", "hf", "--variant", "9b")
    assert code == 1
    assert "unknown variant '9b'" in error[0]
    assert "7b-instruct" in error[0]


def test_inspect_a_run_and_a_corpus(call, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    settings = {"steps": 10, "seq_len": 8}
    record = {"stage": "code", "model": {"name": "tiny"}, "settings": settings}
    (run / "recipe.json").write_text(json.dumps(record))
    rows = [{"step": s, "loss": 5.0 - s, "tokens": 64 * s, "tokens_per_s": 100.0} for s in (1, 2)]
    rows.append({"step": 2, "validation_loss": 3.5})
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (run / "metrics.jsonl").write_text(lines + '{"step": 3, "lo')  # being written
    _, out, _ = call("inspect", "run", "--json")
    facts = json.loads(out)
    assert (facts["step"], facts["steps"], facts["loss"], facts["finished"]) == (2, 10, 3.0, False)
    assert (facts["tokens_per_s"], facts["validation"]["validation_loss"]) == (100.0, 3.5)
    shutil.copytree(run, tmp_path / "other")
    (tmp_path / "other" / "metrics.jsonl").write_text(lines.rpartition("{")[0])  # not validated
    code, out, _ = call("inspect", "run", "other", "--plot", "both.png")
    assert code == 0
    assert re.search(r"run +2 of 10 +128 +3.0000 +3.5000", out)
    assert re.search(r"other +2 of 10 +128 +3.0000$", out, re.MULTILINE)
    assert (tmp_path / "both.png").read_bytes().startswith(b"\x89PNG")
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    manifest = {
        "kind": "corpus",
        "n_documents": {"train": 3000, "validation": 1},
        "n_bytes": {"train": 2_500_000, "validation": 12},
        "dropped": {"too small": {"n": 7, "examples": ["a"]}},
        "shards": [{}],
    }
    (corpus / "manifest.json").write_text(json.dumps(manifest))
    _, out, _ = call("inspect", "corpus")
    assert re.search(r"train +3,000", out)
    assert re.search(r"train +2.5 MB", out)
    assert re.search(r"too small +7", out)


def test_bench(call):
    _, out, _ = call("bench")
    assert re.search(r"^train_step +Training steps of one shape", out, re.MULTILINE)
    command = [sys.executable, "-m", "codellama", "bench", "train_step", "--help"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "--seq-len" in shown.stdout  # the script's own options
    code, _, err = call("bench", "nothing")
    assert code == 2
    assert "train_step" in err[0]


def test_options_name_what_loads():
    assert tuple(options.Precision) == LOAD_DTYPES
    assert tuple(options.Format) == FORMATS


def test_the_page_is_that_of_the_commands():
    spec = spec_from_file_location("make_cli", ROOT / "docs" / "make_cli.py")
    assert spec is not None
    assert spec.loader is not None
    make_cli = module_from_spec(spec)
    spec.loader.exec_module(make_cli)
    assert make_cli.PAGE.read_text() == make_cli.page(), "run `make docs`"


# -- what goes wrong ------------------------------------------------------------------------------

MODEL = ("--model", "{base}")
WRONG_ARGUMENTS = [
    (("--nothing",), "No such option"),
    (("nothing",), "No such command"),
    (("complete", "x", "--max-tokens", "-1", *MODEL), "max_tokens = -1"),
    (("complete", "x", "--max-tokens", "many", *MODEL), "--max-tokens"),
    (("complete", "x", "--temperature", "nan", *MODEL), "temperature = nan"),
    (("complete", "x", "--top-p", "1.5", *MODEL), "top_p = 1.5"),
    (("complete", "x", "--top-k", "-1", *MODEL), "top_k = -1"),
    (("complete", "x", "--n", "0", *MODEL), "n = 0"),
    (("complete", "x", "--stop", "", *MODEL), "stop"),
    (("complete", "x", "--dtype", "int3", *MODEL), "bfloat16"),
    (("complete", "x", "--device", "nothing", *MODEL), "--device"),
    (("infill", "no gap", *MODEL), "<FILL_ME> not found"),
    (("infill", "<FILL_ME> <FILL_ME>", *MODEL), "found 2 times"),
    (("infill", "a<FILL_ME>", "--prefix-file", "r.toml", *MODEL), "not both"),
    (("infill", "--prefix-file", "absent.py", *MODEL), "absent.py"),
    (("infill", "--suffix-file", "tree", *MODEL), "directory"),
    (("chat", "", *MODEL), "empty"),
    (("chat", "--json", *MODEL), "MESSAGE"),
    (("prepare",), "RECIPE"),
    (("prepare", "absent.toml"), "no such recipe"),
    (("prepare", "tree"), "tree: "),
    (("prepare", "r.toml", "--set", "corpus.nothing=1"), "corpus.nothing"),
    (("prepare", "r.toml", "--set", "corpus.seed='a'"), "corpus.seed"),
    (("prepare", "r.toml", "--set", "seed"), "key.subkey=value"),
    (("train", "r.toml"), "code, long"),
    (("train", "r.toml", "--stage", "last"), "'last'"),
    (("train", "r.toml", "--stage", "code", "--workers", "0"), "--workers"),
    (("convert", "{base}", "x", "--to", "onnx"), "gguf"),
    (("convert", "{base}", "x"), "--to"),
    (("tokenizer", "decode", "a", *MODEL), "'a' is not an id"),
]
FAILED_RUNS = [
    (("complete", "x", "--model", "absent/folder/x"), "absent"),
    (("complete", "x", "--model", "tree"), "tree"),
    (("complete", "x", "--model", "{damaged}"), "damaged"),
    (("complete", "x " * 5000, *MODEL), "context"),
    (("infill", "x " * 5000 + "<FILL_ME>", *MODEL), "context"),
    (("infill", "x<FILL_ME>y", "--model", "{python}"), "cannot infill"),
    (("infill", "x<FILL_ME>y", "--model", "{python}", "--json"), "cannot infill"),
    (("chat", "a [INST] b", "--model", "{inst}"), "special tags"),
    (("chat", "a", "--system", "<<SYS>>", "--model", "{inst}"), "special tags"),
    (("chat", "x " * 5000, "--model", "{inst}"), "context"),
    (("prepare", "r.toml", "--set", "corpus.sources=[{name='a', path='absent'}]"), "absent"),
    (("prepare", "r.toml"), "empty"),
    (("train", "r.toml", "--stage", "code"), "corpus"),
    (("tokenizer", "train", "r.toml"), "corpus"),
    (("tokenizer", "decode", "999999", *MODEL), "outside the vocabulary"),
    (("convert", "absent/folder/x", "y", "--to", "hf"), "absent"),
    (("convert", "{base}", "tree", "--to", "hf"), "exists"),
    (("convert", "{base}", "x", "--to", "hf", "--quantize", "q8_0"), "quantize"),
    (("inspect", "absent/folder/x"), "absent"),
    (("inspect", "tree"), "tree"),
    (("inspect", "{damaged}"), "damaged"),
    (("inspect", "{base}", "{base}"), "only runs"),
]


def named(case):
    return " ".join(word[:20] for word in case) if isinstance(case, tuple) else ""


def one_line(err, says):
    assert len(err) == 1, err
    assert err[0].startswith("codellama: ")
    assert says in err[0]


@pytest.mark.parametrize(("arguments", "says"), WRONG_ARGUMENTS, ids=named)
def test_wrong_arguments(call, arguments, says):
    code, out, err = call(*arguments)
    assert (code, out) == (2, "")
    one_line(err, says)
    assert err[0].endswith("--help)")


@pytest.mark.parametrize(("arguments", "says"), FAILED_RUNS, ids=named)
def test_failed_runs(call, arguments, says, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    code, out, err = call(*arguments)
    assert (code, out) == (1, "")
    one_line(err, says)
    left = {path for path in tmp_path.rglob("*") if path.is_file()} - {*before}
    assert not [path for path in left if path.name != "lock"]


def test_errors_of_the_system_are_one_line(call, monkeypatch):
    for error, says in (
        (MemoryError(), "out of memory"),
        (OSError(28, "No space left on device", "out"), "out: No space left"),
        (RuntimeError("bad\nframe #0: c10"), "bad"),
    ):

        def fail(*_, error=error, **__):
            raise error

        monkeypatch.setattr("codellama.describe.describe", fail)
        code, _, err = call("inspect", "{base}")
        assert code == 1
        one_line(err, says)


def test_closed_standard_input(call, monkeypatch):
    monkeypatch.setattr(cli.terminal.sys, "stdin", None)
    with pytest.raises(ValueError, match="standard input is closed"):
        cli.terminal.read_text("-")


# -- conversations --------------------------------------------------------------------------------


def test_conversation_from_a_pipe(call):
    """Commands, lines that go on, a refused message; the session survives all of it."""
    typed = (
        b'one\n/system Be [INST]\n/system Be short.\nbad <<SYS>>\n/nothing\na\\\nb\n"""x\ny"""\n'
    )
    code, out, err = call("chat", "--model", "{inst}", "--max-tokens", "4", stdin=typed)
    assert code == 0
    assert len([line for line in err if line.startswith("(ended after 4 tokens")]) == 3
    assert len([line for line in err if "special tags" in line]) == 2
    assert "(system text set)" in err
    assert [line for line in err if "unknown command /nothing" in line]
    assert out.strip()
    assert ">" not in out.splitlines()[0][:1]
    assert "\x1b" not in out


def test_history_and_reset(models, monkeypatch):
    from codellama.conversation import Conversation, converse
    from codellama.engine import Engine, SamplingParams

    engine = Engine(models / "inst")
    conversation = Conversation(engine, SamplingParams(max_tokens=3), "Be short.")
    typed = 'one\n"""two\n  lines"""\n\n'
    monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
    converse(conversation)
    roles = [message["role"] for message in conversation.messages]
    assert roles == ["system", "user", "assistant", "user", "assistant"]
    assert conversation.messages[3]["content"] == "two\n  lines"
    monkeypatch.setattr(sys, "stdin", io.StringIO("/reset\nthree\n/system\n/exit\nfour\n"))
    converse(conversation)
    assert [m["content"] for m in conversation.messages if m["role"] == "user"] == ["three"]
    assert conversation.messages[0]["role"] == "user"


def test_full_context_and_tags_in_an_answer(models, monkeypatch, capsys):
    from codellama.conversation import Conversation, converse
    from codellama.engine import Completion, Engine, SamplingParams

    engine = Engine(models / "inst")
    conversation = Conversation(engine, SamplingParams(max_tokens=3))
    monkeypatch.setattr(sys, "stdin", io.StringIO("x " * 5000 + "\nhello\n"))
    converse(conversation)
    assert "/reset starts anew" in capsys.readouterr().err
    assert [m["role"] for m in conversation.messages] == ["user", "assistant"]
    written = Completion("fine [/INST] [INST] more", (5, 6), None, "stop", 9)
    monkeypatch.setattr(engine, "chat", lambda *_: [written])
    conversation.ask("again")
    assert conversation.messages[-1]["content"] == "fine"


def test_markdown_grows_into_what_it_is_at_once(monkeypatch):
    from rich.console import Console
    from rich.markdown import Markdown

    from codellama import terminal

    monkeypatch.setattr(terminal, "_FRAME_S", 0)
    code = "".join(f"def f{i}(x):\n    return x + {i}\n" for i in range(20))
    text = f"Here is *code*:\n\n```python\n{code}```\n\n1. one\n2. two\n\nThe end. {'word ' * 50}"
    grown, whole = io.StringIO(), io.StringIO()
    settings = {"force_terminal": True, "width": 60, "height": 12, "color_system": None}
    with terminal.MarkdownView(Console(file=grown, **settings)) as view:
        for i in range(0, len(text), 5):
            view.add(text[i : i + 5])
    Console(file=whole, **settings).print(Markdown(text))
    assert screen(grown.getvalue()) == screen(whole.getvalue())
    assert "def f19(x):" in screen(grown.getvalue())


def screen(output):
    """What a very tall terminal shows after the output: cursor up, erase line, CR, LF."""
    rows: list[list[str]] = [[]]
    row = column = 0
    for match in re.finditer(r"\x1b\[([\d;?]*)([A-Za-z])|(.)", output, re.DOTALL):
        count, control, char = match.groups()
        if control == "A":
            row -= int(count or 1)
        elif control == "K":
            rows[row] = []
        elif char == "\r":
            column = 0
        elif char == "\n":
            row, column = row + 1, 0
            rows += [[] for _ in range(row + 1 - len(rows))]
        elif char:
            rows[row] += " " * (column + 1 - len(rows[row]))
            rows[row][column] = char
            column += 1
    return "\n".join("".join(row).rstrip() for row in rows).rstrip()


class Terminal:
    """A command on a pseudo-terminal."""

    def __init__(self, *arguments):
        environment = {**os.environ, "TERM": "xterm", "COLUMNS": "80", "OMP_NUM_THREADS": "1"}
        environment.pop("NO_COLOR", None)
        self.pid, self.file = pty.fork()
        if self.pid == 0:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # as where a script runs the tests
            os.execve(sys.executable, [*COMMAND, *arguments], environment)
        self.seen = b""

    def wait_for(self, text, timeout_s=300):
        """Read until the text has come, and forget what was before it."""
        end = time.monotonic() + timeout_s
        while text not in self.seen:
            ready, _, _ = select.select([self.file], [], [], max(0, end - time.monotonic()))
            assert ready, f"{text!r} did not come: {self.seen[-2000:]!r}"
            try:
                self.seen += os.read(self.file, 65536)
            except OSError:  # it ended
                raise AssertionError(f"{text!r} did not come: {self.seen[-2000:]!r}") from None
        self.seen = self.seen.partition(text)[2]

    def type(self, text):
        os.write(self.file, text)

    def interrupt_line(self, text, n_tries=20):
        """Type a line and Ctrl-C, again where the prompt was not yet ready to take it."""
        for _ in range(n_tries):
            self.type(text + b"\x03")
            try:
                return self.wait_for(b"/exit leaves", timeout_s=10)
            except AssertionError:
                continue
        raise AssertionError("Ctrl-C was not noticed")

    def close(self):
        """The exit code."""
        while True:
            try:
                if not os.read(self.file, 65536):
                    break
            except OSError:
                break
        os.close(self.file)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def test_chat_on_a_terminal(models):
    """An answer without end is cancelled by Ctrl-C; the session answers again; Ctrl-D leaves."""
    chat = Terminal("chat", "--model", str(models / "inst"), "--max-tokens", "4000")
    try:
        chat.wait_for(b"> ")
        chat.type(b"hello\n")
        chat.wait_for(b"\x1b[?25l")  # the live display has begun
        chat.wait_for(b"\x1b[2K")
        chat.type(b"\x03")
        chat.wait_for(b"(cancelled)")
        chat.wait_for(b"> ")
        chat.interrupt_line(b"half a li")
        chat.wait_for(b"> ")
        chat.type(b"/help\n")
        chat.wait_for(b"/system TEXT")
        chat.wait_for(b"> ")
        chat.type(b"\x04")
        assert chat.close() == 0
    except BaseException:
        os.kill(chat.pid, signal.SIGKILL)
        chat.close()
        raise


# -- the real command -----------------------------------------------------------------------------


def test_help_is_fast():
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    shown = subprocess.run([*COMMAND, "--help"], capture_output=True, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert "complete" in shown.stdout
    used_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert used_s < 0.5


def test_no_arguments_show_help():
    shown = subprocess.run(COMMAND, capture_output=True, text=True)
    assert shown.returncode == 2
    assert "Usage" in shown.stdout + shown.stderr


@pytest.mark.parametrize("target", ["pipe", "full"])
def test_output_that_cannot_be_written(models, target):
    """A reader that leaves is no failure, a full disk is; neither leaves a traceback."""
    given = [*COMMAND, "complete", "x", "--model", str(models / "base"), "--max-tokens", "2000"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if target == "pipe":
        with subprocess.Popen(
            given, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
        ) as process:
            assert process.stdout is not None
            assert process.stderr is not None
            process.stdout.read(3)
            process.stdout.close()
            assert process.stderr.read() == b""
        assert process.returncode == 0
        return
    with open("/dev/full", "w") as full:
        done = subprocess.run(given, stdout=full, stderr=subprocess.PIPE, env=environment)
    assert done.returncode == 1
    assert done.stderr == b"codellama: No space left on device\n"
