"""Muon: a step in which every direction of a weight matrix moves equally far (Jordan et al. 2024).

Adam scales each weight alone; the update of a matrix then is mostly a few strong directions. Muon
takes the momentum of the whole matrix and makes all of its singular values alike, so that the weak
directions learn, too. Only for matrices of at least 32 rows and columns, which the inner
convolutions and linear layers are. The rest goes with Adam, in the same optimizer: biases, norms,
the table of classes, of which a batch sees a few rows only, and the first and the last layer where
the image has fewer channels than that.
"""

import torch


def orthogonalized(matrix, steps=5):
    """The matrix with most of its singular values brought near 1 (0.7 to 1.2), its singular vectors
    kept: [M, N]. Very small values only grow, about 3.4-fold a step.

    An odd polynomial of the values, steep at zero, applied again and again instead of a
    decomposition (Newton-Schulz in the coefficients of Jordan et al. 2024). Each step multiplies x
    from the left by a polynomial of x x^T, so that all of them can work on that small square alone,
    and on x once, at the end. In float32: rounded to bfloat16, small eigenvalues of the square turn
    negative and grow twelvefold a step.
    """
    wide = matrix.shape[0] <= matrix.shape[1]
    x = (matrix if wide else matrix.T).float()
    x = x / (x.norm() + 1e-7)                                   # now all values lie in 0..1
    gram, product = x @ x.T, None
    for k in range(steps):
        factor = torch.addmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
        factor.diagonal().add_(3.4445)
        product = factor if k == 0 else factor @ product        # the result so far is product @ x,
        if k < steps - 1:
            gram = factor @ gram @ factor                       # and its Gram matrix this
    x = product @ x
    return (x if wide else x.T).to(matrix.dtype)


def is_inner(p):
    """Does Muon care for this parameter? A matrix or convolution between wide layers."""
    return p.ndim >= 2 and min(p.shape[:2]) >= 32 and not getattr(p, "is_table", False)


class Muon(torch.optim.Optimizer):
    """Muon for matrices, AdamW for the rest.

    lr: of both; Muon's steps are scaled to the size of Adam's (Liu et al. 2025, section 2.2).
    betas, weight_decay: of AdamW; the decay of both.   momentum: of Muon, in Nesterov's form.
    """

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), weight_decay=0.0, momentum=0.9,
                 eps=1e-8):
        super().__init__(params, dict(lr=lr, betas=betas, weight_decay=weight_decay,
                                      momentum=momentum, eps=eps))

    @torch.no_grad()
    def step(self):
        """One update of all parameters that have a gradient."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                p.mul_(1 - group["lr"] * group["weight_decay"])
                if is_inner(p):
                    update = self._muon(p, group["momentum"])
                else:
                    update = self._adam(p, *group["betas"], group["eps"])
                p.sub_(update, alpha=group["lr"])

    def _muon(self, p, momentum):
        state = self.state[p]
        if not state:
            state["exp_avg"] = torch.zeros_like(p)
        average = state["exp_avg"].lerp_(p.grad, 1 - momentum)
        matrix = p.grad.lerp(average, momentum).flatten(1)      # [out, in * H * W] of a convolution
        return (0.2 * max(matrix.shape) ** 0.5 * orthogonalized(matrix)).view_as(p)

    def _adam(self, p, beta1, beta2, eps):
        state = self.state[p]
        if not state:
            state.update(step=torch.zeros(()), exp_avg=torch.zeros_like(p),
                         exp_avg_sq=torch.zeros_like(p))
        state["step"] += 1
        state["exp_avg"].lerp_(p.grad, 1 - beta1)
        state["exp_avg_sq"].lerp_(p.grad.square(), 1 - beta2)
        mean = state["exp_avg"] / (1 - beta1 ** state["step"].item())
        square = state["exp_avg_sq"] / (1 - beta2 ** state["step"].item())
        return mean / (square.sqrt() + eps)
