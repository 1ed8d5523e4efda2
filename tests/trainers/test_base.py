"""What both trainers share: resumption, caches on disk, several devices."""

import json
from unittest import mock

import datasets
import pytest
import torch
from tiny import tiny_processor
from tiny_training import contrastive, fine_tuning, save_base_models, tiny_rows, tiny_trainable, weights_of
from tokenizers import Tokenizer
from transformers import TrainingArguments

from speechllm import CheckpointError, SpeechLLMForConditionalGeneration, SpeechLLMProcessor
from speechllm.trainers import ContrastiveArguments, ContrastiveTrainer


SMALL = dict(hidden_size=32, num_attention_heads=2, num_hidden_layers=1, intermediate_size=48)


def assembled(bases):
    torch.manual_seed(5)
    model = SpeechLLMForConditionalGeneration.from_speech_text_pretrained(*bases, **SMALL)
    return model, SpeechLLMProcessor.from_config(model.config)


@pytest.mark.parametrize(("kind", "rank"), [("full", 0), ("projector", 0), ("projector", 2), ("full", 2), (None, None)])
def test_resuming_gives_the_weights_of_an_uninterrupted_run(tmp_path, kind, rank):
    """`kind`: of the checkpoint; rank `None`: contrastive. With dropout, across an epoch's end and in mid-epoch."""
    bases = save_base_models(tmp_path)

    def trainer(folder, **options):
        if rank is None:
            return contrastive(tmp_path / folder, tiny_trainable(dropout=0.1), layers="0,1", **options)
        model, processor = assembled(bases)
        model.is_self_contained = kind == "full"
        return fine_tuning(tmp_path / folder, model, processor=processor, lora_rank=rank, **options)

    # 16 rows, batches of 2, accumulation 2: four steps per epoch; saved at step 6, in the middle of the second
    options = {
        "max_steps": 9,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "save_strategy": "steps",
        "save_steps": 6,
    }
    whole = trainer("whole", **options)
    whole.train()
    resumed = trainer("resumed", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-6"))
    assert resumed.state.global_step == 9
    after = weights_of(whole.speechllm)
    for name, value in weights_of(resumed.speechllm).items():
        torch.testing.assert_close(value, after[name], atol=1e-6, rtol=0, msg=name)
    assert not (tmp_path / "whole" / "checkpoint-6" / "pytorch_model.bin").exists()


def test_a_checkpoint_without_weights_is_refused(tmp_path):
    contrastive(tmp_path, max_steps=1, save_strategy="steps", save_steps=1).train()
    (tmp_path / "checkpoint-1" / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="holds neither"):
        contrastive(tmp_path / "run").train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


@pytest.mark.parametrize("make", [contrastive, fine_tuning])
def test_what_trainer_offers_and_has_no_effect_here_is_refused(tmp_path, make):
    def build(**options):
        trainer = make(tmp_path)
        model, processor = trainer.speechllm, trainer.processing_class
        return type(trainer)(model, trainer.args, tiny_rows(), processing_class=processor, **options)

    for name in ("compute_metrics", "compute_loss_func", "preprocess_logits_for_metrics"):
        with pytest.raises(ValueError, match=f"`{name}` has no effect here"):
            build(**{name: dict})
    with pytest.raises(ValueError, match="There are 2 sets of rows; give one"):
        build(eval_dataset={"dev": tiny_rows(2), "test": tiny_rows(2)})
    with pytest.raises(ValueError, match=r"None of the 2 row\(s\) of `eval_dataset` can be used: utterance 0"):
        build(eval_dataset=[{**row, "text": ""} for row in tiny_rows(2)])
    for setting in ({"label_smoothing_factor": 0.1}, {"neftune_noise_alpha": 5.0}, {"bf16_full_eval": True}):
        with pytest.raises(ValueError, match=f"{next(iter(setting))}: nothing changes by that here"):
            make(tmp_path, **setting)
    with pytest.raises(NotImplementedError, match="answers"):
        build().predict(tiny_rows(2))


@pytest.mark.parametrize("make", [contrastive, fine_tuning])
@pytest.mark.parametrize("held_out", [None, []])
def test_evaluation_without_rows_is_refused_at_the_start(tmp_path, make, held_out):
    with pytest.raises(ValueError, match=r"eval_strategy is 'epoch'.*\(--eval_data or --held_out\)"):
        make(tmp_path, held_out=held_out, eval_strategy="epoch")


def test_batches_are_prepared_ahead_as_asked(tmp_path):
    options = {"dataloader_num_workers": 1, "dataloader_prefetch_factor": 3}
    trainer = contrastive(tmp_path, **options)
    assert trainer._loader(trainer.train_dataset).prefetch_factor == 3
    stream = datasets.Dataset.from_list(tiny_rows()).to_iterable_dataset()
    assert contrastive(tmp_path, train=stream, **options)._stream_loader().prefetch_factor == 3


def test_one_process_with_several_gpus_is_refused(tmp_path):
    with (
        mock.patch.object(TrainingArguments, "n_gpu", mock.PropertyMock(return_value=2)),
        pytest.raises(ValueError, match="one process per GPU"),
    ):
        contrastive(tmp_path)


def test_a_damaged_cache_file_is_computed_again(tmp_path):
    options = {"feature_cache": str(tmp_path / "cache"), "text_state_cache": str(tmp_path / "cache"), "layers": "0,1"}
    options["max_steps"] = 4  # an epoch
    first = contrastive(tmp_path / "a", **options)
    first.train()
    for folder in (first.frames.folder, first.text_states.folder):
        files = sorted(folder.glob("*/*.safetensors"))
        assert len(files) == 16
        files[3].write_bytes(files[3].read_bytes()[:50])
    second = contrastive(tmp_path / "b", **options)
    second.train()
    assert second.frames.corrupt == second.text_states.corrupt == 1
    assert not second.set_aside
    after = weights_of(first.speechllm)
    for name, value in weights_of(second.speechllm).items():
        torch.testing.assert_close(value, after[name], atol=1e-5, rtol=0)


def test_other_weights_have_another_cache(tmp_path):
    def folders(model, **options):
        options = {"text_state_cache": str(tmp_path / "cache"), **options}
        trainer = contrastive(tmp_path, model, tiny_rows(4), feature_cache=str(tmp_path / "cache"), **options)
        return trainer.frames.folder, trainer.text_states.folder

    plain = folders(tiny_trainable())
    assert folders(tiny_trainable()) == plain
    changed = tiny_trainable()
    with torch.no_grad():
        next(changed.model.speech_encoder.parameters()).view(-1)[0] += 1e-3
        changed.model.language_model.layers[2].mlp.up_proj.weight[0, 0] += 1e-3
    others = [folders(changed), folders(tiny_trainable().to(torch.bfloat16))]
    assert all(a != b for other in others for a, b in zip(other, plain))
    eager = tiny_trainable()
    eager.set_attn_implementation("eager")
    mixed = [folders(eager), folders(tiny_trainable(), bf16=True)]
    assert all(a != b for other in mixed for a, b in zip(other, plain))
    halves = [folders(tiny_trainable().to(torch.bfloat16), bf16=bf16) for bf16 in (False, True)]
    assert halves[0] == halves[1]  # autocast changes nothing: both stages of a run can share a cache
    words = tiny_processor(tiny_trainable().config)
    state = json.loads(words.tokenizer.backend_tokenizer.to_str())
    (first, one), (second, two) = list(state["model"]["vocab"].items())[-2:]
    state["model"]["vocab"].update({first: two, second: one})  # as many tokens, of which two have changed places
    words.tokenizer._tokenizer = Tokenizer.from_str(json.dumps(state))
    options = {"feature_cache": str(tmp_path / "cache"), "text_state_cache": str(tmp_path / "cache")}
    trainer = ContrastiveTrainer(
        tiny_trainable(), ContrastiveArguments(str(tmp_path), use_cpu=True, **options), tiny_rows(4), None, words
    )
    assert trainer.text_states.folder != plain[1] and trainer.frames.folder == plain[0]
    assert folders(tiny_trainable(speech_layer=1))[0] != plain[0]
    assert folders(tiny_trainable(), layers="0,2")[1] != plain[1]
    assert folders(tiny_trainable(), prefix="")[1] != plain[1]
    assert folders(tiny_trainable(), layers="0,2")[0] == plain[0]


@pytest.mark.parametrize(
    ("count", "sharded", "batches"),
    [(7, False, [2, 1, 1]), (7, True, [2, 2, 2]), (4, True, [1, 1, 1]), (2, True, [1, 1, 1])],
)
def test_processes_share_evaluation(count, sharded, batches, tmp_path, monkeypatch):
    """Each row is with one process; where weights are split, all processes run the model equally often."""
    trainer = contrastive(tmp_path, held_out=tiny_rows(count, first=16), per_device_eval_batch_size=2)
    trainer.is_fsdp_enabled = sharded
    monkeypatch.setattr(ContrastiveArguments, "world_size", 3)
    shares = []
    for rank in range(3):
        monkeypatch.setattr(ContrastiveArguments, "process_index", rank)
        shares.append(
            [batch["rows"] if batch["weight"] else [] for batch in trainer.eval_batches(trainer.eval_dataset)]
        )
    assert [len(share) for share in shares] == batches
    assert sorted(row for share in shares for batch in share for row in batch) == list(range(count))
    assert max(len(batch) for share in shares for batch in share) <= 2
