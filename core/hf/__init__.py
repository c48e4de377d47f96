"""Folders of other people: weights, adapters and tokenizers in the formats of Hugging Face."""
