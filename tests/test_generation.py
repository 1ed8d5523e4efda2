"""`generate` with audio: batches, beams, samples, streams, and processors that look at the prompt's tokens."""

import pytest
import torch
from tiny import SPEECH, enliven, tiny_model, tiny_processor, tiny_tokenizer, tone
from transformers import TextIteratorStreamer, TextStreamer


# Each prompt and the seconds of its audios: several, one long enough for two segments, and none at all.
PROMPTS = [
    ("a<|audio|>b<|audio|>c", (0.5, 0.731)),
    ("d<|audio|>", (1.2,)),
    ("no audio at all, just text", ()),
    ("<|audio|><|audio|><|audio|>e", (0.31, 0.4, 0.9)),
]


def model_and_inputs(speech="hubert-layer", text="llama-untied", rows=PROMPTS):
    model = enliven(tiny_model(speech, "qformer", text))
    processor = tiny_processor(model.config, segment_seconds=1.0)
    audios = [[tone(s, seed=i * 10 + k) for k, s in enumerate(seconds)] for i, (_, seconds) in enumerate(rows)]
    singles = [processor(prompt, audio or None, return_tensors="pt") for (prompt, _), audio in zip(rows, audios)]
    batch = processor([prompt for prompt, _ in rows], audios, return_tensors="pt")
    return model, processor, batch, singles


def answers(output, batch):
    return output[:, batch["input_ids"].shape[1] :].tolist()


GREEDY = {"do_sample": False, "max_new_tokens": 6, "min_new_tokens": 6}
BEAMS = {**GREEDY, "num_beams": 3}


@pytest.mark.parametrize(
    "settings", [GREEDY, BEAMS, {**BEAMS, "num_return_sequences": 2}], ids=["greedy", "beams", "two"]
)
@pytest.mark.parametrize("speech", SPEECH)
def test_a_batch_says_what_each_prompt_says_alone(speech, settings):
    model, _, batch, singles = model_and_inputs(speech)
    together = answers(model.generate(**batch, **settings), batch)
    alone = [answer for single in singles for answer in answers(model.generate(**single, **settings), single)]
    assert together == alone
    assert len({tuple(answer) for answer in together}) > 1


@pytest.mark.parametrize("text", ["gpt2", "gemma2", "gemma3", "qwen2", "opt"])
def test_the_cache_changes_nothing(text):
    model, _, batch, _ = model_and_inputs("whisper", text)
    assert torch.equal(model.generate(**batch, **GREEDY), model.generate(**batch, **GREEDY, use_cache=False))


def test_the_head_gets_the_last_states_in_one_piece():
    """A view into the prompt's states would make PyTorch copy the head's weights once per row on CPUs."""
    model, _, batch, _ = model_and_inputs()
    contiguous = []
    model.get_output_embeddings().register_forward_pre_hook(
        lambda module, inputs: contiguous.append((inputs[0].shape[:2], inputs[0].is_contiguous()))
    )
    model.generate(**batch, **GREEDY)
    assert contiguous == [((4, 1), True)] * 6


def test_the_audio_is_heard_once_per_prompt_with_a_cache():
    model, _, batch, _ = model_and_inputs()
    calls = []
    model.model.projector.register_forward_hook(lambda *_: calls.append(1))
    model.generate(**batch, **GREEDY)
    assert len(calls) == 1


def test_several_samples_of_a_prompt_hear_its_own_audio():
    model, processor, batch, _ = model_and_inputs()
    settings = {
        "do_sample": True,
        "max_new_tokens": 5,
        "min_new_tokens": 5,
        "temperature": 1.5,
        "top_k": 20,
        "top_p": 0.9,
    }
    torch.manual_seed(0)
    samples = model.generate(**batch, **settings, num_return_sequences=2)
    repeated = [row for row in PROMPTS for _ in range(2)]
    audios = [
        [tone(s, seed=i * 10 + k) for k, s in enumerate(seconds)]
        for i, (_, seconds) in enumerate(PROMPTS)
        for _ in "xx"
    ]
    by_hand = processor([prompt for prompt, _ in repeated], audios, return_tensors="pt")
    torch.manual_seed(0)
    assert torch.equal(samples, model.generate(**by_hand, **settings))
    assert samples[0].tolist() != samples[1].tolist()


@pytest.mark.parametrize(
    "settings",
    [
        {"repetition_penalty": 1.7},
        {"no_repeat_ngram_size": 2},
        {"repetition_penalty": 1.7, "num_beams": 2},
        {"repetition_penalty": 1.3, "do_sample": True, "top_p": 0.9, "min_p": 0.01, "typical_p": 0.9},
        {"bad_words_ids": [[65], [66, 67]], "encoder_repetition_penalty": 1.2},
    ],
    ids=str,
)
def test_processors_that_look_up_prompt_tokens_meet_a_placeholder_beyond_the_vocabulary(settings):
    model, processor, batch, _ = model_and_inputs()
    assert model.config.audio_token_id == model.config.text_config.vocab_size == 258
    output = model.generate(**batch, **{**GREEDY, **settings})
    assert max(map(max, answers(output, batch))) < 258
    if "num_beams" in settings or "do_sample" in settings or "bad_words_ids" in settings:
        return
    # The placeholder counts for nothing: the text-only prompt is answered as by the LLM's own vocabulary.
    text = processor("no audio at all, just text", return_tensors="pt")
    model.config.audio_token_id = 0  # a token that the prompt lacks, so that no column is added
    assert answers(model.generate(**text, **{**GREEDY, **settings}), text) == [answers(output, batch)[2]]


def test_scores_have_the_llms_vocabulary():
    model, _, batch, _ = model_and_inputs()
    output = model.generate(**batch, **GREEDY, output_scores=True, return_dict_in_generate=True, repetition_penalty=1.2)
    assert {score.shape for score in output.scores} == {(4, 258)}


def test_guidance_takes_away_what_the_llm_says_without_the_audio():
    """As Transformers' classifier-free guidance: scale * (with - without) + without, in log-probabilities, where the pass
    without sees the prompt's last token and what was answered."""
    model, _, _, (batch, *_) = model_and_inputs()
    settings = {**GREEDY, "guidance_scale": 1.5, "output_scores": True}
    output = model.generate(**batch, **settings, return_dict_in_generate=True)
    asked = batch["input_ids"].shape[1]
    with torch.no_grad():
        guided = model(**batch).logits[:, -1].log_softmax(-1)
        alone = model(input_ids=output.sequences[:, asked - 1 : asked]).logits[:, -1].log_softmax(-1)
    allowed = output.scores[0] > -torch.inf  # not the end, before the shortest length
    torch.testing.assert_close(output.scores[0][allowed], (1.5 * (guided - alone) + alone)[allowed], atol=1e-4, rtol=0)
    assert allowed.float().mean() > 0.9
    assert output.sequences[:, asked].tolist() == output.scores[0].argmax(-1).tolist()
    repeated = model.generate(**batch, **settings, repetition_penalty=1.5)
    assert max(map(max, answers(repeated, batch))) < 258


@pytest.mark.parametrize("skip_prompt", [True, False])
def test_text_streamer(skip_prompt, capsys):
    model, processor, _, singles = model_and_inputs()
    inputs = singles[1]
    streamer = TextStreamer(processor.tokenizer, skip_prompt=skip_prompt, skip_special_tokens=True)
    output = model.generate(**inputs, **GREEDY, streamer=streamer)
    start = inputs["input_ids"].shape[1] if skip_prompt else 0
    assert capsys.readouterr().out.strip() == processor.decode(output[0, start:], skip_special_tokens=True).strip()


def test_text_iterator_streamer_yields_the_answer():
    model, processor, _, singles = model_and_inputs()
    streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=True)
    output = model.generate(**singles[0], **GREEDY, streamer=streamer)
    assert "".join(streamer) == processor.decode(output[0, singles[0]["input_ids"].shape[1] :])


def test_a_draft_model_hears_the_audio_and_changes_nothing():
    model, _, _, singles = model_and_inputs()
    draft = enliven(tiny_model("hubert-layer", "qformer", "llama-untied"))
    torch.manual_seed(5)
    torch.nn.init.normal_(draft.model.projector.window_model.queries)
    heard, encode = [], draft.model.encode_speech
    draft.model.encode_speech = lambda *audio: (heard.append(len(audio[0])), encode(*audio))[1]
    for inputs in singles[:2]:
        options = {"do_sample": False, "max_new_tokens": 6}
        assisted = model.generate(**inputs, **options, assistant_model=draft)
        assert torch.equal(assisted, model.generate(**inputs, **options))
    assert heard


def test_a_second_turn_continues_from_the_cache():
    model, processor, _, singles = model_and_inputs()
    inputs = singles[0]
    first = model.generate(**inputs, **GREEDY, return_dict_in_generate=True)
    follow_up = processor("f", return_tensors="pt")["input_ids"]
    sequence = torch.cat([first.sequences, follow_up], dim=1)
    second = model.generate(sequence, past_key_values=first.past_key_values, **GREEDY)
    whole = model.generate(**{**inputs, "input_ids": sequence, "attention_mask": torch.ones_like(sequence)}, **GREEDY)
    assert torch.equal(second, whole)


def test_generation_from_embeddings():
    model, _, _, singles = model_and_inputs()
    inputs = singles[0]
    with torch.no_grad():
        embeddings = model.model.embed_prompt(inputs["input_ids"], model(**inputs).speech_tokens)
    output = model.generate(inputs_embeds=embeddings, attention_mask=inputs["attention_mask"], **GREEDY)
    assert output.tolist() == answers(model.generate(**inputs, **GREEDY), inputs)


@pytest.mark.parametrize("settings", [GREEDY, BEAMS], ids=["greedy", "beams"])
def test_generation_from_precomputed_frames(settings):
    model, _, batch, _ = model_and_inputs()
    with torch.no_grad():
        frames, lengths = model.model.encode_speech(batch["input_values"], batch["input_values_mask"])
    mask = torch.arange(frames.shape[1]) < lengths[:, None]
    text = {name: batch[name] for name in ("input_ids", "attention_mask")}
    output = model.generate(**text, speech_frames=frames, speech_frames_mask=mask, **settings)
    assert torch.equal(output, model.generate(**batch, **settings))


def test_an_llm_with_spare_rows_has_the_placeholder_inside_its_vocabulary():
    model = enliven(tiny_model("whisper", "mlp", "qwen2"))
    model.resize_token_embeddings(320)
    assert model.config.text_config.vocab_size == 320 and model.config.audio_token_id == 258
    processor = tiny_processor(model.config, tiny_tokenizer())
    inputs = processor("a<|audio|>", tone(0.5), return_tensors="pt")
    output = model.generate(**inputs, **GREEDY, repetition_penalty=1.5)
    assert output.shape[1] == inputs["input_ids"].shape[1] + 6
    most_likely = model.get_output_embeddings().register_forward_hook(
        lambda module, inputs, logits: logits.index_fill(-1, torch.tensor([258]), 1e4)
    )
    for options in (GREEDY, {**GREEDY, "do_sample": True, "num_return_sequences": 4}):
        assert not (model.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :] == 258).any()
    most_likely.remove()


@pytest.mark.parametrize("rows", [None, 320], ids=["placeholder beyond the vocabulary", "in a spare row"])
def test_prompt_lookup_gives_the_greedy_answer(rows):
    """It tries what followed in the prompt: after the answer's first token, here, the placeholder."""
    model = enliven(tiny_model("whisper", "mlp", "qwen2"))
    if rows:
        model.resize_token_embeddings(rows)
    model.generation_config.eos_token_id = None
    processor = tiny_processor(model.config, tiny_tokenizer())
    samples = tone(0.5)
    token = model.generate(**processor("a<|audio|>", samples, return_tensors="pt"), **GREEDY)[0, -6:].tolist()
    inputs = processor(f"{processor.decode(token)}<|audio|>", samples, return_tensors="pt")
    greedy = model.generate(**inputs, **{**GREEDY, "max_new_tokens": 12})
    looked_up = model.generate(
        **inputs, **{**GREEDY, "max_new_tokens": 12}, prompt_lookup_num_tokens=3, max_matching_ngram_size=1
    )
    assert torch.equal(looked_up, greedy)
