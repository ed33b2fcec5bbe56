"""A benchmark asked in the middle of training: the same questions every time, shared out over the ranks."""

from __future__ import annotations

from cobra.api import Cobra
from cobra.config import ValidationConfig
from cobra.errors import DataError
from cobra.eval import engine
from cobra.eval.benchmark import Benchmark, Prediction
from cobra.models.vlm import CobraVLM
from cobra.ranks import Ranks
from cobra.text.tokenizer import Tokenizer


class Validation:
    """Asks the model that is being trained itself; no second copy is made, nothing is written."""

    def __init__(self, benchmark: Benchmark, config: ValidationConfig) -> None:
        """Choose the questions.

        Raises:
            DataError: the benchmark's files or images are missing.
        """
        self.benchmark, self.batch_size = benchmark, config.batch_size
        self.questions = engine.select(benchmark.some_questions(), config.limit)
        missing = [question.image for question in self.questions if not question.image.is_file()]
        if missing:
            raise DataError(f"validation: {len(missing)} images of {benchmark.name} are missing, such as {missing[0]}.")

    def __call__(self, model: CobraVLM, tokenizer: Tokenizer, ranks: Ranks) -> dict[str, float]:
        """Return `validation/<benchmark>` in percent. Leaves the model in evaluation mode."""
        vlm = Cobra(model, tokenizer, name="in training")
        mine = engine.share(self.questions, ranks)
        answers: dict[str, Prediction] = {}
        asking = engine.Engine(vlm, self.batch_size)
        for found in asking.answers(engine.group_by_image(mine, self.batch_size)):
            answers |= found
        together: dict[str, Prediction] = {}
        for part in ranks.gather(answers):
            together |= part
        return {f"validation/{self.benchmark.name}": self.benchmark.score(together, self.questions).overall.percent}
