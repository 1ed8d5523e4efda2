"""Answers by generation: resumable, and spread over processes.

1. All rows are sorted by length, longest first, and cut into batches. The batches do not depend on what is done already
   or on the number of processes, so an interrupted run gives the answers of an uninterrupted one.
2. Each process takes every n-th batch and appends each answer to a file of its own (`prediction_files.py`) at once. A
   batch whose rows all have answers is skipped; of a half-written one only the missing answers are added.
"""

from typing import Any

import torch
from accelerate import PartialState
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from ..data.feature_cache import FeatureCache
from ..data.items import AnswerItems, SpeechCollator, approximate_length
from ..data.prompts import chat_of, prompt_of
from ..data.schema import Row, SetAside
from ..modeling_speechllm import SpeechLLMForConditionalGeneration
from ..processing_speechllm import SpeechLLMProcessor
from .prediction_files import PredictionFiles


class TranscriptItems(AnswerItems):
    """Chats with the transcript in the place of the audio: what the LLM answers if nothing is lost in hearing."""

    def __init__(self, rows: list[Row], processor: SpeechLLMProcessor, with_answer: bool = False):
        super().__init__(rows, processor, with_answer=with_answer)

    def __getitem__(self, index: int) -> dict[str, Any] | SetAside:
        row = self.rows[index]
        if reason := lacks_transcript(row):
            return SetAside(row["id"], reason, "empty transcript")
        question, *answer = chat_of({"audio": None, **row}, with_answer=self.with_answer)
        transcript = {"type": "text", "text": f"{row['text']}\n"}
        parts = [transcript if part["type"] == "audio" else part for part in question["content"]]
        return {"index": index, **self._ids([{**question, "content": parts}, *answer], [])}


def lacks_transcript(row: Row) -> str | None:
    """Why the row has nothing to put in the place of its audio."""
    return None if row.get("text") else f"{row['id']} has no transcript (`text`) to put in the place of its audio."


class PromptCollator(SpeechCollator):
    """Prompts, with or without audio, to generate from; a batch without any that can be used is empty."""

    def __init__(self, dataset: AnswerItems | TranscriptItems):
        super().__init__(dataset, padding_side="left")

    def __call__(self, items: list[dict[str, Any] | SetAside]) -> dict[str, Any]:
        if all(isinstance(item, SetAside) for item in items):
            return {"rows": [], "set_aside": items}
        return super().__call__(items)


@torch.no_grad()
def generate_texts(
    model: SpeechLLMForConditionalGeneration,
    processor: SpeechLLMProcessor,
    batch: dict[str, Any],
    max_new_tokens: int,
    num_beams: int = 1,
) -> list[tuple[str, bool]]:
    """Each prompt's answer, greedy or by beam search, and whether the model ended it (or `max_new_tokens` did).

    Args:
        batch: model inputs, padded on the left, perhaps with what a collator adds.
    """
    inputs = {name: value.to(model.device) for name, value in batch.items() if isinstance(value, torch.Tensor)}
    output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, num_beams=num_beams)
    answers = output[:, inputs["input_ids"].shape[1] :]
    ends = model.generation_config.eos_token_id
    ends = torch.tensor(ends if isinstance(ends, list) else [ends] if ends is not None else [], device=answers.device)
    ended = torch.isin(answers, ends).any(1).tolist()
    texts = processor.batch_decode(answers, skip_special_tokens=True)
    return [(text.strip(), end) for text, end in zip(texts, ended, strict=True)]


def generate_answers(
    model: SpeechLLMForConditionalGeneration,
    processor: SpeechLLMProcessor,
    rows: list[Row],
    files: PredictionFiles,
    *,
    batch_size: int,
    max_new_tokens: int,
    num_beams: int = 1,
    oracle: bool = False,
    frames: FeatureCache | None = None,
    workers: int = 0,
    strict: bool = False,
) -> None:
    """Answer the rows that `files` has no answer to, on all processes; what cannot be heard is noted there as well.

    Args:
        rows: with unique ids and prompts that can be made.
        oracle: put the transcript in the place of the audio.
        frames: cache of encoder frames to read from.
        workers: processes that prepare batches, per process.
        strict: raise where an utterance cannot be used.

    Raises:
        ValueError: with `strict`, naming the first utterance that cannot be used.
    """
    state = PartialState()
    data = TranscriptItems(rows, processor) if oracle else AnswerItems(rows, processor, frames, with_answer=False)
    done = {i for i, row in enumerate(rows) if (row["id"], prompt_of(row)) in files.answers}
    if not strict:  # which is to stop there
        # What could not be used is tried again, but does not make its whole batch be answered again.
        done |= {i for i, row in enumerate(rows) if row["id"] in files.unusable and isinstance(data[i], SetAside)}
    lengths = [len(row.get("text") or "") if oracle else approximate_length(row) for row in rows]
    batches = [batch for batch in sorted_batches(lengths, batch_size) if not done.issuperset(batch)]
    batches = batches[state.process_index :: state.num_processes]
    state.wait_for_everyone()  # nobody writes while another still reads what is there
    collate = PromptCollator(data)
    loader = DataLoader(data, batch_sampler=batches, collate_fn=collate, num_workers=workers)
    model.eval()
    with (
        files.appending() as append,
        tqdm(total=sum(map(len, batches)), desc="Answering", unit="utt", disable=not state.is_main_process) as progress,
    ):
        for batch in loader:
            for item in batch["set_aside"]:
                if strict:
                    raise ValueError(f"{item.reason} (--strict stops here.)")
                append({"id": item.id, "set_aside": item.reason})
            answers = generate_texts(model, processor, batch, max_new_tokens, num_beams) if batch["rows"] else []
            for index, (text, ended) in zip(batch["rows"], answers, strict=True):
                if index not in done:
                    row = rows[index]
                    key = row["id"], prompt_of(row)
                    line = {"id": row["id"], "prompt": key[1], "prediction": text, "ended": ended}
                    append({**line, "input": files.inputs.get(key)})
            progress.update(len(batch["rows"]) + len(batch["set_aside"]))
    state.wait_for_everyone()


def sorted_batches(lengths: list[float], batch_size: int) -> list[list[int]]:
    """Indices in batches of similar length, the longest first, where memory would run out first."""
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
