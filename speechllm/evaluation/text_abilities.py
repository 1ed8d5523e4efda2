"""Whether the LLM still answers text as it did before it learned to hear: token by token, against the bare LLM.

A SpeechLLM whose LLM was not trained must answer prompts without audio exactly as the base LLM does. The base is the one
that the checkpoint is pinned to, loaded anew by Transformers alone, without anything of this package.
"""

from typing import Any

import torch
from transformers import AutoModelForCausalLM

from ..base_models_speechllm import explained, pin_revision
from ..modeling_speechllm import SpeechLLMForConditionalGeneration
from ..processing_speechllm import SpeechLLMProcessor


PROMPTS = (
    "What is the capital of France?",
    "Write one sentence about the sea.",
    "Which is larger, 17 or 71? Answer with the number.",
    "Translate into Spanish: Good morning, my friends.",
    "List three animals that live on a farm.",
)


@torch.no_grad()
def compare_text_abilities(
    model: SpeechLLMForConditionalGeneration,
    processor: SpeechLLMProcessor,
    prompts: tuple[str, ...] = PROMPTS,
    max_new_tokens: int = 32,
) -> dict[str, Any]:
    """Greedy answers of both to text prompts, and the logits of the prompts' last tokens.

    Returns:
        `identical`: whether all tokens are; `largest_logit_difference`; per prompt `first_difference` (index of the first
        token that differs, `None` if none does) and both answers. Where the checkpoint does not say what its base LLM
        is, `identical` is `None`, and `reason` says so.

    Raises:
        CheckpointError: if the base LLM cannot be loaded, or has changed since the checkpoint was made.
    """
    base = (model.config.base_models or {}).get("text")
    if base is None:
        return {"identical": None, "reason": "The checkpoint does not say which LLM it was made from (`base_models`)."}
    local = (base["revision"] or "").startswith("sha256:")
    revision = None if local else base["revision"]
    remedy = "Put it back where the checkpoint names it."
    with explained(f"the base LLM {base['id']!r}", remedy, weights_of=base["id"], revision=revision):
        if local and pin_revision(base["id"], None) != base["revision"]:
            raise ValueError("its weights have changed since the checkpoint was made.")
        bare = AutoModelForCausalLM.from_pretrained(
            base["id"],
            revision=revision,
            use_safetensors=True,
            dtype=model.get_input_embeddings().weight.dtype,
            attn_implementation=model.model.language_model.config._attn_implementation,
        )
    bare = bare.to(model.device).eval()
    model.eval()
    found, largest = [], 0.0
    for prompt in prompts:
        text = processor.apply_chat_template([{"role": "user", "content": prompt}], add_generation_prompt=True)
        ids = torch.tensor([processor.tokenize_pieces([(text, False)], [])["input_ids"]], device=model.device)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        logits = [which(**inputs).logits[:, -1].float() for which in (model, bare)]
        largest = max(largest, (logits[0] - logits[1]).abs().max().item())
        options = {"generation_config": model.generation_config, "max_new_tokens": max_new_tokens, "do_sample": False}
        ours, theirs = (which.generate(**inputs, **options)[0, ids.shape[1] :].tolist() for which in (model, bare))
        found.append(
            {
                "prompt": prompt,
                "first_difference": first_difference(ours, theirs),
                "answer": processor.decode(ours, skip_special_tokens=True).strip(),
                "base_answer": processor.decode(theirs, skip_special_tokens=True).strip(),
            }
        )
    return {
        "identical": all(item["first_difference"] is None for item in found),
        "largest_logit_difference": largest,
        "base_model": base,
        "prompts": found,
    }


def first_difference(a: list[int], b: list[int]) -> int | None:
    """Index of the first element in which two lists differ, the end of the shorter one included; `None` if equal."""
    if a == b:
        return None
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
