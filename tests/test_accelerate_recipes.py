"""Every file in recipes/accelerate is one that `accelerate launch` accepts."""

from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser


FOLDER = Path(__file__).parent.parent / "recipes" / "accelerate"


@pytest.mark.parametrize(("name", "kind"), [("ddp", "MULTI_GPU"), ("fsdp2", "FSDP"), ("deepspeed_zero2", "DEEPSPEED")])
def test_accelerate_reads_it(name, kind):
    path = FOLDER / f"{name}.yaml"
    config = load_config_from_file(str(path))
    assert config.distributed_type == kind and config.num_processes == 8 and config.mixed_precision == "bf16"
    arguments = ["--config_file", str(path), "-m", "speechllm", "pretrain"]
    launched, defaults, _ = _validate_launch_command(launch_command_parser().parse_args(arguments))
    assert launched.num_processes == 8 and launched.mixed_precision == "bf16"
    assert launched.use_fsdp == (kind == "FSDP") and launched.use_deepspeed == (kind == "DEEPSPEED")
    if kind == "FSDP":
        assert launched.fsdp_version == 2 and launched.fsdp_auto_wrap_policy == "TRANSFORMER_BASED_WRAP"
        assert launched.fsdp_reshard_after_forward and launched.fsdp_state_dict_type == "FULL_STATE_DICT"
    if kind == "DEEPSPEED":
        assert launched.zero_stage == 2


def test_every_file_is_tested():
    assert {path.stem for path in FOLDER.glob("*.yaml")} == {"ddp", "fsdp2", "deepspeed_zero2"}
