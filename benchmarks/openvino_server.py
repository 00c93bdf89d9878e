"""OpenVINO GenAI's ContinuousBatchingPipeline behind the little HTTP that load.py needs; it brings no server itself.

    python openvino_server.py --model FOLDER --threads 2 --port 8000

Runs in OpenVINO's environment and needs only `openvino-genai`. Prompts are token ids, and ids go back as the text:
nothing is detokenised, which favours this contender a little.
"""

from __future__ import annotations

import argparse
import json
import queue
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy
import openvino
import openvino_genai

Tokens = queue.SimpleQueue[list[int] | None]  # ids as they come; None at the end


class Engine:
    """The one thread that steps the pipeline. `submit` may be called from any."""

    def __init__(self, model: str, threads: int) -> None:
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.cache_size = 2  # GB
        scheduler.max_num_batched_tokens = 2048
        scheduler.enable_prefix_caching = True
        properties = {"INFERENCE_NUM_THREADS": threads}
        self._pipeline = openvino_genai.ContinuousBatchingPipeline(model, scheduler, "CPU", properties)
        self._arrived: queue.SimpleQueue[tuple[list[int], int, Tokens]] = queue.SimpleQueue()
        self._handles: list[tuple[Any, Tokens]] = []
        self._num_added = 0

    def submit(self, prompt: list[int], num_tokens: int) -> Tokens:
        tokens: Tokens = queue.SimpleQueue()
        self._arrived.put((prompt, num_tokens, tokens))
        return tokens

    def run(self) -> None:
        while True:
            if not self._handles:
                self._add(*self._arrived.get())
            while not self._arrived.empty():
                self._add(*self._arrived.get())
            self._pipeline.step()
            self._handles = [pair for pair in self._handles if self._deliver(*pair)]

    def _add(self, prompt: list[int], num_tokens: int, tokens: Tokens) -> None:
        config = openvino_genai.GenerationConfig(
            max_new_tokens=num_tokens, min_new_tokens=num_tokens, ignore_eos=True, do_sample=False
        )
        ids = openvino.Tensor(numpy.array([prompt], dtype=numpy.int64))
        self._handles.append((self._pipeline.add_request(self._num_added, ids, config), tokens))
        self._num_added += 1

    def _deliver(self, handle: Any, tokens: Tokens) -> bool:
        """Pass on what the step has brought; False after the last token."""
        while handle.can_read():
            for output in handle.read().values():
                tokens.put(output.generated_ids)
        if handle.get_status() == openvino_genai.GenerationStatus.RUNNING:
            return True
        tokens.put(None)
        return False


class Handler(BaseHTTPRequestHandler):
    engine: Engine
    name: str

    def do_GET(self) -> None:
        self._begin("application/json")
        self.wfile.write(json.dumps({"data": [{"id": self.name}]}).encode())

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        tokens = self.engine.submit(body["prompt"], body["max_tokens"])
        self._begin("text/event-stream")
        num_tokens = 0
        while (ids := tokens.get()) is not None:
            num_tokens += len(ids)
            self._event({"choices": [{"text": f"{ids}"}]})
        self._event({"choices": [], "usage": {"prompt_tokens": len(body["prompt"]), "completion_tokens": num_tokens}})
        self.wfile.write(b"data: [DONE]\n\n")

    def _begin(self, content_type: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", content_type)
        self.end_headers()

    def _event(self, event: dict[str, Any]) -> None:
        self.wfile.write(b"data: " + json.dumps(event).encode() + b"\n\n")

    def log_message(self, *args: object) -> None:
        """Requests are not logged."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--port", type=int, required=True)
    args = parser.parse_args()
    Handler.engine, Handler.name = Engine(args.model, args.threads), args.model
    threading.Thread(target=Handler.engine.run, daemon=True).start()
    ThreadingHTTPServer(("127.0.0.1", args.port), Handler).serve_forever()


if __name__ == "__main__":
    main()
