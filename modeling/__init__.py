"""What a LoTLIP checkpoint is: configuration, model, tokenizer and processor."""

# First, since the modules here import them: lotlip_hf registers these as soon as the Auto classes are complete.
from transformers import AutoModel, AutoProcessor, AutoTokenizer  # noqa: F401
