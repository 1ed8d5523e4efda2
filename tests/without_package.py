"""Running a script as it runs on a machine that has a checkpoint and Transformers but not this package."""

import json
import os
import subprocess
import sys


HIDE_PACKAGE = """
import os, sys
sys.path = [p for p in sys.path if not os.path.exists(os.path.join(p or ".", "speechllm"))]
sys.meta_path = [f for f in sys.meta_path if "editable" not in str(f).lower()]
try:
    import speechllm
except ImportError:
    pass
else:
    raise SystemExit("the package is importable: the test would show nothing")
"""


def run_without_package(script: str, folder, *arguments, timeout: float = 900):
    """Run `script` in `folder`, and return what it printed last, as JSON."""
    environment = {**os.environ, "HF_MODULES_CACHE": str(folder / "modules"), "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONPATH", None)
    run = subprocess.run(
        [sys.executable, "-c", HIDE_PACKAGE + script, *map(str, arguments)],
        capture_output=True, text=True, timeout=timeout, env=environment, cwd=folder,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout.splitlines()[-1])
