"""Dynamic batching: concurrent prompts share the passes through the model.

1. Prompts wait in a queue. One worker thread takes the oldest and, for up to `max_wait` seconds, others that are
   generated under the same settings, until there are `max_batch_size` of them.
2. They go through `generate` together. A stopping criterion watches each row after each token: it hands new text to
   whoever waits for it, and ends the row on an end-of-turn token, its own length limit or stop string, its deadline, or
   its cancellation. So a row's answer is out when it is complete, and nobody's timeout leaves the model running.
3. Greedy answers are those of `generate` without batching, up to rounding: padding is masked, but sums over other
   shapes round differently, which may decide between two tokens that are almost equally likely.
"""

import copy
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from transformers import StoppingCriteria, StoppingCriteriaList


@dataclass(frozen=True)
class Sampling:
    """Settings that all prompts of a batch share. Temperature 0 is greedy."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None

    def to_generate(self) -> dict:
        if self.temperature == 0:
            # What the checkpoint's generation settings may say of sampling would be warned about.
            return {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        return {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p, "top_k": 0}


@dataclass(eq=False)
class Job:
    """One prompt and what becomes of it.

    Args:
        text: the rendered chat, with a placeholder for each audio.
        audios: samples at 16 kHz of each audio, (samples,), as `load_audio` returns them.
        prompt_tokens: length of the prompt, where the model's context bounds it.
        deadline: of `time.monotonic()`; the answer ends there, unfinished.
        on_text: called from the worker thread with each new piece of text, if given.
        on_end: called from the worker thread, once, when the job is over, in whichever way.
    """

    text: str
    audios: list[np.ndarray]
    max_new_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    prompt_tokens: int = 0
    stop: tuple[str, ...] = ()
    deadline: float = float("inf")
    on_text: Callable[[str], None] | None = None
    on_end: Callable[["Job"], None] = lambda job: None

    answer: str = ""
    tokens: int = 0
    finish_reason: str | None = None  # "stop", "length", "timeout", "cancelled" or "error"
    error: Exception | None = None
    is_cancelled: bool = False

    def cancel(self) -> None:
        """Give up the answer; its row ends with the next token."""
        self.is_cancelled = True

    def end(self, reason: str, error: Exception | None = None) -> None:
        if self.finish_reason is None:
            self.finish_reason, self.error = reason, error
            self.on_end(self)

    def ended_by_time_or_user(self) -> bool:
        if self.is_cancelled:
            self.end("cancelled")
        elif time.monotonic() >= self.deadline:
            self.end("timeout")
        return self.finish_reason is not None


class Batcher:
    """Answers jobs in one worker thread.

    Args:
        model, processor: a `SpeechLLMForConditionalGeneration` in evaluation mode and its processor, of which the worker
            has a copy: a tokenizer that pads in one thread and counts tokens in another does both wrongly, or raises
            "Already borrowed".
        max_batch_size: prompts generated at once.
        max_wait: seconds that a prompt waits for others.
        context: positions that the rows of a batch share, see `SpeechLLMConfig.batch_context`: its longest prompt and its
            longest answer must fit together.
    """

    def __init__(
        self, model, processor, max_batch_size: int = 8, max_wait: float = 0.02, context: float = float("inf")
    ):
        self.model, self.processor = model, copy.deepcopy(processor)
        self.max_batch_size, self.max_wait, self.context = max_batch_size, max_wait, context
        self.prompts = self.batches = 0  # so far
        self._queue: deque[Job] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="batcher", daemon=True)
        self._thread.start()

    def submit(self, *jobs: Job) -> None:
        """Queue prompts; how many may wait is for the caller to bound."""
        with self._changed:
            self._queue.extend(jobs)
            self._changed.notify()

    def cancel(self, *jobs: Job) -> None:
        """Give up answers: prompts that wait leave the queue at once, and take their audio with them."""
        with self._changed:
            for job in jobs:
                job.cancel()
                if job in self._queue:
                    self._queue.remove(job)
                    job.end("cancelled")

    def close(self) -> None:
        """End the worker after what is queued."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _work(self) -> None:
        while self._answer_next():
            pass

    def _answer_next(self) -> bool:
        """Answer one batch; whether there was one. (Nothing of it is held here while the next is waited for.)"""
        if not (batch := self._next_batch()):
            return False
        self.batches += 1
        self.prompts += len(batch)
        try:
            self._generate(batch)
            for job in batch:
                job.end("length")  # the model's own limit
        except Exception as error:  # the thread must live on for the jobs after these
            traceback.clear_frames(error.__traceback__)  # which hold the batch's tensors
            for job in batch:
                job.end("error", error)
        return True

    def _next_batch(self) -> list[Job]:
        """Jobs for one batch; none when the batcher is closed and the queue is empty."""
        with self._changed:
            batch: list[Job] = []
            closes_at = None
            while True:
                self._take_matching(batch)
                if batch and closes_at is None:
                    closes_at = time.monotonic() + self.max_wait
                if len(batch) == self.max_batch_size or (self._closed and not self._queue):
                    return batch
                remaining = None if closes_at is None else closes_at - time.monotonic()
                if remaining is not None and remaining <= 0:
                    return batch
                self._changed.wait(remaining)

    def _take_matching(self, batch: list[Job]) -> None:
        """Move jobs that go with those in the batch from the queue into it; the first decides."""
        rest = []
        while self._queue and len(batch) < self.max_batch_size:
            job = self._queue.popleft()
            if job.ended_by_time_or_user():
                continue
            alone = job.sampling.seed is not None  # a seed's answer must not depend on others in the batch
            if not batch or (job.sampling == batch[0].sampling and not alone and self._fits([*batch, job])):
                batch.append(job)
            else:
                rest.append(job)
        self._queue.extendleft(reversed(rest))

    def _fits(self, batch: list[Job]) -> bool:
        longest = max(job.prompt_tokens for job in batch) + max(job.max_new_tokens for job in batch)
        return longest <= self.context

    @torch.inference_mode()
    def _generate(self, batch: list[Job]) -> None:
        inputs = self.processor(
            text=[job.text for job in batch],
            audio=[{"array": audio, "checked": True} for job in batch for audio in job.audios] or None,
            add_special_tokens=False,  # the chat template wrote them
            return_tensors="pt",
        ).to(self.model.device)
        watcher = _RowWatcher(batch, self.processor.tokenizer, self._end_tokens())
        seed = batch[0].sampling.seed
        with torch.random.fork_rng(enabled=seed is not None):
            if seed is not None:
                torch.manual_seed(seed)
            self.model.generate(
                **inputs,
                **batch[0].sampling.to_generate(),
                num_beams=1,
                max_new_tokens=max(job.max_new_tokens for job in batch),
                stopping_criteria=StoppingCriteriaList([watcher]),
            )

    def _end_tokens(self) -> set[int]:
        end = self.model.generation_config.eos_token_id
        return set(end if isinstance(end, list) else [] if end is None else [end])


class _RowWatcher(StoppingCriteria):
    """Called by `generate` after each token: passes on what is new in each row, and says which rows are done."""

    def __init__(self, jobs: list[Job], tokenizer, end_tokens: set[int]):
        self.jobs, self.tokenizer, self.end_tokens = jobs, tokenizer, end_tokens
        self.ids: list[list[int]] = [[] for _ in jobs]

    def __call__(self, input_ids: torch.LongTensor, scores, **kwargs) -> torch.BoolTensor:
        last = input_ids[:, -1].tolist()
        for job, ids, token in zip(self.jobs, self.ids, last):
            if job.finish_reason is None:
                self._advance(job, ids, token)
        done = [job.finish_reason is not None for job in self.jobs]
        return torch.tensor(done, device=input_ids.device)

    def _advance(self, job: Job, ids: list[int], token: int) -> None:
        job.tokens += 1
        ended = token in self.end_tokens
        if not ended:
            ids.append(token)
        reason = "stop" if ended else "length" if job.tokens >= job.max_new_tokens else None
        if reason is None and not job.stop and job.on_text is None:
            job.ended_by_time_or_user()
            return  # nobody looks at the text yet
        text = self.tokenizer.decode(ids, skip_special_tokens=True)
        found = [at for stop in job.stop if (at := text.find(stop)) >= 0]
        if found:
            text, reason = text[: min(found)], "stop"
        elif reason is None:  # what may yet change, or turn out to be the start of a stop string, waits
            text = text[: len(text) - _unsettled(text, job.stop)]
        if len(text) > len(job.answer):
            new, job.answer = text[len(job.answer) :], text
            if job.on_text is not None:
                job.on_text(new)
        if reason is not None:
            job.end(reason)
        else:
            job.ended_by_time_or_user()


def _unsettled(text: str, stops: tuple[str, ...]) -> int:
    """How many characters at the end of `text` are not certain to stay: half a character of several tokens (shown as
    U+FFFD), or the start of a stop string."""
    replacement = len(text) - len(text.rstrip("�"))
    starts = [n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n])]
    return max([replacement, *starts])
