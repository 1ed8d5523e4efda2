"""When each word of a transcript is spoken.

1. A CTC recogniser of Transformers (any `AutoModelForCTC`) gives log-probabilities of characters, frame by frame.
2. `torchaudio.functional.forced_align` finds the most probable path through them that spells the transcript.
3. A word lasts from the first frame of its first character to the last frame of its last one.

Where that cannot be (no recogniser, a transcript longer than its frames, no character that the recogniser knows), the
words share the utterance's time by their lengths, and the row says so: `row["alignment"]` is `"forced"` or
`"proportional"`, `row["words"]` is [{"word", "start", "end"}, ...] in seconds.
"""

import hashlib
import json
import logging
import os
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torchaudio.functional import forced_align, merge_tokens
from tqdm.auto import tqdm
from transformers import AutoModelForCTC, AutoProcessor, Wav2Vec2CTCTokenizer

from ..audio_speechllm import AudioError, load_audio
from ..base_models_speechllm import explained
from ..configuration_speechllm import SAMPLING_RATE
from .manifests import json_line, written_audio
from .schema import ManifestError, Row, SetAside
from .sources import load_source


logger = logging.getLogger(__name__)

Word = dict[str, str | float]  # "word", "start", "end"


class AlignmentError(ValueError):
    """A transcript that cannot be aligned with its audio; the message says why."""


def word_frames(
    log_probs: torch.Tensor, words: list[list[int]], blank: int, delimiter: int | None = None
) -> list[tuple[int, int] | None]:
    """First and last (exclusive) frame of each word on the most probable CTC path through all of them.

    Args:
        log_probs: (frames, vocabulary), log-probabilities.
        words: token ids of each word; an empty word has no frames.
        blank: id of CTC's blank.
        delimiter: token between two words, if the vocabulary has one.

    Raises:
        AlignmentError: if there is nothing to align, the words need more frames than there are, or the
            log-probabilities are not finite.
    """
    spelt = [i for i, word in enumerate(words) if word]
    if not spelt:
        raise AlignmentError("no character of the transcript is in the recogniser's vocabulary")
    targets, places = [], {}  # places: word -> its tokens' place among the targets
    for i in spelt:
        if targets and delimiter is not None:
            targets.append(delimiter)
        places[i] = (len(targets), len(targets) + len(words[i]))
        targets += words[i]
    needed = len(targets) + sum(a == b for a, b in pairwise(targets))  # equal neighbours need a blank between them
    if needed > len(log_probs):
        raise AlignmentError(f"the transcript needs {needed} frames, but the audio has {len(log_probs)}")
    log_probs = log_probs.detach().float().cpu()
    if not log_probs.isfinite().all():
        raise AlignmentError("the recogniser's output is not finite")
    path, scores = forced_align(log_probs[None], torch.tensor([targets]), blank=blank)
    spans = merge_tokens(path[0], scores[0], blank=blank)  # one per target
    found: list[tuple[int, int] | None] = [None] * len(words)
    for i, (first, last) in places.items():
        found[i] = spans[first].start, spans[last - 1].end
    return found


def proportional_words(text: str, seconds: float) -> list[Word]:
    """The words of a transcript, each with a share of the utterance by its number of characters and one for the space."""
    words = text.split()
    ends = np.cumsum([len(word) + 1 for word in words])
    times = [0.0, *(seconds * ends / ends[-1]).tolist()] if words else []
    return [_word(word, start, end) for word, (start, end) in zip(words, pairwise(times))]


def _word(word: str, start: float, end: float) -> Word:
    return {"word": word, "start": round(start, 3), "end": round(end, 3)}


class ForcedAligner:
    """A CTC recogniser, and how its vocabulary spells words.

    Args:
        model: folder or Hub id of any CTC model with its processor, e.g. `facebook/wav2vec2-base-960h`.
        device: default: a GPU if there is one, else the CPU.

    Attributes:
        unknown: characters that the vocabulary lacks and how often they were passed over.
    """

    def __init__(self, model: str, device: str | None = None):
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.processor = AutoProcessor.from_pretrained(model)
        if not hasattr(self.processor, "tokenizer"):
            raise ValueError(
                f"{model} has no tokenizer beside its feature extractor. Give a CTC model for recognition."
            )
        with explained(f"the recogniser {model!r}", "Check the id or path and the network.", weights_of=model):
            loaded = AutoModelForCTC.from_pretrained(model, dtype=torch.float32, use_safetensors=True)
        self.model = loaded.to(self.device).eval()
        self.blank = self.model.config.pad_token_id  # as in the CTC loss of Transformers
        tokenizer = self.processor.tokenizer
        self.by_character = isinstance(tokenizer, Wav2Vec2CTCTokenizer)
        self.vocabulary = tokenizer.get_vocab()
        self.delimiter = self.vocabulary.get(tokenizer.word_delimiter_token) if self.by_character else None
        self.special = {*tokenizer.all_special_ids, self.blank, self.delimiter}
        self.unknown: Counter[str] = Counter()

    def spell(self, word: str) -> list[int]:
        """A word's token ids: character by character in the case that the vocabulary has, or by the tokenizer's own
        pieces where it has such. What the vocabulary lacks is passed over and counted."""
        if not self.by_character:
            ids = [
                i for i in self.processor.tokenizer(word, add_special_tokens=False).input_ids if i not in self.special
            ]
            self.unknown.update([] if ids else [word])
            return ids
        ids = []
        for character in word:
            known = [self.vocabulary.get(c) for c in (character, character.upper(), character.lower())]
            known = [i for i in known if i is not None and i not in self.special]
            ids += known[:1]
            self.unknown.update([] if known else [character])
        return ids

    @torch.no_grad()
    def __call__(self, waveform: np.ndarray, text: str) -> list[Word]:
        """Times of the words (separated by white space) of `text`. A word without any known character gets the time
        between its neighbours.

        Args:
            waveform: (samples,) float32 at 16 kHz.

        Raises:
            AlignmentError: see `word_frames`.
        """
        inputs = self.processor(waveform, sampling_rate=SAMPLING_RATE, return_tensors="pt").to(self.device)
        log_probs = self.model(**inputs).logits[0].float().log_softmax(-1)
        words = text.split()
        frames = word_frames(log_probs, [self.spell(word) for word in words], self.blank, self.delimiter)
        seconds = len(waveform) / SAMPLING_RATE / len(log_probs)
        found = []
        for i, word in enumerate(words):
            before = next((span[1] for span in frames[i::-1] if span), 0)
            after = next((span[0] for span in frames[i:] if span), len(log_probs))
            start, end = frames[i] or (before, max(before, after))
            found.append(_word(word, start * seconds, end * seconds))
        return found


def aligned_row(row: Row, aligner: ForcedAligner | None) -> Row:
    """The row with `words` and `alignment`.

    Raises:
        AudioError: if its audio cannot be used.
        AlignmentError: if it has no transcript.
    """
    if not str(row.get("text") or "").strip():
        raise AlignmentError(f"{row['id']} has no `text`. Give its transcript.")
    waveform = load_audio(row["audio"], row.get("sampling_rate"), name=row["id"])
    if aligner is not None:
        try:
            return {**row, "words": aligner(waveform, row["text"]), "alignment": "forced"}
        except AlignmentError as error:
            logger.info("%s: %s.", row["id"], error)
    seconds = len(waveform) / SAMPLING_RATE
    return {**row, "words": proportional_words(row["text"], seconds), "alignment": "proportional"}


def align_manifest(
    data: str, output: str, ctc_model: str | None = None, device: str | None = None, strict: bool = False
) -> dict[str, int]:
    """Align a source's rows and write them to a manifest. Rows that cannot be used are left out and listed in
    `.set_aside.jsonl` beside it. A run that was cut short goes on where it was; the output appears when it is complete.

    Args:
        data: a manifest or another source (`sources.py`).
        output: manifest; must end in .jsonl.
        ctc_model, device: see `ForcedAligner`; without a model all alignments are proportional.
        strict: stop at the first row that cannot be used.

    Returns:
        How many rows are `forced`, `proportional` and `set_aside`, and how many `unknown` characters were passed over
        (in this run).

    Raises:
        ManifestError: if `data` cannot be read, `output` does not end in .jsonl, or no row can be aligned; with `strict`,
            if one cannot.
    """
    target = Path(output)
    if target.suffix != ".jsonl":
        raise ManifestError(f"{output}: aligned rows are written as JSON Lines. Give a path that ends in .jsonl.")
    loaded = load_source(data, for_training=False)
    rows = loaded.rows
    _stop_if(strict, loaded.set_aside)
    target.parent.mkdir(parents=True, exist_ok=True)
    inputs = hashlib.sha256(repr((ctc_model, strict)).encode())
    for row in rows:
        inputs.update(repr(row).encode())
    partial = target.with_name(f"{target.name}.{inputs.hexdigest()[:12]}.partial")
    done = _complete_lines(partial)
    aligner = ForcedAligner(ctc_model, device) if ctc_model and len(done) < len(rows) else None
    with open(partial, "a", encoding="utf-8") as file:
        for row in tqdm(rows[len(done) :], desc="Aligning", unit="utt"):
            try:
                result = _portable(aligned_row(row, aligner), target)
            except (AudioError, AlignmentError) as error:
                item = SetAside(row["id"], str(error))
                _stop_if(strict, [item])
                logger.warning("Set aside: %s", error)
                result = {"set_aside": {"id": item.id, "reason": item.reason}}
            done.append(result)
            file.write(json_line(result))
            file.flush()
    kept = [row for row in done if "set_aside" not in row]
    set_aside = loaded.set_aside + [SetAside(**row["set_aside"]) for row in done if "set_aside" in row]
    if not kept:
        raise ManifestError(f"{data}: none of its rows can be aligned; the first: {set_aside[0].reason}")
    listed = target.with_suffix(".set_aside.jsonl")
    if set_aside:
        _write_lines(listed, [vars(item) for item in set_aside])
    else:
        listed.unlink(missing_ok=True)  # that of an earlier run
    _write_lines(target, kept)
    partial.unlink()
    counts = Counter(row["alignment"] for row in kept)
    return {
        "forced": counts["forced"],
        "proportional": counts["proportional"],
        "set_aside": len(set_aside),
        "unknown": aligner.unknown.total() if aligner else 0,
    }


def _stop_if(strict: bool, set_aside: list[SetAside]) -> None:
    if strict and set_aside:
        raise ManifestError(f"{set_aside[0].reason} (--strict stops here.)")


def _complete_lines(path: Path) -> list[Row]:
    """The rows of an unfinished file, which loses its last line if that is torn."""
    if not path.is_file():
        return []
    whole = path.read_bytes().rpartition(b"\n")[0].splitlines()
    rows = [json.loads(line) for line in whole]
    _write_lines(path, rows)
    return rows


def _write_lines(path: Path, rows: list[Row]) -> None:
    """All of them or, if this is interrupted, the file as it was."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text("".join(map(json_line, rows)), encoding="utf-8")
    temporary.replace(path)


def _portable(row: Row, output: Path) -> Row:
    """The row as the manifest `output` has it: audio in its folder by the relative path, all else by the absolute one."""
    if not isinstance(row["audio"], str | os.PathLike):  # a segment, or what is in memory
        return {**row, "audio": written_audio(row["audio"], row["id"], output)}
    audio, folder = Path(row["audio"]).resolve(), output.parent.resolve()
    inside = audio.is_relative_to(folder)
    named = {} if row["id"] == row["audio"] else {"id": row["id"]}
    rest = {name: value for name, value in row.items() if name != "id"}
    return {**rest, **named, "audio": str(audio.relative_to(folder) if inside else audio)}
