"""What speech tokens look like to the LLM: the nearest entries of its embedding table."""

import torch
from torch.nn import functional as F

from ..data.schema import Row
from ..modeling_speechllm import SpeechLLMForConditionalGeneration
from ..processing_speechllm import SpeechLLMProcessor


@torch.no_grad()
def nearest_tokens(
    model: SpeechLLMForConditionalGeneration, processor: SpeechLLMProcessor, rows: list[Row]
) -> list[list[str]]:
    """For each row the LLM token nearest by cosine to each of its speech tokens, special tokens left out.

    Returns:
        One list of token texts per row, in order of time.
    """
    model.eval()
    tokenizer = processor.tokenizer
    table = F.normalize(model.get_input_embeddings().weight.float(), dim=-1)
    special = [i for i in tokenizer.all_special_ids if i < len(table)]
    found = []
    for row in rows:
        inputs = processor.pad_features(processor.extract_features(row["audio"], row.get("sampling_rate")))
        speech = model.get_audio_features(**{name: value.to(model.device) for name, value in inputs.items()})
        similarity = F.normalize(speech.pooler_output.float(), dim=-1) @ table.T
        similarity[:, special] = -torch.inf
        found.append([tokenizer.decode([i]) for i in similarity.argmax(-1).tolist()])
    return found
