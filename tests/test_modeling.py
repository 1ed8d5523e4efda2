"""The model on tiny random weights: encoders x projectors x LLMs, exactness under padding, layers, freezing, adapters."""

import warnings
from itertools import accumulate
from unittest import mock

import numpy as np
import pytest
import torch
from tiny import LLM, PROJECTORS, SPEECH, TEXT, WAVE, enliven, tiny_config, tiny_model, tiny_processor, tone
from torch.profiler import ProfilerActivity, profile
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from speechllm import SpeechLLMConfig, SpeechLLMForConditionalGeneration, SpeechLLMModel
from speechllm.projector_speechllm import SpeechLLMProjector


SECONDS = (1.0, 0.61, 0.337)  # no whole number of windows, and the last less than two


def prompts(model, seconds=SECONDS, **options):
    """One prompt per audio, as the processor makes them."""
    processor = tiny_processor(model.config)
    texts = [f"a<|audio|>{'b' * i}" for i in range(1, len(seconds) + 1)]
    return processor(texts, [tone(s, seed=i) for i, s in enumerate(seconds)], **options)


def speech_inputs(model, seconds=SECONDS):
    batch = prompts(model, seconds)
    name = "input_features" if model.config.is_whisper else "input_values"
    return batch[name], batch[f"{name}_mask"]


def close(a, b, atol=1e-4):
    torch.testing.assert_close(a, b, atol=atol, rtol=0)


# ---- every part with every other -----------------------------------------------------------------------------------


@pytest.mark.parametrize("text", TEXT)
@pytest.mark.parametrize("projector", PROJECTORS)
@pytest.mark.parametrize("speech", SPEECH)
def test_forward_loss_gradient_and_generate(speech, projector, text):
    model = tiny_model(speech, projector, text)
    batch = prompts(model, SECONDS[:2])
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    labels = labels.masked_fill(labels == model.config.audio_token_id, -100)

    model.train()
    output = model(**batch, labels=labels)
    output.loss.backward()

    assert output.logits.shape == (*batch["input_ids"].shape, model.config.text_config.vocab_size)
    assert abs(output.loss.item() - np.log(model.config.text_config.vocab_size)) < 1
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == ("projector." in name), name
    gradients = [p.grad.abs().max() for n, p in model.named_parameters() if n.endswith("window_model.linear.weight")]
    gradients += [p.grad.abs().max() for n, p in model.named_parameters() if n.endswith("linear_1.weight")]
    assert gradients and min(gradients) > 0

    model.eval()
    generated = model.generate(**batch, max_new_tokens=3, do_sample=False)
    assert generated.shape[1] <= batch["input_ids"].shape[1] + 3
    assert (generated[:, : batch["input_ids"].shape[1]] == batch["input_ids"]).all()


# ---- exactness -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("projector", PROJECTORS)
@pytest.mark.parametrize("speech", SPEECH)
def test_a_batch_gives_each_prompt_what_it_gets_alone(speech, projector):
    model = enliven(tiny_model(speech, projector))
    batch = prompts(model)
    with torch.no_grad():
        logits = model(**batch).logits
        tokens = model.get_audio_features(
            **{k: v for k, v in batch.items() if k.startswith("input_") and k[6:9] != "ids"}
        )
        tokens = tokens.pooler_output
        for i, seconds in enumerate(SECONDS):
            processor = tiny_processor(model.config)
            alone = processor(f"a<|audio|>{'b' * (i + 1)}", tone(seconds, seed=i))
            output = model(**alone)
            count = len(output.speech_tokens)
            close(tokens[:count], output.speech_tokens)
            tokens = tokens[count:]
            close(logits[i, -alone["input_ids"].shape[1] :], output.logits[0])
    assert len(tokens) == 0


MORE_ENCODERS = {
    "unispeech": ("unispeech", {**WAVE, "feat_extract_norm": "layer", "do_stable_layer_norm": True}),
    "unispeech-sat": ("unispeech-sat", {**WAVE, "feat_extract_norm": "layer", "do_stable_layer_norm": True}),
    "wavlm-group": ("wavlm", {**WAVE, "feat_extract_norm": "group"}),
    "wavlm-adapter": ("wavlm", {**WAVE, "feat_extract_norm": "layer", "add_adapter": True}),
    "wav2vec2-wide-adapter": (
        "wav2vec2",
        {**WAVE, "feat_extract_norm": "layer", "add_adapter": True, "output_hidden_size": 48},
    ),
    "wav2vec2-conformer": (
        "wav2vec2-conformer",
        {**WAVE, "feat_extract_norm": "layer", "position_embeddings_type": "rotary"},
    ),
    "data2vec-audio": ("data2vec-audio", {**WAVE, "num_conv_pos_embeddings": 2}),
}


@pytest.mark.parametrize("speech", [*SPEECH, *MORE_ENCODERS])
def test_frames_do_not_depend_on_the_batch_whatever_the_length(speech):
    with mock.patch.dict(SPEECH, MORE_ENCODERS):
        model = enliven(tiny_model(speech, "mlp")).model
    rule, generator = model.config.speech_token_rule, torch.Generator().manual_seed(1)
    unit = 160 if model.config.is_whisper else 1
    steps = [
        rule.shortest // unit + 1,
        *torch.randint(4_000 // unit, 12_000 // unit, (4,), generator=generator).tolist(),
    ]
    size = max(steps) + (50 if model.config.is_whisper else 0)
    inputs = torch.randn((5, 80, size) if model.config.is_whisper else (5, size), generator=generator)
    mask = torch.arange(size) < torch.tensor(steps)[:, None]
    if not model.config.is_whisper:
        inputs = inputs * mask
    with torch.no_grad():
        frames, lengths = model.encode_speech(inputs, mask)
        assert lengths.tolist() == [rule.frames(n) for n in steps]
        for i, n in enumerate(steps):
            alone = inputs[i : i + 1, ..., : n + (50 if model.config.is_whisper else 0)]
            expected, _ = model.encode_speech(alone, mask[i : i + 1, : alone.shape[-1]])
            close(frames[i, : lengths[i]], expected[0, : lengths[i]])
            if not model.config.is_whisper:  # all that the encoder gives is counted
                assert expected.shape[1] == lengths[i]


def test_whisper_with_its_full_window_is_transformers_whisper():
    model = enliven(tiny_model("whisper", context_seconds=30)).model
    inputs, mask = speech_inputs(model, (2.0, 0.73))
    assert inputs.shape[-1] == 3000
    reference = WhisperEncoder(model.config.speech_config).eval()
    reference.load_state_dict(model.speech_encoder.state_dict())
    with torch.no_grad():
        frames, lengths = model.encode_speech(inputs, mask)
        close(frames, reference(inputs).last_hidden_state, atol=1e-5)
    assert lengths.tolist() == [100, 37]


def test_context_beyond_the_audio_changes_whispers_features_and_padding_does_not():
    model = enliven(tiny_model("whisper")).model
    inputs, mask = speech_inputs(model, (1.0,))
    with torch.no_grad():
        frames, lengths = model.encode_speech(inputs, mask)
        longer, _ = model.encode_speech(
            torch.nn.functional.pad(inputs, (0, 300), value=7.0), torch.nn.functional.pad(mask, (0, 300))
        )
        model.config.context_seconds = 0
        without, _ = model.encode_speech(inputs, mask)
    close(frames[:, :50], longer[:, :50])
    assert (frames[:, :50] - without[:, :50]).abs().max() > 1e-2


@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("speech", ["hubert-layer", "hubert-group", "wav2vec2-adapter", "whisper"])
def test_the_encoder_layer_is_a_setting(speech, layer):
    model = enliven(tiny_model(speech, speech_layer=layer, context_seconds=30)).model
    inputs, mask = speech_inputs(model, (1.0,))
    with torch.no_grad():
        frames, lengths = model.encode_speech(inputs, mask)
        states = model.speech_encoder(inputs, output_hidden_states=True).hidden_states
    close(frames, states[layer], atol=1e-5)
    assert frames.shape[1] == lengths[0] or model.config.is_whisper


@pytest.mark.parametrize("projector", PROJECTORS)
def test_windows_see_their_own_valid_frames_only(projector):
    torch.manual_seed(0)
    model = enliven(SpeechLLMProjector(tiny_config("hubert-layer", projector)).eval())
    frames, lengths = torch.randn(2, 12, 32), torch.tensor([12, 7])  # windows of 5: 3 and 2
    with torch.no_grad():
        tokens = model(frames, lengths)
        per_window = len(tokens) // 5
        noisy = frames.clone()
        noisy[1, 7:] = 1e3  # padding
        close(model(noisy, lengths), tokens)
        other = frames.clone()
        other[0, 5] = torch.randn(32)  # first frame of the second window
        changed = (model(other, lengths) - tokens).abs().amax(-1).unflatten(0, (-1, per_window)).amax(-1) > 1e-3
    assert changed.tolist() == [False, True, False, False, False]


def test_a_partly_filled_window_is_a_shorter_window():
    """Padding takes no attention: the last window is what the Q-Former makes of its valid frames alone."""
    torch.manual_seed(0)
    model = enliven(SpeechLLMProjector(tiny_config("hubert-layer", "qformer")).eval())
    frames = torch.randn(1, 7, 32)
    with torch.no_grad():
        last = model(frames, torch.tensor([7])).unflatten(0, (2, -1))[1]
        alone = model.window_model(frames[:, 5:], torch.ones(1, 2, dtype=torch.bool))[0]
    close(last, alone)


def test_the_papers_projector_has_42_5_million_parameters():
    config = SpeechLLMConfig(
        speech_config={"model_type": "hubert", "hidden_size": 1024, "num_hidden_layers": 24},
        text_config={"model_type": "llama", "hidden_size": 4096},
    )
    with torch.device("meta"):
        projector = SpeechLLMProjector(config)
    parameters = sum(parameter.numel() for parameter in projector.parameters())
    assert round(parameters / 1e6, 1) == 42.5
    rule = config.speech_token_rule
    assert (rule.window, rule.tokens_per_window) == (17, 4)
    assert 11 < rule.tokens(rule.frames(160_000)) / 10 < 13  # speech tokens per second


# ---- audio inputs --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("speech", ["hubert-layer", "hubert-group", "whisper"])
def test_encoder_calls_are_bounded_and_change_nothing(speech):
    model = enliven(tiny_model(speech)).model
    inputs, mask = speech_inputs(model, (1.0, 0.61, 0.337, 0.9, 1.0, 0.5))
    name = "input_features" if model.config.is_whisper else "input_values"
    given = {name: inputs, f"{name}_mask": mask}
    with torch.no_grad():
        expected = model.get_audio_features(**given).pooler_output
        model.config.encoder_batch_seconds = 3.1
        seconds = []
        encode = model.encode_speech
        with mock.patch.object(
            model, "encode_speech", lambda x, m: seconds.append(m.numel() / mask[0].numel()) or encode(x, m)
        ):
            close(model.get_audio_features(**given).pooler_output, expected)
    assert len(seconds) > 1 and max(seconds) <= 3.1


def peak_memory(call) -> float:
    """MiB that `call` has torch allocate at most, counted from the allocations: the same on every machine."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        call()
    events = [event for event in prof.profiler.kineto_results.events() if event.name() == "[memory]"]
    sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(accumulate(sizes)) / 2**20


@pytest.mark.parametrize("speech", ["hubert", "whisper"])
def test_an_hour_of_audio_needs_little_more_memory_than_a_minute(speech):
    """The inputs are expanded views and take no memory themselves."""
    wave = {**WAVE, "model_type": "hubert", "feat_extract_norm": "layer", "conv_dim": (8, 8, 8), "num_hidden_layers": 1}
    mel = {
        "model_type": "whisper", "d_model": 64, "encoder_layers": 1, "encoder_attention_heads": 1,
        "encoder_ffn_dim": 1024,
    }  # fmt: skip
    config = SpeechLLMConfig(
        speech_config={"hubert": wave, "whisper": mel}[speech],
        text_config={"model_type": "llama", **LLM, "vocab_size": 300},
        projector_config=PROJECTORS["mlp"],
        encoder_batch_seconds=60,
    )
    model = SpeechLLMModel(config).eval()
    counts = {}

    def run(minutes):
        segments = 2 * minutes
        if speech == "hubert":
            x = torch.ones(1, 480_000).expand(segments, -1)
        else:
            x = torch.ones(1, 80, 1).expand(segments, 80, 3000)
        name = "input_features" if config.is_whisper else "input_values"
        mask = torch.ones(1, 1, dtype=torch.bool).expand(segments, x.shape[-1])
        with torch.no_grad():
            tokens = model.get_audio_features(**{name: x, f"{name}_mask": mask}).pooler_output
        counts[minutes] = len(tokens)

    minute, hour = peak_memory(lambda: run(1)), peak_memory(lambda: run(60))
    assert counts[60] == 60 * counts[1]
    assert minute > 10, "the measurement is too small to mean anything"
    assert hour < minute + 10  # MiB; the speech tokens themselves take 5
    config.encoder_batch_seconds = 600  # what the bound is for
    assert peak_memory(lambda: run(10)) > 5 * minute


def test_precomputed_frames_replace_the_encoder():
    model = enliven(tiny_model("hubert-layer"))
    batch = prompts(model)
    with torch.no_grad():
        expected = model(**batch)
        frames, lengths = model.model.encode_speech(batch["input_values"], batch["input_values_mask"])
        mask = torch.arange(frames.shape[1]) < lengths[:, None]
        text = {name: batch[name] for name in ("input_ids", "attention_mask")}
        with mock.patch.object(model.model.speech_encoder, "forward", side_effect=AssertionError):
            output = model(**text, speech_frames=frames, speech_frames_mask=mask)
    close(output.logits, expected.logits, atol=0)


def test_audio_inputs_that_do_not_fit_are_explained():
    model = tiny_model("whisper")
    batch = dict(prompts(model))
    with pytest.raises(ValueError, match="needs `input_features_mask`"):
        model(**{**batch, "input_features_mask": None})
    with pytest.raises(ValueError, match=r"takes `input_features`.*processor"):
        model(input_ids=batch["input_ids"], input_values=torch.zeros(1, 900), input_values_mask=torch.ones(1, 900))
    with pytest.raises(ValueError, match=r"hold \d+ audio placeholders.*audio makes \d+ speech tokens"):
        model(**{**batch, "input_ids": batch["input_ids"][:, :-6], "attention_mask": None})
    with pytest.raises(ValueError, match=r"audio makes 0 speech tokens.*processor"):
        model(input_ids=batch["input_ids"])
    with pytest.raises(ValueError, match=r"segments \[1\].*shorter than one encoder frame"):
        mask = batch["input_features_mask"].clone()
        mask[1] = 0
        model(**{**batch, "input_features_mask": mask})
    with pytest.raises(ValueError, match="either `input_ids` or `inputs_embeds`"):
        model()
    with pytest.raises(ValueError, match="Audio needs `input_ids`"):
        model(**{**batch, "input_ids": None, "inputs_embeds": torch.zeros(3, 5, 32)})
    with pytest.raises(ValueError, match="either audio or `speech_tokens`"):
        model.model(**batch, speech_tokens=torch.zeros(3, 32))


def test_speech_tokens_of_an_earlier_pass_stand_for_the_audio():
    model = enliven(tiny_model("whisper")).model
    batch = prompts(tiny_model("whisper"))
    with torch.no_grad():
        heard = model(**batch)
        read = model(batch["input_ids"], attention_mask=batch["attention_mask"], speech_tokens=heard.speech_tokens)
    assert torch.equal(read.last_hidden_state, heard.last_hidden_state)
    assert read.speech_tokens is heard.speech_tokens


# ---- the LLM inside ------------------------------------------------------------------------------------------------


def bare_llm(model):
    """The causal LM whose weights the SpeechLLM holds, put together again by Transformers itself."""
    llm = AutoModelForCausalLM.from_config(model.config.text_config).eval()
    prefix = f"{llm.base_model_prefix}."
    state = {prefix + key: value for key, value in model.model.language_model.state_dict().items()}
    llm.load_state_dict({**state, **model.head.state_dict()}, strict=True)
    return llm


@pytest.mark.parametrize("text", TEXT)
def test_text_only_prompts_get_the_bare_llms_logits_bit_by_bit(text):
    model = enliven(tiny_model("whisper", "mlp", text))
    llm = bare_llm(model)
    input_ids = torch.randint(0, 256, (2, 9), generator=torch.Generator().manual_seed(0))
    attention_mask = torch.ones_like(input_ids)
    attention_mask[0, :3] = 0
    with torch.no_grad():
        ours = model(input_ids=input_ids, attention_mask=attention_mask, labels=input_ids)
        theirs = llm(input_ids=input_ids, attention_mask=attention_mask, labels=input_ids)
    assert torch.equal(ours.logits, theirs.logits)
    assert torch.equal(ours.loss, theirs.loss)
    tied = TEXT[text][1].get("tie_word_embeddings", True)
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied
    settings = {"max_new_tokens": 8, "do_sample": False, "attention_mask": attention_mask}
    assert torch.equal(model.generate(input_ids, **settings), llm.generate(input_ids, **settings))


@pytest.mark.parametrize("layers", [[0], [0, 1], [2], [0, 2], [3], [0, 1, 2, 3], [3, 1]])
@pytest.mark.parametrize("text", TEXT)
def test_layer_states_are_the_llms_hidden_states(text, layers):
    model = enliven(tiny_model("whisper", "mlp", text))
    llm = bare_llm(model)
    batch = prompts(model, SECONDS[:2])
    with torch.no_grad():
        embeddings = model.model.embed_prompt(batch["input_ids"], model(**batch).speech_tokens)
        expected = llm(
            inputs_embeds=embeddings, attention_mask=batch["attention_mask"], output_hidden_states=True
        ).hidden_states
        output = model.model(**batch, layers=layers)
    assert list(output.layer_states) == layers
    assert output.last_hidden_state is None
    for layer in layers:
        added_inside = layer == 0 and text in ("gpt2", "opt")  # learned positions
        reference = embeddings if added_inside else expected[layer]
        assert torch.equal(output.layer_states[layer], reference), layer


def test_no_layer_beyond_the_last_is_run():
    model = tiny_model("whisper", "mlp", "llama-tied").model
    batch = prompts(tiny_model("whisper", "mlp", "llama-tied"))
    calls = []
    for i, layer in enumerate(model.llm_layers):
        layer.register_forward_hook(lambda *args, i=i: calls.append(i))
    for layers, run in (([0], []), ([0, 1], [0]), ([2], [0, 1]), ([3], [0, 1, 2])):
        calls.clear()
        model(**batch, layers=layers)
        assert calls == run
        assert len(model.llm_layers) == 3
    with pytest.raises(ValueError, match="hidden states 0"):
        model(**batch, layers=[4])
    with (
        mock.patch.object(model.llm_layers[0], "forward", side_effect=RuntimeError("boom")),
        pytest.raises(RuntimeError, match="boom"),
    ):
        model(**batch, layers=[1])
    assert len(model.llm_layers) == 3 and not model.llm_layers[0]._forward_hooks.get("keep")


def test_answer_logits_only_gives_the_same_loss_and_gradient():
    model = tiny_model("hubert-layer")
    batch = prompts(model, padding_side="right")
    labels = batch["input_ids"].masked_fill((batch["attention_mask"] == 0) | (batch["input_ids"] >= 258), -100)
    labels[:, 0] = -100

    def run(**options):
        model.zero_grad()
        output = model(**batch, labels=labels, **options)
        output.loss.backward()
        return output, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    for count in (None, 7, torch.tensor(7)):
        whole, expected = run(num_items_in_batch=count)
        part, gradient = run(num_items_in_batch=count, answer_logits_only=True)
        close(part.loss, whole.loss, atol=1e-6)
        assert part.logits.shape == ((labels[:, 1:] != -100).sum(), 258)
        for name in expected:
            close(gradient[name], expected[name], atol=1e-6)


# ---- numerics ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["llama-tied", "gemma3", "qwen3"])
@pytest.mark.parametrize("speech", ["hubert-layer", "whisper"])
def test_sdpa_equals_eager(speech, text):
    model = enliven(tiny_model(speech, "qformer", text))
    batch = prompts(model)
    with torch.no_grad():
        expected = model(**batch).logits
        assert model.model.speech_encoder.config._attn_implementation == "sdpa"
        model.set_attn_implementation("eager")
        for part in (
            model.model.speech_encoder,
            model.model.language_model,
            model.model.projector.window_model.qformer,
        ):
            assert part.config._attn_implementation == "eager"
        valid = batch["attention_mask"].bool()
        close(model(**batch).logits[valid], expected[valid])


def test_attention_that_the_encoder_has_not_is_asked_of_the_others():
    """WavLM has eager attention alone, whatever is asked for the model as a whole."""
    config = tiny_config("wavlm", "qformer", "llama-tied")
    config._attn_implementation = "sdpa"
    model = SpeechLLMForConditionalGeneration(config)
    assert model.model.speech_encoder.config._attn_implementation == "eager"
    assert model.model.language_model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("speech", ["hubert-group", "hubert-layer", "whisper"])
def test_bf16(speech):
    model = tiny_model(speech)
    batch = prompts(model)
    with torch.no_grad():
        expected = model(**batch).logits
        model.model.speech_encoder.bfloat16(), model.model.language_model.bfloat16(), model.head.bfloat16()
        output = model(**batch)
        assert output.speech_tokens.dtype == torch.float32  # the projector keeps its precision
        assert output.logits.dtype == torch.bfloat16
        close(output.logits.float(), expected, atol=0.05)
        model.bfloat16()
        close(model(**batch).logits.float(), expected, atol=0.05)


# ---- training ------------------------------------------------------------------------------------------------------


def gradients(model, batch, layers=None, seed=0):
    model.zero_grad()
    torch.manual_seed(seed)
    if layers is None:
        model(**batch, labels=batch["input_ids"].clamp(max=257)).loss.backward()
    else:
        states = model.model(**batch, layers=layers).layer_states
        sum(state.float().pow(2).mean() for state in states.values()).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("layers", [None, [0, 1, 2], [1, 3]])
@pytest.mark.parametrize("speech", ["hubert-layer", "whisper"])
def test_gradient_checkpointing_recomputes_and_gives_the_same_gradient(speech, layers, frozen):
    model = tiny_model(speech, freeze_language_model=frozen, freeze_speech_encoder=frozen).train()
    batch = prompts(model)
    calls = []
    for layer in model.model.llm_layers:
        # Inside the checkpoint, so that the recomputation counts.
        layer.mlp.register_forward_pre_hook(lambda module, *_: calls.append(module.training))
    expected = gradients(model, batch, layers)
    runs = len(calls)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model.gradient_checkpointing_enable()
    gradient = gradients(model, batch, layers)
    assert len(calls) == 3 * runs, "each layer should have run once more, in the backward pass"
    assert set(calls) == {not frozen}
    assert gradient.keys() == expected.keys()
    for name in expected:
        close(gradient[name], expected[name], atol=1e-6)
    calls.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model.gradient_checkpointing_disable()
    gradients(model, batch, layers)
    assert len(calls) == runs


def test_frozen_parts_stay_in_evaluation_mode():
    model = tiny_model("hubert-layer").train()
    assert model.training and model.model.projector.training
    assert all(module.training for module in model.model.projector.modules())
    for frozen in (model.model.speech_encoder, model.model.language_model, model.head):
        assert not any(module.training for module in frozen.modules())
        assert not any(parameter.requires_grad for parameter in frozen.parameters())
    assert not any(module.training for module in model.eval().modules())

    thawed = tiny_model("hubert-layer", freeze_language_model=False).train()
    assert all(module.training for module in thawed.model.language_model.modules())
    assert all(parameter.requires_grad for parameter in thawed.head.parameters())
    assert not any(module.training for module in thawed.model.speech_encoder.modules())


def test_the_papers_way_of_training_frozen_parts_in_training_mode_is_a_setting():
    model = tiny_model("hubert-layer", frozen_in_train_mode=True).train()
    assert all(module.training for module in model.modules())
    assert not any(parameter.requires_grad for parameter in model.model.speech_encoder.parameters())
    batch = prompts(model, SECONDS[:1])
    values, mask = batch["input_values"], batch["input_values_mask"]
    with torch.no_grad():
        assert not torch.equal(model.model.encode_speech(values, mask)[0], model.model.encode_speech(values, mask)[0])


def test_an_unfrozen_encoder_is_trained():
    model = tiny_model("hubert-layer", freeze_speech_encoder=False).train()
    gradient = gradients(model, prompts(model))
    assert any("speech_encoder" in name for name in gradient)
    assert not any("language_model" in name for name in gradient)


@pytest.mark.parametrize("how", ["get_peft_model", "add_adapter"])
@pytest.mark.parametrize("target", [["q_proj", "v_proj"], r".*language_model.*\.(q|v)_proj"])
def test_peft_lora(how, target):
    peft = pytest.importorskip("peft")
    model = tiny_model("hubert-layer", "qformer", "llama-untied")
    batch = prompts(model)
    with torch.no_grad():
        expected = model(**batch).logits
    config = peft.LoraConfig(r=2, lora_alpha=4, lora_dropout=0.1, target_modules=target)
    if how == "add_adapter":
        model.add_adapter(config)
        trained = model
    else:
        trained = peft.get_peft_model(model, config)
    model.model.projector.requires_grad_(True)
    with torch.no_grad():
        close(trained.eval()(**batch).logits, expected, atol=1e-6)  # LoRA's B starts at zero

    trained.train()
    layers = [m for m in model.modules() if hasattr(m, "get_base_layer")]
    assert len(layers) == (6 if isinstance(target, str) else 10)  # of the LLM; of the encoder too
    for layer in layers:
        assert layer.lora_dropout.training and not layer.get_base_layer().training
    assert not model.model.language_model.norm.training

    optimizer = torch.optim.SGD([p for p in trained.parameters() if p.requires_grad], lr=1.0)
    for _ in range(2):  # the gradient of A is zero while B is
        optimizer.zero_grad()
        trained(**batch, labels=batch["input_ids"].clamp(max=257)).loss.backward()
        optimizer.step()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == ("lora_" in name or "projector." in name), name
        assert "lora_" not in name or parameter.grad.abs().max() > 0, name
    with torch.no_grad():
        assert (trained.eval()(**batch).logits - expected).abs().max() > 1e-4
    assert trained.generate(**batch, max_new_tokens=2).shape[0] == 3


def test_the_headless_model_is_the_same_model_without_a_head():
    model = tiny_model("hubert-layer")
    headless = SpeechLLMModel(model.config).eval()
    headless.load_state_dict(model.model.state_dict(), strict=True)
    batch = prompts(model)
    with torch.no_grad():
        assert torch.equal(headless(**batch).last_hidden_state, model.model(**batch).last_hidden_state)
    assert not headless.can_generate() and model.can_generate()


def test_config_options_reach_the_llm():
    config = tiny_config("whisper", "mlp", "gpt2")
    assert config.get_text_config().hidden_size == 32
    assert AutoConfig.for_model("gpt2").model_type == "gpt2"
