"""Balancers weigh the teachers of each image: losses (T, B) in, coefficients (T, B) out.

The loss of a pair that is not computed is -inf; its coefficient is set to 0 afterwards.
A micro batch's loss is the sum of loss x coefficient; it is averaged over ranks and accumulation.
Coefficients carry no gradient. With B images, T teachers and their weights w (mean 1):

    none      1 / (B T)
    fixed     w_t / (B T)
    dropping  w_t keep_tb / (B (1 + (T - 1)(1 - p))): an image's hardest teacher is kept, others are
              dropped with probability p (Sariyildiz et al., UNIC, arXiv 2408.05088, section 3.3)
              drop.lazy: the hardest is the teacher with the largest running loss, so that the pairs
              are drawn before the teachers run (after DiverseDistill, arXiv 2402.14035)
    adaloss   w_t a_t / (B T), a_t ~ 1 / running loss, mean 1 (Hu et al., arXiv 1708.06832; tried
              on several teachers by AM-RADIO, arXiv 2312.06709)
    famo      w_t a_t / (B T), a_t ~ z_t / last loss, mean 1, z learned so that all losses fall at
              one rate (Liu et al., FAMO, NeurIPS 2023, arXiv 2306.03792)
    mgda      w_t a_t / (B T), a_t of mean 1: the shortest gradient at the student's last features
              (Sener and Koltun, NeurIPS 2018, arXiv 1810.04650)

To add one, give its class a name in `BALANCERS`: that name is a value of `--balance.kind`.
"""

from __future__ import annotations

from unic_ds import config
from unic_ds.losses.balancer import Balancer
from unic_ds.losses.dropping import Dropping, LazyDropping
from unic_ds.losses.loss_balancers import AdaLoss, Famo
from unic_ds.losses.mgda import Mgda

__all__ = ["BALANCERS", "Balancer", "build"]

BALANCERS: dict[str, type[Balancer]] = {
    "none": Balancer,
    "fixed": Balancer,
    "dropping": Dropping,
    "adaloss": AdaLoss,
    "famo": Famo,
    "mgda": Mgda,
}


def build(cfg: config.Config) -> Balancer:
    """The balancer of a run; its `state_dict` belongs in the checkpoint."""
    kind = LazyDropping if cfg.drop.lazy else BALANCERS[cfg.balance.kind]
    return kind.from_config(cfg)
