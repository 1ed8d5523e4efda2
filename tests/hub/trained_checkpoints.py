"""Tiny checkpoints as the trainers leave them."""

import torch
from tiny import PROJECTORS
from tiny_training import contrastive, fine_tuning, tiny_rows

from speechllm import SpeechLLMForConditionalGeneration, SpeechLLMProcessor


DATA = {"source": "org/words", "license": "cc-by-4.0", "language": "en"}
ROWS = [{**row, **DATA, "duration": 90.0} for row in tiny_rows(16)]
HELD_OUT = [{**row, **DATA} for row in tiny_rows(6, 16)]


def new_model(speech="org/speech", text="org/llm"):
    torch.manual_seed(1)
    return SpeechLLMForConditionalGeneration.from_speech_text_pretrained(speech, text, **PROJECTORS["qformer"])


def pretrain(folder, model=None, **options):
    """Contrastive pretraining with held-out retrieval before and after."""
    options = {"eval_on_start": True, "eval_strategy": "steps", "eval_steps": 2, "learning_rate": 1e-2, **options}
    model = model or new_model()
    trainer = contrastive(folder, model, ROWS, HELD_OUT, layers="0,2", **options)
    trainer.processing_class = SpeechLLMProcessor.from_config(model.config)
    trainer.train()
    trainer.save_model()
    return folder


def adapt(folder, checkpoint, **options):
    """Fine-tuning with LoRA, whose matrices grow far from zero."""
    options = {"lora_rank": 2, "learning_rate": 1e-1, "max_new_tokens": 4, **options}
    model = SpeechLLMForConditionalGeneration.from_pretrained(checkpoint)
    processor = SpeechLLMProcessor.from_pretrained(checkpoint)
    trainer = fine_tuning(folder, model, ROWS, HELD_OUT, processor, **options)
    trainer.train()
    trainer.evaluate()
    trainer.save_model()
    return folder
