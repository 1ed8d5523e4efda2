"""The processor: audio of every kind in, counts that the model agrees with, chats, padding, labels."""

import io
import random

import numpy as np
import pytest
import soundfile
import torch
from tiny import CHAT_TEMPLATE, PROJECTORS, SPEECH, tiny_config, tiny_model, tiny_processor, tiny_tokenizer, tone
from tokenizers import AddedToken
from transformers import AutoProcessor, AutoTokenizer, WhisperFeatureExtractor

from speechllm import AudioError, SpeechLLMProcessor


AUDIO = "<|audio|>"


@pytest.fixture(scope="module")
def config():
    return tiny_config("hubert-layer", "qformer")


@pytest.fixture(scope="module")
def processor(config):
    return tiny_processor(config)


def user(*parts):
    return {"role": "user", "content": [{"type": "text", "text": p} if isinstance(p, str) else p for p in parts]}


def audio(source, **more):
    return {"type": "audio", "audio": source, **more}


def assistant(text):
    return {"role": "assistant", "content": text}


# ---- audio ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("projector", PROJECTORS)
@pytest.mark.parametrize("speech", SPEECH)
def test_placeholders_are_the_models_speech_tokens_at_every_length(speech, projector):
    model = tiny_model(speech, projector)
    processor = tiny_processor(model.config, segment_seconds=0.7)
    shortest = max(400, model.config.speech_token_rule.shortest)
    lengths = [shortest, shortest + 1, 11_199, 11_200, 11_201, 22_400, 22_401]
    lengths += random.Random(0).sample(range(shortest, 30_000), 12)
    signal = tone(2.0)
    with torch.no_grad():
        for length in lengths:
            batch = processor(f"x{AUDIO}y", signal[:length])
            placeholders = int((batch["input_ids"] == processor.audio_token_id).sum())
            given = {k: v for k, v in batch.items() if k.startswith(("input_values", "input_features"))}
            assert placeholders == processor.count_speech_tokens(length), length
            assert placeholders == len(model.get_audio_features(**given).pooler_output), length


def test_every_source_of_audio_gives_the_same_features(processor, tmp_path):
    signal = tone(0.5)
    path = tmp_path / "speech.wav"
    soundfile.write(path, signal, 16_000, subtype="FLOAT")
    expected = processor(AUDIO, signal)
    sources = [
        path,
        str(path),
        path.read_bytes(),
        torch.from_numpy(signal),
        signal.astype(np.float64),
        np.stack([signal, signal]),
        {"array": signal, "sampling_rate": 16_000},
        {"bytes": path.read_bytes(), "path": None},
    ]
    for source in sources:
        batch = processor(AUDIO, source)
        assert torch.equal(batch["input_values"], expected["input_values"])
        assert torch.equal(batch["input_ids"], expected["input_ids"])
    integers = processor(AUDIO, (signal * 32_767).astype(np.int16))
    torch.testing.assert_close(integers["input_values"], expected["input_values"], atol=1e-3, rtol=0)


@pytest.mark.parametrize("rate", [8_000, 44_100, 48_000])
def test_sampling_rates(processor, rate):
    signal = tone(0.5, rate=rate)
    batch = processor([AUDIO, AUDIO], [signal, torch.from_numpy(signal)], sampling_rate=rate)
    assert batch["input_values"].shape == (2, 8_000)
    chat = [user(audio(signal), "?")]
    by_chat = [
        processor.apply_chat_template([chat, chat], tokenize=True, return_dict=True, sampling_rate=rate),
        processor.apply_chat_template(
            [[user(audio(signal, sampling_rate=rate))]] * 2, tokenize=True, return_dict=True, sampling_rate=16_000
        ),
        processor.apply_chat_template(
            [chat, chat], tokenize=True, return_dict=True, processor_kwargs={"sampling_rate": rate}
        ),
        processor.apply_chat_template(
            [chat, chat], tokenize=True, return_dict=True, audio_kwargs={"sampling_rate": rate}
        ),
    ]
    for inputs in by_chat:
        assert torch.equal(inputs["input_values"], batch["input_values"])


def test_options_of_a_tokenizers_template(processor):
    chats = [[user(audio(tone(0.5)), text)] for text in ("?", "Where?")]
    batch = processor.apply_chat_template(chats, tokenize=True, return_dict=True, pad_to_multiple_of=64)
    assert batch["input_ids"].shape[1] % 64 == 0
    for option in ("return_assistant_tokens_mask", "sanitize_control_tokens"):
        with pytest.raises(ValueError, match=f"There is no `{option}` here"):
            processor.apply_chat_template(chats, tokenize=True, return_dict=True, **{option: True})


def test_long_audio_is_cut_into_equal_segments(processor):
    assert processor.segment_lengths(480_000) == [480_000]
    assert processor.segment_lengths(480_001) == [240_000, 240_001]
    for samples in (1_000_003, 16_000 * 3600):
        lengths = processor.segment_lengths(samples)
        assert sum(lengths) == samples and max(lengths) <= 480_000 and max(lengths) - min(lengths) <= 1
    assert len(processor.segment_lengths(16_000 * 3600)) == 120


def test_segments_hold_the_audio_in_order(processor):
    processor = tiny_processor(tiny_config("hubert-layer"), segment_seconds=0.5)
    processor.feature_extractor.do_normalize = False
    signal = tone(1.3)
    segments = processor.extract_features(signal)
    assert [segment["steps"] for segment in segments] == processor.segment_lengths(len(signal))
    np.testing.assert_array_equal(np.concatenate([segment["features"] for segment in segments]), signal)


def test_whisper_features_go_on_for_the_context_and_no_further():
    for context, bins in ((0.5, 150), (0, 100), (30, 3000)):
        processor = tiny_processor(tiny_config("whisper", context_seconds=context))
        (segment,) = processor.extract_features(tone(1.0))
        assert segment["features"].shape == (80, bins) and segment["steps"] == 100
    (segment,) = tiny_processor(tiny_config("whisper")).extract_features(tone(29.9))
    assert segment["features"].shape == (80, 3000) and segment["steps"] == 2990
    padded = tiny_processor(tiny_config("whisper", context_seconds=30)).extract_features(tone(1.0))[0]["features"]
    expected = WhisperFeatureExtractor(feature_size=80)(tone(1.0), sampling_rate=16_000, return_tensors="pt")
    torch.testing.assert_close(padded, expected.input_features[0])


def test_padding_features_marks_what_is_valid(processor):
    segments = [processor.extract_features(tone(s))[0] for s in (0.5, 0.2)]
    batch = processor.pad_features(segments)
    assert batch["input_values"].shape == batch["input_values_mask"].shape == (2, 8_000)
    assert batch["input_values_mask"].sum(-1).tolist() == [8_000, 3_200]
    assert (batch["input_values"][1, 3_200:] == 0).all()
    assert torch.equal(batch["input_values"][1, :3_200], segments[1]["features"])


@pytest.mark.parametrize(
    "source, message",
    [
        (np.zeros(16_000, np.float32), "silent"),
        (np.full(16_000, np.nan, np.float32), "not finite"),
        (np.zeros(0, np.float32), "no samples"),
        (tone(0.02), "too short: 20.0 ms.*at least 25.0 ms.*pad it with silence"),
        ("missing.wav", r"missing.wav\)?: there is no such file"),
        (b"", "empty file"),
        (b"not audio", "not audio that can be decoded"),
        ({"array": tone(1.0), "sampling_rate": 3_000_000}, "3,000,000 Hz"),
    ],
    ids=str,
)
def test_bad_audio_is_explained_wherever_it_is_given(processor, source, message):
    with pytest.raises(AudioError, match=message):
        processor(AUDIO, source)
    with pytest.raises(AudioError, match=message):
        processor.apply_chat_template([user(audio(source))], tokenize=True, return_dict=True)
    with pytest.raises(AudioError, match=f"^utterance 12.*({message.removeprefix('missing.wav')})"):
        processor.extract_features(source, name="utterance 12")
    labelled = [user(audio(source)), assistant("a")]
    with pytest.raises(AudioError, match=message):
        processor.apply_chat_template(labelled, tokenize=True, return_dict=True, return_labels=True)


def test_audio_shorter_than_the_encoders_first_frame_is_refused_by_whisper_too():
    processor = tiny_processor(tiny_config("whisper"))
    with pytest.raises(AudioError, match="too short: 24.9 ms"):
        processor.extract_features(tone(1.0)[:399])
    assert len(processor.extract_features(tone(1.0)[:400])) == 1


# ---- text ----------------------------------------------------------------------------------------------------------


def test_padding_is_left_for_generation_and_right_on_request(processor):
    texts, audios = [f"a{AUDIO}", f"{AUDIO}bcd{AUDIO}"], [[tone(0.3)], [tone(0.4), tone(0.2)]]
    left = processor(texts, audios)
    right = processor(texts, audios, padding_side="right")
    assert left["attention_mask"][0, 0] == 0 and left["attention_mask"][0, -1] == 1
    assert right["attention_mask"][0, 0] == 1 and right["attention_mask"][0, -1] == 0
    for row in range(2):
        kept = [batch["input_ids"][row][batch["attention_mask"][row].bool()].tolist() for batch in (left, right)]
        assert kept[0] == kept[1]
    assert torch.equal(left["input_values"], processor(texts, [a for row in audios for a in row])["input_values"])


def test_texts_without_audio(processor):
    assert processor("abc")["input_ids"] == [processor.tokenizer("abc")["input_ids"]]
    batch = processor(["abc", "d"], return_tensors="pt")
    assert batch["input_ids"].shape == (2, 3) and set(batch) == {"input_ids", "attention_mask"}


def test_audio_without_text(processor):
    assert set(processor(audio=tone(0.3))) == {"input_values", "input_values_mask"}


def test_mismatches_of_text_and_audio_are_explained(processor):
    with pytest.raises(ValueError, match=r"hold 1 audio placeholders.*\[1, 0\] per text.*2 audios.*Put one"):
        processor([AUDIO, "b"], [tone(0.3), tone(0.3)])
    with pytest.raises(ValueError, match="hold 1 audio placeholders.*0 audios"):
        processor(AUDIO)
    with pytest.raises(ValueError, match="Give `text`"):
        processor()
    with pytest.raises(ValueError, match="Truncation could cut audio"):
        processor(AUDIO, tone(0.3), truncation=True, max_length=3)
    with pytest.raises(ValueError, match="Truncation could cut audio"):
        processor.apply_chat_template(
            [user(audio(tone(0.3))), assistant("a")],
            tokenize=True,
            return_dict=True,
            return_labels=True,
            truncation=True,
        )


def test_options_may_come_in_groups_and_contradictions_are_refused(processor):
    plain = processor(AUDIO, tone(0.5, rate=8_000), sampling_rate=8_000, padding="max_length", max_length=30)
    grouped = processor(
        AUDIO,
        tone(0.5, rate=8_000),
        audio_kwargs={"sampling_rate": 8_000},
        text_kwargs={"padding": "max_length", "max_length": 30},
        common_kwargs={"return_tensors": "pt"},
        return_tensors="pt",
    )
    assert plain["input_ids"].shape == (1, 30)
    assert plain.keys() == grouped.keys() and all(torch.equal(plain[name], grouped[name]) for name in plain)
    with pytest.raises(ValueError, match=r"`sampling_rate` is 8000 in `audio_kwargs` and 16000 beside it"):
        processor(AUDIO, tone(0.5), sampling_rate=16_000, audio_kwargs={"sampling_rate": 8_000})


def test_numpy_arrays_on_request(processor):
    batch = processor(AUDIO, tone(0.5), return_tensors="np")
    assert {type(value) for value in batch.values()} == {np.ndarray}
    chat = [user(audio(tone(0.3)), "What?")]
    batch = processor.apply_chat_template(chat, tokenize=True, return_dict=True, return_tensors="np")
    assert {type(value) for value in batch.values()} == {np.ndarray}


def test_text_alone_may_be_truncated(processor):
    assert processor("abcdef", truncation=True, max_length=3)["input_ids"][0] == processor("abc")["input_ids"][0]


def test_the_llms_vocabulary_is_undisturbed():
    plain, extended = tiny_tokenizer(), tiny_tokenizer()
    vocabulary = plain.get_vocab()
    processor = tiny_processor(tiny_config(), extended)
    assert {k: v for k, v in extended.get_vocab().items() if k != AUDIO} == vocabulary
    assert processor.audio_token_id == len(vocabulary) == extended.convert_tokens_to_ids(AUDIO)
    text = "<|im_start|>user\nHällo, wörld <|audi|> <|im_end|>\n"
    assert extended(text)["input_ids"] == plain(text)["input_ids"]
    assert extended(f"a{AUDIO}{AUDIO} b")["input_ids"] == [
        *plain("a")["input_ids"], *[processor.audio_token_id] * 2, *plain(" b")["input_ids"]
    ]  # fmt: skip
    assert (plain.eos_token_id, plain.pad_token_id, plain.bos_token_id) == (
        extended.eos_token_id, extended.pad_token_id, extended.bos_token_id
    )  # fmt: skip
    assert tiny_processor(tiny_config(), extended).audio_token_id == processor.audio_token_id  # once and for all


def test_an_llm_whose_embedding_table_has_spare_rows():
    config = tiny_config("whisper")
    config.text_config.vocab_size = 320
    processor = tiny_processor(config)
    assert processor.audio_token_id == 258 < config.text_config.vocab_size


# ---- chats ---------------------------------------------------------------------------------------------------------

CHAT = [
    {"role": "system", "content": "Be brief."},
    user(audio(tone(0.3)), "What?", audio(tone(0.5, seed=1))),
    assistant("One."),
    user("And ", audio(tone(0.2, seed=2))),
]


def test_audio_in_any_turn_becomes_a_placeholder(processor):
    assert processor.apply_chat_template(CHAT, add_generation_prompt=True) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        f"<|im_start|>user\n{AUDIO}What?{AUDIO}<|im_end|>\n"
        "<|im_start|>assistant\nOne.<|im_end|>\n"
        f"<|im_start|>user\nAnd {AUDIO}<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    inputs = processor.apply_chat_template(CHAT, add_generation_prompt=True, tokenize=True, return_dict=True)
    counts = [processor.count_speech_tokens(n) for n in (4_800, 8_000, 3_200)]
    runs, previous = [], None
    for token in inputs["input_ids"][0].tolist():
        if token == processor.audio_token_id:
            runs[-1:] = [runs[-1] + 1] if previous == token else [*runs[-1:], 1]
        previous = token
    assert runs == counts
    assert inputs["input_values_mask"].sum(-1).tolist() == [4_800, 8_000, 3_200]
    assert processor.decode(inputs["input_ids"][0], skip_special_tokens=True).count("What?") == 1


def test_chats_in_a_batch(processor):
    chats = [CHAT, [user("Just text.")], [user(audio(tone(0.4)))]]
    rendered = processor.apply_chat_template(chats, add_generation_prompt=True)
    assert rendered[1] == "<|im_start|>user\nJust text.<|im_end|>\n<|im_start|>assistant\n"
    batch = processor.apply_chat_template(chats, add_generation_prompt=True, tokenize=True, return_dict=True)
    assert batch["input_ids"].shape[0] == 3 and batch["input_values"].shape[0] == 4
    ids = processor.apply_chat_template(chats, add_generation_prompt=True, tokenize=True)
    assert torch.equal(ids, batch["input_ids"])
    text_only = processor.apply_chat_template(chats[1], add_generation_prompt=True, tokenize=True, return_dict=True)
    assert text_only["input_ids"] == [processor.tokenizer(rendered[1], add_special_tokens=False)["input_ids"]]


def test_continuing_the_last_message(processor):
    chat = [user("Say a."), {"role": "assistant", "content": [{"type": "text", "text": "a b"}]}]
    assert processor.apply_chat_template(chat, continue_final_message=True).endswith("<|im_start|>assistant\na b")


def test_a_tokenizer_without_a_chat_template():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    processor = tiny_processor(tiny_config(), tokenizer)
    chat = [user(audio(tone(0.3)), "What?"), assistant("Yes."), user("So?")]
    expected = f"User: {AUDIO}What?\nAssistant: Yes.\nUser: So?\nAssistant: "
    assert processor.apply_chat_template(chat, add_generation_prompt=True) == expected
    batch = processor.apply_chat_template(chat[:2], tokenize=True, return_dict=True, return_labels=True)
    answer = batch["labels"][0][batch["labels"][0] != -100]
    assert processor.decode(answer) == "Yes.<|im_end|>"


def test_a_tokenizer_with_several_chat_templates():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = {"default": CHAT_TEMPLATE, "tool_use": "{{ messages }}"}
    processor = tiny_processor(tiny_config(), tokenizer)
    assert processor.apply_chat_template([user("a")]) == "<|im_start|>user\na<|im_end|>\n"


@pytest.mark.parametrize(
    "chat, error, message",
    [
        ([user({"type": "audio"})], AudioError, "Message 0.*audio part without audio.*Give it a path"),
        ([user("a"), user({"type": "audio", "audio": None})], AudioError, "Message 1.*without audio"),
        ([user({"type": "image", "image": "x.png"})], ValueError, "Message 0.*type 'image'.*Give parts"),
        ([user({"type": "audio_url", "audio_url": "x"})], ValueError, "Message 0.*type 'audio_url'"),
        ([user({"type": "text"})], ValueError, "Message 0.*type 'text'"),
        ([{"role": "user", "content": ["plain"]}], ValueError, "Message 0.*type 'str'"),
        ([{"content": "a"}], ValueError, 'Message 0.*"role"'),
        (["hello"], ValueError, 'not a dict with a "role"'),
        ([], ValueError, "chat is empty"),
        ([user(f"{AUDIO} typed by hand", audio(tone(0.3)))], ValueError, "hold 2 audio placeholders.*1 audios"),
    ],
    ids=str,
)
def test_impossible_chats_are_explained(processor, chat, error, message):
    with pytest.raises(error, match=message):
        processor.apply_chat_template(chat, tokenize=True, return_dict=True)


# ---- labels --------------------------------------------------------------------------------------------------------


def test_labels_are_the_answers_with_their_end(processor):
    chats = [
        [user(audio(tone(0.3)), "One?"), assistant("First.")],
        [user("Two?", audio(tone(0.2)), audio(tone(0.4))), assistant("Aha."), user("So?"), assistant("Second answer.")],
        [user("No audio."), assistant("Right.")],
    ]
    batch = processor.apply_chat_template(chats, tokenize=True, return_dict=True, return_labels=True)
    assert set(batch) == {"input_ids", "attention_mask", "labels", "input_values", "input_values_mask"}
    labels = batch["labels"]
    assert [processor.decode(row[row != -100]) for row in labels] == [
        "First.<|im_end|>", "Aha.<|im_end|>Second answer.<|im_end|>", "Right.<|im_end|>"
    ]  # fmt: skip
    assert (labels[labels != -100] == batch["input_ids"][labels != -100]).all()
    assert (labels[batch["attention_mask"] == 0] == -100).all()
    assert batch["attention_mask"][0, 0] == 1 and batch["attention_mask"][0, -1] == 0  # padded on the right
    assert batch["input_values"].shape[0] == 3

    left = processor.apply_chat_template(
        chats, tokenize=True, return_dict=True, return_labels=True, padding_side="left"
    )
    for row in range(3):
        for name in ("input_ids", "labels"):
            assert torch.equal(
                left[name][row][left["attention_mask"][row].bool()],
                batch[name][row][batch["attention_mask"][row].bool()],
            )


def test_the_prompt_is_tokenized_in_training_as_in_generation(processor):
    chat = [user(audio(tone(0.3)), "One?"), assistant(" a space first")]
    trained = processor.apply_chat_template(chat, tokenize=True, return_dict=True, return_labels=True)
    asked = processor.apply_chat_template(chat[:1], add_generation_prompt=True, tokenize=True, return_dict=True)
    start = asked["input_ids"].shape[1]
    assert torch.equal(trained["input_ids"][:, :start], asked["input_ids"])
    assert (trained["labels"][:, :start] == -100).all() and (trained["labels"][:, start:] != -100).all()


def test_the_model_takes_labelled_batches():
    model = tiny_model("whisper")
    processor = tiny_processor(model.config)
    chats = [[user(audio(tone(0.3)), "One?"), assistant("a")], [user(audio(tone(0.9)), "Two?"), assistant("bcd")]]
    batch = processor.apply_chat_template(chats, tokenize=True, return_dict=True, return_labels=True)
    assert torch.isfinite(model(**batch).loss)


def test_an_end_of_turn_token_that_is_special_needs_no_other_end():
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([AddedToken("<end>", special=True)], special_tokens=True)
    tokenizer.chat_template = CHAT_TEMPLATE.replace("<|im_end|>", "<end>")
    processor = tiny_processor(tiny_config(), tokenizer)
    batch = processor.apply_chat_template(
        [user("a"), assistant("b")], tokenize=True, return_dict=True, return_labels=True
    )
    assert processor.decode(batch["labels"][0][batch["labels"][0] != -100]) == "b<end>"


def test_chats_that_cannot_be_labelled_are_explained(processor):
    with pytest.raises(ValueError, match="no assistant turn to learn from"):
        processor.apply_chat_template([user("a")], tokenize=True, return_dict=True, return_labels=True)
    forgetful = "{% for m in messages[-2:] %}{{ m['role'] + m['content'] }}{% endfor %}"
    with pytest.raises(ValueError, match="rewrites earlier turns"):
        processor.answer_pieces([{"role": "user", "content": "a"}, assistant("b")] * 2, forgetful)


def test_the_pieces_of_labelling_can_be_used_apart(processor):
    chat = [user(audio(tone(0.3)), "One?"), assistant("a")]
    pieces = processor.answer_pieces(chat)
    assert [is_answer for _, is_answer in pieces] == [False, True]
    row = processor.tokenize_pieces(pieces, [2])
    assert row["input_ids"].count(processor.audio_token_id) == 2
    batch = processor.pad_rows([row, processor.tokenize_pieces(pieces, [5])], padding_side="left")
    assert batch["input_ids"].shape == batch["labels"].shape and batch["attention_mask"][0, :3].tolist() == [0, 0, 0]
    assert set(processor.pad_rows([{"input_ids": [1]}, {"input_ids": [1, 2]}])) == {"input_ids", "attention_mask"}


# ---- making and saving ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("speech", ["whisper", "hubert-group"])
def test_a_processor_survives_saving(tmp_path, speech):
    processor = tiny_processor(tiny_config(speech, context_seconds=1.5), segment_seconds=12.5)
    processor.save_pretrained(tmp_path)
    chats = [[user(audio(tone(0.3)), "One?"), assistant("a")]]
    expected = processor.apply_chat_template(chats, tokenize=True, return_dict=True, return_labels=True)
    for loaded in (SpeechLLMProcessor.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)):
        assert isinstance(loaded, SpeechLLMProcessor)
        assert loaded.to_dict() == processor.to_dict()
        assert loaded.chat_template == processor.chat_template
        assert (loaded.segment_seconds, loaded.context_seconds) == (12.5, 1.5)
        batch = loaded.apply_chat_template(chats, tokenize=True, return_dict=True, return_labels=True)
        assert batch.keys() == expected.keys() and all(torch.equal(batch[k], expected[k]) for k in batch)
    assert AutoTokenizer.from_pretrained(tmp_path).convert_tokens_to_ids(AUDIO) == processor.audio_token_id


def test_settings_that_cannot_work_are_explained():
    config = tiny_config("whisper")
    rule = config.speech_token_rule.to_dict()
    with pytest.raises(ValueError, match="segment_seconds is 31.*30 seconds"):
        tiny_processor(config, segment_seconds=31)
    with pytest.raises(ValueError, match=r"8000 Hz; 16,000 is needed"):
        SpeechLLMProcessor(WhisperFeatureExtractor(sampling_rate=8_000), tiny_tokenizer(), speech_token_rule=rule)
    with pytest.raises(ValueError, match="Give `speech_token_rule"):
        SpeechLLMProcessor(WhisperFeatureExtractor(), tiny_tokenizer())


def test_decoding(processor):
    ids = processor.tokenizer("abc<|im_end|>")["input_ids"]
    assert processor.decode(ids, skip_special_tokens=True) == "abc"
    assert processor.batch_decode([ids, ids], skip_special_tokens=True) == ["abc", "abc"]


def test_bytes_of_a_compressed_file(processor):
    file = io.BytesIO()
    soundfile.write(file, tone(0.5), 16_000, format="FLAC")
    assert processor(AUDIO, file.getvalue())["input_values"].shape == (1, 8_000)


# ---- tokenizers and templates as LLMs have them ----------------------------------------------------------------------


def test_a_tokenizer_without_a_padding_token_pads(config):
    """As Llama's: several prompts at once are nothing special to whoever asks."""
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    processor = tiny_processor(config, tokenizer)
    batch = processor([f"a{AUDIO}", f"longer{AUDIO}"], [tone(0.3), tone(0.4)])
    assert batch["attention_mask"].sum(1).tolist()[0] < batch["input_ids"].shape[1]
    chats = [[user("a", audio(tone(0.3)))], [user("longer", audio(tone(0.4)))]]
    batch = processor.apply_chat_template(chats, add_generation_prompt=True, tokenize=True, return_dict=True)
    assert batch["input_ids"].shape[0] == 2


THINKING = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)


def test_an_llm_that_thinks_is_taught_and_asked_for_the_answer_alone(config):
    """Qwen 3's way: an empty thought before the answer, which the prompt has where no thinking is wanted."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = THINKING
    processor = tiny_processor(config, tokenizer)
    chat = [user("Say it."), assistant("hello")]
    batch = processor.apply_chat_template(chat, tokenize=True, return_dict=True, return_labels=True)
    assert tokenizer.decode(batch["labels"][0][batch["labels"][0] != -100]) == "hello<|im_end|>"
    prompt = processor.apply_chat_template(chat[:1], add_generation_prompt=True)
    assert prompt.endswith("<think>\n\n</think>\n\n")
    assert tokenizer.decode(batch["input_ids"][0]).startswith(prompt)
    thinking = processor.apply_chat_template(chat[:1], add_generation_prompt=True, enable_thinking=True)
    assert thinking.endswith("assistant\n")


@pytest.mark.parametrize(
    "convert", [lambda x: x, lambda x: x.tolist(), lambda x: {"array": x}], ids=["array", "list", "dict"]
)
def test_a_chats_sampling_rate_is_that_of_all_samples(processor, convert):
    samples = tone(0.5, rate=8_000)
    for chat, options in (
        ([user(audio(convert(samples), sampling_rate=8_000))], {}),
        ([user(audio(convert(samples)))], {"sampling_rate": 8_000}),
    ):
        batch = processor.apply_chat_template(chat, tokenize=True, return_dict=True, return_tensors="pt", **options)
        assert batch["input_values"].shape[1] == 8_000


def test_labels_come_padded_to_the_longest_alone(processor):
    chat = [user("Say it."), assistant("hello")]
    options = dict(tokenize=True, return_dict=True, return_labels=True)
    with pytest.raises(ValueError, match="padded to the longest"):
        processor.apply_chat_template(chat, padding="max_length", max_length=100, **options)
    assert isinstance(processor.apply_chat_template(chat, return_tensors="np", **options)["labels"], np.ndarray)
