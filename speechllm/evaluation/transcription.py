"""Transcribing files with a trained model."""

import os

import torch
from transformers import AutoProcessor

from ..data.prompts import chat_of
from ..modeling_speechllm import SpeechLLMForConditionalGeneration


class Transcriber:
    """A loaded model that answers one audio file at a time.

    Args:
        model: checkpoint folder or Hub id.
        device: e.g. `"cuda:0"`; default: a GPU if there is one, else the CPU.

    Raises:
        CheckpointError: if the checkpoint cannot be loaded.
    """

    def __init__(self, model: str | os.PathLike, device: str | None = None):
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.model = SpeechLLMForConditionalGeneration.from_pretrained(model).to(device).eval()
        self.processor = AutoProcessor.from_pretrained(model)

    def __call__(self, audio: str | os.PathLike, prompt: str | None = None, max_new_tokens: int = 256) -> str:
        """The model's answer to `audio` under `prompt` (default: transcribe).

        Raises:
            AudioError: if the audio cannot be used.
        """
        chat = chat_of({"id": str(audio), "audio": audio, "prompt": prompt}, with_answer=False)
        inputs = self.processor.apply_chat_template(
            chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        ).to(self.model.device)
        output = self.model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        return self.processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
