"""A server of OpenAI's form that answers by rote and fails when told to."""

import asyncio
import json
import socket
import threading
from contextlib import contextmanager

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse


@contextmanager
def listening(app):
    """The address of an ASGI app that listens on a port of its own."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        config = uvicorn.Config(app, log_level="critical", timeout_graceful_shutdown=1)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


class Parrot:
    """Says every prompt backwards; `faults` names what befalls the next requests."""

    def __init__(self):
        self.faults, self.n_asked, self.n_now, self.n_most, self.pause_s = [], 0, 0, 0, 0.0
        self.app = FastAPI()
        self.app.get("/v1/models")(lambda: {"data": [{"id": "parrot", "max_model_len": 99}]})
        self.app.post("/v1/completions")(self.complete)

    async def complete(self, request: Request):
        body, fault = await request.json(), self.faults.pop(0) if self.faults else None
        self.n_asked += 1
        if isinstance(fault, int):
            error = {"error": {"message": f"no, because {fault}"}}
            return JSONResponse(error, fault, {"retry-after": "1"} if fault == 429 else None)
        if fault == "garbage":
            return JSONResponse({"choices": "nonsense"})
        parts = [c async for c in self.parts(body, fault)] if not body["stream"] else []
        if parts:
            text = "".join(part["text"] for part in parts)
            return {"choices": [parts[-1] | {"text": text}]}
        return StreamingResponse(self.events(body, fault), media_type="text/event-stream")

    async def events(self, body, fault):
        async for part in self.parts(body, fault):
            yield f"data: {json.dumps({'choices': [part]}, ensure_ascii=False)}\n\n"
        yield "data: [DONE]\n\n"

    async def parts(self, body, fault):
        self.n_now += 1
        self.n_most = max(self.n_most, self.n_now)
        try:
            for letter in reversed(body["prompt"]):
                await asyncio.sleep(60 if fault == "hang" else self.pause_s)
                yield {"text": letter, "finish_reason": None}
                if fault == "break":
                    raise RuntimeError("the connection is to break here")
            yield {"text": "", "finish_reason": None if fault == "end" else "stop"}
        finally:
            self.n_now -= 1
