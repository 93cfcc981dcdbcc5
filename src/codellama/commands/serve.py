"""The command that serves a model over HTTP."""

from __future__ import annotations

import contextlib
import resource
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from codellama import terminal
from codellama.commands.options import Device, Dtype, Precision, check_device

if TYPE_CHECKING:
    from codellama.serve import Limits, Service

Names = list[str] | None


def serve(
    model: Annotated[
        str | None,
        typer.Argument(help="What `complete --model` takes; its tokenizer alone with --upstream."),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535)] = 8080,
    api_key: Annotated[
        Names, typer.Option(envvar="CODELLAMA_API_KEY", help="Asked of clients; may be repeated.")
    ] = None,
    upstream: Annotated[
        str | None, typer.Option(metavar="URL[,URL…]", help="An OpenAI-compatible cluster.")
    ] = None,
    upstream_key: Annotated[
        str | None, typer.Option(envvar="CODELLAMA_UPSTREAM_KEY", help="The cluster's key.")
    ] = None,
    allow_origin: Annotated[
        Names, typer.Option(help="Where browsers may ask from, too; may be repeated.")
    ] = None,
    max_texts: Annotated[
        int, typer.Option(min=1, help="Texts under way; more are refused with 429.")
    ] = 128,
    max_total_tokens: Annotated[int, typer.Option(min=1, help="Tokens of all of them.")] = 1 << 20,
    max_tokens: Annotated[int, typer.Option(min=1, help="New tokens of one text.")] = 1 << 16,
    max_body_bytes: Annotated[int, typer.Option(min=1, help="Of one request.")] = 4 << 20,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds for one request.")] = 600,
    grace: Annotated[float, typer.Option(min=0, help="Seconds to finish after SIGTERM.")] = 30,
    newest_wins: Annotated[
        bool, typer.Option("--newest-wins", help="End a client's infilling when it asks again.")
    ] = False,
    recognise: Annotated[
        bool, typer.Option(help="Take prompts written <PRE> … <SUF>… <MID> for infilling.")
    ] = True,
    suffix_first: Annotated[
        bool, typer.Option("--suffix-first", help="SPM where a client does not say.")
    ] = False,
    trim_suffix: Annotated[
        bool, typer.Option("--trim-suffix", help="End infilling before what repeats the suffix.")
    ] = False,
    end_at_line: Annotated[
        bool, typer.Option("--end-at-line", help="Drop an infilling's unfinished last line.")
    ] = False,
    device: Device = "cpu",
    dtype: Dtype = Precision.BFLOAT16,
) -> None:
    """Serve the interfaces of OpenAI, Mistral, llama.cpp, Ollama and Tabby, and a page."""
    if upstream is None:
        check_device(device)
    from codellama.serve import LOOPBACK, Limits, Rules, serve

    is_local = host in LOOPBACK
    if not is_local and not api_key:
        terminal.say(f"warning: {host} can be reached from elsewhere, and there is no --api-key")
    sizes = (max_texts, max_total_tokens, max_tokens, timeout)
    limits = Limits(*sizes, newest_wins, recognise, suffix_first, trim_suffix, end_at_line)
    hosts, origins = LOOPBACK if is_local else None, tuple(allow_origin or ())
    rules = Rules(tuple(api_key or ()), hosts, origins, max_body_bytes)
    with contextlib.suppress(ValueError, OSError):  # each connection takes a descriptor
        most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))

    def load() -> Service:
        service = _service(model, upstream, upstream_key, limits, device, dtype.value)
        address = f"[{host}]" if ":" in host else host
        terminal.say(f"serving {service.name} at http://{address}:{port}")
        return service

    serve(load, host, port, rules, grace)


def _service(
    model: str | None, urls: str | None, key: str | None, limits: Limits, device: str, dtype: str
) -> Service:
    """The engine, or the cluster with the model's tokenizer."""
    from codellama.engine.engine import SHIPPED_MODEL, Engine
    from codellama.serve import Service
    from codellama.weights import load_tokenizer, open_weights

    weights = open_weights(model or SHIPPED_MODEL)
    stem = Path(model).absolute().name.removesuffix(".gguf") if model else "codellama"
    # Editors choose their template by this word.
    name = stem if "codellama" in stem.lower() else f"codellama-{stem}"
    meta = {
        "n_vocab": weights.config.vocab_size,
        "n_ctx_train": weights.config.max_position_embeddings,
        "n_embd": weights.config.hidden_size,
        "n_params": weights.config.n_params,
        "size": sum(tensor.n_bytes for tensor in weights.tensors.values()),
        "precision": dtype,
    }
    if urls is None:
        engine = Engine(model, device=device, dtype=dtype)
        return Service(engine, engine.tokenizer, name, meta, limits)
    from codellama.engine.endpoint import Endpoint

    tokenizer = load_tokenizer(weights)
    most = limits.max_texts  # the cluster has a queue of its own
    endpoint = Endpoint(urls.split(","), api_key=key, tokenizer=tokenizer, max_in_flight=most)
    return Service(endpoint, tokenizer, name, meta, limits)
