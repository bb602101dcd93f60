"""Trains with an evaluator that is no part of the package: `outside_evaluator.py --option ...`."""

import sys
from collections.abc import Iterator, Sequence

import torch

from unic_ds import dist, train
from unic_ds.evaluate.features import FILLER, EvalData, Model
from unic_ds.evaluate.registry import EVALUATORS
from unic_ds.evaluate.table import Score


class PatchRank:
    """Effective rank of the patch tokens (RankMe, arXiv 2210.02885): it needs no labels."""

    model_needs = frozenset({"patch"})
    data_needs = frozenset()

    def evaluate(self, models: Sequence[Model], data: EvalData) -> Iterator[Score]:
        """Yield `patch_rank` of each model, from a pass of its own over the validation images."""
        for model in models:
            square_CC, images = torch.zeros(()), torch.zeros(())
            for batch in data.val.batches([model.size]):
                counted_B = torch.from_numpy(batch.place_B != FILLER)
                patch_BNC = model.encode(batch.images[model.size], self.model_needs).patch_BNC
                patch_MC = patch_BNC[counted_B].flatten(0, 1).detach().double()
                square_CC = square_CC + patch_MC.T @ patch_MC
                images += counted_B.sum()
            value_C = torch.linalg.eigvalsh(dist.all_reduce_sum(square_CC)).clamp(min=0).sqrt()
            part_C = value_C / value_C.sum() + 1e-7
            rank = float((-part_C * part_C.log()).sum().exp())
            count = int(dist.all_reduce_sum(images))
            yield Score(model.name, "patch_rank", rank, f"patch_rank of {count} validation images")


if __name__ == "__main__":
    EVALUATORS["patch_rank"] = PatchRank()
    sys.exit(train.main(sys.argv[1:]))
