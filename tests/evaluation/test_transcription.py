"""Transcribing a file is generating from its chat."""

import soundfile
import torch
from tiny import tiny_processor, tone
from tiny_training import tiny_trainable

from speechllm.evaluation.transcription import Transcriber


def test_a_transcriber_answers_what_generate_does(tmp_path):
    model = tiny_trainable()
    processor = tiny_processor(model.config)
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    soundfile.write(tmp_path / "a.wav", tone(0.4), 16_000, subtype="FLOAT")
    transcriber = Transcriber(tmp_path / "model", device="cpu")
    for prompt, words in ((None, "Transcribe the speech."), ("Summarise.", "Summarise.")):
        chat = [{"role": "user", "content": [{"type": "audio", "audio": tone(0.4)}, {"type": "text", "text": words}]}]
        inputs = processor.apply_chat_template(
            chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        with torch.no_grad():
            output = model.generate(**inputs, max_new_tokens=6, do_sample=False)
        expected = processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
        assert transcriber(tmp_path / "a.wav", prompt=prompt, max_new_tokens=6) == expected
