# Copyright 2026 The tapo_trl authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

import math

import pytest
import torch

from tapo_trl.losses import slrm_loss, tapo_loss


class TestSLRMLoss:
    def test_is_eq_9_in_the_plain_domain(self):
        chosen, rejected = torch.randn(2, 50, dtype=torch.float64)
        for eta in (0.5, 1.0, 3.0):
            losses, _ = slrm_loss(chosen, rejected, eta=eta)
            s_w, s_l = chosen.exp() ** eta, rejected.exp() ** eta
            torch.testing.assert_close(losses, -(s_w / (s_w + s_l)).log())

    def test_survives_scores_that_overflow_in_the_plain_domain(self):
        losses, metrics = slrm_loss(torch.tensor([500.0, -500.0]), torch.tensor([0.0, 0.0]))
        assert losses.tolist() == [0.0, 500.0]
        assert metrics["accuracy"].tolist() == [1.0, 0.0]

    def test_ties_margin_and_smoothing(self):
        zero = torch.zeros(1)
        losses, metrics = slrm_loss(zero, zero)
        assert losses.item() == pytest.approx(math.log(2)) and metrics["accuracy"].item() == 0.5
        assert slrm_loss(zero + 2, zero, margin=zero + 2)[0].item() == pytest.approx(math.log(2))
        smooth = slrm_loss(zero + 2, zero, label_smoothing=0.25)[0].item()
        expected = -0.75 * math.log(1 / (1 + math.exp(-2))) - 0.25 * math.log(1 / (1 + math.exp(2)))
        assert smooth == pytest.approx(expected, rel=1e-6)


class TestTAPOLoss:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_is_ln_2_for_equal_policies(self, dtype):
        zero = torch.zeros(3, dtype=dtype)
        losses, metrics = tapo_loss(zero, zero, beta=1000.0)
        torch.testing.assert_close(losses, torch.full_like(zero, math.log(2)), rtol=0, atol=1e-7)
        assert metrics["rewards/accuracies"].tolist() == [0.5] * 3

    def test_is_eq_13(self):
        win, lose = torch.randn(2, 20, dtype=torch.float64) * 1e-3
        losses, metrics = tapo_loss(win, lose, beta=500.0)
        torch.testing.assert_close(losses, -torch.sigmoid(500 * win - 500 * lose).log())
        torch.testing.assert_close(metrics["rewards/margins"], 500 * (win - lose))
        assert metrics["rewards/accuracies"].tolist() == (win > lose).double().tolist()

    def test_other_losses(self):
        win, lose = torch.tensor([0.002]), torch.tensor([0.001])
        assert tapo_loss(win, lose, 100.0, "hinge")[0].item() == pytest.approx(0.9, rel=1e-4)
        assert tapo_loss(win, lose, 100.0, "ipo")[0].item() == pytest.approx((0.001 - 0.005) ** 2, rel=1e-3)
        with pytest.raises(ValueError, match="loss_type"):
            tapo_loss(win, lose, 100.0, "sigmod")

    def test_ratio_clip_stops_the_gradient_outside(self):
        win = torch.tensor([0.05, 0.2], requires_grad=True)
        losses, metrics = tapo_loss(win, torch.zeros(2), beta=1.0, ratio_clip=0.1)
        losses.sum().backward()
        assert win.grad[0] != 0 and win.grad[1] == 0
        torch.testing.assert_close(metrics["rewards/chosen"], win.detach())
