"""Every recipe trains: two steps each, on tiny models and rows; and the files themselves."""

import copy
import json
import math
import re
from pathlib import Path

import pytest
import soundfile
import torch
from tiny import SPEECH, TEXT, tiny_feature_extractor, tiny_processor, tiny_tokenizer
from tiny_training import tiny_rows
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from speechllm import SpeechLLMForConditionalGeneration
from speechllm.cli import main
from speechllm.data.forced_alignment import proportional_words
from speechllm.objectives import parse_layer_schedule
from speechllm.quickstart.run import PROJECTOR
from speechllm.recipes import UsageError, parse_settings, read_recipe
from speechllm.trainers import ContrastiveArguments, ContrastiveTrainer, FineTuningArguments, FineTuningTrainer
from speechllm.training import DataArguments, ModelArguments, load_model


ROOT = Path(__file__).parent.parent
RECIPES = {f"{path.parent.name}/{path.stem}": path for path in sorted((ROOT / "recipes").glob("[!a]*/*.yaml"))}
PRETRAINING = [name for name in RECIPES if "/finetune" not in name]
FINE_TUNING = [name for name in RECIPES if "/finetune" in name]
DEPTH = 32  # the paper's LLM has so many layers, and its recipes name them
PRETRAINING_STAGE = ContrastiveArguments, ContrastiveTrainer
FINE_TUNING_STAGE = FineTuningArguments, FineTuningTrainer
models_of = {}  # by their settings: loading one takes longer than two steps with it
TINY_PROJECTOR = {**dict.fromkeys(("hidden_size", "intermediate_size"), 16), "num_hidden_layers": 1,
                  "num_attention_heads": 2, "num_queries": 2}  # fmt: skip


# ---- every recipe trains -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with an encoder, an LLM of 32 tiny layers, a checkpoint of both, and manifests of all kinds of rows."""
    folder = tmp_path_factory.mktemp("world")
    torch.manual_seed(0)
    AutoModel.from_config(AutoConfig.for_model("hubert", **SPEECH["hubert-layer"][1])).save_pretrained(
        folder / "speech"
    )
    tiny_feature_extractor("hubert-layer").save_pretrained(folder / "speech")
    tokenizer = tiny_tokenizer()
    values = {**TEXT["llama-tied"][1], "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": DEPTH,
              "vocab_size": len(tokenizer), "bos_token_id": tokenizer.bos_token_id,
              "eos_token_id": tokenizer.eos_token_id}  # fmt: skip
    AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **values)).save_pretrained(folder / "text")
    tokenizer.save_pretrained(folder / "text")
    model = SpeechLLMForConditionalGeneration.from_speech_text_pretrained(
        str(folder / "speech"), str(folder / "text"), **TINY_PROJECTOR
    )
    model.save_pretrained(folder / "pretrained")
    tiny_processor(model.config).save_pretrained(folder / "pretrained")

    tasks = [{}, {"task": "st", "target_language": "German", "target": "etwas"},
             {"task": "sqa", "question": "What is it?", "target": "it is"}]  # fmt: skip
    lines = []
    for i, row in enumerate(tiny_rows(16)):
        seconds = len(row["audio"]) / 16_000
        soundfile.write(folder / f"{i}.wav", row["audio"], 16_000)
        words = proportional_words(row["text"], seconds)
        lines.append({"id": row["id"], "audio": f"{i}.wav", "text": row["text"], "duration": seconds, "words": words,
                      "alignment": "proportional", **tasks[i % 3]})  # fmt: skip
    for name, rows in (("train", lines[:12]), ("held-out", lines[12:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def train(recipe, world, output):
    """A trainer after two steps with a recipe, and their logs; replaced are models, data, folders and sizes, all else is the file's."""
    values = read_recipe(recipe)
    replaced = {"train_data": world / "train.jsonl", "eval_data": world / "held-out.jsonl", "output_dir": output,
                "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1, "max_steps": 2, "logging_steps": 1,
                "eval_strategy": "no", "save_strategy": "no", "use_cpu": True, "disable_tqdm": True,
                "dataloader_pin_memory": False}  # fmt: skip
    folders = {"speech_model": world / "speech", "text_model": world / "text", "model": world / "pretrained"}
    replaced |= {name: model for name, model in folders.items() if values.get(name)}
    replaced |= {name: output / "cache" for name in ("feature_cache", "text_state_cache") if values.get(name)}
    if "speech_model" in replaced:
        replaced["projector"] = json.dumps(TINY_PROJECTOR)
    if "layer_schedule" in values:
        replaced["layer_schedule"] = re.sub(r" \d+:", " 1:", values["layer_schedule"])
    if "gradcache_chunk" in values:
        replaced["gradcache_chunk"] = 2
    if "train_fraction" in values:
        replaced["train_fraction"] = 0.5
    if "max_new_tokens" in values:
        replaced["max_new_tokens"] = 2
    if "minimum_seconds" in values:
        replaced["minimum_seconds"] = 0.1
    stage = FINE_TUNING_STAGE if recipe.stem.startswith("finetune") else PRETRAINING_STAGE
    arguments = ["--config", str(recipe), *(f"--{name}={value}" for name, value in replaced.items())]
    model_settings, data, settings = parse_settings([ModelArguments, DataArguments, stage[0]], arguments, "test", "")
    if repr(model_settings) not in models_of:
        models_of[repr(model_settings)] = load_model(model_settings, settings)
    model, processor = models_of[repr(model_settings)]
    train_rows, held_out = data.load()
    trainer = stage[1](copy.deepcopy(model), settings, train_rows, held_out, processor)
    trainer.train()
    steps = [log for log in trainer.state.log_history if "loss" in log]
    assert len(steps) == 2
    for log in steps:
        assert all(math.isfinite(value) for value in log.values()), log
        assert log["loss"] > 0 and log["grad_norm"] > 0
    return trainer, steps


@pytest.mark.parametrize("name", PRETRAINING)
def test_pretraining(name, world, tmp_path):
    _, steps = train(RECIPES[name], world, tmp_path)
    values = read_recipe(RECIPES[name])
    weights = {"contrastive": 1.0, **{key.removesuffix("_weight"): weight for key, weight in values.items()
                                      if key.endswith("_weight")}}  # fmt: skip
    terms = {term for term in ("contrastive", "next_token", "mixed", "distillation", "norm") if weights.get(term)}
    for i, log in enumerate(steps):
        logged = {key.removeprefix("loss_") for key in log if key.startswith("loss_")}
        assert terms <= logged, (terms, logged)
        assert not {"contrastive", "next_token", "mixed", "distillation", "norm"} & logged - terms
        assert sum(weights[term] * log[f"loss_{term}"] for term in terms) == pytest.approx(
            log["loss"], rel=1e-3, abs=1e-5
        )
        if "contrastive" in terms:
            schedule = re.sub(r" \d+:", " 1:", values.get("layer_schedule", f"0:{values['layers']}"))
            layers = [at for start, at in parse_layer_schedule(schedule, DEPTH) if start <= i][-1]
            assert {int(key.rpartition("_")[2]) for key in logged if key.startswith("layer_")} == set(layers)
        assert ("temperature" in log) == bool(values.get("temperature_learned"))
        assert ("weight_layer_0" in log) == ("layer_weights" in values or "layer_ramp" in values)
        if "text_bank" in values or "hard_negatives" in values:
            assert log["extra_texts"] > 0


def test_frozen_parts_in_training_mode(world, tmp_path):
    trainer, _ = train(RECIPES["paper/contr-wasser-all-as-published"], world, tmp_path)
    assert trainer.args.similarity == "wasserstein_geomloss"
    assert trainer.headless.speech_encoder.training and trainer.headless.language_model.training
    trainer.save_model(str(tmp_path / "saved"))
    for settings, training in ((ModelArguments(str(tmp_path / "saved")), True), (
        ModelArguments(str(world / "pretrained")), False), (
        ModelArguments(str(world / "pretrained"), frozen_in_train_mode=True), True)):  # fmt: skip
        model, _ = load_model(settings, trainer.args)
        assert model.train().model.speech_encoder.training == training


@pytest.mark.parametrize("name", FINE_TUNING)
def test_fine_tuning(name, world, tmp_path):
    trainer, _ = train(RECIPES[name], world, tmp_path)
    values = read_recipe(RECIPES[name])
    evaluated = trainer.evaluate()
    assert evaluated["eval_loss"] > 0
    assert ("eval_asr_wer" in evaluated) == values.get("predict_with_generate", True)
    trained = {
        name.partition("lora_")[1] or "projector" for name, p in trainer.model.named_parameters() if p.requires_grad
    }
    assert trained == ({"projector", "lora_"} if values.get("lora_rank") else {"projector"})
    assert len(trainer.train_rows) == (6 if "train_fraction" in values else 12)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_small_recipe_on_the_real_models(tmp_path, monkeypatch, capsys):
    """The two commands of `recipes/small`, from an empty folder."""
    monkeypatch.chdir(tmp_path)
    assert main(["fetch"]) == 0
    assert "data/small/train.jsonl: 435 rows" in capsys.readouterr().out
    assert main(["pretrain", "--config", str(RECIPES["small/contr-cos-all"]), "--max_steps", "2"]) == 0
    state = json.loads(Path("runs/small/contr-cos-all/trainer_state.json").read_text())
    assert state["global_step"] == 2
    evaluated = json.loads(Path("runs/small/contr-cos-all/eval_results.json").read_text())
    assert {f"eval_loss_layer_{layer}" for layer in (0, 5, 10, 15, 20, 25, 30)} <= set(evaluated)


# ---- the files -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RECIPES)
def test_published_settings(name):
    """Stated here once more, so that no change of a shared base can alter them unseen."""
    values = read_recipe(RECIPES[name])
    assert values["output_dir"] == f"runs/{name}"  # no two recipes overwrite each other
    assert RECIPES[name].name in (ROOT / "docs" / "paper_index.md").read_text()
    kind = FineTuningArguments if name in FINE_TUNING else ContrastiveArguments
    arguments = ["--config", str(RECIPES[name]), "--use_cpu", "true"]
    _, data, settings = parse_settings([ModelArguments, DataArguments, kind], arguments, "test", "")
    assert settings.weight_decay == 0 and settings.optim.startswith("adamw_torch")
    if name.startswith("paper/"):
        assert (settings.learning_rate, settings.warmup_steps) == (1e-4, 0.03)
        assert settings.lr_scheduler_type == "cosine" and settings.gradient_checkpointing
        shape = (settings.num_train_epochs, settings.per_device_train_batch_size, settings.gradient_accumulation_steps)
        assert shape == ((2, 4, 5) if kind is FineTuningArguments else (5, 10, 2))
        if kind is ContrastiveArguments:
            assert (settings.temperature, settings.prefix, settings.gather_negatives) == (0.1, "", False)
            assert not settings.symmetric and (data.minimum_seconds, data.maximum_seconds) == (1, 45)
        else:
            assert settings.lora_rank == 0 and data.prompts == "drawn"
            assert (data.minimum_seconds, data.maximum_seconds) == (1, 45 if name.endswith("asr") else 150)


def test_the_papers_layers_and_similarities():
    for name in ("cos", "wasser"):
        for layers, expected in (("emb", [0]), ("all", [0, 5, 10, 15, 20, 25, 32])):
            values = read_recipe(RECIPES[f"paper/contr-{name}-{layers}"])
            assert parse_layer_schedule(f"0:{values['layers']}", DEPTH) == [(0, expected)]
            assert values["similarity"] == {"cos": "cosine", "wasser": "wasserstein"}[name]


def test_every_row_has_both_sizes():
    paper, small = (
        {name.partition("/")[2] for name in RECIPES if name.startswith(size)} for size in ("paper", "small")
    )
    assert paper - small == {"contr-cos-all-giga", "contr-wasser-all-as-published"}
    assert small - paper == {"contr-cos-all-29-percent"}


def test_small_recipes_have_the_quick_starts_projector():
    for name in ("contr-cos-all", "finetune-no-pretraining"):
        assert read_recipe(RECIPES[f"small/{name}"])["projector"] == PROJECTOR


def write(folder, **files):
    for name, text in files.items():
        path = folder / f"{name.replace('__', '/')}.yaml"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    return path


def test_a_recipe_builds_on_others(tmp_path):
    top = write(
        tmp_path,
        common="learning_rate: 1.0\nlayers: emb\nsymmetric: true\nprojector: {num_queries: 2, hidden_size: 8}",
        base__stage="base: ../common.yaml\nlearning_rate: 2.0\ntext_model: t\nspeech_model: s",
        top="base: base/stage.yaml\nlayers: all\nsymmetric: null\nprojector: {num_queries: 3}\ntrain_data: d",
    )
    model, _, settings = parse(*("--config", str(top), "--use_cpu", "true", "--layers", "0,1"))
    assert (settings.learning_rate, settings.layers, settings.symmetric) == (2.0, "0,1", False)
    assert model.projector == {"num_queries": 3}  # a value is replaced as a whole
    assert model.text_model == "t"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"a": "base: a.yaml"}, "a.yaml, base .*a.yaml: it builds on itself"),
        ({"b": "base: folder/../a.yaml", "folder__c": "", "a": "base: b.yaml"}, "a.yaml, base .*b.yaml, base .*a.yaml: it"),
        ({"a": "base: none.yaml"}, "a.yaml, base .*none.yaml: No such file"),
        ({"b": "- 1", "a": "base: b.yaml"}, "a.yaml, base .*b.yaml holds a list"),
        ({"b": "c: [", "a": "base: b.yaml"}, "a.yaml, base .*b.yaml is not YAML"),
        ({"b": "learning_rat: 1", "a": "base: b.yaml"}, "a.yaml, base .*b.yaml: there is no .*Did you mean `learning_rate`"),
        ({"a": "base: [b.yaml, c.yaml]"}, "must be the path of one recipe"),
    ],
)  # fmt: skip
def test_bases_that_make_no_sense(files, message, tmp_path):
    with pytest.raises(UsageError, match=message):
        parse(*BASE, "--config", str(write(tmp_path, **files)))


def test_a_fraction_of_the_rows(world):
    def ids(fraction):
        data = DataArguments(
            str(world / "train.jsonl"), eval_data=str(world / "held-out.jsonl"), train_fraction=fraction
        )
        return [row["id"] for row in data.load()[0]]

    whole, half, little = ids(1.0), ids(0.5), ids(0.01)
    assert (len(whole), len(half), len(little)) == (12, 6, 1)
    assert set(little) < set(half) < set(whole) and half == ids(0.5)
    for fraction in (0.0, -1.0, 1.5, float("nan")):
        with pytest.raises(UsageError, match="above 0 and at most 1"):
            ids(fraction)
    stream, _ = DataArguments(str(world / "train.jsonl"), streaming=True, train_fraction=0.5).load()
    assert {row["audio"] for row in stream} < {
        row["audio"] for row in DataArguments(str(world / "train.jsonl")).load()[0]
    }


def parse(*arguments):
    return parse_settings([ModelArguments, DataArguments, ContrastiveArguments], [*arguments], "test", "")


BASE = ("--model", "m", "--train_data", "d", "--use_cpu", "true")


def test_values_of_every_kind(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(
        'speech_model: s\ntext_model: t\ntrain_data: d\nprojector: {num_queries: 2}\nlearning_rate: 1e-3\nprefix: "-"\n'
        "symmetric: true\nlayers: -1\nreport_to: [none]\nmax_grad_norm: null\nuse_cpu: true\n"
    )
    model, _, settings = parse("--config", str(path), "--learning_rate", "2e-3")
    assert model.projector == {"num_queries": 2}
    assert (settings.learning_rate, settings.prefix, settings.symmetric, settings.layers) == (2e-3, "-", True, "-1")
    assert settings.max_grad_norm == 1.0
    model, _, _ = parse(
        "--speech_model=s", "--text_model=t", "--train_data=d", "--use_cpu=true", '--projector={"num_queries": 3}'
    )
    assert model.projector == {"num_queries": 3}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--learning_rat", "1"), "Did you mean `--learning_rate`"),
        (("--layer", "emb"), "--layer"),  # no abbreviations
        (("--learning_rate", "fast"), "invalid float"),
        (("--layers", "deep"), "use 'emb', 'all'"),
        (("--layer_schedule", "5:emb"), "begin at step 0"),
        (("--temperature", "0"), "above 0"),
        (("--speech_layer", "3"), "is for a new model"),
        (("--text_model", "t"), "Give either"),
        (("--dtype", "float7"), "use float32"),
        (("--projector", "{"), "not JSON"),
        (("--projector", '{"queries": 3}'), "num_queries"),
        (("--config", "nowhere.yaml"), "No such file"),
        (("--config",), "needs the path"),
        (("--config", "base.yaml", "--config", "mine.yaml"), "--config is there twice"),
    ],
)
def test_what_makes_no_sense_is_a_usage_error(arguments, message):
    with pytest.raises(UsageError, match=message):
        parse(*BASE, *arguments)


def test_recipes_that_make_no_sense(tmp_path):
    path = tmp_path / "r.yaml"
    for text, message in (
        ("learning_rat: 1", "no setting `learning_rat`. Did you mean `learning_rate`"),
        ("- a", "holds a list"),
        ("a: [", "is not YAML"),
        ("learning_rate: fast", "invalid float"),
    ):
        path.write_text(text)
        with pytest.raises(UsageError, match=message.replace("[", r"\[")):
            parse(*BASE, "--config", str(path))
    path.write_text("")
    assert read_recipe(path) == {}
