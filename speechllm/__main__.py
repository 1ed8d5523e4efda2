"""`python -m speechllm`, for `accelerate launch -m speechllm pretrain ...`."""

import sys

from .cli import main


sys.exit(main())
