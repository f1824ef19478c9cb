"""The language models of the study: OpenELM (ours) and Qwen2 (transformers')."""
