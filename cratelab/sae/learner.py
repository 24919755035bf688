"""One step of training an auto-encoder, and the rebirth of its dead features."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cratelab.devices import exact
from cratelab.sae.architectures import keep_largest
from cratelab.sae.autoencoder import Sae


class Learner:
    """An auto-encoder, its optimizer, and for how many tokens each feature has been silent."""

    def __init__(self, sae: Sae, learning_rate: float):
        self.sae, self.idle = sae, torch.zeros_like(sae.threshold)
        self.optimizer = torch.optim.Adam(sae.parameters(), lr=learning_rate, fused=True)

    def step(self, x: Tensor) -> Tensor:
        """One update on the tokens (n, d_in); the loss before it."""
        sae = self.sae
        loss, code = self.loss(x)
        self.optimizer.zero_grad()
        loss.backward()
        with torch.no_grad():
            along = (sae.W_dec.grad * sae.W_dec).sum(1, keepdim=True)
            sae.W_dec.grad -= along * sae.W_dec
            self.optimizer.step()
            F.normalize(sae.W_dec, dim=1, out=sae.W_dec)
            self.idle += len(x)
            self.idle[(code > 0).any(0)] = 0
        return loss.detach()

    def loss(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What `train_saes` minimises (eq-10-2), and the code (n, m)."""
        sae = self.sae
        code = sae.architecture.code_in_training(sae.pre_activations(x), sae.threshold)
        size = x.square().sum(1)
        errors = (sae.decode(code) - x).square().sum(1)
        least = float(size.mean()) / 100
        loss = (errors / size.clamp(min=least if least > 1e-12 else 1.0)).mean()  # a silent batch has no scale
        return loss + sae.architecture.penalty(code), code

    def keep_largest(self, code: Tensor) -> Tensor:
        """`architectures.keep_largest` with this auto-encoder's k and threshold."""
        return keep_largest(code, self.sae.config.k, self.sae.threshold)

    def n_dead(self, patience: int) -> int:
        """How many features have been silent for `patience` tokens."""
        return int((self.idle >= patience).sum())

    @torch.no_grad()
    def resample(self, x: Tensor, patience: int, draw: np.random.Generator) -> None:
        """Let features silent for `patience` tokens point at inputs that are badly reconstructed."""
        dead = (self.idle >= patience).nonzero()[:, 0]
        errors = exact((self.sae(x) - x).square().sum(1))
        share = errors.square() / errors.square().sum()
        if not len(dead) or not share.isfinite().all():  # nothing to mend, or no error
            return
        chosen = torch.from_numpy(draw.choice(len(x), len(dead), p=share.cpu().numpy())).to(x.device)
        rows = F.normalize(x[chosen] - self.sae.b_dec, dim=1)
        live = self.sae.W_enc.norm(dim=0)[self.idle < patience]
        self.sae.W_dec[dead] = rows
        self.sae.W_enc[:, dead] = 0.2 * (live.mean() if len(live) else 1.0) * rows.mT
        self.sae.b_enc[dead] = 0
        self.idle[dead] = 0
        for parameter, state in self.optimizer.state.items():
            for moment in state["exp_avg"], state["exp_avg_sq"]:
                if parameter is not self.sae.b_dec:
                    moment[(slice(None), dead) if parameter is self.sae.W_enc else dead] = 0

    def is_finite(self) -> bool:
        """Whether all of the state is."""
        return all(bool(tensor.isfinite().all()) for tensor in self.tensors().values())

    def tensors(self) -> dict[str, Tensor]:
        """All of the state: the auto-encoder, Adam's moments, and the silence."""
        held = self.sae.state_dict() | {"idle": self.idle}
        moments = self.optimizer.state_dict()["state"]
        return held | {f"adam.{i}.{name}": value for i in moments for name, value in moments[i].items()}

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Take what `tensors` gave."""
        self.sae.load_state_dict({name: tensors[name] for name in self.sae.state_dict()})
        self.idle.copy_(tensors["idle"])
        names = "step", "exp_avg", "exp_avg_sq"
        state = {i: {name: tensors[f"adam.{i}.{name}"] for name in names} for i in range(4)}
        self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": state})
