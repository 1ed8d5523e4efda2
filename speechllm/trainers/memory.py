"""Memory that training has freed, given back to the system."""

import ctypes
import sys

from transformers import TrainerCallback


class GiveMemoryBack(TrainerCallback):
    """Tensors of ever-changing sizes leave the C library's heap in pieces, gigabytes in all; it gives them back if asked."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % 5 == 0:
            self.on_train_end()

    def on_train_end(self, *_, **__):
        if sys.platform == "linux":
            ctypes.CDLL(None).malloc_trim(0)
