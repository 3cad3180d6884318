"""Code of a LoTLIP checkpoint: configuration, model, tokenizer and processor."""
