"""Runs inside COMET's own environment, which knows nothing of this package: `python comet_runner.py request answer`."""

import json
import os
import sys


def main(request_path: str, answer_path: str) -> None:
    from comet import download_model, load_from_checkpoint

    with open(request_path, encoding="utf-8") as file:
        request = json.load(file)
    name = request["model"]
    model = load_from_checkpoint(name if os.path.exists(name) else download_model(name))
    output = model.predict(
        request["segments"], batch_size=request["batch_size"], gpus=request["gpus"], progress_bar=False
    )
    with open(answer_path, "w", encoding="utf-8") as file:
        json.dump([float(score) for score in output.scores], file)


if __name__ == "__main__":
    main(*sys.argv[1:])
