import pytest
import soundfile
import torch
from tiny import enliven, tiny_config, tiny_processor, tone

from speechllm import SpeechLLMForConditionalGeneration


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """The folder of a tiny checkpoint that answers with words of "a" and never ends an answer by itself."""
    folder = tmp_path_factory.mktemp("demo") / "tiny-model"
    config = tiny_config("whisper")
    torch.manual_seed(0)
    model = enliven(SpeechLLMForConditionalGeneration(config).eval())
    processor = tiny_processor(config)
    settings, tokenizer = model.generation_config, processor.tokenizer
    settings.eos_token_id = None
    settings.suppress_tokens = [i for i in range(len(tokenizer)) if tokenizer.decode([i]) not in ("a", " ")]
    settings.no_repeat_ngram_size = 10  # so that both come
    model.save_pretrained(folder, kind="full")
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def recordings(tmp_path_factory):
    """Files to upload: two that can be used, one too long, one too large, one that is no audio."""
    folder = tmp_path_factory.mktemp("recordings")
    for name, seconds in (("good", 1.5), ("other", 1.0), ("long", 11.0), ("large", 90.0)):
        soundfile.write(folder / f"{name}.wav", tone(seconds, seed=len(name)), 16_000)
    (folder / "bad.wav").write_bytes(b"This is a letter, not a recording. " * 40)
    return folder
