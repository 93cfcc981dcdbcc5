"""The server: every dialect that editors speak, over one engine or over a cluster.

    a dialect's body  ->  Request  ->  Service.stream  ->  pieces  ->  the dialect's reply

`prompts` builds all prompts, `generation` is the form that all dialects share, `service` runs it
within limits, `openai`, `llamacpp`, `ollama` and `tabby` parse and render, `guard` decides who may
ask, `app` puts them together.
"""

from codellama.serve.app import create_app, serve
from codellama.serve.guard import LOOPBACK, Rules
from codellama.serve.service import Limits, Service

__all__ = ["LOOPBACK", "Limits", "Rules", "Service", "create_app", "serve"]
