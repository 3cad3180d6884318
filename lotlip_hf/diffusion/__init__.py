"""LoTLIP in diffusion pipelines."""
