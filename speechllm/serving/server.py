"""Running the application: loading the model, and leaving in order.

On SIGTERM or SIGINT the server goes on listening, but answers new requests with status 503, until those in progress are
done; a second signal ends it at once.
"""

import os
from collections.abc import Sequence
from pathlib import Path

import torch
import uvicorn
from transformers import AutoProcessor

from ..modeling_speechllm import SpeechLLMForConditionalGeneration
from .app import LOOPBACK, Limits, Service


ALL_ADDRESSES = ("0.0.0.0", "::", "")


class Server(uvicorn.Server):
    """A uvicorn server that drains before it exits."""

    def __init__(self, config: uvicorn.Config, service: Service):
        super().__init__(config)
        self.service = service

    async def startup(self, sockets=None) -> None:
        await super().startup(sockets)
        for server in self.servers:
            host, port = server.sockets[0].getsockname()[:2]
            host = f"[{host}]" if ":" in host else host
            print(f"Serving {self.service.name} at http://{host}:{port}/v1 (stop with Ctrl-C)", flush=True)

    def handle_exit(self, sig: int, frame) -> None:
        if self.service.draining:
            self.should_exit = self.force_exit = True
        self.service.draining = True

    async def on_tick(self, counter: int) -> bool:
        if self.service.draining and self.service.in_flight == 0:
            self.should_exit = True
        return await super().on_tick(counter)


def serve(
    model: str | os.PathLike,
    host: str = "127.0.0.1",
    port: int = 8000,
    max_batch_size: int = 8,
    max_wait_ms: float = 20.0,
    limits: Limits | None = None,
    device: str | None = None,
    allowed_hosts: Sequence[str] = (),
) -> None:
    """Serve a checkpoint until a signal ends it.

    Args:
        model: checkpoint folder or Hub id; its last part is the model's name in requests.
        host: address to listen at. There is no authentication: leave it on loopback, or put a proxy in front.
        port: 0 for any free one.
        max_batch_size, max_wait_ms: see `Batcher`.
        device: default: a GPU if there is one, else the CPU.
        allowed_hosts: further names that clients may call this machine by, besides the loopback ones and `host`. Where
            `host` stands for all addresses, any name will do unless some are given.

    Raises:
        CheckpointError: if the checkpoint cannot be loaded.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    loaded = SpeechLLMForConditionalGeneration.from_pretrained(model).to(device).eval()
    processor = AutoProcessor.from_pretrained(model)
    name = Path(os.path.abspath(model)).name if os.path.isdir(model) else str(model)
    service = Service(loaded, processor, name, limits or Limits(), max_batch_size, max_wait_ms / 1000)
    config = uvicorn.Config(
        service.app(_hosts(host, allowed_hosts)),
        host=host,
        port=port,
        log_level="warning",
        access_log=False,
        lifespan="off",
        server_header=False,
    )
    Server(config, service).run()


def _hosts(host: str, allowed: Sequence[str]) -> list[str]:
    """What the `Host` header of a request may be."""
    if host in ALL_ADDRESSES:
        return [*LOOPBACK, *allowed] if allowed else ["*"]
    return [*LOOPBACK, f"[{host}]" if ":" in host else host, *allowed]


__all__ = ["serve"]
