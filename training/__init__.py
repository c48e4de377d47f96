"""Data, one step, the loop that repeats it, LoRA, fine-tuning and GRPO."""
