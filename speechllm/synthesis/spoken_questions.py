"""Spoken question answering: made-up passages (`passages.py`), the questions that the LLM can answer from the text,
and the passages spoken.

1. Passages and questions are generated.
2. The LLM reads each passage as text, with a question after it, and answers greedily. A question is kept if the answer
   equals the reference after SQuAD's normalisation (lower case, no punctuation, no articles). The prompt opens with
   three other passages and short answers (`EXAMPLES`): a small LLM otherwise understands the passage but answers in
   whole sentences, and exact match would be zero. So what is kept is what the LLM can find in the text *once it knows
   the form of an answer*, which fine-tuning teaches; without examples and fine-tuning it scores far lower.
3. The passages of kept questions are spoken, each in one voice, drawn by seed.

The second step costs one short generation per question, so sets are made once and
kept in the cache, with the LLM's answers in `answers.jsonl`.
"""

import copy
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from ..base_models_speechllm import explained
from ..data.schema import Row, load_rows
from ..downloads import build_once, cache_directory
from ..evaluation.metrics.question_answering import exact_match
from ..quickstart.weights import smollm2_135m_instruct
from .engines import Voice, parse_voices
from .passages import Passage, generate_passages, question_rows
from .speaking import synthesise, write_jsonl


VOICES = ("flite:slt", "flite:rms")
LONGEST = 8.0  # seconds of a spoken passage
BATCH = 16  # passages that are tried at once
EXAMPLES = """\
Passage: Bob lives in Lima and works as a cleaner. He has three boats.
Question: Where does Bob live?
Answer: Lima
Question: What is the job of Bob?
Answer: cleaner

Passage: The car of Sarah is orange. It was parked near the bridge at eight o'clock.
Question: What color is the car?
Answer: orange
Question: At what time was the car parked?
Answer: eight o'clock

Passage: Mike sold a chair to Ellen in spring.
Question: Who sold a chair?
Answer: Mike
Question: Who got a chair from Mike?
Answer: Ellen

"""
FORMAT = 1  # raise when the data set changes, so that cached ones are built again


def spoken_question_answering(
    train: int = 240,
    test: int = 60,
    voices: Sequence[Voice] | None = None,
    llm: str | os.PathLike | None = None,
    *,
    seed: int = 0,
    apart_from: Sequence[Passage] = (),
    workers: int | None = None,
    progress: bool = True,
) -> dict[str, list[Row]]:
    """The data set, made at the first call and kept in the cache; a call that was interrupted is gone on with.

    Args:
        train, test: passages of each split, every one with at least one question that the LLM answers.
        voices: of which each passage is spoken in one; default: a woman's and a man's of flite.
        llm: folder or Hub id of the LLM; default: SmolLM2-135M-Instruct.
        seed: of passages and voices.
        apart_from: passages of another test, of which no two slot values stand together in one of "train" either.
        workers: engines that run at once; default: one per core.
        progress: show bars.

    Returns:
        "train" and "test": rows of the task `sqa` with `question`, `answers` (phrases that stand in the passage word
        for word), `target`, `text` (the passage), `passage_id`, `audio`, `duration` (at most 8 s), `speaker`,
        `gender` (where known). Questions of one passage share its recording.

    Raises:
        DownloadError: the LLM or the engine is not here and cannot be fetched.
        ValueError: so many passages, apart from each other, cannot be generated.
    """
    voices = list(voices or parse_voices(VOICES))
    model = str(llm or smollm2_135m_instruct())
    provenance = {"format": FORMAT, "train": train, "test": test, "seed": seed, "llm": Path(model).name,
                  "voices": [voice.with_gender for voice in voices]}  # fmt: skip
    if apart_from:
        provenance["apart from"] = [passage.text for passage in apart_from]

    def build(folder: Path) -> None:
        answerer = Answerer(model)
        passages, rows = _answerable(test, "test", candidates(test, "test", seed), answerer, folder / "test", progress)
        _speak(rows, voices, folder / "test", seed, workers, progress)
        passages = candidates(train, "train", seed, [*passages, *apart_from])
        _, rows = _answerable(train, "train", passages, answerer, folder / "train", progress)
        _speak(rows, voices, folder / "train", seed, workers, progress)

    key = hashlib.sha256(json.dumps(provenance).encode()).hexdigest()[:12]
    folder = build_once(cache_directory() / "synthesis" / f"questions-{key}", provenance, build, resume=True)
    return {name: load_rows(folder / name / "manifest.jsonl") for name in ("train", "test")}


class Answerer:
    """An LLM that answers questions about passages of text, greedily, in the manner of `EXAMPLES`.

    Args:
        model: folder or Hub id of a causal LLM.
    """

    def __init__(self, model: str):
        self.tokenizer = AutoTokenizer.from_pretrained(model, padding_side="left")
        with explained(f"the LLM {model!r}", "Check the id or path and the network.", weights_of=model):
            self.model = AutoModelForCausalLM.from_pretrained(
                model, dtype=torch.bfloat16, attn_implementation="eager", use_safetensors=True
            )
        self.model.eval().to("cuda" if torch.cuda.is_available() else "cpu")
        examples = self.tokenizer(EXAMPLES, add_special_tokens=False, return_tensors="pt").to(self.model.device)
        self.start = examples["input_ids"].shape[1]
        with torch.no_grad():
            self.examples = self.model(**examples, use_cache=True, logits_to_keep=1).past_key_values

    @torch.no_grad()
    def __call__(self, rows: Sequence[Row], max_new_tokens: int = 8) -> list[str]:
        """The first line of each answer."""
        texts = [f"Passage: {row['text']}\nQuestion: {row['question']}\nAnswer:" for row in rows]
        inputs = self.tokenizer(texts, add_special_tokens=False, padding=True, return_tensors="pt").to(
            self.model.device
        )
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        positions = self.start + (mask.cumsum(1) - 1).clamp(min=0)
        mask = torch.cat([mask.new_ones(len(rows), self.start), mask], 1)
        cache = copy.deepcopy(self.examples)  # the examples' keys and values are the same for every question
        cache.batch_repeat_interleave(len(rows))
        answers = []
        for _ in range(max_new_tokens):
            output = self.model(
                ids,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            ids, positions = output.logits[:, -1:].argmax(-1), positions[:, -1:] + 1
            mask = torch.cat([mask, mask.new_ones(len(rows), 1)], 1)
            answers.append(ids)
        decoded = self.tokenizer.batch_decode(torch.cat(answers, 1), skip_special_tokens=True)
        return [text.strip().partition("\n")[0] for text in decoded]


def candidates(count: int, split: str, seed: int = 0, apart_from: Sequence[Passage] = ()) -> list[Passage]:
    """What `count` passages of a split ("train", "test") are chosen from: more than are wanted, as the LLM answers no question
    on some of them."""
    return generate_passages(4 * count, f"{split} {seed}", apart_from)


def _answerable(
    count: int, split: str, candidates: Sequence[Passage], answerer: Answerer, folder: Path, progress: bool
) -> tuple[list[Passage], list[Row]]:
    """The first `count` passages of a split's candidates that have a question which the LLM answers, and the rows of those
    questions. Every answer goes to `answers.jsonl`, with `correct`; what an earlier run wrote there is not asked again."""
    known = load_answers(folder / "answers.jsonl")
    kept, rows, answered = [], [], []
    with tqdm(total=count, desc=f"Passages for {split}", unit="passage", disable=not progress) as bar:
        for start in range(0, len(candidates), BATCH):
            batch = candidates[start : start + BATCH]
            asked = question_rows(batch, split, first=start)
            if not all(row["id"] in known for row in asked):
                known |= dict(zip((row["id"] for row in asked), answerer(asked)))
            correct = []
            for row in asked:
                answer = known[row["id"]]
                right = exact_match(answer, row["target"])
                answered.append({**row, "answer": answer, "correct": right})
                correct += [row] * right
            write_jsonl(folder / "answers.jsonl", answered)
            names = list(dict.fromkeys(row["passage_id"] for row in correct))[: count - len(kept)]
            rows += [row for row in correct if row["passage_id"] in names]
            kept += [passage for number, passage in enumerate(batch, start) if f"{split}-{number:04d}" in names]
            bar.update(len(names))
            if len(kept) == count:
                break
    if len(kept) < count:
        raise ValueError(f"The LLM answers questions on only {len(kept)} of {len(candidates)} passages. Ask for fewer.")
    return kept, rows


def load_answers(path: Path) -> dict[str, str]:
    """Question's id -> the LLM's answer; none without the file."""
    lines = path.read_text(encoding="utf-8").split("\n") if path.exists() else []  # strings may hold other line breaks
    return {row["id"]: row["answer"] for row in map(json.loads, filter(None, lines))}


def _speak(
    rows: list[Row], voices: Sequence[Voice], folder: Path, seed: int, workers: int | None, progress: bool
) -> None:
    """Speak each passage once, and write a manifest of its questions."""
    passages = {row["passage_id"]: {"id": row["passage_id"], "text": row["text"]} for row in rows}
    texts = list(passages.values())
    spoken = synthesise(texts, folder, voices, takes=1, seed=seed, workers=workers, strict=True, progress=progress)
    speech = dict(zip(passages, spoken.rows, strict=True))
    labels = {"audio", "duration", "speaker", "gender", "rate"}  # no gender where nobody said
    joined = [{**row, **{k: v for k, v in speech[row["passage_id"]].items() if k in labels}} for row in rows]
    joined = [row for row in joined if row["duration"] <= LONGEST]
    write_jsonl(folder / "manifest.jsonl", [{**row, "audio": os.path.relpath(row["audio"], folder)} for row in joined])
