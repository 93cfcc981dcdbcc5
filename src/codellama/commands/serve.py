"""The command that serves a model over HTTP."""

from __future__ import annotations

import contextlib
import resource
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from codellama import terminal
from codellama.commands.options import Device, Dtype, Precision, check_device

if TYPE_CHECKING:
    from codellama.serve import Limits, Service


def serve(
    model: Annotated[
        str | None,
        typer.Argument(
            help="Hugging Face or Meta folder, .gguf file or hub name; the shipped model by "
            "default. With --upstream, whose tokenizer it gives."
        ),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535)] = 8080,
    api_key: Annotated[
        list[str] | None,
        typer.Option(envvar="CODELLAMA_API_KEY", help="Required of clients (may be repeated)."),
    ] = None,
    upstream: Annotated[
        str | None, typer.Option(help="URLs of an OpenAI-compatible cluster, with commas between.")
    ] = None,
    upstream_key: Annotated[
        str | None, typer.Option(envvar="CODELLAMA_UPSTREAM_KEY", help="Key of the cluster.")
    ] = None,
    allow_origin: Annotated[
        list[str] | None,
        typer.Option(help="A foreign origin that browsers may ask from (may be repeated)."),
    ] = None,
    max_requests: Annotated[
        int, typer.Option(min=1, help="Texts under way; more are refused with 429.")
    ] = 128,
    max_total_tokens: Annotated[int, typer.Option(min=1, help="Tokens of all texts under way.")] = 1
    << 20,
    max_tokens: Annotated[int, typer.Option(min=1, help="New tokens of one text.")] = 1 << 16,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds that a request may take.")] = 600,
    grace: Annotated[float, typer.Option(min=0, help="Seconds to finish after SIGTERM.")] = 30,
    newest_wins: Annotated[
        bool, typer.Option(help="End a client's infilling when it asks for another.")
    ] = False,
    recognise: Annotated[
        bool, typer.Option(help="Take prompts written as <PRE> … <SUF>… <MID> for infilling.")
    ] = True,
    suffix_first: Annotated[
        bool, typer.Option("--suffix-first", help="SPM where clients do not say.")
    ] = False,
    device: Device = "cpu",
    dtype: Dtype = Precision.BFLOAT16,
) -> None:
    """Serve OpenAI's, Mistral's, llama.cpp's, Ollama's and Tabby's interfaces, and a page."""
    if upstream is None:
        check_device(device)
    from codellama.serve import Limits, Rules, serve
    from codellama.serve.guard import LOOPBACK

    is_local = host in LOOPBACK
    if not is_local and not api_key:
        terminal.say(f"warning: {host} can be reached from elsewhere, and there is no --api-key")
    limits = Limits(
        max_requests, max_total_tokens, max_tokens, timeout_s=timeout, newest_wins=newest_wins
    )
    rules = Rules(
        tuple(api_key or ()),
        LOOPBACK if is_local else None,
        tuple(allow_origin or ()),
        max_body_bytes=limits.max_body_bytes,
    )
    with contextlib.suppress(ValueError, OSError):  # a connection takes a descriptor
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))

    def load() -> Service:
        service = _service(model, upstream, upstream_key, limits, device, dtype.value)
        service.recognise, service.suffix_first = recognise, suffix_first
        where = f"[{host}]" if ":" in host else host
        terminal.say(f"serving {service.card.name} at http://{where}:{port}")
        return service

    serve(load, host, port, rules, grace)


def _service(
    model: str | None,
    upstream: str | None,
    upstream_key: str | None,
    limits: Limits,
    device: str,
    dtype: str,
) -> Service:
    """The engine, or the cluster, with the model's tokenizer."""
    from codellama.engine.engine import SHIPPED_MODEL, Engine
    from codellama.serve import ModelCard, Service
    from codellama.weights import load_tokenizer, open_weights

    weights = open_weights(model or SHIPPED_MODEL)
    stem = Path(model).resolve().name.removesuffix(".gguf") if model else "codellama"
    # Editors choose their template by this word.
    name = stem if "codellama" in stem.lower() else f"codellama-{stem}"
    card = ModelCard(
        name,
        int(time.time()),
        {
            "n_vocab": weights.config.vocab_size,
            "n_ctx_train": weights.config.max_position_embeddings,
            "n_embd": weights.config.hidden_size,
            "n_params": weights.config.n_params,
            "size": sum(tensor.n_bytes for tensor in weights.tensors.values()),
            "precision": dtype,
        },
    )
    if upstream is None:
        engine = Engine(model, device=device, dtype=dtype)
        return Service(engine, engine.tokenizer, card, limits)
    from codellama.engine.endpoint import Endpoint

    urls = [url.strip() for url in upstream.split(",") if url.strip()]
    tokenizer = load_tokenizer(weights)
    endpoint = Endpoint(urls, api_key=upstream_key, tokenizer=tokenizer)
    return Service(endpoint, tokenizer, card, limits)
