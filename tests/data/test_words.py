"""From seconds to speech tokens, and from words to the token ids of their text."""

import pytest
from tiny import tiny_config, tiny_processor, tiny_tokenizer, tone
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from speechllm.configuration_speechllm import SpeechTokenRule
from speechllm.data.joining import joined_rows
from speechllm.data.words import ids_by_word, speech_token_span, without_punctuation, word_spans


RULE = SpeechTokenRule(
    convolutions=((1, 320, 0),), samples_per_step=1, window=10, tokens_per_window=3
)  # 0.2 s a window


@pytest.mark.parametrize(
    ("start", "end", "frames", "expected"),
    [
        (0.0, 0.1, [100], (0, 3)),
        (0.0, 0.2, [100], (0, 3)),  # the next window begins at 0.2 s and is not touched
        (0.0, 0.21, [100], (0, 6)),
        (0.39, 0.45, [100], (3, 9)),
        (0.4, 0.4, [100], (6, 9)),  # at least one window
        (1.9, 9.0, [100], (27, 30)),  # beyond the end: the last window
        (-1.0, 0.1, [100], (0, 3)),
        (0.85, 0.95, [45, 45], (12, 18)),  # 45 frames are 5 windows, 15 tokens; the second segment begins at 0.9 s
        (0.95, 1.05, [45, 45], (15, 18)),
        (1.15, 1.3, [45, 45], (18, 21)),
    ],
)
def test_spans_of_speech_tokens(start, end, frames, expected):
    assert speech_token_span(start, end, frames, RULE) == expected


@pytest.mark.parametrize("speech", ["hubert-layer", "whisper", "wav2vec2-adapter"])
def test_the_whole_utterance_is_all_its_tokens(speech):
    config = tiny_config(speech)
    for seconds, segment in ((0.3, 30), (1.7, 30), (1.7, 0.9)):
        processor = tiny_processor(config, segment_seconds=segment)
        waveform = tone(seconds)
        frames = [processor.rule.frames(part["steps"]) for part in processor.extract_features(waveform)]
        count = processor.count_speech_tokens(len(waveform))
        padded = processor.rule.tokens_per_window if speech == "wav2vec2-adapter" else 0  # a frame beyond the end
        first, last = speech_token_span(0, seconds, frames, processor.rule)
        assert first == 0 and count - padded <= last <= count
        first, last = speech_token_span(seconds / 2, seconds / 2, frames, processor.rule)
        assert first - processor.rule.tokens_per_window <= count / 2 <= last + processor.rule.tokens_per_window


def subword_tokenizer(kind):
    text = ["the weather is nice today", "don't ask me that, again!", "naïve café ελλάδα"]
    if kind == "byte-level":
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    else:  # as Llama 2 and Gemma: a space is a letter
        backend = Tokenizer(models.BPE(unk_token="<unk>"))
        backend.pre_tokenizer = pre_tokenizers.Metaspace()
        trainer = trainers.BpeTrainer(vocab_size=120, special_tokens=["<unk>"])
    backend.train_from_iterator(text * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>" if kind != "byte-level" else None)


@pytest.mark.parametrize("kind", ["bytes", "byte-level", "sentencepiece"])
@pytest.mark.parametrize("text", ["the weather is nice", "don't ask me that, again!", "naïve café ελλάδα 😀 x", "a"])
def test_word_ids_are_the_text_s(kind, text):
    tokenizer = tiny_tokenizer() if kind == "bytes" else subword_tokenizer(kind)
    words = text.split()
    ids = ids_by_word(words, tokenizer)
    assert len(ids) == len(words)
    assert [token for word in ids for token in word] == tokenizer(text, add_special_tokens=False).input_ids
    for word, own in zip(words, ids):
        if kind == "sentencepiece":
            pieces = "".join(tokenizer.convert_ids_to_tokens(list(own)))
            assert pieces == f"▁{word}" or "<unk>" in pieces
        else:
            assert tokenizer.decode(list(own)).strip() == word  # a word brings its space along


def test_punctuation():
    words = ["Hello,", "don't", "—", "(U.S.)", "3.5", "¿Qué?", "well-known"]
    assert [without_punctuation(w) for w in words] == ["Hello", "don't", "", "U.S", "3.5", "Qué", "well-known"]
    row = {"words": [{"word": w, "start": 0.2 * i, "end": 0.2 * i + 0.1} for i, w in enumerate(words)]}
    spans = word_spans(row, [100], RULE, tiny_tokenizer(), punctuation=False)
    assert [(span.first, span.last) for span in spans] == [(3 * i, 3 * i + 3) for i in (0, 1, 3, 4, 5, 6)]
    assert tiny_tokenizer().decode([i for s in spans for i in s.text_ids]) == "Hello don't U.S 3.5 Qué well-known"
    assert len(word_spans(row, [100], RULE, tiny_tokenizer())) == 7


def test_joined_rows_join_their_words():
    rows = [
        {
            "id": str(i),
            "audio": tone(0.5),
            "text": f"word{i} end",
            "duration": 0.5,
            "alignment": "forced" if i else "proportional",
            "words": [{"word": f"word{i}", "start": 0.1, "end": 0.2}, {"word": "end", "start": 0.3, "end": 0.5}],
        }
        for i in range(4)
    ]
    for joined in joined_rows(rows, 5, maximum_seconds=1.5):
        assert " ".join(word["word"] for word in joined["words"]) == joined["text"]
        for i, word in enumerate(joined["words"]):
            assert word["start"] == pytest.approx(0.5 * (i // 2) + (0.3 if i % 2 else 0.1))
        assert (joined["alignment"] == "forced") == ("0" not in [part["id"] for part in joined["parts"]])
    assert "words" not in joined_rows([{**row, "words": []} if 0 else {k: v for k, v in row.items() if k != "words"}
                                       for row in rows], 1, 1.5)[0]  # fmt: skip
