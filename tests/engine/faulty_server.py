"""A small OpenAI-compatible server around an engine, in this process, that fails when told to."""

import asyncio
import json
import socket
import threading
from contextlib import aclosing, contextmanager

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse

from codellama.engine import SamplingParams

NAMES = ("max_tokens", "temperature", "top_p", "top_k", "min_p", "seed", "repetition_penalty")


class Server:
    """`faults` names what befalls the next requests: a status, hang, break, garbage, end."""

    def __init__(self, engine):
        self.engine, self.faults, self.bodies = engine, [], []
        self.n_now = self.n_most = 0
        self.pause_s = 0.0
        self.url = ""

    def app(self):
        app = FastAPI()

        @app.get("/v1/models")
        async def models():
            return {"data": [{"id": "m", "max_model_len": self.engine.max_context}]}

        @app.post("/v1/completions")
        @app.post("/v1/chat/completions")
        async def complete(request: Request):
            body = await request.json()
            self.bodies.append(body)
            fault = self.faults.pop(0) if self.faults else None
            if isinstance(fault, int):
                error = {"error": {"message": f"no, because {fault}"}}
                return JSONResponse(error, fault, {"retry-after": "1"} if fault == 429 else None)
            if fault == "garbage":
                return JSONResponse({"choices": "nonsense"})
            if body["stream"]:
                return StreamingResponse(self.events(body, fault), media_type="text/event-stream")
            parts = [part async for part in self.parts(body, fault)]
            whole = parts[-1] | {"token_ids": [], "text": "".join(p["text"] for p in parts)}
            for part in parts:
                whole["token_ids"] += part["token_ids"]
            if body.get("logprobs"):
                rows = [part["logprobs"] for part in parts if part["logprobs"]]
                lists = {name: [x for row in rows for x in row[name]] for name in rows[0]}
                if body.get("echo"):
                    [scores] = self.engine.score([body["prompt"]])
                    lists["token_logprobs"] = [None, *scores, *lists["token_logprobs"]]
                whole["logprobs"] = lists
            if "messages" in body:
                whole["message"] = {"role": "assistant", "content": whole.pop("text")}
            return {"choices": [whole]}

        return app

    async def events(self, body, fault):
        async for part in self.parts(body, fault):
            yield f"data: {json.dumps({'choices': [part]}, ensure_ascii=False)}\n\n"
        usage = {"prompt_tokens_details": {"cached_tokens": part["n_cached"]}}
        yield f"data: {json.dumps({'choices': [], 'usage': usage})}\n\ndata: [DONE]\n\n"

    async def parts(self, body, fault):
        tokenizer, prompt = self.engine.tokenizer, body.get("prompt")
        stops = body.get("stop_token_ids", [tokenizer.eos_id])
        if "messages" in body:
            prompt = tokenizer.encode_dialog(body["messages"])
        elif "suffix" in body:
            prompt = tokenizer.encode_infilling(prompt, body["suffix"])
            stops = [tokenizer.eos_id, tokenizer.eot_id]
        elif isinstance(prompt, str):
            prompt = tokenizer.encode(prompt, bos=True)
        settings = {name: body[name] for name in NAMES if name in body}
        n_top = body.get("logprobs", 0)
        params = SamplingParams(
            **settings, stop=body.get("stop", ()), logprobs=bool(n_top), top_logprobs=int(n_top)
        )
        self.n_now += 1
        self.n_most = max(self.n_most, self.n_now)
        try:
            if fault == "hang":
                await asyncio.sleep(60)
            await asyncio.sleep(self.pause_s)
            async with aclosing(self.engine.pieces(prompt, params, stops)) as pieces:
                async for piece in pieces:
                    tops = [{f"token_id:{i}": p for i, p in top} for top in piece.top_logprobs]
                    logprobs = {"token_logprobs": list(piece.logprobs), "top_logprobs": tops}
                    yield {
                        "text": piece.text,
                        "token_ids": list(piece.token_ids),
                        "logprobs": logprobs if piece.token_ids else None,
                        "finish_reason": None if fault == "end" else piece.finish_reason,
                        "n_cached": piece.n_cached,
                    }
                    if fault == "break":
                        raise RuntimeError("the connection is to break here")
                    if fault == "end":
                        return
        finally:
            self.n_now -= 1


@contextmanager
def running(engine):
    """A Server that listens on a port of its own."""
    server = Server(engine)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        server.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        config = uvicorn.Config(server.app(), log_level="critical", timeout_graceful_shutdown=1)
        serving = uvicorn.Server(config)
        thread = threading.Thread(target=serving.run, args=([listener],))
        thread.start()
        try:
            yield server
        finally:
            serving.should_exit = True
            thread.join()
