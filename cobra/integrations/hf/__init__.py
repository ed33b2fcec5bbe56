"""Cobra in Hugging Face's form: folders that transformers loads without this package, and back.

Importing this package registers the model with transformers, so that `AutoModelForImageTextToText` and `AutoProcessor`
build exported models from the code here, without `trust_remote_code`. `import cobra` alone does not: it would have to
import transformers, which takes seconds, for everybody.
"""

from __future__ import annotations

from cobra.errors import ConfigError


def _register() -> None:
    try:
        from transformers import (
            AutoConfig,
            AutoImageProcessor,
            AutoModel,
            AutoModelForImageTextToText,
            AutoProcessor,
        )

        from cobra.integrations.hf.configuration_cobra import CobraConfig
        from cobra.integrations.hf.image_processing_cobra import CobraImageProcessor
        from cobra.integrations.hf.modeling_cobra import CobraMambaForConditionalGeneration
        from cobra.integrations.hf.processing_cobra import CobraProcessor
    except ImportError as error:
        raise ConfigError(
            f"Hugging Face's form needs transformers 5.23 or newer: pip install 'cobra-vlm[transformers]' ({error})."
        ) from None
    AutoConfig.register(CobraConfig.model_type, CobraConfig)
    for auto in (AutoModel, AutoModelForImageTextToText):
        auto.register(CobraConfig, CobraMambaForConditionalGeneration)
    AutoImageProcessor.register(CobraConfig, CobraImageProcessor)
    AutoProcessor.register(CobraConfig, CobraProcessor)


_register()
