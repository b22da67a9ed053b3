"""The language models behind P and Q: the tiny one, real ones, LoRA, several processes."""
