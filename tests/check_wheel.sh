#!/usr/bin/env bash
# check_wheel.sh WHEEL: the wheel holds all it needs, and imports where neither the project nor its tools are installed.
# The heavy dependencies come from the project's environment, by path: only the wheel itself is under test.
set -euo pipefail
wheel=$(realpath "$1")
project=$(realpath "$(dirname "$0")/..")
room=$(mktemp -d)
trap 'rm -rf "$room"' EXIT
"$project/.venv/bin/python" -m venv "$room/env"
"$room/env/bin/python" -m pip install -q --no-deps --disable-pip-version-check "$wheel"
site=$("$project/.venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
# A plain path entry: .pth files in it (such as the project's own editable install) are not followed.
cd "$room"
PYTHONPATH="$site" "$room/env/bin/python" - <<'PYTHON'
import importlib
import pathlib
import pkgutil

import speechllm

assert str(pathlib.Path(speechllm.__file__)).startswith(str(pathlib.Path.cwd())), speechllm.__file__
for module in pkgutil.walk_packages(speechllm.__path__, "speechllm."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
package = pathlib.Path(speechllm.__file__).parent
for name in ("quickstart/report.html.jinja", "evaluation/page.css", "evaluation/report.html.jinja", "hub/model_card.md",
             "reproduction/results.html.jinja", "evaluation/metrics/modules/wer/wer.py",
             "evaluation/metrics/english_spellings.json", "evaluation/metrics/english_spellings.LICENSE"):
    assert (package / name).is_file(), f"package data is missing: {name}"
print("wheel ok:", speechllm.__version__)
PYTHON
# What every user has must do without what only the extras bring.
PYTHONPATH="$site" "$room/env/bin/python" - <<'PYTHON'
import importlib
import sys

EXTRAS = {"G722", "evaluate", "geomloss", "gguf", "gradio", "multipart", "ot", "sacrebleu", "starlette", "uvicorn"}
for name in ("speechllm", "speechllm.cli", "speechllm.objectives", "speechllm.trainers", "speechllm.training",
             "speechllm.data.sources", "speechllm.hub.publishing", "speechllm.pipeline_speechllm"):
    importlib.import_module(name)
    assert not (imported := EXTRAS & set(sys.modules)), f"{name} imports {imported}, which an extra brings"
PYTHON
PYTHONPATH="$site" "$room/env/bin/speechllm" --version
