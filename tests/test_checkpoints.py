"""Checkpoints: both kinds come back bit by bit, from folders and repositories, and nothing random is ever loaded."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import (
    LLM,
    PROJECTORS,
    SPEECH,
    TEXT,
    WAVE,
    tiny_feature_extractor,
    tiny_model,
    tiny_processor,
    tiny_tokenizer,
    tone,
)
from transformers import (
    AutoConfig,
    AutoFeatureExtractor,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    HubertForCTC,
    WhisperForConditionalGeneration,
)
from without_package import run_without_package

from speechllm import (
    CheckpointError,
    SpeechLLMConfig,
    SpeechLLMForConditionalGeneration,
    SpeechLLMModel,
    SpeechLLMProcessor,
)
from speechllm.base_models_speechllm import pin_revision
from speechllm.checkpoint_speechllm import HUB_FILES, copy_hub_files
from speechllm.configuration_speechllm import AUTO_MAP


PROJECTOR = PROJECTORS["qformer"]
SHA = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="session")
def bases(tmp_path_factory):
    """Folders of base models, as their authors publish them: with a head or decoder that the SpeechLLM leaves out."""
    root = tmp_path_factory.mktemp("bases")
    torch.manual_seed(0)
    whisper = WhisperForConditionalGeneration(AutoConfig.for_model("whisper", **SPEECH["whisper"][1]))
    hubert = {**WAVE, "feat_extract_norm": "layer", "do_stable_layer_norm": True, "mask_time_prob": 0.05}
    hubert = HubertForCTC(AutoConfig.for_model("hubert", **hubert, vocab_size=32))
    for name, model in (("whisper", whisper), ("hubert", hubert)):
        model.save_pretrained(root / name)
        tiny_feature_extractor("whisper" if name == "whisper" else "hubert-layer").save_pretrained(root / name)
    tokenizer = tiny_tokenizer()
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    for name in ("llama-tied", "llama-untied", "gpt2"):
        model_type, values = TEXT[name]
        # As many LLMs do, this one has more rows than its tokenizer has tokens.
        config = AutoConfig.for_model(model_type, **values, vocab_size=264, **ids)
        AutoModelForCausalLM.from_config(config).save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    return root


def new_model(bases, speech="hubert", text="llama-untied", cls=SpeechLLMForConditionalGeneration, **options):
    torch.manual_seed(1)
    return cls.from_speech_text_pretrained(bases / speech, bases / text, **{**PROJECTOR, **options})


def inputs_of(model, processor=None):
    processor = processor or SpeechLLMProcessor.from_config(model.config)
    return processor([f"a<|audio|>{'b' * i}" for i in range(2)], [tone(0.5), tone(0.31)])


def equal_states(a, b):
    a, b = a.state_dict(), b.state_dict()
    assert a.keys() == b.keys()
    assert [key for key in a if not torch.equal(a[key], b[key]) or a[key].dtype != b[key].dtype] == []


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(Path(folder).rglob("*")) if p.is_file()}


def edit_config(folder, **values):
    path = Path(folder) / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def edit_tensors(path, change):
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


# ---- assembling ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["llama-tied", "llama-untied", "gpt2"])
@pytest.mark.parametrize("speech", ["whisper", "hubert"])
def test_a_new_model_has_the_base_models_weights(bases, speech, text):
    model = new_model(bases, speech, text, window_frames=7, speech_layer=1)
    encoder = AutoModel.from_pretrained(bases / speech)
    encoder = encoder.encoder if speech == "whisper" else encoder
    for key, value in encoder.state_dict().items():
        assert torch.equal(model.model.speech_encoder.state_dict()[key], value) or key == "masked_spec_embed", key
    llm = AutoModelForCausalLM.from_pretrained(bases / text)
    ids = torch.randint(0, 256, (2, 7))
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, llm(input_ids=ids).logits)
    assert model.config.projector_config.window_frames == 7 and model.config.speech_layer == 1
    assert model.config.audio_token_id == 258
    assert model.config.base_models["text"] == {"id": str(bases / text), "revision": pin_revision(bases / text, None)}
    assert not any(p.requires_grad for n, p in model.named_parameters() if "projector." not in n)
    assert all(p.requires_grad for p in model.model.projector.parameters())
    assert model.generation_config.eos_token_id == tiny_tokenizer().eos_token_id
    assert model.generate(**inputs_of(model), max_new_tokens=2).shape[0] == 2


def test_options_that_there_are_not(bases):
    with pytest.raises(TypeError, match="no option 'num_querys'. The projector's settings are projector_type"):
        new_model(bases, num_querys=2)
    assert new_model(bases, torch_dtype=torch.bfloat16).get_input_embeddings().weight.dtype == torch.bfloat16


def test_an_answer_ends_with_the_token_that_ends_it_in_the_chat_template(bases, tmp_path):
    """Of base LLMs it is often not the end of text that their configuration knows."""
    shutil.copytree(bases / "llama-tied", tmp_path / "llm")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "llm")
    tokenizer.eos_token = tokenizer.pad_token = "<|im_start|>"
    tokenizer.save_pretrained(tmp_path / "llm")
    for path in (tmp_path / "llm").glob("*config.json"):
        if path.name != "tokenizer_config.json":
            edited = {**json.loads(path.read_text()), "eos_token_id": tokenizer.eos_token_id}
            path.write_text(json.dumps(edited))
    model = SpeechLLMForConditionalGeneration.from_speech_text_pretrained(
        bases / "hubert", tmp_path / "llm", **PROJECTOR
    )
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert model.generation_config.eos_token_id == [tokenizer.eos_token_id, end]


def test_a_resized_vocabulary_is_saved_whole(bases, tmp_path):
    model = new_model(bases)
    model.resize_token_embeddings(300)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").exists()
    equal_states(SpeechLLMForConditionalGeneration.from_pretrained(tmp_path), model)
    with pytest.raises(ValueError, match="vocabulary was resized"):
        model.save_pretrained(tmp_path, kind="projector")


def test_a_new_projector_is_initialised_and_a_missing_mask_vector_is_the_same_each_time(bases, tmp_path):
    first, second = new_model(bases), new_model(bases)
    equal_states(first, second)
    weights = first.model.projector.window_model
    assert weights.queries.std() > 0.5 and 0.01 < weights.linear.weight.std() < 0.05
    assert weights.layer_norm.weight.eq(1).all()

    shutil.copytree(bases / "hubert", tmp_path / "hubert")
    edit_tensors(tmp_path / "hubert/model.safetensors", lambda tensors: tensors.pop("hubert.masked_spec_embed"))
    for _ in range(2):
        model = SpeechLLMForConditionalGeneration.from_speech_text_pretrained(
            tmp_path / "hubert", bases / "llama-tied", **PROJECTOR
        )
        assert model.model.speech_encoder.masked_spec_embed.eq(0).all()


def test_dtypes(bases, tmp_path):
    model = new_model(bases, dtype="bfloat16")
    kinds = {name.split(".")[1] + str(p.dtype) for name, p in model.named_parameters()}
    assert kinds == {
        "speech_encodertorch.bfloat16", "language_modeltorch.bfloat16", "lm_headtorch.bfloat16", "projectortorch.float32"
    }  # fmt: skip
    for kind in ("projector", "full"):
        model.save_pretrained(tmp_path / kind, kind=kind)
        assert json.loads((tmp_path / kind / "config.json").read_text())["dtype"] == "bfloat16"
        equal_states(SpeechLLMForConditionalGeneration.from_pretrained(tmp_path / kind), model)
        wide = SpeechLLMForConditionalGeneration.from_pretrained(tmp_path / kind, dtype=torch.float32)
        assert {p.dtype for p in wide.parameters()} == {torch.float32}


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}])
def test_device_map(bases, tmp_path, device_map):
    model = new_model(bases, device_map=device_map)
    for kind in ("full", "projector"):
        model.save_pretrained(tmp_path / kind, kind=kind)
        loaded = SpeechLLMForConditionalGeneration.from_pretrained(tmp_path / kind, device_map=device_map)
        equal_states(loaded, model)
        inputs = {name: value.to(loaded.device) for name, value in inputs_of(loaded).items()}
        assert loaded.generate(**inputs, max_new_tokens=2).shape[0] == 2


def test_attn_implementation(bases, tmp_path):
    model = new_model(bases, attn_implementation="eager")
    model.save_pretrained(tmp_path)
    loaded = SpeechLLMForConditionalGeneration.from_pretrained(tmp_path, attn_implementation="eager")
    for m in (model, loaded):
        assert m.model.language_model.config._attn_implementation == "eager"
        assert m.model.projector.window_model.qformer.config._attn_implementation == "eager"


def test_base_models_that_cannot_be_used_are_explained(bases, tmp_path):
    cls = SpeechLLMForConditionalGeneration
    with pytest.raises(CheckpointError, match=r"the speech model '/no/where'.*Check the id or path"):
        cls.from_speech_text_pretrained("/no/where", bases / "gpt2")
    with pytest.raises(CheckpointError, match=r"the text model 'no-one/nothing'"):
        cls.from_speech_text_pretrained(bases / "hubert", "no-one/nothing")
    with pytest.raises(ValueError, match="'gpt2'.*not a speech encoder"):
        cls.from_speech_text_pretrained(bases / "gpt2", bases / "gpt2")
    shutil.copytree(bases / "gpt2", tmp_path / "gpt2")
    for file in (tmp_path / "gpt2").glob("tokenizer*"):
        file.unlink()
    with pytest.raises(CheckpointError, match="the tokenizer of .*1 tokens.*vocabulary 264.*tokenizer files"):
        cls.from_speech_text_pretrained(bases / "hubert", tmp_path / "gpt2")


@pytest.mark.parametrize("part", ["hubert", "whisper", "llama-untied"])
def test_base_models_without_safetensors_or_with_a_tensor_less_are_refused(bases, tmp_path, part):
    speech, text = (tmp_path / part, bases / "gpt2") if part != "llama-untied" else (bases / "hubert", tmp_path / part)
    shutil.copytree(bases / part, tmp_path / part)
    file = tmp_path / part / "model.safetensors"
    gone = {
        "hubert": "hubert.encoder.layers.0.final_layer_norm.bias",
        "whisper": "model.encoder.layer_norm.bias",
        "llama-untied": "lm_head.weight",
    }[part]
    edit_tensors(file, lambda tensors: tensors.pop(gone))
    with pytest.raises(CheckpointError, match=f"lacks 1 tensor.*{gone.split('.', 2)[-1]}"):
        SpeechLLMForConditionalGeneration.from_speech_text_pretrained(speech, text, **PROJECTOR)
    file.unlink()
    with pytest.raises(CheckpointError, match="Cannot load the frozen .* model .*Check the id or path"):
        SpeechLLMForConditionalGeneration.from_speech_text_pretrained(speech, text, **PROJECTOR)


@pytest.mark.parametrize("part", ["whisper", "llama-tied"])
def test_pickled_base_models_are_refused_with_the_way_to_convert(bases, tmp_path, monkeypatch, part):
    """And the way works, also where tensors share their memory, as tied embeddings do in a `.bin`."""
    speech, text = (tmp_path / part, bases / "gpt2") if part == "whisper" else (bases / "hubert", tmp_path / part)
    shutil.copytree(bases / part, tmp_path / part)
    tensors = load_file(tmp_path / part / "model.safetensors")
    if part == "llama-tied":
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    torch.save(tensors, tmp_path / part / "pytorch_model.bin")
    (tmp_path / part / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=rf"model '.*{part}'.*pytorch_model.bin.* are pickled.*convert") as error:
        SpeechLLMForConditionalGeneration.from_speech_text_pretrained(speech, text, **PROJECTOR)
    convert(error.value, tmp_path / part, monkeypatch)
    model = SpeechLLMForConditionalGeneration.from_speech_text_pretrained(speech, text, **PROJECTOR)
    body = model.model.speech_encoder if part == "whisper" else model.model.language_model
    name, prefix = ("conv1.weight", "model.encoder.") if part == "whisper" else ("embed_tokens.weight", "model.")
    assert torch.equal(body.get_parameter(name), tensors[prefix + name])


def convert(error, folder, monkeypatch):
    """Do what the refusal of a pickled file says."""
    with monkeypatch.context() as patch:
        patch.chdir(folder)
        exec(f"import glob, safetensors.torch, torch; {str(error).rpartition('once: ')[2]}")


def test_a_whisper_without_a_decoder_will_do(bases, tmp_path):
    shutil.copytree(bases / "whisper", tmp_path / "whisper")

    def drop_decoder(tensors):
        for key in [key for key in tensors if "decoder" in key]:
            del tensors[key]

    edit_tensors(tmp_path / "whisper/model.safetensors", drop_decoder)
    model = SpeechLLMForConditionalGeneration.from_speech_text_pretrained(
        tmp_path / "whisper", bases / "llama-tied", **PROJECTOR
    )
    expected = load_file(bases / "whisper/model.safetensors")["model.encoder.conv1.weight"]
    assert torch.equal(model.model.speech_encoder.conv1.weight, expected)


# ---- there and back ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["full", "projector"])
@pytest.mark.parametrize("text", ["llama-tied", "llama-untied", "gpt2"])
@pytest.mark.parametrize("speech", ["whisper", "hubert"])
def test_round_trip(bases, tmp_path, speech, text, kind):
    model = new_model(bases, speech, text)
    model.generation_config.max_new_tokens = 7
    model.save_pretrained(tmp_path, kind=kind)
    assert (tmp_path / "projector.safetensors").exists() == (kind == "projector")
    assert (tmp_path / "model.safetensors").exists() == (kind == "full")
    assert {name for name in HUB_FILES if (tmp_path / name).exists()} == set(HUB_FILES)
    assert not list(tmp_path.glob("*.bin")) and not list(tmp_path.glob(".saving*"))
    inputs = inputs_of(model)
    for loaded in (SpeechLLMForConditionalGeneration.from_pretrained(tmp_path), AutoModel.from_pretrained(tmp_path)):
        equal_states(loaded, model)
        with torch.no_grad():
            assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)
        assert not loaded.training
        assert {n for n, p in loaded.named_parameters() if p.requires_grad} == {
            n for n, p in model.named_parameters() if "projector." in n
        }
        assert loaded.generation_config.max_new_tokens == 7
        tied = loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
        assert tied == (text != "llama-untied")


@pytest.mark.parametrize("speech", SPEECH)
def test_full_round_trip_of_every_encoder(tmp_path, speech):
    model = tiny_model(speech)
    model.save_pretrained(tmp_path)
    equal_states(SpeechLLMForConditionalGeneration.from_pretrained(tmp_path), model)


@pytest.mark.parametrize("kind", ["full", "projector"])
def test_with_and_without_a_head(bases, tmp_path, kind):
    """A headless checkpoint loads into the generating model where the head can be had: from the base model, or tied."""
    text = "llama-untied" if kind == "projector" else "llama-tied"
    whole, headless = new_model(bases, text=text), new_model(bases, text=text, cls=SpeechLLMModel)
    equal_states(whole.model, headless)
    whole.save_pretrained(tmp_path / "whole", kind=kind)
    headless.save_pretrained(tmp_path / "headless", kind=kind)
    for folder in ("whole", "headless"):
        equal_states(SpeechLLMModel.from_pretrained(tmp_path / folder), headless)
        equal_states(SpeechLLMForConditionalGeneration.from_pretrained(tmp_path / folder), whole)
    headless.load_trained_weights(tmp_path / "whole") if kind == "projector" else None
    if kind == "full":
        new_model(bases, cls=SpeechLLMModel).save_pretrained(tmp_path / "untied", kind="full")
        with pytest.raises(CheckpointError, match=r"lacks 1 tensor\(s\): head.lm_head.weight"):
            SpeechLLMForConditionalGeneration.from_pretrained(tmp_path / "untied")


def test_shards(bases, tmp_path):
    model = new_model(bases)
    model.save_pretrained(tmp_path, kind="full", max_shard_size="50KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    equal_states(SpeechLLMForConditionalGeneration.from_pretrained(tmp_path), model)
    model.save_pretrained(tmp_path, kind="full")
    assert sorted(p.name for p in tmp_path.glob("*.safetensors*")) == ["model.safetensors"]
    equal_states(SpeechLLMForConditionalGeneration.from_pretrained(tmp_path), model)


def test_the_kind_is_chosen_so_that_nothing_is_lost(bases, tmp_path):
    def kind_of(model):
        model.save_pretrained(tmp_path)
        return "projector" if (tmp_path / "projector.safetensors").exists() else "full"

    assert kind_of(new_model(bases)) == "projector"
    assert kind_of(SpeechLLMForConditionalGeneration.from_pretrained(tmp_path)) == "projector"
    assert kind_of(tiny_model()) == "full"  # no base models
    assert kind_of(new_model(bases, config_options={"freeze_language_model": False})) == "full"
    new_model(bases).save_pretrained(tmp_path, kind="full")
    assert kind_of(SpeechLLMForConditionalGeneration.from_pretrained(tmp_path)) == "full"  # its bases may be far away
    with pytest.raises(ValueError, match="would lose the trained weights"):
        new_model(bases, config_options={"freeze_language_model": False}).save_pretrained(tmp_path, kind="projector")
    with pytest.raises(ValueError, match="needs `config.base_models`"):
        tiny_model().save_pretrained(tmp_path, kind="projector")
    with pytest.raises(ValueError, match="kind is 'half'"):
        tiny_model().save_pretrained(tmp_path, kind="half")


def test_a_model_in_another_dtype_is_still_its_base_models(bases, tmp_path):
    new_model(bases).to(torch.bfloat16).save_pretrained(tmp_path)
    assert (tmp_path / "projector.safetensors").is_file()


def test_saving_again_leaves_no_stale_weights(bases, tmp_path):
    peft = pytest.importorskip("peft")
    folder = tmp_path / "features.safetensors"
    own = [tmp_path / "notes.txt", folder / "notes.txt", tmp_path / "features.index.safetensors"]
    folder.mkdir()
    for path in own:
        path.write_text("mine")
    plain, adapted = new_model(bases), new_model(bases, text="llama-tied")
    adapted.add_adapter(peft.LoraConfig(target_modules=["q_proj"], r=2))
    for model, kind in (
        (adapted, "full"),
        (plain, "projector"),
        (adapted, "projector"),
        (plain, "full"),
        (adapted, None),
    ):
        model.save_pretrained(tmp_path, kind=kind)
        weights = {"projector.safetensors"} if kind != "full" else {"model.safetensors"}
        assert {p.name for p in tmp_path.glob("*.safetensors")} == weights | {own[2].name, folder.name}
        assert (tmp_path / "adapter").exists() == (model is adapted)
        equal_states(SpeechLLMForConditionalGeneration.from_pretrained(tmp_path), model)
    assert [path.read_text() for path in own] == ["mine"] * 3
    (tmp_path / "adapter" / "notes.txt").write_text("mine")
    plain.save_pretrained(tmp_path)
    assert [path.name for path in (tmp_path / "adapter").iterdir()] == ["notes.txt"]


def test_other_processes_save_nothing(bases, tmp_path):
    new_model(bases).save_pretrained(tmp_path / "none", is_main_process=False)
    assert not (tmp_path / "none").exists()


def test_a_given_state_dict_is_what_is_saved(bases, tmp_path):
    model = new_model(bases)
    state = {key: value + 1 if "projector." in key else value for key, value in model.state_dict().items()}
    for kind in ("full", "projector"):
        model.save_pretrained(tmp_path / kind, kind=kind, state_dict=state)
        loaded = SpeechLLMForConditionalGeneration.from_pretrained(tmp_path / kind).state_dict()
        assert all(torch.equal(loaded[key], value) for key, value in state.items())


def test_load_trained_weights(bases, tmp_path):
    trained, other = new_model(bases), new_model(bases)
    with torch.no_grad():
        for parameter in trained.model.projector.parameters():
            parameter.add_(1)
    trained.save_pretrained(tmp_path)
    other.load_trained_weights(tmp_path)
    equal_states(other, trained)
    with pytest.raises(CheckpointError, match="trained weights.*No such file"):
        other.load_trained_weights(tmp_path / "nowhere")
    edit_tensors(tmp_path / "projector.safetensors", lambda t: t.pop("model.projector.window_model.queries"))
    with pytest.raises(CheckpointError, match="lacks 1 tensor.*queries"):
        other.load_trained_weights(tmp_path)
    with pytest.raises(CheckpointError, match="another shape"):
        new_model(bases, num_queries=3).load_trained_weights(save(trained, tmp_path / "again"))


def save(model, folder, **options):
    model.save_pretrained(folder, **options)
    return folder


# ---- adapters ------------------------------------------------------------------------------------------------------

LORA = {"r": 2, "lora_alpha": 4, "lora_dropout": 0.1, "target_modules": r".*language_model.*\.(q|v)_proj"}


def with_lora(model, how, **options):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(**{**LORA, **options})
    if how == "add_adapter":
        model.add_adapter(config)
    else:
        peft.get_peft_model(model, config)
    torch.manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.5)
    return model.eval()


@pytest.mark.parametrize("kind", ["full", "projector"])
@pytest.mark.parametrize("how", ["add_adapter", "get_peft_model"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_dora": True},
        {"target_modules": "all-linear"},
        {"modules_to_save": ["projector"]},
        {"target_modules": ["q_proj", "linear"]},
    ],
    ids=str,
)
def test_round_trip_with_an_adapter(bases, tmp_path, how, kind, options):
    model = with_lora(new_model(bases, text="llama-tied"), how, **options)
    if "modules_to_save" in options:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "modules_to_save" in name:
                    parameter.add_(0.5)
    inputs = inputs_of(model)
    model.save_pretrained(tmp_path, kind=kind)
    assert (tmp_path / "adapter/adapter_model.safetensors").exists()
    loaded = SpeechLLMForConditionalGeneration.from_pretrained(tmp_path)
    if "modules_to_save" not in options:  # whose originals are not kept: their trained copies take their place
        equal_states(loaded, model)
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)
    assert not any(module.training for module in loaded.modules())
    trainable = {name for name, p in loaded.named_parameters() if p.requires_grad}
    assert any("lora_" in name for name in trainable)
    assert any("projector." in name and "lora_" not in name for name in trainable)
    assert not any("language_model" in name and "lora_" not in name for name in trainable)
    loaded.save_pretrained(tmp_path / "again", kind=kind)
    for file in (
        "adapter/adapter_model.safetensors",
        "projector.safetensors" if kind == "projector" else "model.safetensors",
    ):
        a, b = load_file(tmp_path / file), load_file(tmp_path / "again" / file)
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_an_adapter_is_loaded_into_a_model_that_has_one(bases, tmp_path):
    model = with_lora(new_model(bases), "add_adapter")
    model.save_pretrained(tmp_path)
    for how in ("add_adapter", "get_peft_model"):
        other = with_lora(new_model(bases), how)
        with torch.no_grad():
            for parameter in other.parameters():
                if parameter.requires_grad:
                    parameter.add_(1)
        other.load_trained_weights(tmp_path)
        equal_states(other, model)
    bare = new_model(bases)
    bare.load_trained_weights(tmp_path)
    equal_states(bare, model)


def test_an_adapter_keeps_its_precision_beside_a_coarser_llm(bases, tmp_path):
    model = with_lora(new_model(bases, dtype="bfloat16"), "add_adapter")
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
    for kind in ("full", "projector"):
        model.save_pretrained(tmp_path / kind, kind=kind)
        equal_states(SpeechLLMForConditionalGeneration.from_pretrained(tmp_path / kind), model)


def test_a_merged_adapter_is_neither_lost_nor_applied_twice(bases, tmp_path):
    peft = pytest.importorskip("peft")
    model = new_model(bases, text="llama-tied")
    wrapped = peft.get_peft_model(model, peft.LoraConfig(**LORA, init_lora_weights=False)).eval()
    inputs = inputs_of(model)
    with torch.no_grad():
        expected = wrapped(**inputs).logits
        wrapped.merge_adapter()
        with pytest.raises(ValueError, match="would be applied twice after loading. Unmerge it"):
            model.save_pretrained(tmp_path, kind="full")
        wrapped.unmerge_adapter()
        merged = wrapped.merge_and_unload()
    with pytest.raises(ValueError, match="would lose the trained weights"):
        merged.save_pretrained(tmp_path, kind="projector")
    merged.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").is_file() and not (tmp_path / "adapter").exists()
    with torch.no_grad():
        loaded = SpeechLLMForConditionalGeneration.from_pretrained(tmp_path)(**inputs).logits
    torch.testing.assert_close(loaded, expected, atol=1e-5, rtol=0)


def test_pefts_own_adapter_only_saving_works(bases, tmp_path):
    peft = pytest.importorskip("peft")
    wrapped = peft.get_peft_model(new_model(bases), peft.LoraConfig(**LORA, init_lora_weights=False)).eval()
    wrapped.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(new_model(bases), tmp_path).eval()
    equal_states(loaded, wrapped)


def test_adapters_that_cannot_be_saved_are_refused(bases, tmp_path):
    peft = pytest.importorskip("peft")
    model = with_lora(new_model(bases), "add_adapter")
    model.add_adapter(peft.LoraConfig(**LORA), adapter_name="second")
    with pytest.raises(ValueError, match="adapters.*'second'.*one LoRA adapter can be saved"):
        model.save_pretrained(tmp_path / "two")
    model = new_model(bases)
    model.add_adapter(peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[]))
    with pytest.raises(ValueError, match="'IA3'.*one LoRA adapter"):
        model.save_pretrained(tmp_path / "ia3")
    assert not list(tmp_path.iterdir())


def test_a_damaged_adapter_is_refused(bases, tmp_path):
    with_lora(new_model(bases), "add_adapter").save_pretrained(tmp_path)
    file = tmp_path / "adapter/adapter_model.safetensors"
    edit_tensors(file, lambda tensors: tensors.pop(next(iter(tensors))))
    with pytest.raises(CheckpointError, match="The adapter .*lacks 1 tensor.*lora_"):
        SpeechLLMForConditionalGeneration.from_pretrained(tmp_path)
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(CheckpointError, match="Cannot load the adapter"):
        SpeechLLMForConditionalGeneration.from_pretrained(tmp_path)
    file.unlink()
    with pytest.raises(CheckpointError, match="adapter_model.safetensors"):
        SpeechLLMForConditionalGeneration.from_pretrained(tmp_path)


def test_a_pickled_adapter_is_refused_with_the_way_to_convert(bases, tmp_path, monkeypatch):
    """And the way works."""
    with_lora(new_model(bases), "add_adapter").save_pretrained(tmp_path)
    file = tmp_path / "adapter/adapter_model.safetensors"
    weights = load_file(file)
    torch.save(weights, tmp_path / "adapter/adapter_model.bin")
    file.unlink()
    with pytest.raises(CheckpointError, match=r"the adapter of .*adapter_model.bin.* are pickled.*convert") as error:
        SpeechLLMForConditionalGeneration.from_pretrained(tmp_path)
    convert(error.value, tmp_path / "adapter", monkeypatch)
    again = load_file(file)
    assert again.keys() == weights.keys() and all(torch.equal(again[name], weights[name]) for name in weights)
    SpeechLLMForConditionalGeneration.from_pretrained(tmp_path)


# ---- refusals ------------------------------------------------------------------------------------------------------


def _missing_base(folder, bases):
    shutil.rmtree(bases / "llama-untied")


def _changed_base(folder, bases):
    def train(tensors):
        tensors["model.layers.1.mlp.up_proj.weight"] *= 1.001

    edit_tensors(bases / "llama-untied/model.safetensors", train)


def _changed_bias(folder, bases):
    edit_tensors(bases / "hubert/model.safetensors", lambda t: t["hubert.encoder.layer_norm.bias"].add_(1e-3))


def _corrupt_base(folder, bases):
    path = bases / "hubert/model.safetensors"
    path.write_bytes(b"\xff" * 100)


def _missing_tensor(folder, bases):
    edit_tensors(folder / "projector.safetensors", lambda t: t.pop("model.projector.window_model.linear.bias"))


def _reshaped_tensor(folder, bases):
    name = "model.projector.window_model.linear.bias"
    edit_tensors(folder / "projector.safetensors", lambda t: t.update({name: t[name][:-1].clone()}))


def _corrupt_file(folder, bases):
    (folder / "projector.safetensors").write_bytes(b"not safetensors")


def _truncated_file(folder, bases):
    data = (folder / "projector.safetensors").read_bytes()
    (folder / "projector.safetensors").write_bytes(data[: len(data) // 2])


def _no_bases(folder, bases):
    edit_config(folder, base_models=None)


def _pickled(folder, bases):
    torch.save(load_file(folder / "projector.safetensors"), folder / "pytorch_model.bin")
    (folder / "projector.safetensors").unlink()


@pytest.mark.parametrize(
    "damage, message",
    [
        (_missing_base, r"the frozen text model '.*llama-untied': there is no such folder.*put the folder back"),
        (_changed_base, r"the frozen text model '.*llama-untied': its weights are not those.*Restore"),
        (_changed_bias, r"the frozen speech model '.*hubert': its weights are not those"),
        (_corrupt_base, r"the frozen speech model '.*hubert'.*"),
        (_missing_tensor, r"lacks 1 tensor\(s\): model.projector.window_model.linear.bias.*random weights"),
        (_reshaped_tensor, r"another shape.*: model.projector.window_model.linear.bias"),
        (_corrupt_file, r"the trained weights .*projector.safetensors.*Download or train them again"),
        (_truncated_file, r"the trained weights .*projector.safetensors"),
        (_no_bases, r"does not say which speech encoder and LLM.*base_models"),
        (_pickled, r"Cannot load the checkpoint .*safetensors"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_damaged_projector_only_checkpoint_is_refused(bases, tmp_path, damage, message):
    shutil.copytree(bases, tmp_path / "bases")
    model = new_model(tmp_path / "bases")
    model.save_pretrained(tmp_path / "model")
    damage(tmp_path / "model", tmp_path / "bases")
    for load in (SpeechLLMForConditionalGeneration.from_pretrained, AutoModel.from_pretrained):
        with pytest.raises(CheckpointError, match=message):
            load(tmp_path / "model")


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda t: t.pop("model.language_model.norm.weight"), r"lacks 1 tensor\(s\): model.language_model.norm.weight"),
        (lambda t: t.pop("model.speech_encoder.encoder.layer_norm.bias"), r"lacks 1 tensor.*speech_encoder"),
        (lambda t: t.update({"head.lm_head.weight": torch.zeros(9, 32)}), "another shape.*: head.lm_head.weight"),
        (lambda t: [t.pop(k) for k in list(t) if "projector." in k], r"lacks \d\d tensor.* and \d\d more"),
        (None, "Cannot load the checkpoint .*Download or save it again"),
    ],
)
def test_a_damaged_full_checkpoint_is_refused(bases, tmp_path, damage, message):
    new_model(bases).save_pretrained(tmp_path, kind="full")
    file = tmp_path / "model.safetensors"
    if damage is None:
        file.write_bytes(file.read_bytes()[:1000])
    else:
        edit_tensors(file, damage)
    with pytest.raises(CheckpointError, match=message):
        SpeechLLMForConditionalGeneration.from_pretrained(tmp_path)


def test_a_checkpoint_without_weights_or_config_is_refused(bases, tmp_path):
    with pytest.raises(CheckpointError, match=f"Cannot load the checkpoint {tmp_path}"):
        SpeechLLMForConditionalGeneration.from_pretrained(tmp_path)
    new_model(bases).config.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="Cannot load the checkpoint .*safetensors"):
        SpeechLLMForConditionalGeneration.from_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="Cannot load the checkpoint no_such_org/no_such_model"):
        SpeechLLMForConditionalGeneration.from_pretrained("no_such_org/no_such_model")


def test_a_base_folder_that_moved_can_be_named_anew(bases, tmp_path):
    shutil.copytree(bases, tmp_path / "old")
    model = new_model(tmp_path / "old")
    model.save_pretrained(tmp_path / "model")
    shutil.move(tmp_path / "old", tmp_path / "new")
    moved = {n: {**b, "id": b["id"].replace("/old/", "/new/")} for n, b in model.config.base_models.items()}
    edit_config(tmp_path / "model", base_models=moved)
    equal_states(SpeechLLMForConditionalGeneration.from_pretrained(tmp_path / "model"), model)


def test_relative_base_folders_are_found_from_elsewhere(bases, tmp_path, monkeypatch):
    monkeypatch.chdir(bases)
    model = SpeechLLMForConditionalGeneration.from_speech_text_pretrained("hubert", "llama-tied", **PROJECTOR)
    model.save_pretrained(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    equal_states(SpeechLLMForConditionalGeneration.from_pretrained("model"), model)


# ---- a full disk ---------------------------------------------------------------------------------------------------

FULL_DISK = """
import resource, signal, sys
import torch
from speechllm import CheckpointError, SpeechLLMForConditionalGeneration
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a write beyond the limit fails, as on a full disk
for folder, kind in zip(sys.argv[1:], ("full", "projector")):
    model = SpeechLLMForConditionalGeneration.from_pretrained(folder)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
    try:
        model.save_pretrained(folder, kind=kind)
    except CheckpointError as error:
        print("refused:", error)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
"""


def test_a_full_disk_leaves_the_old_checkpoint_whole(bases, tmp_path):
    model = new_model(bases)
    folders = [tmp_path / "projector", tmp_path / "full"]  # each saved over by the other kind
    before = [contents(save(model, folder, kind=folder.name)) for folder in folders]
    run = subprocess.run([sys.executable, "-c", FULL_DISK, *folders], capture_output=True, text=True, timeout=200)
    assert run.returncode == 0, run.stderr
    messages = run.stdout.splitlines()
    assert len(messages) == 2
    for folder, message, old in zip(folders, messages, before):
        assert message.startswith(f"refused: Cannot save to {folder}: ") and "Free some space" in message
        assert contents(folder) == old
        equal_states(SpeechLLMForConditionalGeneration.from_pretrained(folder), model)


def test_folders_that_cannot_be_written_are_explained(bases, tmp_path):
    model = new_model(bases)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(CheckpointError, match="it is a file. Choose a folder"):
        model.save_pretrained(tmp_path / "file")
    with pytest.raises(CheckpointError, match="Not a directory. Choose a folder that is writable"):
        model.save_pretrained(tmp_path / "file" / "model")


# ---- where the package is not installed ----------------------------------------------------------------------------

REMOTE = """
import json
import numpy as np
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForMultimodalLM, AutoProcessor
trust = {"trust_remote_code": True}
signal = np.sin(np.arange(8000) ** 1.3 / 50).astype(np.float32)
content = [{"type": "audio", "audio": signal}, {"type": "text", "text": "Transcribe."}]
answers = []
def load(folder, auto=AutoModel):
    model = auto.from_pretrained(folder, **trust)
    assert type(model).__name__ == "SpeechLLMForConditionalGeneration"
    assert type(model).__module__.startswith("transformers_modules."), type(model).__module__
    processor = AutoProcessor.from_pretrained(folder, **trust)
    assert type(processor).__module__.startswith("transformers_modules.")
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True, return_dict=True,
        return_tensors="pt",
    )
    generated = model.generate(**inputs, max_new_tokens=5, do_sample=False)
    answers.append(processor.decode(generated[0, inputs["input_ids"].shape[1]:]))
    return model, processor
os.chdir(sys.argv[1])
for source in ("projector", "full"):
    for target, kind in ((source + "-again", None), (source + "-as-full", "full"), (source + "-last", None)):
        model, processor = load(source)
        model.save_pretrained(target, kind=kind)
        processor.save_pretrained(target)
        source = target
    load(source)
for auto in (AutoModelForCausalLM, AutoModelForMultimodalLM):
    load(source, auto)
# Without the processor, whose files Transformers has no other reason to fetch.
AutoModel.from_pretrained("alone", **trust).save_pretrained("alone-again")
assert "speechllm" not in sys.modules
print(json.dumps(answers))
"""


def test_remote_code_where_the_package_is_not_installed(bases, tmp_path):
    """Load, generate, save again from there, load that, by remote code; in the end by the package."""
    pytest.importorskip("peft")
    model = with_lora(new_model(bases, "whisper"), "add_adapter")
    processor = SpeechLLMProcessor.from_config(model.config)
    for kind in ("projector", "full"):
        model.save_pretrained(tmp_path / kind, kind=kind)
        processor.save_pretrained(tmp_path / kind)
    model.save_pretrained(tmp_path / "alone")
    answers = run_without_package(REMOTE, tmp_path, tmp_path, timeout=250)
    assert len(answers) == 10 and len(set(answers)) == 1 and answers[0]

    saved = {
        "projector-again": "projector", "projector-as-full": "model", "projector-last": "model",
        "full-again": "model", "full-as-full": "model", "full-last": "model", "alone-again": "projector",
    }  # fmt: skip
    for folder, weights in saved.items():
        files = {path.name for path in (tmp_path / folder).iterdir()}
        assert {name for name in files if name.endswith(".safetensors")} == {f"{weights}.safetensors"}
        assert {name for name in files if name.endswith(".py")} == set(HUB_FILES)
        assert {Path(name).suffix for name in files} <= {"", ".json", ".jinja", ".py", ".safetensors"}
        config = json.loads((tmp_path / folder / "config.json").read_text())
        assert config["auto_map"] == AUTO_MAP
        equal_states(SpeechLLMForConditionalGeneration.from_pretrained(tmp_path / folder), model)


def test_the_hub_files_are_all_there_and_import_nothing_else(tmp_path):
    import ast

    copy_hub_files(tmp_path)
    package = Path(copy_hub_files.__code__.co_filename).parent
    assert {path.name for path in package.glob("*_speechllm.py")} | {"handler.py"} == set(HUB_FILES)
    allowed = {"torch", "numpy", "safetensors", "transformers", "huggingface_hub", *sys.stdlib_module_names}

    def imports(node):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Try):
                continue  # optional packages
            if isinstance(child, ast.Import):
                yield from (alias.name.split(".")[0] for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level <= 1, "sub-folders do not travel"
                assert child.level == 0 or child.module, "`from . import x` is not seen by Transformers"
                yield child.module.split(".")[0] if child.level == 0 else "transformers"
            yield from imports(child)

    for name in HUB_FILES:
        assert set(imports(ast.parse((tmp_path / name).read_text()))) <= allowed, name


# ---- repositories --------------------------------------------------------------------------------------------------


def publish(cache, folder, repository, sha=SHA, branch="main"):
    """Put a folder into a Hub cache as the repository's commit, which `branch` points to."""
    target = Path(cache) / f"models--{repository.replace('/', '--')}"
    shutil.copytree(folder, target / "snapshots" / sha)
    (target / "refs").mkdir(exist_ok=True)
    (target / "refs" / branch).write_text(sha)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty Hub cache that every loader of this process uses, offline."""
    import huggingface_hub.constants
    import transformers.utils.hub

    cache = tmp_path / "hub"
    cache.mkdir()
    for module in (huggingface_hub.constants, transformers.utils.hub):
        for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "TRANSFORMERS_CACHE"):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, str(cache))
    return cache


@pytest.mark.parametrize("kind", ["full", "projector"])
def test_repositories(bases, hub, tmp_path, kind):
    old, new = SHA[::-1], SHA
    for name in ("hubert", "llama-untied"):
        publish(hub, bases / name, f"org/{name}", old)
    model = SpeechLLMForConditionalGeneration.from_speech_text_pretrained(
        "org/hubert", "org/llama-untied", speech_revision="main", **PROJECTOR
    )
    assert model.config.base_models == {
        "speech": {"id": "org/hubert", "revision": old},
        "text": {"id": "org/llama-untied", "revision": old},
    }
    processor = SpeechLLMProcessor.from_config(model.config)
    model.save_pretrained(tmp_path / "model", kind=kind)
    processor.save_pretrained(tmp_path / "model")
    publish(hub, tmp_path / "model", "org/speech-llm", new)

    # The base repositories move on; the pinned commits are what is loaded.
    for name in ("hubert", "llama-untied"):
        moved = tmp_path / f"moved-{name}"
        shutil.copytree(bases / name, moved)
        edit_tensors(moved / "model.safetensors", lambda tensors: [t.add_(1) for t in tensors.values()])
        publish(hub, moved, f"org/{name}", new)
    for options in ({}, {"revision": "main"}, {"revision": new}):
        equal_states(SpeechLLMForConditionalGeneration.from_pretrained("org/speech-llm", **options), model)
    loaded = SpeechLLMProcessor.from_pretrained("org/speech-llm")
    assert loaded.audio_token_id == processor.audio_token_id

    shutil.rmtree(hub / "models--org--hubert")
    if kind == "projector":
        with pytest.raises(CheckpointError, match=r"the frozen speech model 'org/hubert'.*network"):
            SpeechLLMForConditionalGeneration.from_pretrained("org/speech-llm")
    else:
        equal_states(SpeechLLMForConditionalGeneration.from_pretrained("org/speech-llm"), model)


def test_an_adapter_in_a_repository(bases, hub, tmp_path):
    model = with_lora(new_model(bases), "add_adapter")
    model.save_pretrained(tmp_path / "model")
    publish(hub, tmp_path / "model", "org/adapted")
    equal_states(SpeechLLMForConditionalGeneration.from_pretrained("org/adapted", revision=SHA), model)


def test_a_checkpoint_in_a_subfolder(bases, tmp_path):
    model = with_lora(new_model(bases), "add_adapter")
    for kind in ("full", "projector"):
        model.save_pretrained(tmp_path / kind, kind=kind)
        equal_states(SpeechLLMForConditionalGeneration.from_pretrained(tmp_path, subfolder=kind), model)


# ---- details -------------------------------------------------------------------------------------------------------


def test_the_llms_generation_settings_are_kept(bases, tmp_path):
    shutil.copytree(bases / "llama-tied", tmp_path / "llm")
    GenerationConfig(do_sample=True, temperature=0.6, eos_token_id=[257, 3]).save_pretrained(tmp_path / "llm")
    model = SpeechLLMForConditionalGeneration.from_speech_text_pretrained(
        bases / "hubert", tmp_path / "llm", **PROJECTOR
    )
    settings = model.generation_config
    assert (settings.temperature, settings.eos_token_id, settings.pad_token_id) == (0.6, [257, 3], 257)


def test_the_usual_loading_options_are_accepted(bases, tmp_path):
    model = new_model(bases)
    for kind in ("full", "projector"):
        model.save_pretrained(tmp_path / kind, kind=kind)
        config = SpeechLLMConfig.from_pretrained(tmp_path / kind)
        loaded, info = SpeechLLMForConditionalGeneration.from_pretrained(
            tmp_path / kind, config=config, output_loading_info=True, use_safetensors=True, low_cpu_mem_usage=True
        )
        equal_states(loaded, model)
        assert not info["missing_keys"] and not info["mismatched_keys"]


def test_auto_processors_find_their_parts(bases, tmp_path):
    model = tiny_model("whisper")
    model.save_pretrained(tmp_path)
    tiny_processor(model.config).save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path).eos_token == "<|im_end|>"
    assert AutoFeatureExtractor.from_pretrained(tmp_path).sampling_rate == 16_000
    assert LLM["hidden_size"] == AutoConfig.from_pretrained(tmp_path).text_config.hidden_size
