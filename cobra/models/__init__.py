"""Modules and weights; nothing here knows of training or files of text."""
