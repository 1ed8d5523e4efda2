import pytest
from tiny import enliven, tiny_config, tiny_processor

from speechllm import SpeechLLMForConditionalGeneration


@pytest.fixture(scope="session")
def parts(tmp_path_factory):
    """The folder of a tiny checkpoint that never ends an answer by itself, its model and its processor."""
    import torch

    folder = tmp_path_factory.mktemp("serving") / "tiny-model"
    config = tiny_config("whisper")
    config.text_config.max_position_embeddings = 100_000
    torch.manual_seed(0)
    model = enliven(SpeechLLMForConditionalGeneration(config).eval())
    model.generation_config.eos_token_id = None
    processor = tiny_processor(config, segment_seconds=2.0)
    tokenizer = processor.tokenizer
    model.generation_config.suppress_tokens = [i for i in range(258) if not tokenizer.decode([i]).isalnum()]
    model.save_pretrained(folder, kind="full")
    processor.save_pretrained(folder)
    return folder, model, processor


@pytest.fixture(scope="session")
def answer(parts):
    """What plain `generate` answers to a chat, one at a time."""

    def generate(chat, tokens=8):
        _, model, processor = parts
        inputs = processor.apply_chat_template(
            chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        output = model.generate(**inputs, max_new_tokens=tokens, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        return processor.decode(output, skip_special_tokens=True)

    return generate
