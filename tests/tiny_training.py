"""Tiny data, models and trainers for the tests of training."""

import torch
from tiny import TEXT, tiny_config, tiny_feature_extractor, tiny_processor, tiny_tokenizer, tone
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from speechllm import SpeechLLMForConditionalGeneration
from speechllm.data.forced_alignment import aligned_row
from speechllm.trainers import ContrastiveArguments, ContrastiveTrainer, FineTuningArguments, FineTuningTrainer


WORDS = "one apple river cloud seven green paper window garden yellow stone music lamp winter bread silver".split()


def tiny_rows(count=16, first=0, seconds=0.2):
    """Different tones with different texts."""
    return [
        {
            "id": f"utterance {i}",
            "audio": tone(seconds + 0.02 * (i % 4), seed=i),
            "text": f"{WORDS[i % 16]} {WORDS[(3 * i + i // 16 + 1) % 16]}",
        }
        for i in range(first, first + count)
    ]


def uneven_rows(count=16):
    """Rows with word times whose texts have one to six words: no two halves of a batch have equally many tokens."""
    rows = tiny_rows(count, seconds=0.3)
    for i, row in enumerate(rows):
        row["text"] = " ".join(WORDS[(i * (j + 1) + j) % 16] for j in range(1 + (i * i + i // 4) % 6)) + f" {i}"
        row["duration"] = len(row["audio"]) / 16_000
    return [aligned_row(row, None) for row in rows]


def tiny_trainable(text="llama-tied", speech="hubert-layer", dropout=0.0, **options):
    config = tiny_config(speech, "qformer", text, **options)
    config.projector_config.dropout = dropout
    torch.manual_seed(0)
    model = SpeechLLMForConditionalGeneration(config).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():  # the initial weights are so small that the LLM would hardly mix its tokens
        for parameter in model.model.language_model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.2, generator=generator)
    return model


def _settings(folder, options):
    return {
        "output_dir": str(folder),
        "use_cpu": True,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "max_steps": 2,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        **options,
    }


def contrastive(folder, model=None, train=None, held_out=None, similarity=None, objectives=None, **options):
    """`similarity`: the trainer's, or the name of the setting's."""
    model = model or tiny_trainable()
    if isinstance(similarity, str):
        options["similarity"], similarity = similarity, None
    return ContrastiveTrainer(
        model,
        ContrastiveArguments(**_settings(folder, options)),
        tiny_rows() if train is None else train,
        held_out,
        tiny_processor(model.config),
        similarity=similarity,
        objectives=objectives,
    )


def fine_tuning(folder, model=None, train=None, held_out=None, processor=None, **options):
    model = model or tiny_trainable()
    return FineTuningTrainer(
        model,
        FineTuningArguments(**_settings(folder, options)),
        tiny_rows() if train is None else train,
        held_out,
        processor or tiny_processor(model.config),
    )


def batch_of(trainer, indices=range(4)):
    """A training batch of these rows."""
    loader = trainer._loader(trainer.train_dataset, batch_sampler=[list(indices)])
    return next(iter(loader))


def loss_and_gradient(trainer, batch, **options):
    """The loss of a batch and the gradient of the projector, as one vector."""
    trainer.speechllm.zero_grad()
    trainer.speechllm.train()
    loss = trainer.compute_loss(trainer.model, batch, **options)
    loss.backward()
    return loss.item(), gradient_of(trainer.speechllm)


def gradient_of(model):
    return torch.cat([p.grad.flatten() for p in model.model.projector.parameters() if p.grad is not None])


def weights_of(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def save_base_models(folder, text="llama-tied"):
    """A speech encoder and an LLM as they lie on the Hub; returns their folders."""
    torch.manual_seed(0)
    config = tiny_config("hubert-layer", "qformer", text)
    speech, llm = folder / "speech", folder / "llm"
    AutoModel.from_config(config.speech_config).save_pretrained(speech)
    tiny_feature_extractor("hubert-layer").save_pretrained(speech)
    values = {**TEXT[text][1], "vocab_size": config.text_config.vocab_size}
    tokenizer = tiny_tokenizer()
    values.update(bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(TEXT[text][0], **values)).save_pretrained(llm)
    tokenizer.save_pretrained(llm)
    return str(speech), str(llm)
