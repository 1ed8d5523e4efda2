"""A disk that is full while a training run saves. (test_cli.py has a whole run.)"""

import pytest
import torch
from safetensors.torch import save_file
from tiny import full_disk, tiny_tokenizer
from tiny_training import contrastive, tiny_rows

from speechllm import CheckpointError
from speechllm.saving import explained_saving


WRITERS = {
    "text": lambda path: path.write_text("x" * 9_000),
    "torch": lambda path: torch.save(torch.zeros(9_000), path),
    "safetensors": lambda path: save_file({"x": torch.zeros(9_000)}, path),
    "tokenizer": lambda path: tiny_tokenizer().save_pretrained(path),
}


@pytest.mark.parametrize("kind", WRITERS)
def test_every_writer_is_explained(tmp_path, kind):
    with full_disk(room=2_000), pytest.raises(CheckpointError) as caught, explained_saving(tmp_path / "run"):
        WRITERS[kind](tmp_path / "file")
    message = str(caught.value)
    assert message.startswith(f"Cannot save to {tmp_path / 'run'}: ") and "Free some space" in message
    assert "\n" not in message


@pytest.mark.parametrize(
    "error",
    [CheckpointError("said"), RuntimeError("shapes"), OSError("said"), ConnectionError(104, "reset"), KeyError()],
)
def test_other_errors_pass(error):
    with pytest.raises(type(error)) as caught, explained_saving("run"):
        raise error
    assert caught.value is error


def test_the_list_of_what_was_set_aside(tmp_path):
    rows = [{**row, "id": f"{i} {'x' * 500}", "text": ""} for i, row in enumerate(tiny_rows(4))]
    trainer = contrastive(tmp_path / "run", train=tiny_rows(4) + rows)
    with full_disk(room=2_000), pytest.raises(CheckpointError, match="Cannot save to .*run: File too large"):
        trainer.write_set_aside()
