"""speechllm: give a text LLM ears, cheaply.

Importing the package registers its classes with Transformers' Auto classes, so that checkpoints load without remote
code where it is installed.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMultimodalLM, AutoProcessor

from .audio_speechllm import AudioError, load_audio
from .checkpoint_speechllm import CheckpointError
from .configuration_speechllm import SpeechLLMConfig, SpeechLLMProjectorConfig
from .modeling_speechllm import SpeechLLMForConditionalGeneration, SpeechLLMModel
from .processing_speechllm import SpeechLLMProcessor


__version__ = "0.1.0"

AutoConfig.register("speechllm", SpeechLLMConfig)
for _auto_class in (AutoModel, AutoModelForCausalLM, AutoModelForMultimodalLM):
    _auto_class.register(SpeechLLMConfig, SpeechLLMForConditionalGeneration)
AutoProcessor.register(SpeechLLMConfig, SpeechLLMProcessor)

__all__ = [
    "AudioError",
    "CheckpointError",
    "SpeechLLMConfig",
    "SpeechLLMForConditionalGeneration",
    "SpeechLLMModel",
    "SpeechLLMProcessor",
    "SpeechLLMProjectorConfig",
    "load_audio",
]
