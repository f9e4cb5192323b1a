"""Llama's tokenizer: SentencePiece for training and data, and an export whose ids are the same, to the last text."""
