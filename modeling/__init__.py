"""What a LoTLIP checkpoint is: configuration, model, tokenizer and processor."""
