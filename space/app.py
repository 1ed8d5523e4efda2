"""The Space on the Hub: the page of `speechllm demo` for the checkpoint that the Space's variable `MODEL_ID` names."""

import os
import sys


if __name__ == "__main__":
    if not os.environ.get("MODEL_ID"):
        sys.exit("MODEL_ID is not set: name a checkpoint, owner/name, among the Space's variables.")
    from speechllm.hub.demo import launch_demo

    launch_demo(
        os.environ["MODEL_ID"],
        host=os.environ.get("GRADIO_SERVER_NAME", "127.0.0.1"),  # Spaces set 0.0.0.0
        port=int(os.environ.get("GRADIO_SERVER_PORT", "7860")),
    )
