"""The same results on a GPU. Skipped where there is none."""

import pytest
import torch

import saddlepoint as sp

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


def test_statuses_and_costs_are_those_of_the_cpu():
    digits = sp.data.load("digits")
    x, y = digits.test.take(100).x, digits.test.take(100).y
    for attack in (sp.attacks.PGD(steps=10), sp.attacks.NIFGSM(steps=5), sp.attacks.Restarts(sp.attacks.UniformNoise(), 3)):
        for threat in (sp.Linf(0.1), sp.L2(0.8)):
            net = sp.zoo.build("mlp", in_shape=(1, 8, 8))
            trained = sp.train(net, digits.train.take(500), epochs=2).model
            cpu = sp.attack(trained, x, y, attack, threat)
            gpu = sp.attack(sp.Model(net.cuda()), x.cuda(), y.cuda(), attack, threat, batch_size=32)
            assert gpu.adversarial.is_cuda
            assert (cpu.status == gpu.status).mean() >= 0.98  # arithmetic differs: a sample on the edge may tip
            assert bool(threat.contains(gpu.adversarial, x.cuda()).all())
