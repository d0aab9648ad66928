"""Muon against LAPACK's singular values, and torch's own AdamW for what is not a matrix."""

import pytest
import torch

from models import create_model
from muon import Muon, is_inner, orthogonalized


@pytest.mark.parametrize("shape", [(48, 200), (200, 48), (64, 64)])
def test_singular_values_come_near_one_and_vectors_stay(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    ours = orthogonalized(matrix)
    turned = left.T @ ours @ right.T                        # diagonal, if the vectors are the same
    spread = torch.diag(turned)[values > 0.05 * values.max()]
    assert 0.6 < spread.min() and spread.max() < 1.3
    assert (turned - torch.diag(torch.diag(turned))).abs().max() < 1e-3


@pytest.mark.parametrize("rank", [3, 40])
def test_the_steps_on_the_square_equal_those_on_the_matrix(rank):
    """Newton-Schulz as it is published, on the matrix itself and in float64."""
    generator = torch.Generator().manual_seed(0)
    matrix = (torch.randn(40, rank, generator=generator)
              @ torch.randn(rank, 100, generator=generator))
    x = matrix.double() / matrix.norm()
    for _ in range(5):
        square = x @ x.T
        x = 3.4445 * x - 4.7750 * square @ x + 2.0315 * square @ square @ x
    torch.testing.assert_close(orthogonalized(matrix), x.float(), atol=1e-3, rtol=1e-3)
    assert orthogonalized(matrix.double()).dtype == torch.float64


def test_a_tiny_gradient_gives_as_long_a_step_as_a_large_one():
    matrix = torch.randn(40, 60, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(orthogonalized(1e-4 * matrix), orthogonalized(1e4 * matrix), atol=1e-4)


def test_what_is_no_matrix_steps_as_adamw():
    """Norms, biases, and the first and last layers: equal to torch.optim.AdamW over ten steps."""
    torch.manual_seed(0)
    ours = [torch.nn.Parameter(torch.randn(shape)) for shape in ((7,), (64, 4, 3, 3), (10, 64))]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    settings = dict(lr=1e-2, betas=(0.8, 0.95), weight_decay=0.1)
    optimizers = Muon(ours, **settings), torch.optim.AdamW(theirs, **settings)
    for _ in range(10):
        for p, q in zip(ours, theirs):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    assert not any(map(is_inner, ours))
    assert all(torch.allclose(p, q, atol=1e-6) for p, q in zip(ours, theirs))


def test_the_table_of_many_classes_goes_with_adam():
    model = create_model("attention", base_channels=32, groups=8, num_classes=40)
    inner = {name for name, p in model.named_parameters() if is_inner(p)}
    assert "class_emb.weight" not in inner and "time_mlp.1.weight" in inner, inner


def test_a_step_of_a_convolution_has_adams_size():
    p = torch.nn.Parameter(torch.zeros(64, 64, 3, 3))
    p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(0))
    Muon([p], lr=0.01).step()
    # singular values of 0.7 to 1.2
    assert float(p.detach().square().mean().sqrt()) == pytest.approx(0.2 * 0.01, rel=0.3)


def test_a_matrix_steps_by_its_nesterov_momentum():
    """The published rule by a plain loop (Jordan et al. 2024): the average of the gradients, one
    more step towards the newest, made even; here with singular values of exactly 1."""
    random = torch.Generator().manual_seed(0)
    p = torch.nn.Parameter(torch.zeros(32, 48))
    optimizer, average = Muon([p], lr=0.1, momentum=0.8), torch.zeros(32, 48)
    for _ in range(4):
        p.grad = torch.randn(32, 48, generator=random)
        average = 0.8 * average + 0.2 * p.grad
        left, _, right = torch.linalg.svd(0.8 * average + 0.2 * p.grad, full_matrices=False)
        before = p.detach().clone()
        optimizer.step()
        step, wanted = before - p.detach(), 0.1 * 0.2 * 48**0.5 * left @ right
        likeness = float((step * wanted).sum() / (step.norm() * wanted.norm()))
        assert likeness > 0.98 and float(step.norm() / wanted.norm()) == pytest.approx(1, abs=0.2)
