"""The HTTP application: OpenAI's routes in front of one model.

    GET  /health                    200, or 503 while shutting down
    GET  /v1/models                 the one model
    POST /v1/chat/completions       text and `input_audio` parts; `stream` for server-sent events
    POST /v1/audio/transcriptions   a form with a `file`

Each request is admitted or refused (429, 503), read within the upload limit and the timeout, decoded and rendered in one
of a few threads, and queued for the batcher. When its client leaves or its time is up, its prompts are cancelled.
"""

import asyncio
import contextlib
import functools
import json
import logging
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

import anyio
import numpy as np
from starlette.applications import Starlette
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from ..audio_speechllm import SAMPLING_RATE, AudioError, AudioTooLongError, cut_at_pauses, is_silent, load_audio
from ..configuration_speechllm import AUDIO_TOKEN
from ..data.prompts import PROMPTS
from .batching import Batcher, Job
from .protocol import LISTS, ApiError, ChatAnswer, parse_chat, parse_json, parse_transcription


logger = logging.getLogger(__name__)
DECODING_THREADS = 2
LOOPBACK = ("localhost", "127.0.0.1", "[::1]")
TOKENS_PER_SECOND = 30  # of speech, generously, in any script and tokenizer: where more come, the model repeats itself


class StillSending(ApiError):
    """A request that is refused before its body has been read to the end."""


@dataclass
class Limits:
    """What one server takes.

    Args:
        max_requests: in progress or waiting at once; more get status 429.
        max_audio_seconds: of all audio in a request.
        max_upload_mb: of a request's body.
        timeout: seconds from a request's arrival to its answer's end.
        default_max_tokens: of an answer, where the request does not say; transcripts of long pieces may have more.
    """

    max_requests: int = 32
    max_audio_seconds: float = 600.0
    max_upload_mb: float = 25.0
    timeout: float = 120.0
    default_max_tokens: int = 256


class Service:
    """The model behind the routes.

    Args:
        model, processor: as for `Batcher`.
        name: what requests call the model.
    """

    def __init__(self, model, processor, name: str, limits: Limits, max_batch_size: int, max_wait: float):
        self.processor, self.name, self.limits = processor, name, limits
        self.context = model.config.context
        self.batcher = Batcher(model, processor, max_batch_size, max_wait, model.config.batch_context)
        processor.count_tokens("", [])  # turns off what padding the tokenizer was saved with, before threads share it
        self.created = int(time.time())
        self.in_flight = 0
        self.draining = False
        self.decoding = anyio.CapacityLimiter(DECODING_THREADS)

    def app(self, hosts: Sequence[str] = LOOPBACK) -> Starlette:
        """The application, for requests to these hosts: a web page that gives its own name the address of this machine
        (DNS rebinding) would otherwise have the visitor's browser read answers for it. `"*"` stands for any."""
        return Starlette(
            routes=[
                Route("/health", self.health),
                Route("/v1/models", self.models),
                Route("/v1/models/{name:path}", self.model),
                Route("/v1/chat/completions", self.admitted(self.chat), methods=["POST"]),
                Route("/v1/audio/transcriptions", self.admitted(self.transcription), methods=["POST"]),
            ],
            middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=hosts, www_redirect=False)],
            exception_handlers={
                StillSending: self.answer_when_sent,
                ApiError: _error_response,
                HTTPException: _http_error,
                Exception: _unexpected,
            },
        )

    # ---- routes ------------------------------------------------------------------------------------------------------

    async def health(self, request: Request) -> Response:
        status = {
            "status": "shutting down" if self.draining else "ok",
            "model": self.name,
            "in_flight": self.in_flight,
            "prompts": self.batcher.prompts,
            "batches": self.batcher.batches,
        }
        return JSONResponse(status, 503 if self.draining else 200)

    async def models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self.card()]})

    async def model(self, request: Request) -> Response:
        self.check_model(request.path_params["name"])
        return JSONResponse(self.card())

    def card(self) -> dict:
        return {"id": self.name, "object": "model", "created": self.created, "owned_by": "speechllm"}

    async def chat(self, request: Request, deadline: float) -> Response:
        wanted = parse_chat(parse_json(await self.body(request, "application/json", deadline)))
        self.check_model(wanted.model)
        text, audios, prompt_tokens = await self.in_thread(self.prepare_chat, wanted.messages, deadline=deadline)
        room = self.context - prompt_tokens
        job = Job(
            text,
            audios,
            min(wanted.max_tokens or self.limits.default_max_tokens, room),
            wanted.sampling,
            prompt_tokens,
            wanted.stop,
            deadline,
        )
        answer = ChatAnswer(self.name, prompt_tokens)
        if wanted.stream:
            return self.stream(job, answer, wanted.include_usage)
        await self.run(request, [job])
        return JSONResponse(answer.whole(job.answer, job.finish_reason, job.tokens))

    async def transcription(self, request: Request, deadline: float) -> Response:
        wanted = parse_transcription(await self.form(request, deadline))
        self.check_model(wanted.model)
        prompt = wanted.prompt or PROMPTS["asr"]
        samples, spans, prompts = await self.in_thread(
            self.prepare_transcription, wanted.file, prompt, deadline=deadline
        )
        jobs = [
            Job(
                text,
                audios,
                min(self.transcript_limit(end - start), self.context - tokens),
                wanted.sampling,
                tokens,
                deadline=deadline,
            )
            for (start, end), (text, audios, tokens) in zip(spans, prompts)
        ]
        for (start, end), job in zip(spans, jobs):
            if is_silent(samples[start:end]):  # of which a model makes something up
                job.end("stop")
        await self.run(request, [job for job in jobs if job.finish_reason is None])
        texts = [job.answer.strip() for job in jobs]
        text = " ".join(filter(None, texts))
        if wanted.response_format == "text":
            return PlainTextResponse(text + "\n")
        if wanted.response_format == "json":
            return JSONResponse({"text": text})
        segments = [
            {
                "id": i,
                "start": start / SAMPLING_RATE,
                "end": end / SAMPLING_RATE,
                "text": segment,
                "finish_reason": job.finish_reason,  # as of a chat: "length" if the text is cut off
            }
            for i, ((start, end), segment, job) in enumerate(zip(spans, texts, jobs))
        ]
        duration = len(samples) / SAMPLING_RATE
        return JSONResponse(
            {
                "task": "transcribe",
                "language": wanted.language or "",
                "duration": duration,
                "text": text,
                "segments": segments,
            }
        )

    # ---- the steps of a request --------------------------------------------------------------------------------------

    def admitted(self, route):
        """The route behind the limit on requests in progress, counted until the answer's last byte."""

        @functools.wraps(route)
        async def admit(request: Request) -> Response:
            if self.draining:
                raise ApiError(503, "The server is shutting down.", code="shutting_down")
            if self.in_flight >= self.limits.max_requests:
                raise ApiError(429, f"{self.in_flight} requests are in progress. Try again later.", code="queue_full")
            self.in_flight += 1
            response = None
            try:
                response = await route(request, time.monotonic() + self.limits.timeout)
                return response
            finally:
                if not isinstance(response, StreamingResponse):  # which counts for itself
                    self.in_flight -= 1

        return admit

    def transcript_limit(self, samples: int) -> int:
        return max(self.limits.default_max_tokens, round(samples / SAMPLING_RATE * TOKENS_PER_SECOND))

    def check_model(self, name: str) -> None:
        if name != self.name:
            raise ApiError(
                404,
                f"The model {name[:100]!r} does not exist; this server has {self.name!r}.",
                "model",
                "model_not_found",
            )

    async def body(self, request: Request, content_type: str, deadline: float) -> bytes:
        async with self.reading(request, content_type, deadline) as limited:
            return await limited.body()

    async def form(self, request: Request, deadline: float) -> dict[str, Any]:
        async with self.reading(request, "multipart/form-data", deadline) as limited:
            try:
                async with limited.form(max_files=1, max_fields=20) as form:
                    fields: dict[str, Any] = {}
                    for name, value in form.multi_items():
                        value = await value.read() if isinstance(value, UploadFile) else value
                        fields[name] = [*fields.get(name, []), value] if name in LISTS else value
                    return fields
            except (MultiPartException, HTTPException) as error:
                raise ApiError(400, f"The form cannot be read: {getattr(error, 'detail', error)}") from None

    @contextlib.asynccontextmanager
    async def reading(self, request: Request, content_type: str, deadline: float) -> AsyncIterator[Request]:
        """The request, with a body that ends in an `ApiError` where it exceeds the upload limit or the deadline."""
        if request.headers.get("content-type", "").split(";")[0].strip().lower() != content_type:
            raise ApiError(415, f"The content type must be {content_type}.")
        limit, received = self.limits.max_upload_mb * 1e6, 0
        too_large = f"The request has more than {self.limits.max_upload_mb:g} MB, the limit here."
        declared = request.headers.get("content-length", "")
        if declared.isdigit() and int(declared) > limit:
            raise StillSending(413, too_large)

        async def receive():
            nonlocal received
            message = await request.receive()
            received += len(message.get("body", b""))
            if received > limit:
                raise (StillSending if message.get("more_body") else ApiError)(413, too_large)
            return message

        try:
            async with asyncio.timeout(deadline - time.monotonic()):
                yield Request(request.scope, receive)
        except TimeoutError:
            raise ApiError(408, "The request did not arrive in time.") from None
        except ClientDisconnect:
            raise ApiError(499, "The client left before its request had arrived.") from None  # which nobody will see

    async def answer_when_sent(self, request: Request, error: ApiError) -> Response:
        """An error for a client that would not see it before it has sent its request, which it may, within reason.
        (The route has returned, so this takes none of the places.)"""
        received, more = 0, True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.limits.timeout):
                while more and received < 4e6 * self.limits.max_upload_mb:
                    message = await request.receive()
                    received += len(message.get("body", b""))
                    more = message.get("more_body")
        return _error_response(request, error)

    async def in_thread(self, function, *arguments, deadline: float):
        try:
            async with asyncio.timeout(deadline - time.monotonic()):
                return await anyio.to_thread.run_sync(
                    function, *arguments, limiter=self.decoding, abandon_on_cancel=True
                )
        except TimeoutError:
            raise self.timed_out() from None
        except AudioTooLongError as error:
            raise ApiError(413, str(error), code="audio_too_long") from error
        except AudioError as error:
            raise ApiError(400, str(error), code="invalid_audio") from error

    def prepare_chat(self, messages: list[dict]) -> tuple[str, list[np.ndarray], int]:
        """Messages -> rendered prompt, samples of its audios, and its length in tokens."""
        limit, audios = self.limits.max_audio_seconds, []
        for i, message in enumerate(messages):
            for part in message["content"] if isinstance(message["content"], list) else ():
                if part["type"] == "audio":
                    left = limit - sum(map(len, audios)) / SAMPLING_RATE
                    try:
                        part["audio"] = self.load(part["audio"], f"The audio in message {i}", max(left, 0))
                    except AudioTooLongError as error:
                        if not audios:
                            raise
                        message = f"The chat has more than {limit:g} seconds of audio, the limit here. Shorten it."
                        raise AudioTooLongError(message) from error
                    audios.append(part["audio"])
        return self.render(messages, audios)

    def prepare_transcription(self, file: bytes, prompt: str) -> tuple[np.ndarray, list[tuple[int, int]], list]:
        """A file -> its samples, the spans of its pieces, and the rendered prompt of each piece."""
        samples = self.load(file, "The file", self.limits.max_audio_seconds)
        spans = cut_at_pauses(samples, self.processor.segment_seconds)
        prompts = []
        for start, end in spans:
            piece = samples[start:end]
            parts = [{"type": "audio", "audio": piece}, {"type": "text", "text": prompt}]
            prompts.append(self.render([{"role": "user", "content": parts}], [piece]))
        return samples, spans, prompts

    def load(self, data: bytes, name: str, max_seconds: float) -> np.ndarray:
        return load_audio(data, name=name, shortest=self.processor.shortest, max_seconds=max_seconds)

    def render(self, messages: list[dict], audios: list[np.ndarray]) -> tuple[str, list[np.ndarray], int]:
        try:
            text = self.processor.apply_chat_template(messages, add_generation_prompt=True)
            tokens = self.processor.count_tokens(text, [len(audio) for audio in audios])
        except Exception as error:  # templates raise their own errors, about the order of roles for one
            raise ApiError(400, f"The chat cannot be rendered for this model: {error}", "messages") from error
        if text.count(AUDIO_TOKEN) != len(audios):
            raise ApiError(400, f"A text holds {AUDIO_TOKEN}, the placeholder of audio. Leave it out.", "messages")
        if tokens >= self.context:
            raise ApiError(
                400,
                f"The prompt has {tokens:,} tokens and the model a context of {self.context:,}. Shorten text or audio.",
                "messages",
                "context_length_exceeded",
            )
        return text, audios, tokens

    async def run(self, request: Request, jobs: list[Job]) -> None:
        """Have the jobs answered; cancel them when the client leaves."""
        if not jobs:
            return
        loop, ended = asyncio.get_running_loop(), asyncio.Event()
        missing = len(jobs)

        def count() -> None:
            nonlocal missing
            missing -= 1
            if missing == 0:
                ended.set()

        for job in jobs:
            job.on_end = lambda job: loop.call_soon_threadsafe(count)
        self.batcher.submit(*jobs)
        waits = [asyncio.ensure_future(ended.wait()), asyncio.ensure_future(_disconnected(request))]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self.batcher.cancel(*jobs)  # nothing to those that have ended
            for wait in waits:
                wait.cancel()
        for job in jobs:
            self.check_ended(job)

    def stream(self, job: Job, answer: ChatAnswer, include_usage: bool) -> StreamingResponse:
        loop, texts = asyncio.get_running_loop(), asyncio.Queue()
        job.on_text = lambda text: loop.call_soon_threadsafe(texts.put_nowait, text)
        job.on_end = lambda job: loop.call_soon_threadsafe(texts.put_nowait, None)

        async def events() -> AsyncIterator[str]:
            try:
                yield _event(answer.chunk({"role": "assistant", "content": ""}))
                while (text := await texts.get()) is not None:
                    yield _event(answer.chunk({"content": text}))
                self.check_ended(job)
                yield _event(answer.chunk({}, job.finish_reason))
                if include_usage:
                    yield _event(answer.usage_chunk(job.tokens))
                yield "data: [DONE]\n\n"
            except ApiError as error:  # the status line has gone out already
                yield _event(error.body())

        self.batcher.submit(job)
        return _Stream(self, job, events())

    def check_ended(self, job: Job) -> None:
        if job.finish_reason in (None, "cancelled"):
            raise ApiError(499, "The client left before the answer.")  # which nobody will see
        if job.finish_reason == "timeout":
            raise self.timed_out()
        if job.finish_reason == "error":
            logger.error("generation failed", exc_info=job.error)
            raise ApiError(500, "The model failed on this request.")

    def timed_out(self) -> ApiError:
        return ApiError(504, f"The answer took longer than {self.limits.timeout:g} seconds.", code="timeout")


class _Stream(StreamingResponse):
    """Server-sent events; when they end, or their client leaves, the job is over."""

    def __init__(self, service: Service, job: Job, events: AsyncIterator[str]):
        super().__init__(events, media_type="text/event-stream", headers={"cache-control": "no-cache"})
        self.service, self.job = service, job

    async def __call__(self, scope, receive, send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.service.batcher.cancel(self.job)
            self.service.in_flight -= 1


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _event(data: dict) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"


def _error_response(request: Request, error: ApiError) -> Response:
    headers = {"retry-after": "1"} if error.status in (429, 503) else None
    return JSONResponse(error.body(), error.status, headers)


def _http_error(request: Request, error: HTTPException) -> Response:
    return _error_response(request, ApiError(error.status_code, f"{error.detail}: {request.method} {request.url.path}"))


def _unexpected(request: Request, error: Exception) -> Response:
    return _error_response(request, ApiError(500, "The server failed on this request."))
