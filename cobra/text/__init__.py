"""Tokenizer and prompt formats."""
