"""All evaluators by name; a package of your own adds one by `EVALUATORS["mine"] = Mine()`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from unic_ds.evaluate.comparison import Score
from unic_ds.evaluate.correspondence import Correspondence
from unic_ds.evaluate.depth import Depth
from unic_ds.evaluate.detection import Detection
from unic_ds.evaluate.eval_data import EvalData
from unic_ds.evaluate.evaluator import Evaluator
from unic_ds.evaluate.features import Model
from unic_ds.evaluate.fidelity import Fidelity
from unic_ds.evaluate.knn import KNN
from unic_ds.evaluate.linear import Linear
from unic_ds.evaluate.plugplay import PlugPlay
from unic_ds.evaluate.rankme import RankMe
from unic_ds.evaluate.resolutions import Resolutions
from unic_ds.evaluate.retrieval import Retrieval
from unic_ds.evaluate.robustness import Robustness
from unic_ds.evaluate.segmentation import Segmentation
from unic_ds.evaluate.transfer import Transfer
from unic_ds.evaluate.utility import Utility
from unic_ds.evaluate.zeroshot import ZeroShot
from unic_ds.process import console

EVALUATORS: dict[str, Evaluator] = {
    "knn": KNN(),
    "linear": Linear(),
    "transfer": Transfer("transfer", Linear(), "linear"),
    "transfer_knn": Transfer("transfer_knn", KNN(), "knn"),
    "robustness": Robustness(),
    "retrieval": Retrieval(),
    "zeroshot": ZeroShot(),
    "plugplay": PlugPlay(),
    "teacher": Fidelity(),
    "resolutions": Resolutions(),
    "rankme": RankMe(),
    "utility": Utility(),
    "segmentation": Segmentation(),
    "depth": Depth(),
    "detection": Detection(),
    "correspondence": Correspondence(),
}
"""Name -> evaluator, in the order of `config.evaluation.TASKS`."""


def evaluate_models(
    models: Sequence[Model], data: EvalData, names: Iterable[str] | None = None
) -> list[Score]:
    """Scores of frozen models by the evaluators `names` (None: all), the same on every rank.

    Every rank calls it, after training or at any step: it leaves random states and the training
    stream as they are. Under ZeRO-3 the caller gathers the student's weights first. RuntimeError,
    on every rank, if an evaluation fails on one; ValueError for an unknown name.
    """
    scores: list[Score] = []
    for name in EVALUATORS if names is None else names:
        if name not in EVALUATORS:
            known = ", ".join(EVALUATORS)
            raise ValueError(f"there is no evaluator {name!r}; choose from {known}")
        evaluator = EVALUATORS[name]
        if obstacle := obstacle_of(name, models, data):
            console.say(obstacle)
            continue
        able = [model for model in models if evaluator.model_needs <= model.outputs]
        if others := [model.name for model in models if model not in able]:
            needs = ", ".join(sorted(evaluator.model_needs))
            console.say(f"{name} leaves out models without {needs}: {', '.join(others)}")
        scores += evaluator.evaluate(able, data)
    return scores


def obstacle_of(name: str, models: Sequence[Model], data: EvalData) -> str:
    """A sentence if no model or not all of the data have what an evaluator needs, or ""."""
    evaluator = EVALUATORS[name]
    missing = evaluator.data_needs - data.annotations()
    able = any(evaluator.model_needs <= model.outputs for model in models)
    if not missing and able:
        return ""
    lack = ", ".join(sorted(missing or evaluator.model_needs))
    return f"not evaluated by {name}, which needs {'images' if missing else 'a model'} with {lack}"
