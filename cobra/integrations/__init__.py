"""Other people's models below Cobra's evaluation, and Cobra below other people's evaluations."""
