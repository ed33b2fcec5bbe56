"""Scoring rules: pure functions of answers, without files and without torch."""
