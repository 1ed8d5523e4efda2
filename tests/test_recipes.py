"""Every recipe parses, and the index of the paper knows it."""

from pathlib import Path

import pytest

from speechllm.objectives import parse_layer_schedule
from speechllm.recipes import UsageError, parse_settings, read_recipe
from speechllm.trainers import ContrastiveArguments, FineTuningArguments
from speechllm.training import DataArguments, ModelArguments


ROOT = Path(__file__).parent.parent
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_parses(path, tmp_path):
    kind = FineTuningArguments if path.stem.startswith("finetune") else ContrastiveArguments
    arguments = ["--config", str(path), "--output_dir", str(tmp_path), "--use_cpu", "true"]
    model, data, settings = parse_settings([ModelArguments, DataArguments, kind], arguments, "test", "")
    assert settings.output_dir == str(tmp_path)
    assert (settings.learning_rate, settings.warmup_steps, settings.weight_decay) == (1e-4, 0.03, 0.0)
    assert data.maximum_seconds == 45 and model.dtype == "bfloat16"
    if kind is ContrastiveArguments:
        assert (settings.num_train_epochs, settings.per_device_train_batch_size) == (5, 10)
        assert settings.gradient_accumulation_steps == 2
        layers = parse_layer_schedule(settings.layer_schedule or f"0:{settings.layers}", 32)[-1][1]
        assert layers == {"emb": [0], "layer-k": [15]}.get(
            path.stem.removeprefix("contr-cos-"), [0, 5, 10, 15, 20, 25, 32]
        )
        assert settings.prefix == ("auto" if "curriculum" in path.stem else "")
    assert path.name in (ROOT / "docs" / "paper_index.md").read_text()


def test_there_are_recipes():
    assert len(RECIPES) >= 5


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
