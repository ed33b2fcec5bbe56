"""The nine benchmarks and a training set in miniature: rendered scenes in the official files, one module each."""

from cobra.data.toy.folder import Toy, prepare

__all__ = ["Toy", "prepare"]
